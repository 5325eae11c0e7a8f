"""Measure the indicators of every attention of a model while it looks at images."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitreous import slots
from vitreous.errors import DataError, HostError, NotReached
from vitreous.layers.attention import HOSTS, Attention, masked
from vitreous.layers.tokens import PLAIN, TokenState
from vitreous.lens import indicators
from vitreous.lens.measures import perturbed

SPECTRAL = {
    ("spectral_entropy", "paper"): indicators.spectral_entropy,
    ("effective_rank", "paper"): indicators.effective_rank,
    ("spectral_sparsity", "paper"): indicators.spectral_sparsity,
    ("spectral_entropy", "corrected"): partial(indicators.spectral_entropy, eps=0.0),
    ("effective_rank", "corrected"): partial(indicators.effective_rank, eps=0.0),
    ("effective_rank_l1", "corrected"): indicators.effective_rank_l1,
    ("spectral_sparsity", "corrected"): indicators.relative_sparsity,
}
Row = dict[str, Any]  # layer, head (None: all heads together), indicator, form ("paper" or "corrected"), value


def measure(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    noise: float = 0.01,
    seed: int = 0,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> list[Row]:
    """Indicators by layer and head, as rows of layer, head, indicator, form, value; `lens.indicators` defines each.

    images: one batch (B, C, H, W), or an iterable of batches, or of (batch, ...) as a data loader gives them; pixels as
    the model takes them, those of [0, 1] less `mean` and over `std`. Each image is seen twice, clean and with N(0,
    noise^2) added to its [0, 1] pixels, which are then clamped. The noise follows from `seed` and an image's place,
    whatever the batches.

    *Corrected* rows are means over all images, per head. *Paper* rows are what the experiments execute: alignment of
    one image (here the first) in its noisy version; robustness of that image and selectivity of the last batch, all
    heads together (head None). Spectral rows need a learned `sigma` in the attention; alignment is of q and k before
    sigma.

    Maps are recomputed in float32 or better and reduced at once; about two of (2B, H, N, N) exist at a time. What they
    give must equal what the model computed, within 1e-3 of the largest entry (half precision: four roundings). The
    model runs in eval mode without gradients; mode, hooks and random state are as before. Hooks on the children of an
    attention fire again.

    Raises HostError for a model without attentions of a known class at `blocks.i.attn`, or where the recomputed output
    differs; NotReached if the pass leaves one out; DataError for no images, or for pixels outside [0, 1].
    """
    recorders = [Recorder(layer, attention) for layer, attention in enumerate(attentions(model))]
    generator = torch.Generator().manual_seed(seed)
    like, count = next(model.parameters()), 0
    with undisturbed(model), hooked(recorders):
        for batch in [images] if isinstance(images, Tensor) else images:
            clean = batch[0] if isinstance(batch, (tuple, list)) else batch
            noisy = perturbed(clean, noise, generator, mean, std)
            model(torch.cat([clean, noisy]).to(like.device, like.dtype))
            count += len(clean)
    if not count:
        raise DataError("Found no images. Expected at least one. Give a batch (B, C, H, W), or an iterable of batches.")
    for recorder in recorders:
        if recorder.images != count:
            raise NotReached(
                f"{recorder.path} saw {recorder.images} of {count} images. Expected every pass to go through it once. "
                "Remove what skips or repeats the block, or measure the model without it."
            )
    return [row for recorder in recorders for row in recorder.rows()]


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attentions at `blocks.i.attn`. Raises HostError if there is none, or one of an unknown class."""
    known = f"Expected one of {slots.names(HOSTS)}, or an attention grafted into one."
    found = slots.attentions(model)
    for i, attention in enumerate(found):
        if not isinstance(attention, Attention) and type(attention) not in HOSTS:
            raise HostError(
                f"blocks.{i}.attn is a {slots.names([type(attention)])}. {known} Use another "
                "model: it is not known how this one makes its map."
            )
    if not found:
        raise HostError(f"{type(model).__name__} has no blocks.i.attn. {known} Give a timm ViT, unwrapped.")
    return found


class Recorder:
    """The forward hook of one attention: recomputes its map, adds up the indicators, and forgets the map."""

    def __init__(self, layer: int, attention: nn.Module):
        self.layer, self.attention, self.images = layer, attention, 0
        self.paper: dict[str, Tensor] = {}  # () or (H)
        self.sums: dict[str, Tensor] = {}  # (H), over images

    @property
    def path(self) -> str:
        return f"blocks.{self.layer}.attn"

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        given = {name: value for name, value in given.items() if name not in ("self", "seen")}
        own = module if isinstance(module, Attention) else Attention.of(module)
        q, k, maps, again = recompute(own, **given)
        self.verify(again, output)
        if type(own).project is not Attention.project:  # q and k before sigma: those of the plain attention underneath
            q, k, _ = Attention.of(own).attend(**given)[1]
        self.add(q, k, maps)

    def verify(self, again: Tensor, output: Tensor) -> None:
        error, largest = (again - output).abs().max().item(), output.abs().max().item()
        if not error <= max(1e-3, 4 * torch.finfo(output.dtype).eps) * largest:
            raise HostError(
                f"{self.path} returned values up to {largest:.3g}, but its recomputed map gives others, off by "
                f"{error:.3g}. Expected equal ones. Take out what changes this attention, its map cannot be trusted."
            )

    def add(self, q: Tensor, k: Tensor, maps: Tensor) -> None:
        """q, k (2B, H, N, K) and maps (2B, H, N, N): first the clean images, then the same with noise."""
        half = len(maps) // 2
        clean, noisy = maps[:half], maps[half:]
        if not self.images:
            self.paper["angular_alignment"] = indicators.angular_alignment(q[half : half + 1], k[half : half + 1])[0]
            self.paper["perturbation_robustness"] = indicators.perturbation_robustness(clean[:1], noisy[:1])[0]
        values = {
            "angular_alignment": indicators.angular_alignment(q[:half], k[:half]),
            "selectivity": indicators.selectivity(clean),
            "effective_tokens": indicators.effective_tokens(clean),
            "attention_entropy": indicators.attention_entropy(clean),
            "perturbation_robustness": indicators.relative_change(clean, noisy),
        }
        self.paper["selectivity"] = values["selectivity"].mean()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.sum(dim=0).cpu().double()
        self.images += half

    def rows(self) -> list[Row]:
        """Spectra, if the attention has learned ones, then what was recorded, paper form first."""
        sigma = getattr(self.attention, "sigma", None)  # (H, K)
        exact = None if sigma is None else sigma.detach().cpu().double()
        values = {} if exact is None else {key: indicator(exact) for key, indicator in SPECTRAL.items()}
        values |= {(name, "paper"): value for name, value in self.paper.items()}
        values |= {(name, "corrected"): total / self.images for name, total in self.sums.items()}
        return [
            {"layer": self.layer, "head": head, "indicator": name, "form": form, "value": number}
            for (name, form), value in values.items()
            for head, number in ([(None, value.item())] if value.ndim == 0 else enumerate(value.tolist()))
        ]


def recompute(
    attention: Attention,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    state: TokenState = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, N, D) -> q, k (B, H, N, K), attention map (B, H, N, N), and the output (B, N, D) that this map gives."""
    q, k, v = attention.attend(x, rope, attn_mask, is_causal, state)[1]
    wide = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        maps = attention.normalize(masked(attention.scores(q.to(wide), k.to(wide), state), attn_mask, is_causal))
        z = maps @ v.to(wide)
    return q, k, maps, attention.merge(z.to(v.dtype), x)


@contextmanager
def hooked(recorders: Iterable[Recorder]) -> Iterator[None]:
    """Recorders as forward hooks of their attentions while the body runs."""
    handles = [r.attention.register_forward_hook(r, with_kwargs=True) for r in recorders]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients while the body runs; afterwards every module's mode and the random state as before.

    Random state: of torch, numpy and Python, for models that draw from those.
    """
    modes, drawn = {module: module.training for module in model.modules()}, (random.getstate(), np.random.get_state())
    try:
        with torch.no_grad(), torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
