"""AdaptFormer: a small bottleneck beside each MLP, the only part that learns."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.attention import joined_projections
from vitreous.hosts.block import Block
from vitreous.layers.adoption import adopt
from vitreous.mechanism import Mechanism

EPS = 1e-6  # of the batch norm
THEIRS = {  # names in the authors' code
    r"\.adaptmlp\.(down|up)_proj\.": r".adapter.\1.",
    r"(^blocks\.\d+)\.fc([12])\.": r"\1.mlp.fc\2.",
    r"^head\.0\.(?=running)": "head_drop.",
    r"^head\.1\.": "head.",
}


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(Mechanism):
    """A bottleneck adapter in parallel to the MLP of each block, for fine-tuning with everything else frozen.

        y = x + MLP(LN(x)) + s * (W_up dropout(ReLU(W_down x + b_down)) + b_up)          x behind attention, not normed

    Paper: Chen, Ge, Tong, Wang, Song, Wang, Luo 2022, arXiv 2205.13535 (parallel adapter beside the MLP).
    Differs: nothing in the formula. What trains is the run's decision (`--train new+head`), not the mechanism's. On hosts
        that norm behind the MLP, the adapter stands beside that norm, too.
    At start: equals the host exactly (W_up and both biases are 0; the batch norm's variance is 1 - eps until it learns).
    Cost: two thin linears per block; (2 D + 1) bottleneck + D parameters each: 1,189,632 on ViT-B.
    Settings: layers (0-based; default all). bottleneck: width of the adapter. strength: the factor s, fixed; 0 switches the
        adapters off. dropout: inside the bottleneck, 0 to below 1. batch_norm: a batch norm without weights of its own
        before the classifier, as in the authors' code. seed: of W_down, uniform in +-1/sqrt(D).
    Raises: HostError where attention and MLP cannot be run apart (parallel blocks), or, with batch_norm, where there is
        not one classifier; GraftError where another mechanism has changed a half of the block; SettingError.
    """

    paper: ClassVar[str] = "Chen et al. 2022, arXiv 2205.13535"
    exact_at_init: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = (
        "adaptformer:layers=1+3,bottleneck=5,strength=1.0,dropout=0.0",
        "adaptformer:bottleneck=5,batch_norm=true",
    )

    layers: tuple[int, ...] | None = None
    bottleneck: int = 64
    strength: float = 0.1
    dropout: float = 0.1
    batch_norm: bool = False
    seed: int = 0

    @property
    def requires(self) -> tuple[str, ...]:
        return ("halves", "classifier") if self.batch_norm else ("halves",)

    def __post_init__(self):
        super().__post_init__()
        if self.bottleneck < 1:
            raise SettingError(f"Found bottleneck={self.bottleneck}. Expected 1 or more. Give such a width.")
        if self.strength < 0:
            raise SettingError(f"Found strength={self.strength}. Expected 0 (off) or more. Give such a factor.")
        if not 0 <= self.dropout < 1:
            raise SettingError(f"Found dropout={self.dropout}. Expected 0 to below 1. Give such a share.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        changes = {}
        for i in slots.layer_indices(model, self.layers):
            new = slots.block_of(model, i, AdaptedBlock)
            new.adapter = Adapter(self, slots.width(model), generator)
            changes[f"blocks.{i}"] = new
        if self.batch_norm:
            path, displaced = slots.before_classifier(model)
            changes[path] = NormedDropout.of(displaced, slots.width(model))
        return changes

    def renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {}
        for name, value in joined_projections(tensors, ("q_proj", "k_proj", "v_proj")).items():
            for theirs, ours in THEIRS.items():
                name = re.sub(theirs, ours, name)
            changed[name] = value
        changed.pop("head.0.num_batches_tracked", None)  # a mean of all batches would need it, a moving one does not
        return changed


class AdaptedBlock(Block):
    """The host's block with an adapter beside its MLP."""

    def mlp_half(self, x: Tensor) -> Tensor:
        return super().mlp_half(x) + self.adapter(x)


class Adapter(nn.Module):
    """The bottleneck: x (B, n, D) -> what it adds, (B, n, D); no drop path, as in the paper."""

    def __init__(self, settings: AdaptFormer, width: int, generator: torch.Generator):
        super().__init__()
        self.strength = settings.strength
        self.down = skip_init(nn.Linear, width, settings.bottleneck)
        self.drop = nn.Dropout(settings.dropout)
        self.up = skip_init(nn.Linear, settings.bottleneck, width)
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)
            for start_at_zero in (self.down.bias, self.up.weight, self.up.bias):
                start_at_zero.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.strength * self.up(self.drop(F.relu(self.down(x))))


class NormedDropout(nn.Module):
    """A batch norm (B, D) -> (B, D) without weights of its own, then the host's dropout."""

    host: type[nn.Module]

    @classmethod
    def of(cls, displaced: nn.Module, width: int) -> NormedDropout:
        new = adopt(cls, displaced)
        new.host = type(displaced)
        new.register_buffer("running_mean", torch.zeros(width))
        new.register_buffer("running_var", torch.full((width,), 1 - EPS))
        return new

    def forward(self, x: Tensor) -> Tensor:
        normed = F.batch_norm(x, self.running_mean, self.running_var, training=self.training, momentum=0.1, eps=EPS)
        return self.host.forward(self, normed)
