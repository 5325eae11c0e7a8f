"""Masked autoencoder: hidden patches are painted from the visible ones; no labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitreous.base.errors import HostError, MaskError, SettingError
from vitreous.base.metrics import Metric
from vitreous.data import Data, NoTarget
from vitreous.hosts.host import embed, host_of, run, walkable
from vitreous.hosts.stream_ends import Embed, StreamEnd
from vitreous.layers.stream import Stream
from vitreous.tasks._features import features, neighbour_accuracy
from vitreous.tasks._task import Batch, Dice, Objective, Outputs, Task

KNN = Metric("knn", "%", "higher", "images whose nearest others are of their class")


@dataclass(frozen=True, kw_only=True)
class MaskedAutoencoder(Task):
    """Learn without labels by painting hidden patches from the visible ones.

    The network gets the visible patches alone, so a step costs little; a small decoder, which is
    not shipped with the network, gets a learned token in each hidden place and gives pixels.

        loss = mean over hidden patches of the mean over pixels of (painted - pixel)^2

    After He et al. 2021, arXiv 2111.06377; settings for X-rays: Xiao et al. 2022, arXiv 2210.12843
    (hide=0.9, depth=2). Differs: the network's positions are its own, learned ones.

    hide: share of the patches that is hidden, in (0, 1). width, depth, heads: of the decoder.
    normalised: pixels of each patch are brought to mean 0 and variance 1 first. Raises HostError
    where tokens and patches are not one to one, SettingError for a share that leaves no patch.
    """

    paper: ClassVar[str] = "He et al. 2021, arXiv 2111.06377; Xiao et al. 2022, arXiv 2210.12843"
    target = NoTarget
    metrics = (Metric("loss", "", "lower", "error of the painted pixels"), KNN)
    hide: float = 0.75
    width: int = 512
    depth: int = 8
    heads: int = 16
    normalised: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.hide < 1:
            raise SettingError(f"Found hide={self.hide}. Expected a share of the patches, above 0 and below 1. Give 0.75.")
        if min(self.width, self.depth, self.heads) < 1 or self.width % (4 * self.heads):
            raise SettingError(
                f"Found width={self.width}, depth={self.depth}, heads={self.heads}. Expected 1 or more of each, and a width "
                "that four times the heads divide. Give for example width=512,depth=8,heads=16."
            )

    def build(self, model: nn.Module, data: Data | None) -> MaskedAutoencoderObjective:
        check_patches(model, self.hide)
        return MaskedAutoencoderObjective(model, self)


class MaskedAutoencoderObjective(Objective):
    """The network and its decoder. A test hides the same patches of every image."""

    columns = ("loss",)
    shipped = ("decoder",)

    def __init__(self, model: nn.Module, task: MaskedAutoencoder):
        super().__init__(model)
        self.task = task
        patch, channels = model.patch_embed.patch_size, model.patch_embed.proj.in_channels
        self.decoder = Decoder(model.embed_dim, task, channels * patch[0] * patch[1], host_of(model).prefix > 0)

    def draw(self, images: Tensor, target: Tensor, dice: Dice) -> Batch:
        """images; keep (B, n): which patches are seen."""
        return {"images": images, "keep": self.chosen(dice.uniform(self.places(images)))}

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return {"masked_autoencoder": self.errors(batch["images"], batch["keep"]).mean()}

    def predict(self, batch: Batch) -> Outputs:
        """loss (B,), features (B, D), target (B, ...)."""
        images = batch["images"]
        noise = torch.rand(self.places(images), generator=torch.Generator().manual_seed(0)).to(images.device)
        errors = self.errors(images, self.chosen(noise.expand(len(images), -1)))
        return {"loss": errors, "features": features(self.model, images), "target": batch["target"]}

    def score(self, outputs: Outputs) -> dict[str, float]:
        return {"loss": outputs["loss"].mean().item()} | neighbour_accuracy(outputs["features"], outputs["target"])

    def rows(self, outputs: Outputs) -> Iterator[tuple]:
        return ((f"{loss:.6f}",) for loss in outputs["loss"].tolist())

    def places(self, images: Tensor) -> int:
        height, width = self.model.patch_embed.dynamic_feat_size(images.shape[-2:])
        return height * width

    def chosen(self, noise: Tensor) -> Tensor:
        """noise (B, N) -> the patches that are seen, (B, n): those of least noise."""
        return noise.argsort(1)[:, : visible(noise.shape[1], self.task.hide)]

    def errors(self, images: Tensor, keep: Tensor) -> Tensor:
        """(B,) mean over the hidden patches of the mean squared error of their pixels."""
        target = patches_of(images.float(), self.model.patch_embed.patch_size)  # (B, N, p)
        if self.task.normalised:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (self.painted(images, keep).float() - target).square().mean(-1)
        hidden = torch.ones_like(error).scatter(1, keep, 0)
        return (error * hidden).sum(1) / hidden.sum(1)

    def painted(self, images: Tensor, keep: Tensor) -> Tensor:
        """All patches (B, N, p) as the decoder paints them from those in keep (B, n)."""
        stream = run(self.model, embed(self.model, images, keep=keep))
        grid = self.model.patch_embed.dynamic_feat_size(images.shape[-2:])
        return self.decoder(normed(self.model, stream), keep, grid, host_of(self.model).prefix)


class Decoder(nn.Module):
    """Tokens of the network (B, P + N, D) -> pixels of all patches (B, N, pixels).

    class_token: whether the first prefix token takes part; others of the prefix do not.
    """

    def __init__(self, width: int, task: MaskedAutoencoder, pixels: int, class_token: bool):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.class_token = class_token
        self.embed = nn.Linear(width, task.width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(task.width))
        self.blocks = nn.Sequential(*(Block(task.width, task.heads, qkv_bias=True, norm_layer=norm) for _ in range(task.depth)))
        self.norm = norm(task.width)
        self.pred = nn.Linear(task.width, pixels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, keep: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
        x = self.embed(tokens[:, prefix:])
        seen = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, keep, True)
        x = torch.where(seen[..., None], x, self.mask_token.to(x.dtype))
        x = x + positions(grid, x.shape[-1]).to(x)
        if self.class_token:
            x = torch.cat([self.embed(tokens[:, :1]), x], dim=1)
        return self.pred(self.norm(self.blocks(x)))[:, int(self.class_token) :]


def visible(patches: int, hide: float) -> int:
    """How many of N patches are seen: the whole part of (1 - hide) N.

    Raises SettingError for none or all of them.
    """
    count = int(patches * (1 - hide) + 1e-6)  # without the small number 100 * (1 - 0.9) would be 9
    if not 0 < count < patches:
        raise SettingError(
            f"Found hide={hide} for images of {patches} patches, of which {count} would be seen. Expected some seen and some "
            "hidden. Give another share, smaller patches or larger images."
        )
    return count


def patches_of(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) -> patches (B, N, p q C), row by row.

    In a patch, pixels row by row, the channels of each together.
    """
    height, width = (n // p for n, p in zip(images.shape[-2:], size, strict=True))
    cut = images.unflatten(-1, (width, size[1])).unflatten(-3, (height, size[0]))  # (B, C, h, p, w, q)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def positions(grid: tuple[int, int], width: int) -> Tensor:
    """(H W, width) fixed positions: sine and cosine of the column, then of the row.

    At width / 4 frequencies 10000^(-4 i / width) each. The column comes first, as in the authors'
    code and weights.
    """
    rate = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (place.flatten()[:, None] * rate for place in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


def normed(model: nn.Module, stream: Stream) -> Tensor:
    """(B, P + N, D): the final norm of one token for each place.

    A hidden place has the norm of 0.
    """
    norm, tokens = model.norm, stream.tokens()
    return norm.host.forward(norm, tokens) if isinstance(norm, StreamEnd) else norm(tokens)


@torch.no_grad()
def check_patches(model: nn.Module, hide: float) -> None:
    """Raise HostError unless the network runs on some patches and keeps a token for each."""
    walkable(model)
    patch_embed = model.patch_embed
    if type(patch_embed) not in (PatchEmbed, Embed) or type(patch_embed.proj) is not nn.Conv2d:
        kind = type(patch_embed.proj if type(patch_embed) in (PatchEmbed, Embed) else patch_embed).__name__
        raise HostError(
            f"patch_embed holds {kind}, whose tokens are not one to one the patches of the picture, so what is hidden would be "
            "seen. Expected timm's PatchEmbed for masked_autoencoder. Take the graft out first (vitreous.ungraft), or use "
            "another host."
        )
    like, modes = patch_embed.proj.weight, [(module, module.training) for module in model.modules()]
    images = torch.zeros(1, like.shape[1], *patch_embed.img_size, dtype=like.dtype, device=like.device)
    keep = torch.arange(visible(patch_embed.num_patches, hide), device=like.device)[None]
    reason = "some of the visible patches have no token behind the last block"
    try:
        stream = run(model.eval(), embed(model, images, keep=keep))
        ones = torch.ones(1, stream.x.shape[1] - stream.state.inserted, 1, device=like.device)
        seen = bool(stream.state.assignment.restore(ones)[0, host_of(model).prefix :][keep[0]].all())
    except MaskError as error:
        seen, reason = False, str(error).split(". ")[0]
    finally:
        for module, mode in modes:
            module.training = mode
    if not seen:
        raise HostError(
            f"The network cannot be run on some of its patches: {reason}. Expected attention to the visible patches, each of "
            "which keeps a token, for masked_autoencoder. Take the graft out first (vitreous.ungraft), or another task."
        )
