"""SVDA: attention whose scores are a learned spectrum between unit queries and unit keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.errors import SettingError
from vitreous.layers.attention import Attention, query_key_weights
from vitreous.layers.spectral import product_svd
from vitreous.mechanism import Mechanism

SCALES = {"paper": lambda width: width**-0.5, "one": lambda width: 1.0, "sqrt": lambda width: width**0.5}
STARTS = {"scratch": 0.1, "gentle": 0.005}  # standard deviation of sigma around 1


@dataclass(frozen=True, kw_only=True)
class SVDA(Mechanism):
    """Attention by a learned spectrum: cosine of query and key, each latent direction weighted by its own sigma.

        q_i <- q_i / |q_i|,  k_j <- k_j / |k_j|            per token and head, biases included
        A    = softmax(scale * Q diag(sigma_h) K^T),  Z = A V          sigma_h in R^K, free in sign

    Paper: Arampatzakis, Pavlidis, Mitianoudis, Papamarkos 2026, arXiv 2602.10994 (operator); regularisers and start as
        in the authors' experiments.
    Differs: fused kernel (sigma multiplies the queries). On rotary hosts the order is normalise, sigma, rotate (ours).
    At start: changes the output; start=import comes near the pretrained host, see `import_error`.
    Cost: two row norms and one product per block; H * K parameters per block (+ H with scale=learned).
    Settings: layers (0-based; default all). scale: paper = 1/sqrt(K), under which attention is nearly uniform because a
        score cannot exceed max|sigma|/sqrt(K); one; sqrt = sqrt(K); learned = one positive factor per head, from sqrt(K).
        start: scratch = N(1, 0.1^2), gentle = 1 + 0.005 N(0, 1) for pretrained blocks, import = from the host's own
        queries and keys. orthogonality, entropy: weights of the two penalties (0 = off). seed: of the start.
    Raises: HostError where attention is not timm's plain, rotary or EVA one, or import cannot be exact up to the norms.
    """

    paper: ClassVar[str] = "Arampatzakis et al. 2026, arXiv 2602.10994"
    no_decay: ClassVar[tuple[str, ...]] = ("sigma", "log_scale")
    examples: ClassVar[tuple[str, ...]] = ("svda:scale=learned,start=gentle,layers=0+2",)

    layers: tuple[int, ...] | None = None
    scale: Literal["paper", "one", "sqrt", "learned"] = "paper"
    start: Literal["scratch", "gentle", "import"] = "scratch"
    orthogonality: float = 1e-3
    entropy: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("orthogonality", "entropy"):
            if getattr(self, name) < 0:
                raise SettingError(f"Found {name}={getattr(self, name)}. Expected 0 (off) or more. Give such a weight.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        slots.check_host(model)
        layers = slots.layer_indices(model, self.layers)
        generator = torch.Generator().manual_seed(self.seed)
        changes = {}
        for i in layers:
            new = SpectralAttention.of(slots.plain_attention(model, i, "svda"))
            new.begin(self, generator, share=1 / len(layers))
            if self.start == "import":
                imported(new, slots.bilinear_input(model, i, "svda:start=import"))
            changes[f"blocks.{i}.attn"] = new
        return changes


class SpectralAttention(Attention):
    """The host's attention with unit queries and keys and a spectrum sigma (H, K) between them."""

    def begin(self, settings: SVDA, generator: torch.Generator, share: float) -> None:
        """Draw sigma and set the scale; share: this layer's part in means over layers."""
        heads, width = self.num_heads, self.head_dim
        noise = torch.randn(heads, width, generator=generator)
        self.sigma = nn.Parameter(1 + STARTS.get(settings.start, 0.0) * noise)
        self.scale = SCALES.get(settings.scale, SCALES["one"])(width)
        self.log_scale = None
        if settings.scale == "learned":
            self.log_scale = nn.Parameter(torch.full((heads,), width**0.5).log())
        self.weights = {"orthogonality": settings.orthogonality, "entropy": settings.entropy * share}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        sigma = self.sigma if self.log_scale is None else self.sigma * self.log_scale.exp()[:, None]
        return (unit(q) * sigma[:, None]).to(v.dtype), unit(k).to(v.dtype), v

    def penalties(self) -> dict[str, Tensor]:
        """The paper's regularisers for this layer, weighted: scalars by name, to be summed over layers."""
        w_q, _, w_k, _ = query_key_weights(self)
        terms = {
            "orthogonality": lambda: orthogonality(w_q) + orthogonality(w_k),
            "entropy": lambda: spectral_entropy(self.sigma).mean(),
        }
        return {f"svda_{name}": self.weights[name] * term() for name, term in terms.items() if self.weights[name]}


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in at least float32: half precision would underflow on small rows. Zero rows stay zero."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def orthogonality(weight: Tensor) -> Tensor:
    """mean[(W W^T - I)^2] over the A^2 entries, for W (A, D) of all heads together; a scalar, 0 or more."""
    gram = weight @ weight.T
    return (gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).square().mean()


def spectral_entropy(sigma: Tensor) -> Tensor:
    """Entropy in nats of p_k = sigma_k^2 / sum sigma^2, 0 to log K; (..., K) -> (...). Minimised in training."""
    energy = sigma.square()
    p = energy / (energy.sum(-1, keepdim=True) + 1e-8)
    return -(p * (p + 1e-8).log()).sum(-1)


def imported(attention: SpectralAttention, norm: nn.Module) -> None:
    """Start from the host's own queries and keys: the exact spectrum of their product, in an orthonormal basis.

    Per head [W_Q b_Q]^T [W_K b_K] = U diag(s) V^T, so q' = U^T [x 1], k' = V^T [x 1] and sigma = s give the host's
    scores exactly, before queries and keys are normalised. Their mean lengths go into sigma: for x behind a norm with
    weight g and bias c, E|U^T [x 1]|^2 is known without data. What is lost is how the lengths differ between tokens;
    `import_error` measures it. New query and key rows are written to a copy of the projection; the host keeps its own.
    """
    w_q, b_q, w_k, b_k = (t if t is None else t.detach().double() for t in query_key_weights(attention))
    heads, factor = attention.num_heads, attention.head_dim**-0.5
    bias = b_q is not None

    def rows(weight: Tensor, offset: Tensor | None) -> Tensor:  # (H, K, D or D + 1)
        return torch.cat([weight, offset[:, None]], 1).unflatten(0, (heads, -1)) if bias else weight.unflatten(0, (heads, -1))

    u, s, v = product_svd(rows(w_q, b_q), rows(w_k, b_k))  # (H, D or D + 1, K), (H, K), (H, D or D + 1, K)
    gain = norm.weight.detach().double() if norm.weight is not None else torch.ones(w_q.shape[1], dtype=torch.float64)
    shift = getattr(norm, "bias", None)
    shift = shift.detach().double() if shift is not None else torch.zeros_like(gain)
    if bias:  # the constant coordinate 1 has no spread
        gain, shift = F.pad(gain, (0, 1)), F.pad(shift, (0, 1), value=1.0)

    def length(basis: Tensor) -> Tensor:  # (H, D', K) -> (H, 1): root mean square of |basis^T [x 1]|
        spread = (basis * gain[:, None]).square().sum((1, 2))
        centre = (basis.transpose(1, 2) @ shift).square().sum(1)
        return (spread + centre).sqrt()[:, None]

    scale = attention.log_scale.exp()[:, None].double() if attention.log_scale is not None else attention.scale
    attention.sigma.data = (s * length(u) * length(v) * factor / scale).to(attention.sigma.dtype)
    d = w_q.shape[1]
    projection = nn.Linear(d, attention.qkv.out_features, bias=bias).to(attention.qkv.weight)
    new_q, new_k = (basis.transpose(1, 2).flatten(0, 1).to(projection.weight) for basis in (u, v))  # (A, D or D + 1)
    with torch.no_grad():
        projection.load_state_dict(attention.qkv.state_dict())
        a = len(new_q)
        projection.weight[:a], projection.weight[a : 2 * a] = new_q[:, :d], new_k[:, :d]
        if bias:
            projection.bias[:a], projection.bias[a : 2 * a] = new_q[:, d], new_k[:, d]
    attention.qkv = projection


@torch.no_grad()
def import_error(model: nn.Module, images: Tensor, layers: tuple[int, ...] | None = None) -> dict[int, Tensor]:
    """What start=import costs on these images (B, C, H, W): {layer: |A' - A|_F / |A|_F per head (H,)}.

    A is the host's attention, A' the imported one on the same input, so errors do not pile up over layers. model: a plain
    host; unchanged.
    """
    chosen = slots.layer_indices(model, layers)
    grafted = SVDA(layers=chosen, start="import").changes(model)
    errors: dict[int, Tensor] = {}

    def compare(layer: int) -> None:
        path = f"blocks.{layer}.attn"
        pair = Attention.of(slots.plain_attention(model, layer, "svda")), grafted[path]

        def hook(_module: nn.Module, args: tuple, _kwargs: dict) -> None:
            host, ours = (a.normalize(a.scores(*a.project(args[0])[:2])) for a in pair)  # (B, H, N, N)
            errors[layer] = ((ours - host).square().sum((0, 2, 3)) / host.square().sum((0, 2, 3))).sqrt()

        handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))

    handles: list = []
    try:
        for layer in chosen:
            compare(layer)
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return errors
