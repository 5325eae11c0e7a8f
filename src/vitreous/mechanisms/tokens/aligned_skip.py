"""Token pruning for mixers with a decaying state: a pruned place gives nothing, and the state still decays over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitreous import slots
from vitreous.base.errors import HostError, SettingError
from vitreous.hosts.mixer import Mixer
from vitreous.hosts.token_counts import Count, patch_count
from vitreous.layers.stream import Assignment, TokenState, reduce, split, take
from vitreous.reducer import Reducer, counts_between, staying


@dataclass(frozen=True, kw_only=True)
class AlignedSkip(Reducer):
    """The patches with the largest outputs of a decaying mixer stay, and its state decays over the places of the others.

        s_l = sum_d max(0, y_ld),  y: output of the mixer;  of n patches those of the ceil(keep * n) largest s stay (+ 1 - 1)
        h_i = (prod over pruned places of A) A h_prev + B x_i        with retention: gamma^(i - j) (q_i k_j) v_j, j present

    Paper: Zhan, Kong, Gong, Wu, Meng, Zheng, Shen, Ioannidis, Niu, Zhao, Wang 2024, arXiv 2409.18962 (ToP-ViM: importance of
        tokens, and pruning-aware alignment of hidden states).
    Differs: the host is a ViT with retention, where the paper has Mamba: its decay is a constant per head. The step stands
        between mixer and MLP; the paper's blocks have no MLP. y is taken behind the output projection.
    At start: changes the output; keep=1 leaves it bit for bit.
    Cost: a sum over channels. Fewer tokens in the MLP of the block and in all behind it. No parameters.
    Settings: keep: fraction of the patches that stay, in (0, 1]; their number is made even, as released, where the class token
        stands in their middle. macs: share of the host's multiply-adds in the blocks, which then decides keep. layers (0-based;
        default 5+10+15 of 24, and at these fractions of other depths).
    Raises: HostError where no mixer decays, where one behind it mixes whole pictures, on rotary hosts, and where the head
        pools over patches; SettingError.
    """

    paper: ClassVar[str] = "Zhan et al. 2024, arXiv 2409.18962"
    requires: ClassVar[tuple[str, ...]] = ("stream", "remove", "class_head", "halves", "decaying_mixer")
    solves: ClassVar[str] = "keep"
    examples: ClassVar[tuple[str, ...]] = ("aligned_skip:keep=1", "aligned_skip:keep=0.5,layers=0+2", "aligned_skip:macs=0.7")

    keep: float = 0.8
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise SettingError(f"Found keep={self.keep}. Expected a fraction above 0, up to 1. Give for example keep=0.8.")

    @property
    def exact_at_init(self) -> bool:
        return self.keep == 1 if self.macs is None else self.macs == 1

    def changes(self, model: nn.Module) -> dict[str, Any]:
        keep, chosen, changes = self.strength(model), self.chosen(model), {}
        check_mixers(model, chosen)
        for i in chosen:
            changes |= slots.add_step(model, i, "between", Skip(keep, slots.prefix(model)), behind_mixer=True)
        return changes

    def chosen(self, model: nn.Module) -> list[int]:
        """The blocks with a step, in order."""
        n = slots.depth(model)
        return sorted(set(slots.layer_indices(model, self.layers or (5 * n // 24, 10 * n // 24, 15 * n // 24))))

    def strengths(self, model: nn.Module) -> tuple[float, float]:
        return 1.0, 1 / patch_count(model)

    def counts(self, model: nn.Module, strength: float) -> tuple[Count, ...]:
        chosen = self.chosen(model)
        return counts_between(model, lambda block, n: kept(n, strength) if block in chosen else n)


class Skip(nn.Module):
    """The token step: x (B, n, D) and the mixer's output y (B, n, D) -> the prefix, the patches that stay, inserted tokens."""

    def __init__(self, keep: float, prefix: int):
        super().__init__()
        self.keep, self.prefix = keep, prefix

    def forward(self, x: Tensor, state: TokenState, y: Tensor) -> tuple[Tensor, TokenState]:
        original, _ = split(x, state)
        prefix, patches = original[:, : self.prefix], original[:, self.prefix :]
        n = patches.shape[1]
        count = kept(n, self.keep)
        if count >= n:
            return x, state
        top = importance(y[:, self.prefix : self.prefix + n]).topk(count).indices.sort(1).values  # (B, count), in their order
        sizes = state.sizes
        if sizes is not None:
            sizes = torch.cat([sizes[:, : self.prefix], sizes[:, self.prefix :].gather(1, top)], dim=1)
        tokens = torch.cat([prefix, take(patches, top)], dim=1)
        return reduce(x, state, Assignment.keeping(top, n, self.prefix), sizes, tokens=tokens)


def importance(y: Tensor) -> Tensor:
    """s_l = sum_d max(0, y_ld): outputs y (B, n, D) of a mixer -> (B, n), in at least float32."""
    return y.to(torch.promote_types(y.dtype, torch.float32)).clamp(min=0).sum(-1)


def kept(patches: int, keep: float) -> int:
    """ceil(keep * patches), one more if that is even, less the class token; at least 1, and all for keep=1."""
    count = staying(patches, keep)
    return patches if keep == 1 else max(1, count - count % 2)


def check_mixers(model: nn.Module, chosen: list[int]) -> None:
    """Raise HostError unless the mixers of the chosen blocks decay, and those behind pass over places."""
    for i, mixer in enumerate(slots.attentions(model)):
        decays = getattr(mixer, "decays", False)
        if (i in chosen and not decays) or (i > chosen[0] and isinstance(mixer, Mixer) and not decays):
            present = [j for j, other in enumerate(slots.attentions(model)) if getattr(other, "decays", False)]
            raise HostError(
                f"blocks.{i}.attn is a {type(mixer).__name__}, which has no state that decays over pruned places. Expected a "
                f"mixer that has, such as retention; blocks {'+'.join(map(str, present))} hold one. Choose layers among them, "
                "or graft retention there first."
            )
