"""Attention followed through all layers up to each one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

from torch import Tensor

from vitreous.hosts.mixer import Mixer
from vitreous.lens.formulas.maps import TOKENS, rollout_map, rollout_step
from vitreous.lens.probe import Component, Observer, Probe
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import TokenCoordinates


class RolloutObserver(Observer):
    def initialise(self) -> None:
        self.joint: Tensor | None = None  # the product so far, (B, N, N)
        self.spare: Tensor | None = None
        # behind another mixer the product of attentions is not the way of the tokens
        before = takewhile(lambda item: not isinstance(item[1], Mixer), self.model.named_modules())
        self.before_mixers = {name for name, _ in before}

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        if where.layout is None:
            return
        tokens, keys = call.output.shape[3], call.v.shape[3]
        unbroken = self.joint.shape[-1] == tokens if self.joint is not None else where.layer == 0
        square = tokens == keys and call.output.shape[1] == 1 and call.stochastic and not where.recorded
        unbroken &= call.name in self.before_mixers
        if not unbroken or not square or tokens > TOKENS or where.layout.grid is None:
            self.joint = None
            return
        blocks = ((rows, block[: self.batch.count, 0]) for rows, block in call.rows(256, True))
        joint = rollout_step(self.joint, blocks, self.spare)
        self.joint, self.spare = joint, self.joint
        everything = rollout_map(joint, slice(None), where.has_class)  # (B, N)
        self.readout.maps[f"rollout/{where.layer}"] = where.layout.picture(everything[:, None]).nan_to_num()


@dataclass(frozen=True, kw_only=True)
class Rollout(Probe):
    """Attention rollout: the product of 0.5 A + 0.5 I over the layers.

    Abnar and Zuidema 2020, arXiv 2005.00928.

    It ends where tokens change in number, attend in windows, or are more than 1100, and at a block
    with a mixer in place of attention.
    """

    order: ClassVar[int] = 70
    observer: ClassVar[type[Observer]] = RolloutObserver
    components: ClassVar[tuple[Component, ...]] = (
        Component("rollout", "Rollout", low=0, high=1,
                  explains="Attention followed through all layers up to this one (Abnar and Zuidema 2020)."),
    )  # fmt: skip
