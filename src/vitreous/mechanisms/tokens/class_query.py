"""Class query: in the last block only the tokens that the head reads ask, and only they have an MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.errors import MaskError
from vitreous.hosts.attention import Attention, has_biases_beside, query_key_weights, value_weights
from vitreous.layers.stream import PLAIN, Assignment, TokenState, reduce, split
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class ClassQuery(Mechanism):
    """The last block computes only what a head that reads the class token depends on; the patches end before it.

        q = W_Q x_class + b_Q,   per head   u = W_K^T q,   a = softmax(u x^T / sqrt(K)),   z = W_V (a x) + b_V
        x_class <- x_class + W_O z + b_O,   then its MLP;   no other query, key, value or MLP is computed

    Nothing behind the last block reads the patches, so their part in it is left out. A key enters by its product with one
    query, q (W_K x_j + b_K) = (W_K^T q) x_j + a number that is the same for all j and leaves the softmax, and a value by its
    weighted sum: so neither has to be made for every token.

    Paper: none; this is ours. CaiT (Touvron et al. 2021, arXiv 2103.17239) trains with blocks of this kind.
    Differs: nothing is approximated.
    At start: the host's logits, to rounding (sums run in another order). It stays so whatever is trained.
    Cost: the last block falls from 12 N D^2 + 2 N^2 D multiply-adds to 2 H N D + 12 D^2 for one class token and H heads: 8 % of
        a ViT-Ti/16 of 12 blocks. No parameters.
    Settings: none. Prefix tokens (class, distillation, registers) and inserted ones ask, patches do not.
    Raises: HostError where the head pools over patches, and where halves of a block or its attention are not known;
        GraftError where the attention of the last block is not plain; MaskError for masks of the caller.
    """

    paper: ClassVar[str] = "ours; no paper"
    requires: ClassVar[tuple[str, ...]] = ("stream", "remove", "attention", "halves", "class_head")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        last, prefix = slots.depth(model) - 1, slots.prefix(model)
        attention = ClassRows.of(slots.plain_attention(model, last, self.name))
        attention.prefix = prefix
        return slots.add_step(model, last, "between", DropPatches(prefix)) | {f"blocks.{last}.attn": attention}


class ClassRows(Attention):
    """The host's attention for queries of the prefix and of inserted tokens alone; patches get 0."""

    prefix: int

    @property
    def wants_state(self) -> bool:
        return True  # how many tokens are inserted

    def attend(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        state: TokenState = PLAIN,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """x (B, n, D) -> output (B, n, D), and (q, k, v) whose scores were taken, q of the asking tokens.

        Raises MaskError for a mask of the caller, which has a row for every token.
        """
        if is_causal or (attn_mask is not None and state.sizes is None):
            what = "is_causal=True" if is_causal else f"attn_mask of shape {tuple(attn_mask.shape)}"
            raise MaskError(
                f"Found {what}, but only {self.prefix + state.inserted} of {x.shape[1]} tokens ask here. Expected none. Call "
                "the model without a mask, or take class_query out (vitreous.ungraft)."
            )
        patches = x.shape[1] - state.inserted - self.prefix
        asking = without_patches(x, self.prefix, state)
        whole_rows = not (self.training and self.attn_drop.p)  # with dropout weights do not sum to one
        if whole_rows and self.packed_is_plain and not has_biases_beside(self):
            q, k, v = self.folded(asking, x)
            z = self.unfolded(self.weigh(q, k, v, attn_mask, False, state))
        else:
            q, k, v = self.project(x, state)
            q = torch.cat([q[:, :, : self.prefix], q[:, :, self.prefix + patches :]], dim=2)
            z = self.weigh(q, k, v, attn_mask, False, state)
        out = self.merge(z, asking, state)
        nothing = out.new_zeros(1, 1, 1).expand(x.shape[0], patches, out.shape[2])
        return torch.cat([out[:, : self.prefix], nothing, out[:, self.prefix :]], dim=1), (q, k, v)

    def folded(self, asking: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries W_K^T q (B, H, p, D) of asking (B, p, D), and x (B, n, D) as the keys and values of every head."""
        w_q, b_q, w_k, _ = query_key_weights(self)
        q = F.linear(asking, w_q, b_q).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        every = x[:, None].expand(-1, self.num_heads, -1, -1)
        return q @ w_k.unflatten(0, (self.num_heads, -1)), every, every

    def unfolded(self, mixed: Tensor) -> Tensor:
        """Weighted sums of tokens (B, H, p, D) -> weighted sums of values (B, H, p, K); weights sum to one."""
        weight, bias = value_weights(self)
        z = mixed @ weight.unflatten(0, (self.num_heads, -1)).mT
        return z if bias is None else z + bias.unflatten(0, (self.num_heads, 1, -1))


class DropPatches(nn.Module):
    """The token step: of x (B, n, D) the prefix and inserted tokens stay."""

    ends_patches = True  # nothing may stand behind this block

    def __init__(self, prefix: int):
        super().__init__()
        self.prefix = prefix

    def forward(self, x: Tensor, state: TokenState, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, TokenState]:
        original = split(x, state)[0]
        none = torch.zeros(x.shape[0], 0, dtype=torch.int64, device=x.device)
        step = Assignment.keeping(none, original.shape[1] - self.prefix, self.prefix)
        sizes = None if state.sizes is None else state.sizes[:, : self.prefix]
        return reduce(x, state, step, sizes, tokens=original[:, : self.prefix])


def without_patches(x: Tensor, prefix: int, state: TokenState) -> Tensor:
    """The prefix and inserted tokens of x (B, n, D)."""
    original, inserted = split(x, state)
    return torch.cat([original[:, :prefix], inserted], dim=1) if state.inserted else original[:, :prefix]
