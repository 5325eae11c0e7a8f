"""Sparsifiner: a small predictor chooses which keys each patch attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.checkpoint_names import renamed
from vitreous.base.errors import HostError, MaskError, SettingError
from vitreous.hosts.attention import Attention
from vitreous.layers.stream import PLAIN, TokenState, check_places, restore
from vitreous.mechanism import Mechanism

WARM_UP = 0.1  # the authors' share of a run for reconstruction: five epochs of fifty
THEIRS = {  # names in the authors' code
    r"\.mask_predictor\.proj_c_([qk])\.weight$": r".reduce_\1",
    r"\.mask_predictor\.proj_c_([qk])\.bias$": r".bias_\1",
    r"\.mask_predictor\.proj_n$": ".down",
    r"\.mask_predictor\.proj_back_n$": ".up",
}


@dataclass(frozen=True, kw_only=True)
class Sparsifiner(Mechanism):
    """Each patch attends to the keys that a low-rank prediction of its attention chooses.

        c = softmax((Q W_q + b_q) ((K W_k + b_k)^T P) / sqrt(H))       W (K, K/2), P (N, N/6)
        keys of patch i: the keep * N largest of sum_r c_ir |U_jr| over j       U (N, N/6)
            with the 8 largest c_ir alone, and |U_jr| above 0.02 alone
        A = softmax(Q K^T / sqrt(K)) over these keys
        penalty: |c U^T - softmax(Q K^T / sqrt(K))|^2, summed over heads, patches and keys

    W, b, P and U are shared by the heads of a block. The choice itself has no gradient: what
    teaches it is the penalty, of activations, which training adds to the loss.

    Paper: Wei, Duke, Jiang, Aarabi, Taylor, Shkurti 2023, arXiv 2303.13755.
    Differs: the penalty's target is the model's own attention, without gradient (a choice in the
        authors' code; their recipe has that of a teacher), averaged over images and layers. It goes
        on in the sparse phase unless reconstruction=0. Rows of all prefix and inserted tokens are
        open, as the class token's; so are the columns of inserted ones. Channels with tokens of
        their own share P and U. Token pruning is left out (`evit`).
    At start: phase=reconstruct, and keep=1, equal the host exactly; else the output changes.
    Cost: 2 (K + 1) K/2 + 2 N floor(N/6) parameters per block. The map is computed whole and masked.
    Settings: layers (0-based; default all). phase: reconstruct = all keys are seen and the
        predictor learns; sparse = the chosen ones are seen; schedule = the one in the first tenth
        of a training run, as released, then the other. keep: share of keys. reduce: N over the rank.
        coefficients, threshold: 8, 0.02 above. reconstruction: the penalty's weight. seed: of start.
    Raises: HostError where attention or patch embedding is not timm's plain one, or is too small;
        MaskError for images of another size than at graft, which P and U have no rows for.
    """

    paper: ClassVar[str] = "Wei et al. 2023, arXiv 2303.13755"
    requires: ClassVar[tuple[str, ...]] = ("attention", "halves", "stream", "grid")
    any_size: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = (
        "sparsifiner:phase=reconstruct,layers=1+3",
        "sparsifiner:phase=schedule,keep=0.5,reduce=3,seed=2",
    )

    layers: tuple[int, ...] | None = None
    phase: Literal["reconstruct", "sparse", "schedule"] = "sparse"
    keep: float = 0.25
    reduce: int = 6
    coefficients: int = 8
    threshold: float = 0.02
    reconstruction: float = 0.01
    seed: int = 0

    @property
    def exact_at_init(self) -> bool:
        return self.phase == "reconstruct" or self.keep == 1

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise SettingError(f"Found keep={self.keep}. Expected above 0 and at most 1. Give such a share of the keys.")
        for name in ("reduce", "coefficients"):
            if getattr(self, name) < 1:
                raise SettingError(f"Found {name}={getattr(self, name)}. Expected 1 or more. Give such a number.")
        for name in ("threshold", "reconstruction"):
            if getattr(self, name) < 0:
                raise SettingError(f"Found {name}={getattr(self, name)}. Expected 0 or more. Give such a number.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        changes, layers = slots.open_stream(model, self.name), slots.layer_indices(model, self.layers)
        generator, grid, prefix = torch.Generator().manual_seed(self.seed), model.patch_embed.grid_size, slots.prefix(model)
        tokens = prefix + math.prod(grid)
        for i in layers:
            new = SparseAttention.of(slots.plain_attention(model, i, self.name))
            if tokens < self.reduce or new.head_dim < 2:
                raise HostError(
                    f"Found {tokens} tokens and heads of {new.head_dim} numbers at blocks.{i}.attn. Expected {self.reduce} "
                    "tokens and 2 numbers or more, which the predictor reduces. Use a larger host, or a smaller reduce."
                )
            new.initialise(self, grid, tokens, generator)
            new.share = 1 / len(layers)
            changes[f"blocks.{i}.attn"] = new
        return changes

    def renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return renamed(tensors, THEIRS)


class SparseAttention(Attention):
    """The host's attention over keys that a prediction of rank n = N // reduce chooses.

    reduce_q, reduce_k (K/2, K), bias_q, bias_k (K/2): W and b. down, up (N, n): P and U, a row for
    each token of an image. Without the penalty they do not learn.
    """

    settings: Sparsifiner
    grid: tuple[int, int]
    share: float
    dense: bool  # all keys are seen

    def initialise(self, settings: Sparsifiner, grid: tuple[int, int], tokens: int, generator: torch.Generator) -> None:
        width, bound = self.head_dim, self.head_dim**-0.5
        shapes = {name: (width // 2, width) for name in ("reduce_q", "reduce_k")}
        shapes |= {name: (width // 2,) for name in ("bias_q", "bias_k")}
        shapes |= {name: (tokens, tokens // settings.reduce) for name in ("down", "up")}
        for name, shape in shapes.items():
            start = torch.empty(shape)
            if name in ("down", "up"):
                nn.init.trunc_normal_(start, std=0.02, generator=generator)
            else:  # PyTorch's own start of a linear layer
                start.uniform_(-bound, bound, generator=generator)
            setattr(self, name, nn.Parameter(start, requires_grad=settings.reconstruction > 0))
        self.settings, self.grid, self.dense = settings, tuple(grid), settings.exact_at_init

    def schedule(self, progress: float) -> None:
        """Called by training before each step; progress: 0 at the start of a run, 1 at its end."""
        if self.settings.phase == "schedule":
            self.dense = self.settings.keep == 1 or progress < WARM_UP

    def biases(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState = PLAIN) -> tuple[Tensor | None, ...]:
        self.check_size(q.shape[2], state)
        if self.dense:
            return (None,)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            up = self.basis(q, state)
            coefficients = self.coefficients(at_places(q, state), at_places(k, state), state)
            scores = connectivity_scores(coefficients, up, self.settings.coefficients, self.settings.threshold)
            if state.assignment is not None:
                scores = state.assignment.gather_pairs(scores)  # of a merged token the mean over its places
            chosen = largest(scores, math.ceil(self.settings.keep * scores.shape[-1]))
            chosen[:, :, : state.prefix] = True
            chosen = F.pad(chosen, (0, state.inserted, 0, state.inserted), value=True)
            return (torch.zeros_like(chosen, dtype=q.dtype).masked_fill(~chosen, float("-inf")),)

    def terms(self, q: Tensor, k: Tensor, v: Tensor, state: TokenState = PLAIN) -> tuple[tuple[str, Tensor], ...]:
        if not self.settings.reconstruction:
            return ()
        with torch.autocast(q.device.type, enabled=False):
            q, k = at_places(q, state), at_places(k, state)
            attention = (q @ k.mT * self.scale).detach().softmax(-1)
            error = self.coefficients(q, k, state) @ self.basis(q, state).mT - attention
            error = error[:, :, state.prefix :].square().sum((1, 2, 3))
        return (("sparsifiner_reconstruction", self.settings.reconstruction * self.share * error),)

    def coefficients(self, q: Tensor, k: Tensor, state: TokenState) -> Tensor:
        """q, k (B, H, N, K) of all places -> coefficients (B, H, N, n), rows that sum to one."""
        reduce_q, reduce_k, bias_q, bias_k, down = (
            p.to(q.dtype) for p in (self.reduce_q, self.reduce_k, self.bias_q, self.bias_k, self.down)
        )
        low_q, low_k = q @ reduce_q.mT + bias_q, k @ reduce_k.mT + bias_k
        return ((low_q @ (low_k.mT @ of_groups(down, state))) * self.num_heads**-0.5).softmax(-1)

    def basis(self, q: Tensor, state: TokenState) -> Tensor:
        """The basis (N, n) of all places, in float32 or wider."""
        return of_groups(self.up.to(torch.promote_types(q.dtype, torch.float32)), state)

    def check_size(self, tokens: int, state: TokenState) -> None:
        """Raise MaskError for tokens on another grid than that which P and U were made for."""
        check_places(state, tokens, "sparsifiner")
        if tuple(state.grid) != self.grid:
            here, there = (" x ".join(map(str, grid)) for grid in (state.grid, self.grid))
            raise MaskError(
                f"Found images of {here} patches. Expected {there}, as when sparsifiner was grafted: it has a row of numbers "
                "for each place of that image size. Resize the images, or graft it into a model of that size."
            )


def connectivity_scores(coefficients: Tensor, basis: Tensor, most: int, threshold: float) -> Tensor:
    """How much each place (of N) is connected to each: (..., N, n), (N, n) -> (..., N, N).

    Of the coefficients the `most` largest of each row count, of the basis what is, without its
    sign, above the threshold.
    """
    largest_ones = largest(coefficients, min(most, coefficients.shape[-1]))
    return (coefficients * largest_ones) @ F.threshold(basis.abs(), threshold, 0.0).mT


def largest(values: Tensor, count: int) -> Tensor:
    """Whether a value is among the `count` largest of its row, bool (..., N)."""
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(count, dim=-1).indices, True)


def at_places(rows: Tensor, state: TokenState) -> Tensor:
    """Rows of present tokens (B, H, n, K) -> one for each original token, (B, H, N, K).

    In float32 or wider. Inserted tokens are left out; a merged token stands at all its places.
    """
    heads, wide = rows.shape[1], torch.promote_types(rows.dtype, torch.float32)
    return restore(rows.to(wide).transpose(1, 2).flatten(2), state)[0].unflatten(2, (heads, -1)).transpose(1, 2)


def of_groups(matrix: Tensor, state: TokenState) -> Tensor:
    """Rows of the prefix and of the places, the latter once for each of the tokens per place."""
    prefix, places = matrix[: state.prefix], matrix[state.prefix :]
    return torch.cat([prefix, places.repeat(state.groups, 1)])
