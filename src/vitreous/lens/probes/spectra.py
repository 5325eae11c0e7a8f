"""Spectra of each head: of the scores, of the weights, and learned ones.

Learned spectra are those of a spectral attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitreous.lens.formulas import spectra
from vitreous.lens.learned_spectrum import exposed_numbers, learned_spectrum
from vitreous.lens.probe import BatchInfo, Measure, Observer, Probe, Readout, Rows, Source, name_range
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates

PAPER = "As published; not comparable between token counts."


class SpectraObserver(Observer):
    def initialise(self) -> None:
        self.modules = dict(self.model.named_modules())
        self.energies: dict[str, dict[str, Tensor]] = {}  # {module: {child: energies of its output}}
        self.seen: set[str] = set()  # modules of which a call was seen
        self.notes: dict[str, list[str]] = {}
        self.exposed: dict[str, Tensor | None] = dict.fromkeys(exposed_numbers(self.model))

    def on_output(self, name: str, call_index: int, output: Any) -> None:
        if name in self.exposed:
            self.exposed[name] = output
            return
        parent, _, child = name.rpartition(".")
        if parent not in self.seen and isinstance(output, Tensor) and output.is_floating_point():
            axis = 1 if isinstance(self.modules.get(name), nn.modules.conv._ConvNd) else output.ndim - 1
            others = [i for i in range(output.ndim) if i != axis]
            self.energies.setdefault(parent, {})[child] = output.detach().float().square().sum(dim=others)

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        if self.batch.first == 0 and self.probe.weights:
            self.add_model(call, where.layer)
        if self.probe.scores and call.q is not None:
            self.add_scores(call, where)

    def add_model(self, call: AttentionCall, layer: int) -> None:
        """The rows that follow from the model alone; from the call, which shows H and K."""
        self.seen.add(call.name)
        module, energies = self.modules.get(call.name), self.energies.pop(call.name, {})
        if module is None or call.q is None or call.kind == "channel":
            return
        heads, width = call.q.shape[2], call.q.shape[4]
        q, k = (x.float().square().sum(dim=(0, 1, 3)) for x in (call.q, call.k))
        weight = spectra.weight(module, heads, width, spectra.Energies(q, k, energies))
        if weight.note:
            self.notes.setdefault(f"weight spectrum: {weight.note}", []).append(call.name)
        exposed = [x for name, x in self.exposed.items() if x is not None and name.startswith(f"{call.name}.")]
        learned = learned_spectrum(module, call.q, call.k, exposed)
        if learned is not None and learned.parameter:
            note = f"learned spectrum: the parameter {learned.parameter}, by which queries or keys are multiplied"
            self.notes.setdefault(note, []).append(call.name)
        for spectrum in (spectra.Spectrum("learned", None if learned is None else learned.values), weight):
            if spectrum.values is not None:
                self.readout.others[f"spectrum/{spectrum.source}/{layer}"] = spectrum.values.float()
                values = {name: value[None] for name, value in spectrum.indicators().items()}
                self.readout.rows.append(Rows(layer, spectrum.source, call.kind, values))

    def add_scores(self, call: AttentionCall, where: TokenCoordinates) -> None:
        """Spectra of the scores, some images at a time: the decomposition works in float64."""
        images, q, k = max(1, self.batch.block // (2 * call.q[0].numel() + 2 * call.k[0].numel())), call.q, call.k
        if where.assignment is not None and where.same:
            # a token of n places is n equal rows and columns: one that is sqrt(n) as long
            root = where.counts(call).sqrt()[:, None, None, :, None]
            q, k = q * root, k * root
        parts = [
            {name: value.mean(dim=1) for name, value in spectra.score(q, k, call.scale).indicators().items()}
            for q, k in zip(*(self.batch.clean(x).split(images) for x in (q, k)), strict=True)
        ]
        values = {name: torch.cat([part[name] for part in parts]) for name in spectra.INDICATORS}
        self.readout.rows.append(Rows(where.layer, "score", call.kind, values, self.batch.first))

    def finish(self) -> Readout:
        self.readout.notes += [f"{name_range(names)}: {note}" for note, names in self.notes.items()]
        return self.readout


@dataclass(frozen=True, kw_only=True)
class Spectra(Probe):
    """Entropy, effective rank and sparsity of spectra, in paper and corrected form.

    The spectra are those of `lens.formulas.spectra`.

    Rows of weights and of learned spectra come with image 0 alone, of no single image, and so do
    their values. Settings:
    scores=false leaves out the spectra of the scores, which take most of the time; weights=false
    the other ones.
    """

    order: ClassVar[int] = 50
    observer: ClassVar[type[Observer]] = SpectraObserver
    sources: ClassVar[tuple[Source, ...]] = (
        Source("learned", "Learned spectrum", "The values sigma that a spectral attention learned. The same for every image."),
        Source("weight", "Spectrum of the weights", "Singular values of W_Qᵀ W_K. The same for every image."),
        Source("score", "Spectrum of the scores", "Singular values of Q Kᵀ on these images."),
    )
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("spectral_entropy", "Spectral entropy", "nats", 0,
                explains="0: one axis carries all. Log of the number of axes: all carry the same."),
        Measure("spectral_entropy_paper", "Spectral entropy, paper's form", "nats", 0, explains=PAPER),
        Measure("effective_rank", "Effective rank", "axes", 1, explains="How many axes share the energy. 1: a single one."),
        Measure("effective_rank_paper", "Effective rank, paper's form", "axes", 1, explains=PAPER),
        Measure("effective_rank_l1", "Effective rank (magnitudes)", "axes", 1,
                explains="Roy and Vetterli's: axes that share the magnitude."),
        Measure("spectral_sparsity", "Spectral sparsity", "", 0, 1, explains="Share of axes that are as good as nothing."),
        Measure("spectral_sparsity_paper", "Spectral sparsity, paper's form", "", 0, 1, explains=PAPER),
    )  # fmt: skip

    scores: bool = True
    weights: bool = True

    def outputs(self, model: nn.Module, batch: BatchInfo) -> Iterable[str]:
        """Layers that may be a projection of an attention.

        Their energies tell what lies between weights and scores.
        """
        if batch.first or not self.weights:
            return ()
        projections = (name for name, _ in model.named_modules() if name.rpartition(".")[2] in spectra.NAMES)
        return [*projections, *exposed_numbers(model)]
