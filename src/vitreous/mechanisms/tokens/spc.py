"""SVD-ViT's spatial principal components: singular vectors of the tokens as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.read_out import read_tokens
from vitreous.layers.exposed import Exposed
from vitreous.layers.foreground import along_direction, place_bump, towards_centre
from vitreous.layers.spectral import leading_subspace, unit_rows
from vitreous.layers.stream import PLAIN, TokenState, insert, split
from vitreous.mechanism import Mechanism

MOMENTUM = 0.05  # share of a training batch in the running direction of basis=calibrated; ten photographs suffice for one
SHARE = "How much each token has to do with the SPC tokens, mean over them: the squared entry of the singular vector, 1 in all."


@dataclass(frozen=True, kw_only=True)
class SPC(Mechanism):
    """Tokens along the leading singular vectors of an image's own tokens.

    They are appended after some block and read out.

        X = U S V^T (M x D, class token included),   T = U_n^T X = S_n V_n^T,   SSVA: T' = W(X) T

    Paper: Murata, Hotta 2026, arXiv 2602.02765. Its formulas are known in outline only; ours: the read-out, which is the
        mean of class token and SPC tokens behind the final norm (it must see them, since insertion after the last block
        changes accuracy); no centring; signs; SSVA and ID-RSVD in detail (`mixing`, `learned_sketch`).
    Differs: U carries no gradient unless gradient=through (it is ill-defined where singular values meet).
    At start: changes the output; read=gated leaves it bit for bit.
    Cost: a thin randomised SVD of M x D, and `tokens` more tokens in the blocks that follow. No parameters by default.
    Settings: after (blocks that have run; default depth - 1). components: vectors taken, mixed to `tokens` by SSVA; without
        SSVA the leading `tokens`. basis: svd, or a control: random, trailing, mean; or calibrated (ours): tokens pooled over
        the patches along a direction of the features that points at the subject, `foreground_weights`; it is that of the
        batch in training, and a running mean of those, a buffer, afterwards. sketch: oversampling + power steps +
        learned (ID-RSVD, at most one power step, else its gradient vanishes). ssva: mix. sign: a vector weighs the tokens
        that resemble the token mean | the class token positively, or its entries sum to 0 or more; squared: it weighs them
        by u_i^2, which sums to 1 and has no sign (ours). gradient: detach | through.
        rows: raw | unit (vectors of unit, centred rows: without artifact spikes). read: mean | gated (no token is inserted;
        the SPC tokens are added to what the head reads, through gates that start at 0) | learned (a learned token is
        inserted for each, to which the layer-normed SPC token is added through a gate that starts at 0; ours).
    Raises: HostError on rotary hosts, where the head cannot read tokens and, for basis=calibrated, where the patch embedding
        is not timm's; SettingError; MaskError where basis=calibrated trains on tokens that have no places.
    """

    paper: ClassVar[str] = "Murata, Hotta 2026, arXiv 2602.02765"
    no_decay: ClassVar[tuple[str, ...]] = ("gate", "mix", "learned")
    examples: ClassVar[tuple[str, ...]] = (
        "spc:after=2,ssva=true",
        "spc:after=2,read=gated",
        "spc:after=2,tokens=2,sketch=4+1+true,rows=unit,sign=class",
        "spc:after=2,sign=squared,read=learned",
        "spc:after=2,basis=calibrated",
    )

    after: int | None = None
    components: int = 8
    tokens: int = 4
    basis: Literal["svd", "random", "trailing", "mean", "calibrated"] = "svd"
    sketch: tuple[int, int, bool] = (8, 2, False)
    ssva: bool = False
    sign: Literal["mean", "class", "sum", "squared"] = "mean"
    gradient: Literal["detach", "through"] = "detach"
    rows: Literal["raw", "unit"] = "raw"
    read: Literal["mean", "gated", "learned"] = "mean"

    def __post_init__(self):
        super().__post_init__()
        oversample, power, learned = self.sketch
        if min(self.components, self.tokens) < 1 or min(oversample, power) < 0:
            raise SettingError(f"Found {self}. Expected components and tokens from 1, sketch from 0+0. Raise the number.")
        if self.ssva and self.tokens > self.components:
            raise SettingError(
                f"Found tokens={self.tokens} and components={self.components}. Expected at most as many tokens as "
                "components: SSVA mixes components into fewer tokens. Raise components or lower tokens."
            )
        if learned and power > 1:
            raise SettingError(
                f"Found a learned sketch with {power} power steps. Expected 0 or 1: after more, the vectors no longer "
                "depend on the sketch and it cannot learn. Use for example sketch=8+1+true."
            )
        if learned and self.basis != "svd":
            raise SettingError(f"Found a learned sketch with basis={self.basis}. Expected basis=svd. Change one of them.")

    @property
    def requires(self) -> tuple[str, ...]:
        further = ("class_token",) * (self.sign == "class") + ("grid",) * (self.basis == "calibrated")
        return ("stream", "insert", "reads_inserted", *further)

    @property
    def exact_at_init(self) -> bool:
        return self.read == "gated"

    def changes(self, model: nn.Module) -> dict[str, Any]:
        after = slots.block_count(model, self.after)
        step = Components(self, slots.width(model), *read_tokens(model))
        opened = slots.open_stream(model, self.name) if self.basis == "calibrated" else {}
        return opened | slots.add_step(model, after - 1, "after", step)


class Components(nn.Module):
    """The token step of SPC: (x (B, n, D), state) -> `tokens` more.

    Or the same tokens with gated additions.
    """

    def __init__(self, settings: SPC, width: int, heads: tuple[int, int | None], pooled: bool):
        super().__init__()
        self.settings, self.heads, self.pooled = settings, heads, pooled
        n, m = settings.components if settings.ssva else settings.tokens, settings.tokens
        self.taken = n
        oversample, _, learned = settings.sketch
        self.choice = skip_init(nn.Linear, width, m * n) if settings.ssva else None
        self.mix = nn.Parameter(torch.zeros(m)) if settings.ssva else None
        self.sketch = skip_init(nn.Linear, width, n + oversample, bias=False) if learned else None
        self.gate = nn.Parameter(torch.zeros(m, width)) if settings.read != "mean" else None
        self.register_buffer("direction", torch.zeros(width) if settings.basis == "calibrated" else None)
        self.exposed = Exposed("spc_share", "map", SHARE) if settings.basis != "mean" else None
        generator = torch.Generator().manual_seed(0)
        # The same start as `extra_tokens`, so that the two differ in the SPC tokens alone.
        self.learned = nn.Parameter(0.02 * torch.randn(m, width, generator=generator)) if settings.read == "learned" else None
        with torch.no_grad():
            if self.choice is not None:  # peaked at its own component, so that mixing starts selective
                self.choice.weight.zero_()
                self.choice.bias.copy_(5 * torch.eye(m, n).flatten())
            if self.sketch is not None:
                self.sketch.weight.normal_(std=width**-0.5, generator=generator)

    def forward(self, x: Tensor, state: TokenState, qkv: None) -> tuple[Tensor, TokenState]:
        tokens, _ = split(x, state)  # (B, M, D): inserted ones are no part of the picture
        made = self.spc_tokens(tokens, state)  # (B, tokens, D)
        if self.gate is None:
            return insert(x, state, made, read_out=True)
        if self.learned is not None:
            content = F.layer_norm(made, made.shape[-1:]).to(x.dtype)
            return insert(x, state, self.learned + self.gate * content, read_out=True)
        # Component tokens are about sqrt(M) times as long as the tokens they are made of; the gate
        # works on usual length.
        added = (self.gate * made.to(x.dtype)).sum(1, keepdim=True) / tokens.shape[1] ** 0.5  # (B, 1, D)
        start, stop, _ = slice(*self.heads).indices(tokens.shape[1])
        return torch.cat([x[:, :start], x[:, start:stop] + added, x[:, stop:]], dim=1), state

    def spc_tokens(self, x: Tensor, state: TokenState = PLAIN) -> Tensor:
        """x (B, M, D) -> component tokens (B, tokens, D) in float32 or wider, signs settled, SSVA
        done.
        """
        settings = self.settings
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            if settings.basis == "mean":
                made = wide.mean(1, keepdim=True).expand(-1, self.taken, -1)
            else:
                weights = self.basis(wide, state).transpose(1, 2)  # U^T (B, n, M)
                shares = self.exposed(weights if settings.basis == "calibrated" else weights.square())  # rows sum to 1
                made = (shares if settings.sign == "squared" else weights) @ wide
            if self.choice is None:
                return made
            weights = mixing(self.choice, self.mix, wide[:, 0] if self.heads[0] == 0 else wide.mean(1), self.taken)
            return weights @ made

    def basis(self, x: Tensor, state: TokenState = PLAIN) -> Tensor:
        """U (B, M, n): per-token weights, one column per component."""
        settings, n = self.settings, self.taken
        if settings.basis == "calibrated":
            return self.calibrated(x, state)
        oversample, power, _ = settings.sketch
        if settings.basis == "random":
            return random_basis(x, n)
        rows = unit_rows(x) if settings.rows == "unit" else x
        if settings.gradient == "detach":
            rows = rows.detach()
        sign = sign_reference(x.detach(), settings.sign)
        if settings.basis == "trailing":
            rank = min(rows.shape[1:])
            return leading_subspace(rows, rank, method="exact", sign=sign).U[..., -n:]
        sketch = None if self.sketch is None else learned_sketch(rows, self.sketch)
        gradient = "through" if self.sketch is not None else settings.gradient
        return leading_subspace(rows, n, oversample=oversample, power=power, sketch=sketch, sign=sign, gradient=gradient).U

    def calibrated(self, x: Tensor, state: TokenState) -> Tensor:
        """Weights (B, M, n) of basis=calibrated, 0 for prefix tokens; in training the running mean moves on.

        As in batch normalisation, a training batch goes by its own direction and only evaluation by
        the running mean. So what a block computes depends on its input alone, and gradient
        checkpointing, which computes it again in the backward pass, gets the same; the mean stays
        then. Nor does an image's own bump decide its map, as long as the batch has tens of images.
        """
        patches = x[:, state.prefix :]
        rows = unit_rows(patches.detach() if self.settings.gradient == "detach" else patches)
        direction = self.direction.to(rows)
        if self.training:
            direction = towards_centre(rows.detach(), place_bump(state, rows, "spc:basis=calibrated"))
            if not recomputing():
                self.direction.lerp_(direction.to(self.direction), MOMENTUM)
        return F.pad(foreground_weights(rows, direction, self.taken), (0, 0, state.prefix, 0))


def foreground_weights(rows: Tensor, direction: Tensor, n: int) -> Tensor:
    """Weights (B, P, n) that sum to 1 over the patches: softmax(i z), i = 1 to n, each sharper than the last.

    z is Zw brought to mean 0 and variance 1 over the patches of an image, so that only the
    direction of w (D,) counts; 0, and the weights even, where there is no direction yet.
    rows: Z (B, P, D). Zw: `lens.direction`; pooling by it is ours.
    """
    z = along_direction(rows, direction)
    return (z[..., None] * torch.arange(1, n + 1, device=z.device)).softmax(1)


def recomputing() -> bool:
    """Whether a backward pass runs: gradient checkpointing then computes what was computed before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def mixing(choice: nn.Linear, mix: Tensor, summary: Tensor, components: int) -> Tensor:
    """SSVA, our reading: W (B, m, n), rows that sum to one.

    They say which components each token is made of.

    summary: (B, D), the class token or the token mean; it is normed, and even in the signs of the
    components. W = (1 - g) I + g softmax(choice(summary)), g = mix (m,) from 0: it starts as the m
    leading components, exactly.
    """
    logits = applied(choice, summary).unflatten(-1, (-1, components))
    start = torch.eye(len(mix), components, dtype=logits.dtype, device=logits.device)
    return start + mix[:, None] * (logits.softmax(-1) - start)


def learned_sketch(x: Tensor, selector: nn.Linear) -> Tensor:
    """ID-RSVD, our reading: a sketch (B, D, k) of tokens that the image itself selects, X^T
    softmax_tokens(X W_a).
    """
    return x.transpose(1, 2) @ applied(selector, x).softmax(dim=1)


def applied(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear of the normed x (..., D), in the linear's own dtype (a model may be in half
    precision) and back.
    """
    return linear(F.layer_norm(x, x.shape[-1:]).to(linear.weight.dtype)).to(x.dtype)


def random_basis(x: Tensor, n: int) -> Tensor:
    """A control: n orthonormal columns (B, M, n) that do not depend on the image.

    The same for all of M tokens.
    """
    noise = torch.randn(1, x.shape[1], n, generator=torch.Generator().manual_seed(0)).to(x)
    return leading_subspace(noise, n, method="exact", sign=None).U.expand(x.shape[0], -1, -1)


def sign_reference(x: Tensor, rule: str) -> Tensor | None:
    """The tokens' products (B, M) that each vector shall correlate with; None: the sum.

    With their mean or with the class token.
    """
    if rule in ("sum", "squared"):
        return None
    towards = x[:, :1] if rule == "class" else x.mean(1, keepdim=True)
    return (x @ towards.transpose(1, 2)).squeeze(-1)
