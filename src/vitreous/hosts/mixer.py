"""A module in the place of attention that moves information between places in another way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from vitreous.base.errors import MaskError
from vitreous.layers.stream import PLAIN, TokenState, restore, split

M = TypeVar("M", bound="Mixer")


@dataclass(frozen=True)
class Quantity:
    """What a tensor of `Mixer.reading` is; its number of axes says how it is drawn.

    (C,): a bar for each of C heads or channels. (C, n): a curve each, over `axis`, whose first and
    last value are `span`, if it is not just counted. (C, rows, columns): a picture each, its origin
    (offset 0, frequency 0) in cell (rows // 2, columns // 2), as `torch.fft.fftshift` puts it.

    of: what C counts. unit: of the values. explains: one sentence for the page.
    """

    label: str
    unit: str = ""
    of: Literal["channel", "head"] = "channel"
    axis: str = ""
    span: tuple[float, float] | None = None
    explains: str = ""


class Mixer(nn.Module):
    """Base of token mixers without attention. A subclass defines `mix`, or `mix_tokens`.

    linear: f(a) + f(b) = f(a + b) for all patches a and b, so that unit vectors give the exact
    matrix between places (a bias, a norm or a gate by the input makes it False). quantities: what
    the tensors of `reading` are, by name; a subclass adds its own: {**Mixer.quantities, ...}.

    Each group of tokens (a channel with tokens of its own) is a picture of its own. Merged tokens:
    every place is mixed with the token that stands for it, and a token gets the mean of what its
    places got. Inserted tokens get nothing, unless `mixes_inserted`, and with `mix` neither do those
    of the prefix: their residual passes. Dropped places are refused, unless it `decays`.
    """

    wants_state = True  # blocks of ours then hand in the state of the stream
    linear: ClassVar[bool] = False
    mixes_inserted: ClassVar[bool] = False  # True: `mix_tokens` gets inserted tokens too, behind the patches
    attends: ClassVar[bool] = False  # True: it takes a softmax attention of its own, which `look` reads like any other
    decays: ClassVar[bool] = False  # True: weights fall along a sequence, and `mix_present` passes over places
    quantities: ClassVar[dict[str, Quantity]] = {
        "kernel": Quantity(
            "Kernel",
            explains="By how much a place moves the one that lies so far below and to the right, channel by channel.",
        ),
        "frequency_response": Quantity(
            "Frequency response", explains="Factor on each frequency of the picture; frequency 0, its mean, is in the middle."
        ),
        "radial_response": Quantity(
            "Frequency response by frequency",
            axis="cycles per patch",
            span=(0, 0.5),
            explains="Factor on frequencies of the picture, averaged over directions.",
        ),
        "decay": Quantity(
            "Decay", of="head", explains="Factor that weights fall by with every step between tokens, head by head."
        ),
    }

    @classmethod
    def instead_of(cls: type[M], attention: nn.Module) -> M:
        """A mixer with nothing of the attention but its mode and its hooks, which stay shared as in `adopt`.

        Hooks on the state dict are left out: they are about parameters that leave with it. No
        `__init__` of a subclass runs.
        """
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        hooks = {key: value for key, value in vars(attention).items() if "_hook" in key and "state_dict" not in key}
        vars(new).update(hooks, training=attention.training)
        return new

    def add_projections(self, widths: dict[str, int], width: int, generator: torch.Generator) -> None:
        """Add linear layers of `width` inputs, {name: outputs}: normal with std 0.02, cut at two of them; biases 0."""
        for name, out in widths.items():
            linear = skip_init(nn.Linear, width, out)
            nn.init.trunc_normal_(linear.weight, std=0.02, a=-0.04, b=0.04, generator=generator)
            nn.init.zeros_(linear.bias)
            self.add_module(name, linear)

    def reading(self) -> dict[str, Tensor]:
        """{name of `quantities`: (C,), (C, n) or (C, rows, columns)}: what is exact and can be drawn.

        Of the parameters alone, without gradients. What depends on the image goes through
        `layers.exposed.Exposed` instead. `look` stores and draws it.
        """
        return {}

    def mix(self, patches: Tensor) -> Tensor:
        """(B, *grid, D) -> (B, *grid, D), such as (B, H, W, D)."""
        raise TypeError(f"{type(self).__name__} does not say how it mixes: define mix(self, patches).")

    def mix_tokens(self, tokens: Tensor, state: TokenState) -> Tensor:
        """One token per place, prefix first, and inserted ones last, if any: (B, N, D) -> (B, N, D)."""
        prefix, patches = tokens[:, : state.prefix], tokens[:, state.prefix :]
        y = self.mix(patches.reshape(-1, *state.grid, patches.shape[-1])).reshape(patches.shape)
        return torch.cat([torch.zeros_like(prefix, dtype=y.dtype), y], dim=1)

    def mix_present(self, tokens: Tensor, place: Tensor, state: TokenState) -> Tensor:
        """Where places were dropped: tokens (B, n + m, D), m of them inserted, that lie at place (B, n) -> the same shape.

        As if the tokens of the other places gave nothing. Of mixers that say `decays` alone.
        """
        raise TypeError(f"{type(self).__name__} does not pass over places: define mix_present(self, tokens, place, state).")

    def products(self) -> tuple[int, int] | None:
        """Multiply-adds beside its linear layers, (per token, per pair of tokens); None: there is no such formula."""
        return None

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        state: TokenState = PLAIN,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Present tokens (B, n, D) -> (B, n, D). rope: not used, since the places are in the grid.

        seen: a list that gets the output, for token steps behind the mixer. Raises MaskError for a mask, and where a place
        has no token or is not known.
        """
        name = type(self).__name__
        # beside sizes the mask is our own, of merged tokens; the mean over places stands for it
        if is_causal or (attn_mask is not None and state.sizes is None):
            mask = "is_causal=True" if is_causal else f"attn_mask of shape {tuple(attn_mask.shape)}"
            raise MaskError(f"Found {mask}, but {name} has no scores to mask. Expected none. Call the model without a mask.")
        passes_over = self.decays and state.dropped and state.assignment.single
        if state.grid is None or (state.dropped and not passes_over):
            lost = "whose places are not known" if state.grid is None else "while some places have no token"
            raise MaskError(
                f"Found {x.shape[1]} tokens {lost}, but {name} mixes whole pictures. Expected a token for each place. Switch "
                "off what drops patches before it (patch_drop_rate, evit:fuse=false), or mix in earlier blocks."
            )
        if passes_over:
            place = state.assignment.own_places(x.shape[1] - state.inserted)
            y = self.mix_present(x, place, state).to(x.dtype)
        else:
            y = self.mix_restored(x, state)
        if seen is not None:
            seen.append(y)
        return y

    def mix_restored(self, x: Tensor, state: TokenState) -> Tensor:
        """Present tokens (B, n, D) -> (B, n, D): each at all of its places, and the mean of what these get."""
        original, inserted = restore(x, state)
        if self.mixes_inserted:
            mixed = self.mix_tokens(torch.cat([original, inserted], dim=1), state).to(x.dtype)
            y, beside = split(mixed, state)
        else:
            y, beside = self.mix_tokens(original, state).to(x.dtype), torch.zeros_like(inserted)
        y = y if state.assignment is None else state.assignment.gather(y)
        return torch.cat([y, beside], dim=1)


def mixers_in(model: nn.Module) -> dict[str, Mixer]:
    """{dotted path: mixer without attention}, in the order of the model's modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Mixer) and not module.attends}
