"""Whether tokens seek what they are themselves: the cosine of a token's own query and key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitreous.lens.formulas import indicators, spectra
from vitreous.lens.probe import Measure, Observer, Probe, Readout, Rows, listed
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates


class AlignmentObserver(Observer):
    def initialise(self) -> None:
        self.turned: list[str] = []  # modules whose learned spectrum cannot be taken off
        self.modules = dict(self.model.named_modules())

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        if call.kind != "token" or call.q is None or call.q.shape != call.k.shape or not where.same:
            return  # not of tokens, or attention to other tokens
        q, module = call.q, self.modules.get(call.name)
        sigma = None if module is None else spectra.learned(module, q.shape[2]).values
        if sigma is not None:
            q = without_spectrum(q, sigma)
            if q is None:
                self.turned += [] if call.name in self.turned else [call.name]
                return
        cosine = indicators.angular_alignment(q.flatten(0, 1), call.k.flatten(0, 1)).unflatten(0, q.shape[:2]).mean(dim=1)
        values = {"angular_alignment": self.batch.clean(cosine)}
        if self.batch.noisy:
            values["angular_alignment_paper"] = cosine[len(cosine) // 2 :]
        self.readout.rows.append(Rows(where.layer, "attention", call.kind, values, self.batch.first))

    def finish(self) -> Readout:
        why = "alignment: the learned spectrum cannot be taken off the queries (rotary embedding, or zeros in it)"
        self.readout.notes += [f"{listed(self.turned)}: {why}"] if self.turned else []
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


def without_spectrum(q: Tensor, sigma: Tensor) -> Tensor | None:
    """Queries (B, W, H, N, K) before a spectrum (H, K) was multiplied on unit rows.

    None if what is left is not of one length.

    A rotation after the spectrum, or a zero in it, leaves other lengths: then there is no way back.
    """
    q = q.to(torch.promote_types(q.dtype, torch.float32)) / sigma.to(q.device)[:, None]
    norm = torch.linalg.vector_norm(q, dim=-1)
    low, high = norm.amin(dim=(0, 1, 3)), norm.amax(dim=(0, 1, 3))
    return q if bool((high - low <= 1e-2 * high).all()) else None
