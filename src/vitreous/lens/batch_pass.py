"""One pass of a batch, in which the observers of all probes take part.

It hands them each attention, the rows of its map, module outputs and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitreous.base.errors import DataError, NotReached, VitreousError
from vitreous.hosts.mixer import mixers_in
from vitreous.lens.formulas.row_statistics import Distances, RowBlock
from vitreous.lens.layer_features import FeatureCollector, LayerFeatures
from vitreous.lens.preserve_state import preserve_state
from vitreous.lens.probe import BatchInfo, Observer, Probe, Readout
from vitreous.lens.tap.attention_call import FULL_CHECK_ROWS, AttentionCall, Buffers
from vitreous.lens.token_coordinates import Locator, TokenCoordinates


class BatchPass:
    """`on_attention` and `on_output` are the callbacks of `watch`.

    `outputs` names the modules that `on_output` waits for.

    on_located(call, coordinates): called after the observers for every attention.

    A probe that fails ends no pass: it sees nothing more of the batch, what it had read stays, and
    its readout notes where it stopped, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Sequence[Probe],
        batch: BatchInfo,
        on_located: Callable[[AttentionCall, TokenCoordinates], None] | None = None,
    ):
        self.batch, self.on_located = batch, on_located
        self.failures: dict[Observer, str] = {}
        self.observers, self.wanted = [], []
        for probe in probes:
            observer = Observer(probe, model, batch)  # for a probe that cannot begin
            try:
                observer, wanted = probe.start(model, batch), set(probe.outputs(model, batch))
            except Exception as error:
                wanted, self.failures[observer] = set(), failure(probe, "", error)
            self.observers.append(observer)
            self.wanted.append(wanted)
        self.by_rows, self.by_layer = (
            [observer for observer in self.observers if getattr(type(observer), name) is not getattr(Observer, name)]
            for name in ("on_rows", "on_layer")
        )
        options = {"class_token": batch.class_token, "mixers": mixers_in(model), "on_layer": self.on_layer}
        self.collector = FeatureCollector(batch.layouts, batch.count, **options) if self.by_layer else None
        self.outputs = set().union(*self.wanted, self.collector.outputs if self.collector else ())
        self.locator = Locator(batch.count, batch.class_token)
        self.buffers, self.distances = Buffers(), Distances()
        self.counts: dict[tuple[str, int], int] = {}  # images of each call

    @torch.no_grad()
    def on_attention(self, call: AttentionCall) -> None:
        """Hand one attention to every observer; its tensors are released afterwards."""
        if self.batch.noisy and len(call.v) % 2:
            raise DataError(
                f"Found a batch of {len(call.v)} in {call.name}. Expected images and as many noisy copies after them. "
                "Look without noise: noise=0."
            )
        self.counts[call.name, call.call_index] = len(call.v)
        where = self.locator.locate(call)
        with torch.autocast(call.v.device.type, enabled=False):
            if self.by_rows:
                for block in self.blocks(call, where):
                    for observer in self.by_rows:
                        self.hand(observer, "on_rows", call.name, block)
            for observer in self.observers:
                self.hand(observer, "on_attention", call.name, call, where)
        if self.collector is not None:
            self.collector.on_attention(call, where)
        if self.on_located is not None:
            self.on_located(call, where)

    def hand(self, observer: Observer, callback: str, place: str, *args: Any) -> Any:
        """Call a method of an observer that has not failed; place: of the model, for the note."""
        if observer in self.failures:
            return None
        try:
            return getattr(observer, callback)(*args)
        except Exception as error:  # whatever it is, the other measures stand
            self.failures[observer] = failure(observer.probe, place, error)
            return None

    def blocks(self, call: AttentionCall, where: TokenCoordinates) -> Iterator[RowBlock]:
        """The rows of the map in blocks of the size that the batch allows.

        Then those of the effective map, where it differs.
        """
        queries, keys = call.output.shape[3], call.v.shape[3]
        if where.assignment is not None:
            keys = max(keys, where.assignment.places + where.inserted)
        # where other tokens were chosen in the noisy copy, rows are of other tokens
        comparable = self.batch.noisy and (not where.chosen or where.steady(call.layout))
        size = max(1, self.batch.block // (call.output[..., 0, 0].numel() * keys))
        step = queries if queries <= FULL_CHECK_ROWS else size  # all rows of a small map are there already, from its check
        for effective in (False, True) if call.mixed else (False,):
            for rows, block in where.map_rows(call, step, effective):
                for start in range(0, block.shape[3], size):
                    part = block[..., start : start + size, :]
                    yield RowBlock(
                        slice(rows.start + start, rows.start + start + part.shape[3]),
                        self.batch.clean(part),
                        part[len(part) // 2 :] if comparable else None,
                        effective,
                        not effective or call.stochastic,
                        where.points,
                        self.buffers,
                        self.distances,
                    )

    def on_output(self, name: str, call_index: int, output: Any) -> None:
        """Hand the output of a module to those who want it."""
        for observer, wanted in zip(self.observers, self.wanted, strict=True):
            if name in wanted:
                self.hand(observer, "on_output", name, name, call_index, output)
        if self.collector is not None:
            self.collector.on_output(name, call_index, output)

    def on_layer(self, features: LayerFeatures) -> None:
        """Let observers see a layer, and let its tensors go."""
        for observer in self.by_layer:
            self.hand(observer, "on_layer", features.key[0], features)
        for name in ("attention", "queries", "by_channel", "keys", "output", "tokens"):
            setattr(features, name, None)

    def finish(self) -> list[Readout]:
        """What each probe read.

        Raises NotReached if layers did not see the same number of images.
        """
        if len(set(self.counts.values())) > 1:
            least = min(self.counts, key=self.counts.__getitem__)
            raise NotReached(
                f"{least[0]} saw {self.counts[least]} of {max(self.counts.values())} images. Expected every pass to go through "
                "it once. Remove what skips or repeats it, or measure the model without it."
            )
        if self.collector is not None:
            self.collector.finish()
        readouts = [self.hand(observer, "finish", "") or observer.readout for observer in self.observers]
        return [*readouts, Readout(notes=list(self.failures.values()))]


def failure(probe: Probe, place: str, error: Exception) -> str:
    """A note on a probe that failed at a place of the model ("": none in particular)."""
    reason = str(error) if isinstance(error, VitreousError) else f"{type(error).__name__}: {error}"
    return f"{probe.name} was left out{place and f' from {place} on'}: {reason}"


def extra_passes(model: nn.Module, probes: Sequence[Probe], batch: BatchInfo, targets: Sequence[int]) -> list[Readout]:
    """The passes of those probes that need some of their own.

    Modes, random state and gradients are as before. A probe that fails gives a note.
    """
    readouts = []
    for probe in probes:
        if probe.passes:
            gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
            for p, _, _ in gradients:
                p.grad = None
            try:
                with preserve_state(model):
                    readouts.append(probe.extra(model, batch, targets))
            except Exception as error:  # whatever it is, the common pass stands
                readouts.append(Readout(notes=[failure(probe, "", error)]))
            finally:
                for p, gradient, required in gradients:
                    p.grad = gradient
                    p.requires_grad_(required)
    return readouts


def perturbed(images: Tensor, noise: float, generator: torch.Generator, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The images with N(0, noise^2) on their [0, 1] pixels, clamped.

    images: (B, C, H, W) in the model's units, as is the result.
    """
    mean, std = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (mean, std))
    pixels = images * std + mean
    low, high = pixels.min().item(), pixels.max().item()
    if low < -1e-3 or high > 1 + 1e-3:
        raise DataError(
            f"Found pixels from {low:.3g} to {high:.3g}. Expected 0 to 1 before normalisation. "
            "Give the mean and std by which the images were normalised."
        )
    grain = torch.stack([torch.randn(images.shape[1:], generator=generator) for _ in images])
    return ((pixels + noise * grain.to(pixels)).clamp(0, 1) - mean) / std
