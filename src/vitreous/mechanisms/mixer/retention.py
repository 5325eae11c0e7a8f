"""Retention (ViR): causal linear attention with a decay, in three equal forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import slots
from vitreous.base.errors import SettingError
from vitreous.hosts.mixer import Mixer
from vitreous.layers.stream import TokenState, take
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class Retention(Mechanism):
    """Attention becomes retention: products of Q and K that decay with distance, causal.

        O = ((Q K^T / sqrt(K)) * D) V,   D_ij = gamma_h^(i - j) for i >= j, else 0     no softmax
        S_n = gamma_h S_(n-1) + k_n^T v_n,   o_n = q_n S_n / sqrt(K)       the same, token by token
        y = W_O GELU(LN(concat_h O_h)) + b_O                           output=plain: W_O O + b_O

    Paper: Hatamizadeh, Ranzinger, Lan, Alvarez, Fidler, Kautz 2023, arXiv 2310.19731 (ViR, 1-D
        retention); gamma is fixed.
    Differs: class and register tokens of the host stand behind the patches, backwards, so that the
        class token is the last one and sees all others; inserted tokens that are read out stand
        between, others in front, where all see them. A dropped token gives nothing, and the state
        decays over its place. Queries, keys and values come from full
        linear layers.
    At start: changes the output; the displaced attention's weights are not used (keeps_weights is
        False).
    Cost: parallel stores (B, H, N, N); recurrent and chunkwise hold one (B, H, K, K) state, with
        gradients N and N / chunk of them. 4 D^2 + 4 D parameters per block, and 2 D of the
        LayerNorm.
    Settings: layers (0-based; default all). heads (default: the host's). form: parallel, recurrent
        or chunkwise. chunk: tokens per chunk. decay: vir = 1 - exp(linspace(log 1/32, log 1/512,
        heads)), retnet = 1 - 2^(-5 - h). output: paper or plain. seed: of the weights,
        N(0, 0.02^2) cut at two standard deviations.
    Raises: HostError where the blocks cannot hand on a state; MaskError for masks, and for tokens that
        were dropped after some were merged; SettingError.
    """

    paper: ClassVar[str] = "Hatamizadeh et al. 2023, arXiv 2310.19731"
    requires: ClassVar[tuple[str, ...]] = ("stream", "grid", "halves")
    keeps_weights: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = (
        "retention:form=chunkwise,chunk=5,layers=1+3,heads=4",
        "retention:form=recurrent,decay=retnet,output=plain",
    )

    layers: tuple[int, ...] | None = None
    heads: int | None = None
    form: Literal["parallel", "recurrent", "chunkwise"] = "parallel"
    chunk: int = 64
    decay: Literal["vir", "retnet"] = "vir"
    output: Literal["paper", "plain"] = "paper"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.chunk < 1:
            raise SettingError(f"Found chunk={self.chunk}. Expected 1 or more tokens. Give such a number.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        width, layers = slots.width(model), slots.layer_indices(model, self.layers)
        heads, generator = slots.heads_of_a_mixer(model, self.heads), torch.Generator().manual_seed(self.seed)

        def initialise(new: RetentionMixer, layer: int) -> None:
            new.initialise(self, width, heads, generator)

        return slots.put_mixers(model, layers, RetentionMixer, initialise, self.name)


class RetentionMixer(Mixer):
    """Retention over the patches in raster order, then the prefix (see `sequence`)."""

    mixes_inserted: ClassVar[bool] = True
    decays: ClassVar[bool] = True

    def initialise(self, settings: Retention, width: int, heads: int, generator: torch.Generator) -> None:
        self.settings, self.num_heads = settings, heads
        self.add_projections(dict.fromkeys(("q_proj", "k_proj", "v_proj", "proj"), width), width, generator)
        self.norm = nn.LayerNorm(width) if settings.output == "paper" else nn.Identity()

    def mix_tokens(self, tokens: Tensor, state: TokenState) -> Tensor:
        order = sequence(tokens.shape[1], state)
        return self.retain(tokens[:, order], torch.arange(len(order), device=tokens.device))[:, inverse(order)]

    def mix_present(self, tokens: Tensor, place: Tensor, state: TokenState) -> Tensor:
        places = state.assignment.places
        seat = torch.tensor(inverse(sequence(places + state.inserted, state)), device=place.device)
        seats = torch.cat([seat[place], seat[places:].expand(place.shape[0], -1)], dim=1)  # (B, n + m)
        order = seats.argsort(1)
        return take(self.retain(take(tokens, order), take(seats, order)), order.argsort(1))

    def retain(self, tokens: Tensor, seats: Tensor) -> Tensor:
        """Tokens (B, N, D) in the order in which they are read -> (B, N, D); seats (N) or (B, N) in the whole sequence."""
        q, k, v = self.project(tokens)
        log_decay = self.log_decay(q)
        with torch.autocast(q.device.type, enabled=False):  # sums over all tokens without a softmax: half is too coarse
            if self.settings.form == "parallel":
                o = parallel(q, k, v, log_decay, seats)
            elif self.settings.form == "recurrent":
                o = recurrent(q, k, v, log_decay, seats)
            else:
                o = chunkwise(q, k, v, log_decay, self.settings.chunk, seats)
        o = self.norm(o.transpose(1, 2).flatten(2).to(tokens.dtype))  # (B, N, D)
        return self.proj(F.gelu(o) if self.settings.output == "paper" else o)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D) -> queries, keys and values, (B, H, N, K) each, in at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).to(wide)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def log_decay(self, like: Tensor) -> Tensor:
        """log gamma (H,), of the device and type of `like`."""
        return log_decay(self.settings.decay, self.num_heads).to(like)

    def effective_map(self, tokens: Tensor, state: TokenState) -> Tensor:
        """The signed map A (B, H, N, N) with O = A V.

        Rows and columns are in the order of `tokens` (B, N, D).
        """
        order = sequence(tokens.shape[1], state)
        q, k, _ = self.project(tokens[:, order])
        return weights(q, k, self.log_decay(q))[:, :, inverse(order)][..., inverse(order)]

    def products(self) -> tuple[int, int] | None:
        width = self.proj.in_features
        per = {"parallel": (0, 2 * width), "recurrent": (2 * width * width // self.num_heads, 0)}
        return per.get(self.settings.form)

    def reading(self) -> dict[str, Tensor]:
        return {"decay": log_decay(self.settings.decay, self.num_heads).exp()}


def log_decay(kind: str, heads: int) -> Tensor:
    """log gamma (H,), float64.

    kind: "vir", gamma = 1 - e^s with s from log 1/32 to log 1/512; "retnet", 1 - 2^(-5 - h).
    """
    if kind == "vir":
        return (-torch.logspace(-5, -9, heads, base=2, dtype=torch.float64)).log1p()
    return (-(2.0 ** -torch.arange(5, 5 + heads, dtype=torch.float64))).log1p()


def counted(x: Tensor, seats: Tensor | None) -> Tensor:
    """The seats, or 0, 1, 2, ... for the N tokens of x (B, H, N, K)."""
    return torch.arange(x.shape[2], device=x.device) if seats is None else seats


def decayed(log_decay: Tensor, steps: Tensor) -> Tensor:
    """gamma^steps: log gamma (H,), steps (N) or (B, N) -> (H, N, 1) or (B, H, N, 1)."""
    return (steps[..., None, :] * log_decay[:, None]).exp()[..., None]


def decay_mask(log_decay: Tensor, seats: Tensor) -> Tensor:
    """gamma^(s_i - s_j) for i >= j, else 0: log gamma (H,), rising seats s (N) or (B, N) -> (H, N, N) or (B, H, N, N)."""
    # in the exponent, and not below 0: powers of negative distances would overflow
    distance = (seats[..., :, None] - seats[..., None, :]).clamp(min=0)
    return (distance[..., None, :, :] * log_decay[:, None, None]).exp().tril()


def weights(q: Tensor, k: Tensor, log_decay: Tensor, seats: Tensor | None = None) -> Tensor:
    """(Q K^T / sqrt(K)) * D, signed and causal: (B, H, N, N).

    q, k: (B, H, N, K). log_decay: log gamma (H,). seats: (N) or (B, N), rising: where the tokens are in
    the whole sequence, where some were dropped; None: one after the other.
    """
    return (q @ k.mT) * q.shape[-1] ** -0.5 * decay_mask(log_decay, counted(q, seats))


def parallel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, seats: Tensor | None = None) -> Tensor:
    """Retention at once: q, k, v (B, H, N, K), log gamma (H,), seats as in `weights` -> (B, H, N, K).

    Stores (B, H, N, N).
    """
    return weights(q, k, log_decay, seats) @ v


def recurrent(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, seats: Tensor | None = None) -> Tensor:
    """Retention token by token, equal to `parallel`: N steps, one state (B, H, K, K)."""
    seats, scale = counted(q, seats), q.shape[-1] ** -0.5
    gamma = decayed(log_decay, seats.diff(prepend=seats[..., :1]))  # since the token before
    state, outputs = 0, []
    for q_n, k_n, v_n, fall in zip(*(x.split(1, dim=-2) for x in (q, k, v, gamma)), strict=True):  # (B, H, 1, K) each
        state = fall * state + k_n.mT @ v_n
        outputs.append(scale * (q_n @ state))
    return torch.cat(outputs, dim=2)


def chunkwise(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int, seats: Tensor | None = None) -> Tensor:
    """Retention by chunks of tokens, equal to `parallel`.

    Within a chunk at once, between chunks by the state.
    """
    seats, scale = counted(q, seats), q.shape[-1] ** -0.5
    last = seats[..., :1]  # of the chunk before; the state is 0 in the first one
    state, outputs = torch.zeros_like(k[:, :, :1].mT @ v[:, :, :1]), []  # (B, H, K, K)
    parts = *(x.split(chunk, dim=2) for x in (q, k, v)), seats.split(chunk, dim=-1)
    for q_c, k_c, v_c, here in zip(*parts, strict=True):  # (B, H, n, K) each
        before = scale * (q_c @ state) * decayed(log_decay, here - last)
        outputs.append(parallel(q_c, k_c, v_c, log_decay, here) + before)
        end = here[..., -1:]
        state = decayed(log_decay, end - last) * state + k_c.mT @ (v_c * decayed(log_decay, end - here))
        last = end
    return torch.cat(outputs, dim=2)


def sequence(tokens: int, state: TokenState) -> list[int]:
    """Indices of the tokens (prefix, patches, inserted) in the order in which they are read.

    Inserted registers, patches, inserted tokens that are read out, the prefix backwards: each sees
    what is before it, so registers behind the patches would not be seen by these.
    """
    patches = range(state.prefix, tokens - state.inserted)
    inserted = list(zip(range(patches.stop, tokens), state.read_out, strict=True))
    registers, read = ([i for i, is_read in inserted if is_read == wanted] for wanted in (False, True))
    return [*registers, *patches, *read, *reversed(range(state.prefix))]


def inverse(order: list[int]) -> list[int]:
    """Where each token stands in the sequence."""
    return sorted(range(len(order)), key=order.__getitem__)
