"""Temperature: attention made smoother or sharper by one number, without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.attention import Attention
from vitreous.hosts.directions import Projections
from vitreous.layers.exposed import Exposed
from vitreous.layers.stream import PLAIN, TokenState
from vitreous.mechanism import Mechanism

RANGE = (1e-3, 1e6)  # of T: beyond, scores leave float32, or all differences between them


@dataclass(frozen=True, kw_only=True)
class Temperature(Mechanism):
    """Scores are divided by a temperature T before the softmax: smoothed attention for T > 1.

        A = softmax(Q K^T / (T sqrt(K)))

    The entropy of every row rises with T, from all on the largest score to 1/N for each of N keys,
    where the output is the mean of the values.

    Paper: Gu, Tresp, Qin 2022, arXiv 2111.10659 (smoothed attention, against adversarial patches;
        no training).
    Differs: learned=true is ours, as are other hosts than timm's ViT and Eva: there T stands in the
        linear layers that give queries. T divides the product of query and key alone, not what a
        host adds to it (masks, relative positions), and what is added decides for large T.
    At start: T = 1 equals the host exactly, learned or not; any other changes the output.
    Cost: none where T is fixed on timm's ViT and Eva, where it is part of the scale; else one
        product with the queries. H parameters per block with learned=true. Keeps the fused kernel.
    Settings: layers (0-based; default all; on hosts with stages or branches every attention counts
        as one, in the order in which they run). temperature: T. learned: one T per head, which
        starts at `temperature` and stays positive, in place of a fixed number.
    Raises: HostError where attention is not timm's plain, rotary or EVA one, nor of a class in
        `hosts.directions.PROJECTIONS` or with `projections` of its own; GraftError where another
        graft holds it; SettingError.
    """

    paper: ClassVar[str] = "Gu, Tresp, Qin 2022, arXiv 2111.10659"
    requires: ClassVar[tuple[str, ...]] = ("projections",)
    no_decay: ClassVar[tuple[str, ...]] = ("log_temperature",)
    examples: ClassVar[tuple[str, ...]] = (
        "temperature:temperature=1",
        "temperature:temperature=0.5,learned=true,layers=0+2",
    )

    layers: tuple[int, ...] | None = None
    temperature: float = 1.5
    learned: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not RANGE[0] <= self.temperature <= RANGE[1]:
            raise SettingError(
                f"Found temperature={self.temperature}. Expected {RANGE[0]:g} to {RANGE[1]:g}; 1 is the host, more is "
                "smoother. Give such a number."
            )

    @property
    def exact_at_init(self) -> bool:
        return self.temperature == 1

    def changes(self, model: nn.Module) -> dict[str, Any]:
        whole, changes = slots.walks(model), {}
        for i in slots.layer_indices(model, self.layers):
            if whole:
                new = {f"blocks.{i}.attn": TemperedAttention.of(slots.plain_attention(model, i, self.name))}
            else:
                new = slots.adapt_projections(model, i, TemperedQueries, self.name, parts="q")
            for module in new.values():
                module.initialise(self)
            changes |= new
        return changes


class LearnedTemperature(nn.Module):
    """What may hold a temperature per head, as its logarithm (H,)."""

    def start(self, settings: Temperature, heads: int) -> None:
        """Start it at the temperature of the settings; none where that is fixed."""
        self.log_temperature = self.exposed = None
        if settings.learned:
            self.log_temperature = nn.Parameter(torch.full((heads,), settings.temperature).log())
            self.exposed = Exposed("temperature", "number", "The learned temperature of each head: above 1 is smoother.")

    def inverse(self) -> Tensor:
        """1 / T (H,) of the heads."""
        return 1 / self.exposed(self.log_temperature.exp())


class TemperedAttention(LearnedTemperature, Attention):
    """The host's attention at a temperature: part of the scale where fixed, else of the queries."""

    def initialise(self, settings: Temperature) -> None:
        self.start(settings, self.num_heads)
        if not settings.learned:
            self.scale = self.scale / settings.temperature

    def project(self, x: Tensor, state: TokenState = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, state)
        if self.log_temperature is not None:
            q = (q * self.inverse()[:, None, None]).to(q.dtype)
        return q, k, v


class TemperedQueries(LearnedTemperature, Projections):
    """A host's linear layer whose queries come out divided by the temperature."""

    def initialise(self, settings: Temperature) -> None:
        self.start(settings, self.heads)
        self.factor = 1 / settings.temperature

    def changed(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        factor = self.factor if self.log_temperature is None else self.inverse()[:, None]
        parts["q"] = parts["q"] * factor
        return parts
