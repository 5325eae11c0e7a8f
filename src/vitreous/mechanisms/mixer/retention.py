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
from vitreous.layers.stream import TokenState
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
        between, others in front, where all see them. Queries, keys and values come from full
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
    Raises: HostError where the blocks cannot hand on a state; MaskError for masks and dropped
        tokens; SettingError.
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

    def initialise(self, settings: Retention, width: int, heads: int, generator: torch.Generator) -> None:
        self.settings, self.num_heads = settings, heads
        self.add_projections(dict.fromkeys(("q_proj", "k_proj", "v_proj", "proj"), width), width, generator)
        self.norm = nn.LayerNorm(width) if settings.output == "paper" else nn.Identity()

    def mix_tokens(self, tokens: Tensor, state: TokenState) -> Tensor:
        order = sequence(tokens.shape[1], state)
        q, k, v = self.project(tokens[:, order])
        log_decay = self.log_decay(q)
        with torch.autocast(q.device.type, enabled=False):  # sums over all tokens without a softmax: half is too coarse
            if self.settings.form == "parallel":
                o = parallel(q, k, v, log_decay)
            elif self.settings.form == "recurrent":
                o = recurrent(q, k, v, log_decay)
            else:
                o = chunkwise(q, k, v, log_decay, self.settings.chunk)
        o = self.norm(o.transpose(1, 2).flatten(2).to(tokens.dtype))  # (B, N, D)
        y = self.proj(F.gelu(o) if self.settings.output == "paper" else o)
        return y[:, inverse(order)]

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

    def reading(self) -> dict[str, Tensor]:
        return {"decay": log_decay(self.settings.decay, self.num_heads).exp()}


def log_decay(kind: str, heads: int) -> Tensor:
    """log gamma (H,), float64.

    kind: "vir", gamma = 1 - e^s with s from log 1/32 to log 1/512; "retnet", 1 - 2^(-5 - h).
    """
    if kind == "vir":
        return (-torch.logspace(-5, -9, heads, base=2, dtype=torch.float64)).log1p()
    return (-(2.0 ** -torch.arange(5, 5 + heads, dtype=torch.float64))).log1p()


def decay_mask(log_decay: Tensor, tokens: int) -> Tensor:
    """gamma^(i - j) for i >= j, else 0: log gamma (H,) -> (H, N, N)."""
    place = torch.arange(tokens, device=log_decay.device)
    # in the exponent, and not below 0: powers of negative distances would overflow
    distance = (place[:, None] - place).clamp(min=0)
    return (distance * log_decay[:, None, None]).exp().tril()


def weights(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """(Q K^T / sqrt(K)) * D, signed and causal: (B, H, N, N).

    q, k: (B, H, N, K). log_decay: log gamma (H,).
    """
    return (q @ k.mT) * q.shape[-1] ** -0.5 * decay_mask(log_decay, q.shape[2])


def parallel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Retention at once: q, k, v (B, H, N, K), log gamma (H,) -> (B, H, N, K).

    Stores (B, H, N, N).
    """
    return weights(q, k, log_decay) @ v


def recurrent(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Retention token by token, equal to `parallel`: N steps, one state (B, H, K, K)."""
    gamma, scale = log_decay.exp()[:, None, None], q.shape[-1] ** -0.5
    state, outputs = 0, []
    for q_n, k_n, v_n in zip(*(x.split(1, dim=2) for x in (q, k, v)), strict=True):  # (B, H, 1, K) each
        state = gamma * state + k_n.mT @ v_n
        outputs.append(scale * (q_n @ state))
    return torch.cat(outputs, dim=2)


def chunkwise(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int) -> Tensor:
    """Retention by chunks of tokens, equal to `parallel`.

    Within a chunk at once, between chunks by the state.
    """
    rate, scale = log_decay[:, None, None], q.shape[-1] ** -0.5
    state, outputs = torch.zeros_like(k[:, :, :1].mT @ v[:, :, :1]), []  # (B, H, K, K)
    for q_c, k_c, v_c in zip(*(x.split(chunk, dim=2) for x in (q, k, v)), strict=True):  # (B, H, n, K) each
        n = q_c.shape[2]
        age = torch.arange(1, n + 1, device=q.device)[:, None]  # of the state, seen from each token
        outputs.append(parallel(q_c, k_c, v_c, log_decay) + scale * (q_c @ state) * (age * rate).exp())
        state = (n * rate).exp() * state + k_c.mT @ (v_c * ((n - age) * rate).exp())
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
