"""ChannelViT: every channel of an image has patch tokens of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from vitreous import slots
from vitreous.base.errors import DataError, HostError, SettingError
from vitreous.hosts.stream_ends import Embed, Opening
from vitreous.layers.adoption import adopt
from vitreous.layers.stream import TokenState
from vitreous.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class ChannelViT(Mechanism):
    """One token for each patch of each channel, with a learned vector for each channel.

    Projection and positions are shared.

        x[c, n] = w * image[c, patch n] + b + position[n] + channel_embed[c]         C * N tokens, channel by channel
        in training: m ~ U{1..C}, then m random channels of the batch; the tokens of the others are absent

    Paper: Bao, Sivanandan, Karaletsos 2024, arXiv 2309.16108 (ChannelViT; hierarchical channel sampling).
    Differs: w starts as the host's projection summed over its channels (what a grey image meets in the host). Positions
        of other image sizes are resampled as the host does.
    At start: changes the output. The host's patch projection is replaced (keeps_weights is False).
    Cost: C times the tokens; parameters: + C * D, and the projection has one input channel instead of the host's.
    Settings: channels: how many the embedding knows (default: the host's). sampling: drop channels in training.
        seed: of channel_embed, N(0, 0.02^2) cut at two standard deviations.
    Raises: HostError on rotary hosts and where patches are not timm's; DataError for images of other channels: say which
        ones there are with `present(model, (0, 2))`.
    """

    paper: ClassVar[str] = "Bao, Sivanandan, Karaletsos 2024, arXiv 2309.16108"
    requires: ClassVar[tuple[str, ...]] = ("stream", "grid", "insert")
    keeps_weights: ClassVar[bool] = False
    no_decay: ClassVar[tuple[str, ...]] = ("channel_embed",)
    examples: ClassVar[tuple[str, ...]] = ("channelvit:sampling=false",)

    channels: int | None = None
    sampling: bool = True
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.channels is not None and self.channels < 1:
            raise SettingError(f"Found channels={self.channels}. Expected 1 or more. Give such a number.")

    def changes(self, model: nn.Module) -> dict[str, Any]:
        slots.plain_projection(model, self.name)
        embed = ChannelEmbed.of(model.patch_embed, slots.prefix(model))
        embed.initialise(self, slots.width(model))
        path, displaced = slots.after_positions(model)
        return slots.open_stream(model, self.name, embed) | {path: Fold.of(displaced)}

    def renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {name.replace("classifier.", "head."): value for name, value in tensors.items()}
        stem = "patch_embed.channel_embed"
        if f"{stem}.weight" in changed:  # with sampling, an nn.Embedding
            changed[stem] = changed.pop(f"{stem}.weight")
        elif stem in changed and changed[stem].ndim == 5:
            changed[stem] = changed[stem][0, :, :, 0, 0].T.contiguous()  # (1, D, C, 1, 1) -> (C, D)
        weight = changed.get("patch_embed.proj.weight")
        if weight is not None and weight.ndim == 5:
            changed["patch_embed.proj.weight"] = weight.squeeze(2)  # of a convolution over channels, too
        return changed


def present(model: nn.Module, channels: Iterable[int] | None) -> nn.Module:
    """Say which channels the images have from now on, by id and in order.

    None: all that are known. Returns the model.

    Raises HostError if the model has no ChannelViT, SettingError for ids that its embedding does
    not know.
    """
    embed = getattr(model, "patch_embed", None)
    if not isinstance(embed, ChannelEmbed):
        raise HostError("The model has no ChannelViT. Expected one at patch_embed. Call graft(model, 'channelvit') first.")
    known = len(embed.channel_embed)
    chosen = tuple(range(known) if channels is None else channels)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(known)):
        raise SettingError(
            f"Found channels {chosen}. Expected one or more different ids from 0 to {known - 1}, which the embedding knows. "
            "Give such ids, or graft with more channels (channelvit:channels=n)."
        )
    embed.channels = chosen
    return model


class ChannelEmbed(Embed):
    """Patches of each channel with its embedding, folded into the batch so that the host adds
    positions to each.

    channels: the ids of the channels that images have, in their order.
    """

    channels: tuple[int, ...]

    def initialise(self, settings: ChannelViT, width: int) -> None:
        """Make the projection of one channel and the embedding (C, D)."""
        host = self.proj
        known = host.in_channels if settings.channels is None else settings.channels
        self.proj = skip_init(nn.Conv2d, 1, width, kernel_size=host.kernel_size, stride=host.stride, bias=False)
        self.proj.weight = nn.Parameter(host.weight.detach().sum(1, keepdim=True))
        self.proj.bias = None if host.bias is None else nn.Parameter(host.bias.detach().clone())
        generator = torch.Generator().manual_seed(settings.seed)
        start = nn.init.trunc_normal_(torch.empty(known, width), std=0.02, a=-0.04, b=0.04, generator=generator)
        self.channel_embed = nn.Parameter(start)
        self.sampling = settings.sampling
        self.channels = tuple(range(known))

    def patches(self, x: Tensor) -> tuple[Tensor, TokenState]:
        """x (B, C, H, W) -> (B * m, N, D), or (B * m, H, W, D) where the host takes images of any
        size; m channels stay.
        """
        ids, found, sampled = self.channels, x.shape[1], None
        if found != len(ids):
            raise DataError(
                f"Found images of {found} channels. Expected {len(ids)}: channels {'+'.join(map(str, ids))} of the "
                f"{len(self.channel_embed)} that the embedding knows. Say which channels there are with "
                "vitreous.mechanisms.embed.channelvit.present(model, ids), or graft with more (channelvit:channels=n)."
            )
        if self.training and self.sampling:
            chosen = sample(found)
            x, ids = x[:, chosen], [ids[i] for i in chosen]
            sampled = torch.tensor([i in chosen for i in range(found)], device=x.device)
        patches, state = super().patches(x.flatten(0, 1)[:, None])
        patches = patches.unflatten(0, (-1, len(ids)))  # (B, m, N, D) or (B, m, H, W, D)
        names = torch.stack([self.channel_embed[i] for i in ids])  # (m, D)
        names = names.view(len(ids), *[1] * (patches.ndim - 3), -1)
        return (patches + names).flatten(0, 1), replace(state, groups=len(ids), groups_present=sampled)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of all places, channels below each other: (C * H, W)."""
        height, width = super().dynamic_feat_size(img_size)
        return len(self.channels) * height, width


class Fold(nn.Module):
    """Channels from the batch back into the tokens, then the host's patch dropout.

    (B * m, P + N, D) -> (B, P + m * N, D).

    Where that drops patches, what it gives is a tensor without a state: the tokens no longer form a
    grid.
    """

    host: type[nn.Module]

    @classmethod
    def of(cls, displaced: nn.Module) -> Fold:
        new = adopt(cls, displaced)
        new.host = type(displaced)
        return new

    def forward(self, x: Opening) -> Opening | Tensor:
        state = x.state
        tokens = x.x.unflatten(0, (-1, state.groups))  # (B, m, P + N, D)
        prefix, patches = tokens[:, 0, : state.prefix], tokens[:, :, state.prefix :].flatten(1, 2)
        return self.host.forward(self, Opening(torch.cat([prefix, patches], dim=1), state))


def sample(channels: int) -> list[int]:
    """Hierarchical channel sampling: m ~ U{1..C}, then m of C channels, in order.

    Each set is equally likely.

    Draws from the global random state, as dropout does: this is noise of training, which a run's
    seed settles.
    """
    m = int(torch.randint(1, channels + 1, (), device="cpu"))
    return torch.randperm(channels, device="cpu")[:m].sort().values.tolist()
