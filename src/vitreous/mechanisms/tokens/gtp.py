"""Graph-based token propagation: removed patches are handed to their neighbours on a graph first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.errors import MaskError, SettingError
from vitreous.hosts.token_counts import Count, patch_count
from vitreous.layers.geometry import offsets
from vitreous.layers.matching import wide
from vitreous.layers.stream import Assignment, TokenState, check_places, present_pairs, reduce, split, take
from vitreous.reducer import Reducer, between_schedules, counts_between


@dataclass(frozen=True, kw_only=True)
class GTP(Reducer):
    """Between attention and MLP the least important patches leave, and their neighbours take them in.

        W = D^-1/2 G D^-1/2 over patches before the first block;  G_ij = 1 for the 8 neighbours j of i on the grid (spatial),
            the `neighbours` patches j of greatest cosine with i (semantic), or either (mixed);  D = diag(sum_j G_ij)
        in each block, A its attention: the `tokens` patches of smallest (max over heads of A_ii) (max over heads of
            sum_j A_ji) leave:  x_kept <- x_kept + alpha W[kept, leaving] x_leaving,   W <- W[kept, kept]
        s_kept <- s_kept + alpha W[kept, leaving] s_leaving, 1 at first;   attention: softmax(q k^T / sqrt(K) + log s)

    Paper: Xu, Wang, Chen, Zheng, Wei, Liu 2023, arXiv 2311.03035 (section 3; the ranking is that of the authors' code,
        "MixedAttnMax").
    Differs: scores are taken before attention dropout; attention keeps its small entries (sparsity theta = 1). `neighbours`
        is exact also without a class token, and where cosines are equal.
    At start: changes the output; tokens=0 leaves it bit for bit.
    Cost: the scores of attention once more in each chosen block, for the ranking; a product of kept x leaving x D; fewer
        tokens behind. No parameters.
    Settings: tokens: how many patches leave per block, while one stays. macs: share of the host's multiply-adds in the
        blocks; it then decides tokens, and the first blocks may remove one more than the others. alpha: the share of a
        leaving patch that is handed on; 0 is plain pruning. graph: mixed, spatial or semantic. neighbours: of a patch in
        the semantic graph. proportional: count tokens by s in attention. layers (0-based; default all).
    Raises: HostError on rotary hosts, where the head pools over patches, where the grid is not known (unless semantic) and
        where halves of a block or its attention are not known; SettingError.
    """

    paper: ClassVar[str] = "Xu et al. 2023, arXiv 2311.03035"
    solves: ClassVar[str] = "tokens"
    examples: ClassVar[tuple[str, ...]] = (
        "gtp:tokens=0",
        "gtp:tokens=3,graph=semantic,neighbours=2,layers=1+3",
        "gtp:tokens=2,alpha=0.0,graph=spatial,proportional=false",
        "gtp:macs=0.7",
    )

    tokens: int = 8
    alpha: float = 0.1
    graph: Literal["mixed", "spatial", "semantic"] = "mixed"
    neighbours: int = 8
    proportional: bool = True
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.tokens < 0:
            raise SettingError(
                f"Found tokens={self.tokens}. Expected how many patches leave per block, 0 or more. Give such a number."
            )
        if not 0 <= self.alpha <= 1:
            raise SettingError(
                f"Found alpha={self.alpha}. Expected a share, 0 (plain pruning) to 1. Give for example alpha=0.1."
            )
        if self.neighbours < 1:
            raise SettingError(f"Found neighbours={self.neighbours}. Expected 1 or more. Give such a number.")

    @property
    def requires(self) -> tuple[str, ...]:
        places = () if self.graph == "semantic" else ("grid",)
        return ("stream", "remove", "class_head", "attention", "halves", *places)

    @property
    def exact_at_init(self) -> bool:
        return self.tokens == 0 if self.macs is None else self.macs == 1

    def changes(self, model: nn.Module) -> dict[str, Any]:
        prefix, leaving = slots.prefix(model), self.leaving(model, self.strength(model))
        changes = {} if self.graph == "semantic" else slots.open_stream(model, self.name)
        draw = Draw(self.graph, self.neighbours, prefix)
        changes |= slots.add_step(model, 0, "before", draw)
        for i, tokens in leaving.items():
            changes |= slots.add_step(model, i, "between", Propagate(tokens, prefix, self.alpha, self.proportional))
        if 0 in leaving:  # the entry of this block now holds the second step alone
            changes["blocks.0"].add_step("before", draw)
        return changes

    def leaving(self, model: nn.Module, tokens: float) -> dict[int, int]:
        """{block: patches that leave there, while one stays}."""
        layers = sorted(set(slots.layer_indices(model, self.layers)))
        return dict(zip(layers, between_schedules(lambda whole: [whole] * len(layers), tokens), strict=True))

    def strengths(self, model: nn.Module) -> tuple[float, float]:
        return 0, patch_count(model)

    def counts(self, model: nn.Module, strength: float) -> tuple[Count, ...]:
        leaving = self.leaving(model, strength)
        return counts_between(model, lambda block, n: max(1, n - leaving.get(block, 0)))


class Draw(nn.Module):
    """The token step before the first block: draws the graph of the patches, and leaves x as it is."""

    def __init__(self, graph: str, neighbours: int, prefix: int):
        super().__init__()
        self.graph, self.neighbours, self.prefix = graph, neighbours, prefix

    def forward(self, x: Tensor, state: TokenState, qkv: None) -> tuple[Tensor, TokenState]:
        patches = split(x, state)[0][:, self.prefix :].detach()
        edges = patches.new_zeros((patches.shape[0], patches.shape[1], patches.shape[1]), dtype=wide(x))
        if self.graph != "semantic":
            check_places(state, x.shape[1], "gtp")
            edges = edges + adjacent(state, self.prefix, x.device).to(edges.dtype)
        if self.graph != "spatial":
            edges = edges + alike(patches.to(edges.dtype), self.neighbours).to(edges.dtype)
        weights = normalized_edges((edges > 0).to(edges.dtype))
        return x, replace(state, graph=F.pad(weights, (self.prefix, 0, self.prefix, 0)))


def adjacent(state: TokenState, prefix: int, device: torch.device) -> Tensor:
    """Whether two present patches are neighbours on the grid, diagonals too: (B or 1, n, n) bool, false for i = j."""
    near = offsets(state.grid).abs().amax(-1) <= 1
    pairs = present_pairs(near.to(device, torch.float32).tile(state.groups, state.groups)[None], state, 0.0)
    pairs = pairs if pairs.ndim == 3 else pairs[:, 0]
    stop = pairs.shape[1] - state.inserted
    pairs = pairs[:, prefix:stop, prefix:stop] > 0
    return pairs & ~torch.eye(pairs.shape[1], dtype=torch.bool, device=device)


def alike(patches: Tensor, neighbours: int) -> Tensor:
    """Whether patch j is among the most similar ones of patch i by cosine: (B, n, n) bool of (B, n, D)."""
    unit = F.normalize(patches, dim=-1)
    with torch.autocast(patches.device.type, enabled=False):  # half precision cannot tell similar patches apart
        cosine = unit @ unit.mT
    own = torch.eye(patches.shape[1], dtype=torch.bool, device=patches.device)
    nearest = cosine.masked_fill(own, float("-inf")).topk(min(neighbours, patches.shape[1] - 1), dim=-1).indices
    return torch.zeros_like(cosine, dtype=torch.bool).scatter(2, nearest, True)


def normalized_edges(edges: Tensor) -> Tensor:
    """D^-1/2 G D^-1/2 of edges G (B, n, n), D the sums of its rows; a patch without edges has weights of 0."""
    degree = edges.sum(-1)
    root = degree.clamp(min=1).rsqrt()
    return root[:, :, None] * edges * root[:, None]


class Propagate(nn.Module):
    """The token step: x (B, n, D) -> prefix, kept patches in falling order of rank, inserted tokens."""

    def __init__(self, tokens: int, prefix: int, alpha: float, proportional: bool = True):
        super().__init__()
        self.tokens, self.prefix, self.alpha, self.proportional = tokens, prefix, alpha, proportional

    def forward(self, x: Tensor, state: TokenState, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, TokenState]:
        prefix, end = self.prefix, split(x, state)[0].shape[1]
        n = end - prefix
        leaving = min(self.tokens, n - 1)
        if leaving <= 0:
            return x, state
        if state.graph is None:
            raise MaskError(
                "Found tokens without a graph of the patches. Expected the one that the first block draws. Run the model from "
                "its first block on, or take gtp out (vitreous.ungraft)."
            )
        order = importance(qkv[0], qkv[1], state.sizes)[:, prefix:end].argsort(dim=1, descending=True)
        kept, gone = order[:, : n - leaving], order[:, n - leaving :]
        rows = take(state.graph[:, prefix:, prefix:], kept)  # (B, kept, n)
        handed = self.alpha * columns(rows, gone)  # (B, kept, leaving)
        patches = x[:, prefix:end]
        moved = take(patches, kept) + (handed.to(x.dtype) @ take(patches, gone)).to(x.dtype)
        step = Assignment.keeping(kept, n, prefix)
        if self.alpha > 0:
            step = replace(Assignment.mixing(shares(kept, gone, handed), prefix), dropped=True)
        tokens, after = reduce(
            x,
            replace(state, graph=None),
            step,
            self.sizes(x, state, kept, gone, handed),
            tokens=torch.cat([x[:, :prefix], moved], dim=1),
        )
        return tokens, replace(after, graph=F.pad(columns(rows, kept), (prefix, 0, prefix, 0)))

    def sizes(self, x: Tensor, state: TokenState, kept: Tensor, gone: Tensor, handed: Tensor) -> Tensor | None:
        """The scales s (B, prefix + kept) from now on; None where tokens have none."""
        if state.sizes is None and not self.proportional:
            return None
        sizes = torch.ones(x.shape[:2], dtype=wide(x), device=x.device) if state.sizes is None else state.sizes
        patches = sizes[:, self.prefix :]
        received = (handed.to(sizes.dtype) * take(patches, gone)[:, None]).sum(2)
        return torch.cat([sizes[:, : self.prefix], take(patches, kept) + received], dim=1)


def importance(q: Tensor, k: Tensor, sizes: Tensor | None) -> Tensor:
    """(max over heads of A_ii) (max over heads of sum_j A_ji), (B, n); q (scaled), k (B, H, n, K), sizes (B, n) or None."""
    scores = q.detach() @ k.detach().mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sizes is not None:
        scores = scores + sizes.log()[:, None, None]
    attention = scores.softmax(-1)
    return attention.diagonal(dim1=-2, dim2=-1).amax(1) * attention.sum(-2).amax(1)


def columns(rows: Tensor, index: Tensor) -> Tensor:
    """Of rows (B, m, n) the columns index (B, k): (B, m, k)."""
    return rows.gather(2, index[:, None].expand(-1, rows.shape[1], -1))


def shares(kept: Tensor, gone: Tensor, handed: Tensor) -> Tensor:
    """How much each of n patches gives to each that stays, (B, kept, n); handed (B, kept, leaving)."""
    weights = handed.new_zeros(*handed.shape[:2], kept.shape[1] + gone.shape[1])
    return weights.scatter(2, gone[:, None].expand_as(handed), handed).scatter(2, kept[..., None], 1.0)
