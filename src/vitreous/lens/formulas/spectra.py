"""Spectra of a head from three sources: learned, of its weights, of its scores.

    learned   sigma (H, K) of SVDA and its like: see `lens.learned_spectrum`
    weight    singular values of [W_Q b_Q]^T [W_K b_K]: the bilinear form between two tokens that
              the head has learned
    score     singular values of scale Q K^T on an image, rotary embedding included; masks and
              biases are not part of it

The scale of a score is known where a fused kernel got it; elsewhere queries are taken as they
enter the product. The corrected indicators are free of scale, so this concerns the paper's forms
alone.

Weights are found by name: one linear layer each, or a fused one with the rows q | k | v (k | v, q |
k), heads one after the other. They are those of the map that a layer is (`layers.linear.affine`),
adapters included. What lies between such a layer and the product is read off their energies in the
pass (`Energies`): equal in every channel, nothing; equal in every head, a rotation; else a norm, a
pooling or another order of rows, and then a fused layer of an unknown class is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from vitreous.base.errors import HostError
from vitreous.hosts.attention import HOSTS, Attention, has_biases_beside, query_key_parts, query_key_weights
from vitreous.hosts.directions import Projections
from vitreous.layers.linear import acts_as_linear, affine
from vitreous.layers.spectral import product_singular_values
from vitreous.lens.formulas import indicators

SOURCES = ("learned", "weight", "score")
INDICATORS = {
    "spectral_entropy": partial(indicators.spectral_entropy, eps=0.0),
    "spectral_entropy_paper": indicators.spectral_entropy,
    "effective_rank": partial(indicators.effective_rank, eps=0.0),
    "effective_rank_paper": indicators.effective_rank,
    "effective_rank_l1": indicators.effective_rank_l1,
    "spectral_sparsity": indicators.relative_sparsity,
    "spectral_sparsity_paper": indicators.spectral_sparsity,
}
Part = tuple[str, int, int]  # name of a layer, which part of its rows, of how many
FUSED = ("qkv", "to_qkv", "in_proj", "query_key_value")
PAIRS = (("q", "k"), ("query", "key"), ("q_proj", "k_proj"), ("to_q", "to_k"), ("wq", "wk"), ("q_lin", "k_lin"))
PARTS: tuple[tuple[Part, Part], ...] = (  # where the rows of queries and of keys are
    *(((name, 0, 3), (name, 1, 3)) for name in FUSED),
    *(((q, 0, 1), (k, 0, 1)) for q, k in PAIRS),
    *(((q, 0, 1), (kv, 0, 2)) for q, kv in (("q", "kv"), ("to_q", "to_kv"), ("wq", "wkv"))),
    (("qk", 0, 2), ("qk", 1, 2)),
)
NAMES = {name for pair in PARTS for name, _, _ in pair}  # the layers whose energies are worth keeping
SAME = 1e-2  # relative difference of energies that rounding in half precision may make
NOTES = {
    "plain": "",
    "turned": "positions enter between weights and product (rotary embedding): this form is that of equal positions",
    "changed": "queries or keys are normalised, pooled or weighted between weights and product: not the whole score",
    "unseen": "what lies between weights and product was not seen",
}


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one source, or why there are none.

    values: float64; learned, weight (H, K); score (B, W, H, min(N, M, K)). Learned ones may be
    negative, in any order. note: why values is None, or what the spectrum leaves out; "" for
    neither.
    """

    source: str
    values: Tensor | None
    note: str = ""

    def indicators(self) -> dict[str, Tensor]:
        """{column: (...)} of every spectral indicator in paper and corrected form.

        {} without values.
        """
        return {} if self.values is None else {name: act(self.values) for name, act in INDICATORS.items()}


@dataclass(frozen=True)
class Energies:
    """Sums of squares over images and tokens, from one pass.

    q, k: (H, K) of the call. layers: {name of a child of the module that made the call: (channels,)
    of its output}.
    """

    q: Tensor
    k: Tensor
    layers: Mapping[str, Tensor] = field(default_factory=dict)


def score(q: Tensor, k: Tensor, scale: float | None = None) -> Spectrum:
    """Of scale q k^T, scale 1 if unknown: q (B, W, H, N, K), k (B, W, H, M, K).

    No N x M matrix is made.

    Values below 1e-8 of the largest are rounding, as they would be after a kernel in float32.
    """
    values = product_singular_values(q.detach().double(), k.detach().double(), exact=False)
    return Spectrum("score", values * (scale or 1.0))


def weight(module: nn.Module, heads: int, width: int, energies: Energies | None = None) -> Spectrum:
    """Of [W_Q b_Q]^T [W_K b_K] per head, exact: two QRs and one K x K SVD in float64.

    heads, width: H and K of the call. energies: of the call and the layers before it; None if they
    were not seen.
    """
    try:
        projection = _projection(module, heads, width)
    except HostError:
        return Spectrum("weight", None, f"a query or key layer of {_class(module)} is no affine map that can be measured")
    if projection is None:
        return Spectrum("weight", None, f"no query and key weights of {heads} x {width} rows, by name, in {_class(module)}")
    # a bias that stands beside its layer is not in the energies of the layer's output
    between = _between(projection, None if has_biases_beside(module) else energies)
    if not projection.certain and between in ("changed", "unseen"):
        fused = next(name for name, _, count in projection.parts if count > 1)
        return Spectrum("weight", None, f"the order of the rows of {_class(module)}.{fused} could not be confirmed")
    if any(isinstance(getattr(module, name, None), Projections) for name, _, _ in projection.parts):
        between = "changed"  # inside the layer, whose output was compared
    return Spectrum("weight", product_singular_values(projection.q.mT, projection.k.mT), NOTES[between])


@dataclass(frozen=True)
class _Projection:
    """[W b] of queries and keys, (H, K, D + 1) each, float64.

    Where they are among the children, and if that is certain.
    """

    q: Tensor
    k: Tensor
    parts: tuple[Part, ...]
    certain: bool


def _projection(module: nn.Module, heads: int, width: int) -> _Projection | None:
    """Query and key weights of a module, None if no naming that is known fits it."""
    candidates = _of_class(module) or _by_name(module)
    for w_q, b_q, w_k, b_k, parts, certain in candidates:
        q, k = _rows(w_q, b_q, heads, width), _rows(w_k, b_k, heads, width)
        if q is not None and k is not None:
            return _Projection(q, k, parts, certain)
    return None


def _of_class(module: nn.Module) -> list[tuple]:
    """Query and key weights of classes whose order of rows is known.

    timm's plain, rotary and EVA attention, ours, and PyTorch's own.
    """
    if isinstance(module, Attention) or type(module) in HOSTS:
        return [(*query_key_weights(module), query_key_parts(module), True)]
    if isinstance(module, nn.MultiheadAttention):
        w = (module.q_proj_weight, module.k_proj_weight) if module.in_proj_weight is None else module.in_proj_weight.chunk(3)
        b = (None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        return [(w[0], b[0], w[1], b[1], (), True)]
    return []


def _by_name(module: nn.Module) -> Iterator[tuple]:
    """Linear layers under the names of PARTS. Two layers say which is which.

    So do biases that stand beside a fused one.
    """
    for parts in PARTS:
        layers = [getattr(module, name, None) for name, _, _ in parts]
        if not all(acts_as_linear(layer) for layer in layers):
            continue
        maps = [affine(layer) for layer in layers]
        if any(len(weight) % count for (weight, _), (_, _, count) in zip(maps, parts, strict=True)):
            continue
        tensors, certain = [], True
        for (weight, bias), letter, (_, index, count) in zip(maps, "qk", parts, strict=True):
            weight, bias = (None if x is None else x.chunk(count)[index] for x in (weight, bias))
            beside = getattr(module, f"{letter}_bias", None) if bias is None else None
            fits = isinstance(beside, Tensor) and beside.shape == weight.shape[:1]
            tensors += [weight, beside if fits else bias]
            certain = certain and (count == 1 or fits)
        yield *tensors, parts, certain


def _rows(weight: Tensor, bias: Tensor | None, heads: int, width: int) -> Tensor | None:
    """[W b] (H, K, D + 1) in float64.

    Heads that share a projection (grouped queries) get it repeated.
    """
    weight = weight.detach().double()
    if len(weight) % width or (heads * width) % len(weight):
        return None
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    rows = torch.cat([weight, bias[:, None]], dim=1)
    return rows.unflatten(0, (-1, width)).repeat_interleave(heads * width // len(weight), dim=0)


def _between(projection: _Projection, energies: Energies | None) -> str:
    """What lies between the layers and the product: a key of NOTES."""
    if not projection.parts:  # weights of PyTorch's own class, which has nothing there
        return "plain"
    if energies is None or any(name not in energies.layers for name, _, _ in projection.parts):
        return "unseen"
    pairs = [
        (_heads(energies.layers[name].chunk(count)[index], call), call.double())
        for (name, index, count), call in zip(projection.parts, (energies.q, energies.k), strict=True)
    ]
    if all(_proportional(before, after) for before, after in pairs):
        return "plain"
    by_head = [(before.sum(1), after.sum(1)) for before, after in pairs]
    several = len(energies.q) > 1  # of one head the sum says nothing: any number is in proportion
    return "turned" if several and all(_proportional(*pair) for pair in by_head) else "changed"


def _heads(part: Tensor, call: Tensor) -> Tensor:
    """Energies of a layer's channels as (H, K) of the call.

    Heads that share keys get them repeated.
    """
    by_head = part.double().unflatten(0, (-1, call.shape[1]))
    return by_head.repeat_interleave(len(call) // len(by_head), dim=0)


def _proportional(before: Tensor, after: Tensor) -> bool:
    """True if `after` is `before` times one number: queries may have been scaled."""
    factor = after.sum() / before.sum()
    return bool(((after - factor * before).abs() <= SAME * after).all())


def _class(module: nn.Module) -> str:
    return type(module).__name__
