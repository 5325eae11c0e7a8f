"""Self-attention in five steps, on the children of whatever attention the host has.

    project    x (B, N, D), state -> q, k, v (B, H, N, K), queries and keys normed as the host does
    biases     x, q, k, state -> what is added to the scores, (B or 1, H or 1, N, N) each
    scores     q, k, state -> (B, H, N, N), before biases and mask
    normalize  scores, state -> weights whose rows sum to one
    merge      z (B, H, N, K), x, state -> (B, N, D)
    terms      q, k, v, state -> penalties of these activations, a value per image each

An attention idea overrides one or two of them. As long as `scores` and `normalize` are the plain ones, the fused kernel
does both at once, with a bias too. A query whose keys are all hidden, by a mask or a bias, gets 0 on
every path. Where a step depends on the places of tokens (`wants_state`), blocks of ours hand in
the state of the stream. Rotary embedding stands between `project` and `biases`.
"""

from __future__ import annotations

import torch
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.layers.adoption import adopt
from vitreous.layers.linear import affine
from vitreous.layers.stream import PLAIN, TokenState
from vitreous.layers.unit_norm import heads_first

HOSTS = (TimmAttention, AttentionRope, EvaAttention)


class Attention(nn.Module):
    """Plain attention, equal to the host's own, bit for bit; made by `Attention.of(host_attention)`."""

    host: type[nn.Module]

    @classmethod
    def of(cls, attention: nn.Module) -> Attention:
        """Adopt a host's attention (`HOSTS`), or a plain one of ours."""
        new = adopt(cls, attention)
        if not isinstance(attention, Attention):
            new.host = type(attention)
        return new

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        state: TokenState = PLAIN,
        seen: list[tuple[Tensor, Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The output of `attend`; its (q, k, v) is appended to `seen`, for a caller that needs them and lets hooks fire."""
        out, qkv = self.attend(x, rope, attn_mask, is_causal, state)
        if seen is not None:
            seen.append(qkv)
        return out

    def attend(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        state: TokenState = PLAIN,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """x (B, N, D) -> output (B, N, D) and the (q, k, v) whose scores were taken, (B, H, N, K) each."""
        q, k, v = self.project(x, state)
        if rope is not None:
            q, k = self.rotate(q, rope).type_as(v), self.rotate(k, rope).type_as(v)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:  # grouped queries: key head j serves query heads j * groups ... (j + 1) * groups - 1
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        masks = [joined(attn_mask, bias, is_causal) for bias in self.biases(x, q, k, state)]
        outputs = [self.weigh(q, k, v, mask, causal, state) for mask, causal in masks]
        z = outputs[0] if len(outputs) == 1 else sum(outputs) / len(outputs)
        return self.merge(z, x, state), (q, k, v)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, state: TokenState = PLAIN) -> Tensor:
        """normalize(scores + mask) V, (B, H, N, K); by the fused kernel where that computes the same."""
        if self.fused_attn and self.softmax_of_product and not self.written_out(q):
            drop = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=drop, is_causal=is_causal, scale=self.scale
            )
        scores = masked(self.scores(q, k, state), mask, is_causal)
        if mask is None:
            return self.attn_drop(self.normalize(scores, state)) @ v
        # A query whose keys are all hidden has weights of 0, as in the fused kernel. Softmax has NaN for it, backwards too.
        hidden = scores.amax(-1, keepdim=True) == float("-inf")
        weights = self.normalize(scores.masked_fill(hidden, 0.0), state).masked_fill(hidden, 0.0)
        return self.attn_drop(weights) @ v

    def written_out(self, q: Tensor) -> bool:
        """True to take product, softmax and product one by one where a fused kernel could do it: the host's bits differ."""
        return False

    @property
    def softmax_of_product(self) -> bool:
        """True if a fused kernel computes the same: neither `scores` nor `normalize` is overridden."""
        return type(self).scores is Attention.scores and type(self).normalize is Attention.normalize

    @property
    def wants_state(self) -> bool:
        """True if a step depends on the state of the tokens; a class whose `project` or `merge` does says so itself."""
        return not self.softmax_of_product or type(self).biases is not Attention.biases or self.has_terms

    @property
    def has_terms(self) -> bool:
        """True if a penalty depends on queries, keys or values."""
        return type(self).terms is not Attention.terms

    def terms(self, q: Tensor, k: Tensor, v: Tensor, state: TokenState = PLAIN) -> tuple[tuple[str, Tensor], ...]:
        """Penalties of the activations that scores were taken of: (name, value per image (B,)).

        Where the stream is open, blocks of ours ask for them in passes with gradients and hand them
        on as `TokenState.terms`.
        """
        return ()

    def project(self, x: Tensor, state: TokenState = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is not None:
            q, k, v = heads_first(self.packed(x))
        else:
            q, k, v = (
                layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
            )
        return self.q_norm(q), self.k_norm(k), v

    def packed(self, x: Tensor) -> Tensor:
        """Queries, keys and values as the one product leaves them, (B, N, 3, H, K); `qkv` is not None."""
        if not has_biases_beside(self):
            out = self.qkv(x)
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            # One kernel for product and bias, as the host; only where nothing but the weight makes the product.
            at_once = not self.qkv_bias_separate and type(self.qkv) is nn.Linear
            out = F.linear(x, self.qkv.weight, bias) if at_once else self.qkv(x) + bias
        return out.unflatten(-1, (3, self.num_heads, -1))

    def parts(self, x: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        """Those of queries, keys and values from start to stop, (B, H, n, K) each.

        The others are not computed where `qkv` is a linear layer that nobody else holds, and `project` is
        not overridden.
        """
        if not untouched(self.qkv) or has_biases_beside(self) or type(self).project is not Attention.project:
            return self.project(x)[start:stop]
        width = self.qkv.out_features // 3
        rows = slice(start * width, stop * width)
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        packed = F.linear(x, self.qkv.weight[rows], bias).unflatten(-1, (stop - start, self.num_heads, -1))
        norms = (self.q_norm, self.k_norm, nn.Identity())[start:stop]
        return tuple(norm(part) for norm, part in zip(norms, packed.permute(2, 0, 3, 1, 4), strict=True))

    @property
    def packed_is_ours(self) -> bool:
        """True if queries and keys are what `packed` gives, and nobody else holds that: `packed_is_plain`, without hooks."""
        return self.packed_is_plain and not nn.modules.module._has_any_global_hook()

    @property
    def packed_is_plain(self) -> bool:
        """True if queries, keys and values are the output of a linear `qkv` that has no hooks of its own."""
        return untouched(self.qkv) and all(type(norm) is nn.Identity for norm in (self.q_norm, self.k_norm))

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Rotary embedding on all but the prefix tokens of x (B, H, N, K)."""
        prefix = self.num_prefix_tokens
        rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(self, "rotate_half", False))
        return torch.cat([x[:, :, :prefix], rotated], dim=2)

    def biases(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState = PLAIN) -> tuple[Tensor | None, ...]:
        """What is added to the scores, (B or 1, H or 1, N, N), -inf allowed; of several, the outcomes are averaged."""
        return (None,)

    def scores(self, q: Tensor, k: Tensor, state: TokenState = PLAIN) -> Tensor:
        return (q * self.scale) @ k.transpose(-2, -1)

    def normalize(self, scores: Tensor, state: TokenState = PLAIN) -> Tensor:
        return scores.softmax(dim=-1)

    def merge(self, z: Tensor, x: Tensor, state: TokenState = PLAIN) -> Tensor:
        z = self.norm(z.transpose(1, 2).flatten(2))
        if self.gate is not None:
            z = z * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(z))


def untouched(linear: nn.Module) -> bool:
    """True for a linear layer without hooks, whose product may be made without calling it."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(linear) is nn.Linear and not any(getattr(linear, name) for name in hooks)


def written_out_is_faster(tokens: int, learning: bool, device: torch.device) -> bool:
    """Whether to take product, softmax and product one by one in place of the fused kernel (`benchmarks/attention_path`).

    Measured on one CPU of two cores, heads of 64 numbers, times over those of the fused kernel. With gradients 0.78 to 0.94 at
    101 and 145 tokens, 0.89 to 1.32 at 65, 0.91 to 1.07 at 197, more at the ends; without gradients 1.01 to 1.73, but for three
    of 70 cells. The bounds are set by eye between such numbers: other processors may want others.
    """
    return learning and device.type == "cpu" and 80 <= tokens <= 160


def set_fused(model: nn.Module, fused: bool) -> None:
    """Let each attention of ours in a model use the fused kernel, or no longer."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused


def joined(attn_mask: Tensor | None, bias: Tensor | None, is_causal: bool) -> tuple[Tensor | None, bool]:
    """(mask, is_causal) for `weigh`: the caller's mask and a bias in one; either has the meaning of `masked`."""
    if bias is None:
        return attn_mask, is_causal
    return masked(bias, attn_mask, is_causal), False


def masked(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scores (..., N, N) with the mask's meaning of `scaled_dot_product_attention`: additive, or True = attend."""
    if is_causal:
        n = scores.shape[-1]
        return scores + scores.new_full((n, n), float("-inf")).triu(1)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, float("-inf"))
    return scores + attn_mask


def query_key_weights(attention: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(W_Q (A, D), b_Q (A) or None, W_K (A, D), b_K (A) or None) of any attention in `HOSTS`, A = heads * head width.

    They are what queries and keys are made with, adapters included. Raises HostError where a layer is no affine map.
    """
    if attention.qkv is None:
        return *affine(attention.q_proj), *affine(attention.k_proj)
    if reads_around(attention, "qkv"):
        weight, bias = attention.qkv.weight, None  # timm's own forward reads it around whatever stands there
    else:
        weight, bias = affine(attention.qkv)
    w_q, w_k, _ = weight.chunk(3)
    b_q, b_k, _ = (None, None, None) if bias is None else bias.chunk(3)
    if has_biases_beside(attention):
        b_q = attention.q_bias if b_q is None else attention.q_bias + b_q
        b_k = attention.k_bias if b_k is None else attention.k_bias + b_k
    return w_q, b_q, w_k, b_k


def value_weights(attention: nn.Module) -> tuple[Tensor, Tensor | None]:
    """W_V (A, D) and b_V (A) or None of an attention whose `packed_is_plain`, A = heads * head width."""
    weight, bias = affine(attention.qkv)
    return weight.chunk(3)[2], None if bias is None else bias.chunk(3)[2]


def has_biases_beside(attention: nn.Module) -> bool:
    """True if the output of `qkv` is not yet queries and keys: EVA keeps three biases beside a bias-free linear."""
    return getattr(attention, "q_bias", None) is not None


def reads_around(attention: nn.Module, child: str) -> bool:
    """True if the host's forward takes the weight of this child and never calls it; ours calls what stands there."""
    fused_eva = child == "qkv" and type(attention) is EvaAttention
    return fused_eva and has_biases_beside(attention) and not attention.qkv_bias_separate


def joined_projections(tensors: dict[str, Tensor], names: tuple[str, str, str]) -> dict[str, Tensor]:
    """A checkpoint in which projections of queries, keys and values by these names are timm's one, `qkv`."""
    joined, marker = dict(tensors), f".{names[0]}."
    for name in filter(lambda name: marker in name, tensors):
        head, _, tail = name.rpartition(marker)
        parts = [f"{head}.{part}.{tail}" for part in names]
        if all(part in tensors for part in parts):
            joined[f"{head}.qkv.{tail}"] = torch.cat([joined.pop(part) for part in parts])
    return joined


def query_key_parts(attention: nn.Module) -> tuple[tuple[str, int, int], tuple[str, int, int]]:
    """Where the rows of queries and of keys are: (name of a linear, which part of its rows, of how many)."""
    return (("q_proj", 0, 1), ("k_proj", 0, 1)) if attention.qkv is None else (("qkv", 0, 3), ("qkv", 1, 3))
