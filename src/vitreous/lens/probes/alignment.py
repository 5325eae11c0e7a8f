"""Whether tokens seek what they are themselves: the cosine of a token's own query and key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vitreous.lens.formulas import indicators
from vitreous.lens.learned_spectrum import exposed_numbers, learned_spectrum, without_spectrum
from vitreous.lens.probe import BatchInfo, Measure, Observer, Probe, Readout, Rows, name_range
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates


class AlignmentObserver(Observer):
    def initialise(self) -> None:
        self.turned: list[str] = []  # modules whose learned spectrum cannot be taken off
        self.modules = dict(self.model.named_modules())
        self.exposed: dict[str, Tensor] = {}

    def on_output(self, name: str, call_index: int, output: Any) -> None:
        self.exposed[name] = output

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        if call.kind != "token" or call.q is None or call.q.shape != call.k.shape or not where.same:
            return  # not of tokens, or attention to other tokens
        q, k, module = call.q, call.k, self.modules.get(call.name)
        exposed = [value for name, value in self.exposed.items() if name.startswith(f"{call.name}.")]
        spectrum = None if module is None else learned_spectrum(module, q, k, exposed)
        if spectrum is not None:
            of_queries, of_keys = (without_spectrum(x, spectrum.values) for x in (q, k))
            if of_queries is None and of_keys is None:
                self.turned += [] if call.name in self.turned else [call.name]
                return
            q, k = (of_queries, k) if of_queries is not None else (q, of_keys)
        counts = None if where.assignment is None else where.counts(call)
        cosine = indicators.angular_alignment(q.flatten(0, 1), k.flatten(0, 1), counts).unflatten(0, q.shape[:2]).mean(dim=1)
        values = {"angular_alignment": self.batch.clean(cosine)}
        if self.batch.noisy:
            values["angular_alignment_paper"] = cosine[len(cosine) // 2 :]
        self.readout.rows.append(Rows(where.layer, "attention", call.kind, values, self.batch.first))

    def finish(self) -> Readout:
        why = "alignment: the learned spectrum cannot be taken off the queries (rotary embedding, or zeros in it)"
        self.readout.notes += [f"{name_range(self.turned)}: {why}"] if self.turned else []
        return self.readout


@dataclass(frozen=True, kw_only=True)
class Alignment(Probe):
    """Cosine of a token's own query and key, before a learned spectrum comes in.

    No value where the spectrum cannot be divided out.

    Only where queries and keys are the same tokens. The paper's form is that of the noisy image.
    """

    order: ClassVar[int] = 20
    observer: ClassVar[type[Observer]] = AlignmentObserver
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("angular_alignment", "Alignment", "cosine", -1, 1,
                explains="Of a token's own query and key. 1: tokens seek what they are themselves."),
        Measure("angular_alignment_paper", "Alignment, paper's form", "cosine", -1, 1,
                explains="As published: of the noisy image."),
    )  # fmt: skip

    def outputs(self, model: nn.Module, batch: BatchInfo) -> Iterable[str]:
        return exposed_numbers(model)
