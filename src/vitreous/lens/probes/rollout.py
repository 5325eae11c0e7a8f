"""Attention followed through all layers up to each one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar, Literal

from torch import Tensor

from vitreous.base.errors import SettingError
from vitreous.hosts.mixer import Mixer
from vitreous.lens.formulas.maps import TOKENS, fused_rollout_step, rollout_map, rollout_step
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
        if rule := self.probe.rule():
            joint = fused_rollout_step(self.joint, blocks, self.probe.fusion, self.probe.discard)
            self.readout.details[f"rollout/{where.layer}"] = {"rule": rule}
        else:
            joint = rollout_step(self.joint, blocks, self.spare)
        self.joint, self.spare = joint, self.joint
        everything = rollout_map(joint, slice(None), where.has_class)  # (B, N)
        self.readout.maps[f"rollout/{where.layer}"] = where.layout.picture(everything[:, None]).nan_to_num()


@dataclass(frozen=True, kw_only=True)
class Rollout(Probe):
    """Attention rollout: the product of 0.5 A + 0.5 I over the layers.

    Abnar and Zuidema 2020, arXiv 2005.00928.

    It ends where tokens change in number, attend in windows, or are more than 1100, and at a block
    with a mixer in place of attention. fusion: of heads, by their mean, max or min. discard: share
    of each layer's attention that is set to 0, the lowest; see `fused_rollout_step`.
    """

    order: ClassVar[int] = 70
    observer: ClassVar[type[Observer]] = RolloutObserver
    components: ClassVar[tuple[Component, ...]] = (
        Component("rollout", "Rollout", low=0, high=1,
                  explains="Attention followed through all layers up to this one (Abnar and Zuidema 2020)."),
    )  # fmt: skip

    fusion: Literal["mean", "max", "min"] = "mean"
    discard: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.discard < 1:
            raise SettingError(f"Found discard={self.discard}. Expected 0 to below 1. Choose such a share, such as 0.9.")

    def rule(self) -> str:
        """How maps differ from those as published, in words; "" if they do not."""
        if (self.fusion, self.discard) == ("mean", 0):
            return ""
        heads = {"mean": "mean", "max": "maximum", "min": "minimum"}[self.fusion]
        left = f", without the lowest {100 * self.discard:.3g} % of each layer's attention" if self.discard else ""
        return f"the {heads} over heads{left}"
