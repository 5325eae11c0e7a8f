"""Networks in stages: `Pyramid`, `Stage`, `Pool`, and convolutions of tokens.

Each stage halves the picture and widens its channels, then runs its blocks on the places as tokens.
A block is called with the tokens (B, P + N, D), P prefix tokens first, and with the grid (h, w) of
the other N = h w. `Pyramid` has what timm expects of a network beside `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.layers import global_pool_nlc, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vitreous.base.errors import SettingError

Grid = tuple[int, int]
POOLS = ("avg", "max", "avgmax")


def to_tokens(picture: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, h w, D)."""
    return picture.flatten(2).transpose(1, 2)


def to_picture(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, h w, D) -> (B, D, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def check_stages(**lists: Sequence[Any]) -> None:
    """Raise SettingError unless settings with one value per stage are lists, equally long."""
    single = next((f"{name}={values!r}" for name, values in lists.items() if not isinstance(values, (list, tuple))), None)
    if single:
        raise SettingError(f"Found {single}. Expected a list with a value per stage, such as (1, 2, 4). Give it so.")
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{name} of {len(values)}" for name, values in lists.items())
        raise SettingError(f"Found {lengths} stages. Expected equally many. Give each a value per stage.")


def head_width(dim: int, num_heads: int) -> int:
    """Channels per head. Raises SettingError unless the heads share them out evenly."""
    if dim % num_heads:
        raise SettingError(f"Found {num_heads} heads for a width of {dim}. Expected a divisor. Give such a number of heads.")
    return dim // num_heads


def conv_norm(
    in_chans: int,
    out_chans: int,
    kernel: int = 3,
    stride: int = 1,
    *,
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    act: Callable[[], nn.Module] | None = None,
    groups: int = 1,
    bias: bool = True,
) -> nn.Sequential:
    """A padded convolution, then norm and activation, where there are any.

    (B, in_chans, H, W) -> (B, out_chans, ceil(H / stride), ceil(W / stride)) for odd kernels.
    """
    conv = nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return nn.Sequential(conv, *([norm(out_chans)] if norm else []), *([act()] if act else []))


class DepthwiseConv(nn.Module):
    """A depth-wise convolution of tokens on their grid; prefix tokens pass by unchanged.

    (B, P + h w, D), (h, w) -> (B, P + h' w', D), h' = ceil(h / stride), w' = ceil(w / stride).
    norm: built with the width D, on the convolved picture.
    """

    def __init__(
        self,
        dim: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        norm: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, stride, kernel // 2, groups=dim, bias=bias)
        self.norm = norm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        prefix = x.shape[1] - grid[0] * grid[1]
        patches = to_tokens(self.norm(self.conv(to_picture(x[:, prefix:], grid))))
        return torch.cat([x[:, :prefix], patches], dim=1) if prefix else patches


class Stage(nn.Module):
    """A picture made smaller, and blocks on its places as tokens.

    (B, C, H, W) -> picture (B, D, h, w) and prefix tokens (B, P, D), P = 0 without a class token.
    downsample: (B, C, H, W) -> (B, D, h, w). blocks: called as block(tokens, grid). norm: of the
    tokens behind the blocks. cls_token: (1, P, D), joined in front of the tokens of this stage.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Iterable[nn.Module],
        norm: nn.Module | None = None,
        cls_token: nn.Parameter | None = None,
    ):
        super().__init__()
        self.downsample = downsample
        self.cls_token = cls_token
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.grad_checkpointing = False

    @property
    def prefix(self) -> int:
        """The number P of prefix tokens."""
        return 0 if self.cls_token is None else self.cls_token.shape[1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.downsample(x)
        grid = (x.shape[-2], x.shape[-1])
        x = to_tokens(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.run_blocks(x, grid))
        return to_picture(x[:, self.prefix :], grid), x[:, : self.prefix]

    def run_blocks(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, P + N, D) through the blocks, in an order that a subclass may change."""
        for block in self.blocks:
            x = self.run(block, x, grid)
        return x

    def run(self, block: nn.Module, *arguments: Any) -> Tensor:
        """Call a block, with gradient checkpointing if that is on."""
        return checkpoint(block, *arguments) if self.grad_checkpointing else block(*arguments)


class Pool(nn.Module):
    """All tokens of an image to one vector: (B, P + N, D) -> (B, F).

    global_pool: "avg", "max" or "avgmax" of the N patches, or "token", the first prefix token; ""
    leaves all tokens, (B, P + N, F). before, after: modules on the tokens and on the pooled vector.
    Raises SettingError for another pool, or "token" without prefix tokens.
    """

    def __init__(
        self, global_pool: str = "avg", prefix: int = 0, before: nn.Module | None = None, after: nn.Module | None = None
    ):
        super().__init__()
        self.prefix = prefix
        self.before = nn.Identity() if before is None else before
        self.after = nn.Identity() if after is None else after
        self.set_pool(global_pool)

    def set_pool(self, global_pool: str) -> None:
        """Choose another pool; the modules stay."""
        names = ("", *POOLS, *(["token"] if self.prefix else []))
        if global_pool not in names:
            raise SettingError(
                f"Found global_pool={global_pool!r}. Expected one of {', '.join(map(repr, names))} in a network with "
                f"{self.prefix} prefix tokens. Give one of these."
            )
        self.global_pool = global_pool

    def forward(self, x: Tensor) -> Tensor:
        return self.after(global_pool_nlc(self.before(x), self.global_pool, self.prefix))

    def extra_repr(self) -> str:
        return f"global_pool={self.global_pool!r}"


class Pyramid(nn.Module):
    """A network in stages, with what timm expects of one.

    Images (B, in_chans, H, W) -> logits (B, num_classes). stem: images -> (B, C, H / reduction,
    W / reduction), the input of the first stage. dims: widths of the stages. pool: tokens of the
    last stage, (B, P + N, D) -> (B, F). reduction: pixels per place of the first stage, doubled by
    each further one. num_features: F, if not the width of the last stage.

    A subclass may override `embed` to add positions. Linear layers and class tokens start from a
    truncated normal distribution of deviation 0.02, convolutions and norms as in PyTorch.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        dims: Sequence[int],
        pool: nn.Module,
        *,
        reduction: int = 4,
        num_features: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = dims[-1] if num_features is None else num_features
        self.patch_embed = stem
        self.stages = nn.ModuleList(stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.pool = pool
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Start linear layers and class tokens anew."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Stage) and module.cls_token is not None:
                trunc_normal_(module.cls_token, std=0.02)

    # -- the pass ---------------------------------------------------------------------------------

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> the picture that the first stage begins with."""
        return self.patch_embed(images)

    def forward_features(self, images: Tensor) -> Tensor:
        """The tokens of the last stage, (B, P + N, D)."""
        x = self.embed(images)
        for stage in self.stages:
            x, prefix = stage(x)
        return torch.cat([prefix, to_tokens(x)], dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, P + N, D) -> logits, or the pooled features (B, F)."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The pictures behind the stages, (B, D, h, w) each, with `forward_features` in front.

        indices: of stages, as in timm. norm: has no effect, since no norm serves all stages. If
        stop_early, no stage behind the last of `indices` runs, and the tokens in front are of that
        one. Raises SettingError for another output_fmt.
        """
        if output_fmt != "NCHW":
            raise SettingError(f"Found output_fmt={output_fmt!r}. Expected 'NCHW' of a network in stages. Leave it out.")
        chosen, last = feature_take_indices(len(self.stages), indices)
        x, pictures = self.embed(images), []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early or intermediates_only else self.stages):
            x, prefix = stage(x)
            if i in chosen:
                pictures.append(x)
        return pictures if intermediates_only else (torch.cat([prefix, to_tokens(x)], dim=1), pictures)

    # -- what timm asks of a network --------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of `indices`, and the head; returns the chosen stages."""
        chosen, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.pool = nn.Identity()
            self.reset_classifier(0)
        return chosen

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear head (none for 0 classes), and another pool if that is given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.pool.set_pool(global_pool)
        like = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = head.to(like.device, like.dtype).train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers of equal decay: stem, then block by block (or stage by stage), then the head."""
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|cls_token)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.", (99999,)),  # a number that timm joins to the layer before
        ]
        return {"stem": r"^(?:patch_embed|pos_embed)", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("cls_token", "pos_embed"))}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable
