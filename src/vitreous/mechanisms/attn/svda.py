"""SVDA: attention whose scores are a learned spectrum between unit queries and unit keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from vitreous import slots
from vitreous.base.errors import HostError, SettingError
from vitreous.hosts.attention import Attention, joined_projections, query_key_weights, written_out_is_faster
from vitreous.hosts.directions import Directions
from vitreous.layers.exposed import Exposed
from vitreous.layers.stream import PLAIN, TokenState
from vitreous.layers.unit_norm import needs_plain_ops, unit, unit_rows_in_place
from vitreous.mechanism import Mechanism

SCALES = {"paper": lambda width: width**-0.5, "one": lambda width: 1.0, "sqrt": lambda width: width**0.5}
STARTS = {"scratch": 0.1, "gentle": 0.005}  # standard deviation of sigma around 1


@dataclass(frozen=True, kw_only=True)
class SVDA(Mechanism):
    """Attention by a learned spectrum: cosine of query and key, weighted per direction.

    Each latent direction has a sigma of its own.

        q_i <- q_i / |q_i|,  k_j <- k_j / |k_j|            per token and head, biases included
        A    = softmax(scale * Q diag(sigma_h) K^T),  Z = A V          sigma_h in R^K, free in sign

    Paper: Arampatzakis, Pavlidis, Mitianoudis, Papamarkos 2026, arXiv 2602.10994 (operator); regularisers and start as
        in the authors' experiments.
    Differs: fused kernel (sigma multiplies the queries). On rotary hosts the order is normalise, sigma, rotate (ours).
        On hosts other than timm's ViT and Eva it stands in the linear layers that give queries and keys
        (`hosts.directions`), and all that the host does with scores stays: windows, relative positions, reduced keys,
        talking heads, class attention (ours).
    At start: changes the output; start=import comes near a pretrained host, once `vitreous.calibrate` has seen images.
    Cost: two row norms and one product per block, in few passes on the CPU (`layers.rows`); H * K parameters per block (+ H
        with scale=learned).
    Settings: layers (0-based; default all; on hosts with stages or branches every attention counts as one, in the order
        in which they run: Swin-T has 0 to 11, CaiT's class attention comes last, CrossViT counts in each block both
        branches, then both fusions). scale: paper = 1/sqrt(K), under which attention is nearly uniform because a
        score cannot exceed max|sigma|/sqrt(K); one; sqrt = sqrt(K); learned = one positive factor per head, from sqrt(K).
        start: scratch = N(1, 0.1^2), gentle = 1 + 0.005 N(0, 1) for pretrained blocks, import = fitted to the host's own
        attention (`import_spectrum`). orthogonality, entropy: weights of the two penalties (0 = off). seed: of the start.
    Raises: HostError where attention is not timm's plain, rotary or EVA one, nor of a class in
        `hosts.directions.PROJECTIONS` or with `projections` of its own; import is for plain ones.
    """

    paper: ClassVar[str] = "Arampatzakis et al. 2026, arXiv 2602.10994"
    requires: ClassVar[tuple[str, ...]] = ("projections",)
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
        layers = slots.layer_indices(model, self.layers)
        generator = torch.Generator().manual_seed(self.seed)
        whole, changes = slots.walks(model), {}
        if self.start == "import" and not whole:
            raise HostError(
                f"Found svda:start=import for a {type(model).__name__}. Expected timm's plain attention, whose scores alone a "
                "spectrum can be fitted to. Use svda:start=gentle here."
            )
        for i in layers:
            if whole:
                new = {f"blocks.{i}.attn": SpectralAttention.of(slots.plain_attention(model, i, "svda"))}
            else:
                new = slots.adapt_projections(model, i, SpectralDirections, "svda")
            for module in new.values():
                module.initialise(self, generator, share=1 / len(layers))
            changes |= new
        return changes

    def renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        joined = joined_projections(tensors, ("Wq", "Wk", "Wv"))
        return {name.replace(".Wo.", ".proj.").replace(".sigmas", ".sigma"): value for name, value in joined.items()}

    def calibrate(self, model: nn.Module, images: Tensor) -> None:
        if self.start == "import":
            import_spectrum(model, images)


class Spectral(nn.Module):
    """What holds a spectrum sigma (H, K) between unit queries and unit keys."""

    def draw(self, settings: SVDA, generator: torch.Generator, heads: int, width: int) -> None:
        """Draw sigma, and start the heads' factors where those are learned."""
        noise = torch.randn(heads, width, generator=generator)
        self.sigma = nn.Parameter(1 + STARTS.get(settings.start, 0.0) * noise)
        self.log_scale = None
        if settings.scale == "learned":
            self.log_scale = nn.Parameter(torch.full((heads,), width**0.5).log())
        self.exposed = Exposed("sigma", "number", "The learned weight of each latent direction of a head, free in sign.")

    def scaled(self, sigma: Tensor) -> Tensor:
        return sigma if self.log_scale is None else sigma * self.log_scale.exp()[:, None]


class SpectralDirections(Spectral, Directions):
    """A host's layer that gives queries, keys or both: unit vectors, queries by the spectrum sigma (H, K)."""

    def initialise(self, settings: SVDA, generator: torch.Generator, share: float) -> None:
        """As `SpectralAttention.initialise`; sigma stands where the queries are."""
        self.weights = {"orthogonality": settings.orthogonality, "entropy": settings.entropy * share}
        if "q" in self.parts:
            self.draw(settings, generator, self.heads, self.head_dim)
            self.factor = SCALES.get(settings.scale, SCALES["one"])(self.head_dim) / self.host_scale

    def query_weight(self) -> Tensor:
        """sigma, times the scale of the settings over that of the host, by which it multiplies the scores behind."""
        return self.scaled(self.exposed(self.sigma)) * self.factor

    def penalties(self) -> dict[str, Tensor]:
        """As `SpectralAttention.penalties`, of what this layer holds: over the layers of an attention the same sum."""
        projections = [w for w in map(self.rows, "qk") if w is not None]
        terms = {"orthogonality": lambda: orthogonality(torch.stack(projections))}
        if "q" in self.parts:
            terms["entropy"] = lambda: spectral_entropy(self.sigma).mean()
        return {f"svda_{name}": self.weights[name] * term() for name, term in terms.items() if self.weights[name]}


class SpectralAttention(Spectral, Attention):
    """The host's attention with unit queries and keys and a spectrum sigma (H, K).

    The spectrum stands between them.
    """

    def initialise(self, settings: SVDA, generator: torch.Generator, share: float) -> None:
        """Draw sigma and set the scale; share: this layer's part in means over layers."""
        self.draw(settings, generator, self.num_heads, self.head_dim)
        self.host_scale = self.scale
        self.scale = SCALES.get(settings.scale, SCALES["one"])(self.head_dim)
        self.weights = {"orthogonality": settings.orthogonality, "entropy": settings.entropy * share}

    @property
    def weight(self) -> Tensor:
        """The factors of the unit queries, (H, K): sigma.

        Times the heads' factors where those are learned.
        """
        return self.scaled(self.sigma)

    def project(self, x: Tensor, state: TokenState = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.scaled(self.exposed(self.sigma))
        if not needs_plain_ops(x) and self.packed_is_ours:
            return unit_rows_in_place(self.packed(x), weight)
        q, k, v = super().project(x, state)
        return (unit(q) * weight[:, None]).to(v.dtype), unit(k).to(v.dtype), v

    def written_out(self, q: Tensor) -> bool:
        """By measured shape: SVDA changes what the host computes, so its bits need not be those of
        the host's kernel.
        """
        learning = torch.is_grad_enabled() and q.requires_grad
        return not needs_plain_ops(q) and written_out_is_faster(q.shape[2], learning, q.device)

    def penalties(self) -> dict[str, Tensor]:
        """The paper's regularisers for this layer, weighted: scalars by name, to be summed over
        layers.
        """
        w_q, _, w_k, _ = query_key_weights(self)
        terms = {
            "orthogonality": lambda: orthogonality(torch.stack([w_q, w_k])),
            "entropy": lambda: spectral_entropy(self.sigma).mean(),
        }
        return {f"svda_{name}": self.weights[name] * term() for name, term in terms.items() if self.weights[name]}


def orthogonality(weight: Tensor) -> Tensor:
    """mean[(W W^T - I)^2] over the A^2 entries, summed over the W (..., A, D) of all heads
    together; a scalar, 0 or more.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return excess(weight).square().sum() / weight.shape[-2] ** 2
    with torch.autocast(weight.device.type, enabled=False):  # the way back multiplies what this way has stored
        return Orthogonality.apply(weight)


def excess(weight: Tensor) -> Tensor:
    """W W^T - I of W (..., A, D)."""
    gram = weight @ weight.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


class Orthogonality(Function):
    """`orthogonality` with its gradient 4 / A^2 (W W^T - I) W.

    One product each way, where autograd takes two back.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        found = excess(weight)
        ctx.save_for_backward(weight, found)
        return found.square().sum() / found.shape[-1] ** 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        weight, found = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is to be differentiated in turn
            found = excess(weight)
        return (4 * grad / found.shape[-1] ** 2) * (found @ weight)


def spectral_entropy(sigma: Tensor) -> Tensor:
    """Entropy in nats of p_k = sigma_k^2 / sum sigma^2, 0 to log K; (..., K) -> (...).

    Minimised in training.
    """
    energy = sigma.square()
    p = energy / (energy.sum(-1, keepdim=True) + 1e-8)
    return -(p * (p + 1e-8).log()).sum(-1)


@torch.no_grad()
def import_spectrum(model: nn.Module, images: Tensor) -> None:
    """Fit every sigma so that attention on images (B, C, H, W) is nearest to the host's.

    Scores are linear in sigma: s_ij = scale sum_k sigma_k q_ik k_jk with unit rows. Per head, sigma
    minimises sum_ij A_ij (s_ij - t_ij - mean_j)^2 against the host's scores t, with the mean over j
    weighted by the host's attention A: the second-order form of the divergence between the two
    attentions. All weights stay the host's. What cannot be had is how the lengths of queries and
    keys differ between tokens; `import_error` says what that costs.
    """
    moments: dict[nn.Module, list[Tensor]] = {}

    def fit(module: SpectralAttention, q: Tensor, k: Tensor, attention: Tensor, scores: Tensor) -> None:
        new = torch.stack([normal_equations(*parts) for parts in zip(unit(q), unit(k), attention, scores, strict=True)])
        old = moments.setdefault(module, [])
        old.append(new.sum(0))  # (H, K, K + 1), summed over the images

    along_host(model, images, fit)
    for module, parts in moments.items():
        system = sum(parts)
        gram, target = system[..., :-1], system[..., -1:]
        ridge = 1e-6 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(gram.shape[-1]).to(gram)
        sigma = torch.linalg.solve(gram + ridge, target).squeeze(-1)
        factor = module.scale if module.log_scale is None else module.scale * module.log_scale.exp()[:, None]
        module.sigma.copy_(sigma / factor)


@torch.no_grad()
def import_error(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """Distance of SVDA from the host's attention on images (B, C, H, W).

    {layer: |A' - A|_F / |A|_F per head (H,)}.

    A is the host's attention, A' SVDA's on the same input, so errors do not pile up over layers.
    """
    errors: dict[nn.Module, Tensor] = {}

    def compare(module: SpectralAttention, q: Tensor, k: Tensor, attention: Tensor, scores: Tensor) -> None:
        ours = module.normalize(module.scores(unit(q) * module.weight[:, None], unit(k)))
        errors[module] = ((ours - attention).square().sum((0, 2, 3)) / attention.square().sum((0, 2, 3))).sqrt()

    along_host(model, images, compare)
    return {i: errors[m] for i, m in enumerate(slots.attentions(model)) if m in errors}


def along_host(model: nn.Module, images: Tensor, visit: Callable[..., None]) -> None:
    """One pass in which every SVDA module computes its host's attention.

    `visit` is called with (module, q, k, A, scores) of each.
    """

    def hook(module: SpectralAttention, args: tuple, kwargs: dict, _out: Tensor) -> Tensor:
        if args[1:] or any(value is not None and value is not False for value in kwargs.values()):
            raise HostError(
                "Found attention with rotary positions or a mask. Expected plain attention: there sigma and the host's "
                "scores are linear in each other. Use svda:start=gentle here."
            )
        host = Attention.of(module)
        host.scale = module.host_scale
        q, k, v = Attention.project(module, args[0])
        scores = host.scores(q, k)
        weights = scores.softmax(-1)
        visit(module, q, k, weights, scores)
        return host.merge(weights @ v, args[0])

    mine = [m for m in slots.attentions(model) if isinstance(m, SpectralAttention)]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in mine]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()


def normal_equations(q: Tensor, k: Tensor, attention: Tensor, scores: Tensor) -> Tensor:
    """[G | r] (H, K, K + 1), float64, of the least squares in `import_spectrum`.

    For one image: q, k (H, N, K).
    """
    parts = []
    for q_h, k_h, w, t in zip(q.double(), k.double(), attention.double(), scores.double(), strict=True):
        feature = q_h[:, None] * (k_h[None] - (w @ k_h)[:, None])  # (N, N, K), centred under the host's attention
        weighted = (feature * w[..., None]).flatten(0, 1)  # (N N, K)
        goal = (t - (w * t).sum(1, keepdim=True)).flatten()
        parts.append(weighted.T @ torch.cat([feature.flatten(0, 1), goal[:, None]], dim=1))
    return torch.stack(parts)
