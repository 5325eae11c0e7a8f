"""What each layer shows of a batch on the true grid, from one pass of any model.

Features and attention of the patches.

Three features stand for a layer, each (B, P, D), patches only, in raster order:

    keys     "k"   keys of all heads side by side
    output   "o"   what the attention adds to the residual stream: the output of the module around
                   it
    tokens   "x"   the residual stream after the block

Which modules those are follows from the names alone: the block is the outermost module around one
attention and no other, the attention module is the part of the block that the attention lies in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitreous.hosts.mixer import mixers_in
from vitreous.hosts.stream_ends import Opening
from vitreous.layers.stream import Stream
from vitreous.lens.coordinates.layout import Layout
from vitreous.lens.tap import Layouts, trace, watch
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.token_coordinates import Locator, TokenCoordinates, has_class_token

FEATURES = {"k": "keys", "o": "output", "x": "tokens"}
QUERIES = 8  # of object queries and the like, so many are shown
Key = tuple[str, int]  # name of a module, number of the call under that name


@dataclass
class LayerFeatures:
    """One layer and one batch. grid: of attention and keys; token_grid: of output and tokens.

    None where it is not known.

    layer counts the attentions in the order of their calls; kind is that of the call, key its name
    and number. attention (B, H, P): the class token's attention to the patches, or, without one
    (`has_class` False), the mean attention that each patch receives. queries (B, Q, H, P): that of
    the first QUERIES queries one by one, where queries have no place in the image. stream
    (B, N, D): all tokens after the block, of all images of the batch, only while `on_layer` runs.
    merged: tokens were merged, dropped or chosen before it: each place has the feature of its
    token, and an equal share of the attention to it. Where no token is, features and maps are 0.
    prefix: how many tokens without a place come first. by_channel (B, H, G, rows, cols):
    attention to each of the G tokens that stand at one place, of which `attention` is the mean;
    None where there is one.
    """

    layer: int
    key: Key
    kind: str
    has_class: bool = False
    grid: tuple[int, ...] | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    token_grid: tuple[int, ...] | None = None
    output: Tensor | None = None
    tokens: Tensor | None = None
    stream: Tensor | None = None
    merged: bool = False
    prefix: int = 0
    by_channel: Tensor | None = None
    queries: Tensor | None = None

    def feature(self, letter: str) -> Tensor | None:
        """The feature that "k", "o" or "x" stands for."""
        return getattr(self, FEATURES[letter])


def layer_features(model: nn.Module, images: Tensor, layouts: Layouts | None = None) -> list[LayerFeatures]:
    """The features of every attention of a pass of images (B, C, h, w).

    layouts: from `trace`, for several batches.
    """
    layouts = trace(model, images) if layouts is None else layouts
    collector = FeatureCollector(layouts, len(images), class_token=has_class_token(model), mixers=mixers_in(model))
    watch(model, images, collector.on_attention, layouts=layouts, on_output=collector.on_output, outputs=collector.outputs)
    return collector.layers


class FeatureCollector:
    """Gathers the features of one pass.

    `on_attention` and `on_output` are the callbacks of `watch`.

    images: how many of the batch count, from the first on. class_token: as of `has_class_token`.
    mixers: names of modules that stand where attention was.
    on_layer(features): called when all of a layer is there, to reduce it before the next; `finish`
    calls it for the rest.
    """

    def __init__(
        self,
        layouts: Layouts,
        images: int,
        *,
        class_token: bool = True,
        mixers: Iterable[str] = (),
        on_layer: Callable[[LayerFeatures], None] | None = None,
    ):
        self.layouts, self.images, self.on_layer = layouts, images, on_layer
        self.locator = Locator(images, class_token)
        self.complete = self.batch = 0  # layers that on_layer was called for; images of the batch, with those that do not count
        self.outputs = modules_around(list(layouts.calls), layouts.outputs, mixers)
        self.layers: list[LayerFeatures] = []

    def on_attention(self, call: AttentionCall, where: TokenCoordinates | None = None) -> None:
        """Take in one attention. where: its coordinates, if they were found already."""
        where = self.locator.locate(call) if where is None else where
        self.batch = len(call.output)
        layer = LayerFeatures(where.layer, (call.name, call.call_index), call.kind)
        self.layers.append(layer)
        if where.layout is None:
            return
        layer.merged, layer.prefix, layer.has_class, layer.grid = where.merged, where.prefix, where.has_class, where.grid
        if layer.grid is None:
            return
        attention = where.per_place(self.attention(call, where), shared=True)  # (B, H, W, M)
        layer.attention = where.layout.key_picture(attention).flatten(-2).nan_to_num()  # (B, H, P)
        if where.layout.keys_per_place > 1:
            layer.by_channel = where.layout.key_pictures(attention)
        if where.loose_queries:
            rows = next(call.rows(QUERIES, call.stochastic))[1][: self.images].transpose(1, 3)  # (B, Q, H, W, M)
            layer.queries = where.picture(rows, shared=True).flatten(-2).nan_to_num()
        if call.k is not None:
            keys = where.picture(call.k[: self.images].permute(0, 2, 4, 1, 3).float())  # (B, H, K, rows, cols)
            layer.keys = keys.flatten(3).flatten(1, 2).mT.nan_to_num()

    def attention(self, call: AttentionCall, where: TokenCoordinates) -> Tensor:
        """(B, H, W, M): the class token's row, or the mean of all rows.

        A row counts as often as there are places that its token stands for.
        """
        effective = call.stochastic
        if where.has_class or call.output.shape[3] == 1:
            rows = next(call.rows(1, effective))[1][: self.images, :, :, 0].clone()
        else:
            counts = where.counts(call)[: self.images, None, None, None]  # (B or 1, 1, 1, 1, N)
            total = sum(counts[..., rows] @ block[: self.images] for rows, block in call.rows(256, effective))
            rows = (total / counts.sum(-1, keepdim=True))[:, :, :, 0]
        return rows.transpose(1, 2)

    def on_output(self, name: str, number: int, output: Any) -> None:
        """Take in the output of a module, if it is one of `outputs`."""
        if number or name not in self.outputs:
            return
        kind, key = self.outputs[name]
        layer, x = next((layer for layer in reversed(self.layers) if layer.key == key), None), first_tensor(output)
        if layer is None or (kind == "output" and layer.merged):  # a bare tensor does not say which token is where
            return
        # a map of NaN, or of zeros in their place, would say nothing
        if key in self.layouts.moved or not bool(x.isfinite().all()):
            return
        patches, grid = self.patches(x, self.layouts.outputs.get((name, number)))
        if patches is not None:
            setattr(layer, kind, patches[: self.images].float())
            layer.token_grid = grid
        if kind == "tokens":
            # numbers of all tokens need no places
            whole = x.ndim == 3 and (patches is not None or (layer.merged and len(x) == self.batch))
            layer.stream = x if whole else patches
            self.finish(layer.layer + 1)

    def finish(self, count: int | None = None) -> None:
        """Call `on_layer` for those of the first `count` layers for which it was not.

        None: for all.
        """
        for layer in self.layers[self.complete : count]:
            self.complete += 1
            if self.on_layer is not None:
                self.on_layer(layer)
            layer.stream = None

    def patches(self, x: Tensor, layout: Layout | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
        """Features (B, P, D) of a module's output, and their grid; None: on no grid.

        They lie on the output's layout, or else on that of the first call.
        """
        layout = layout or self.locator.layout
        if layout is None or layout.grid is None or x.ndim not in (3, 4) or len(layout.queries) > 1:
            return None, None
        count = layout.queries.shape[1]
        if x.ndim == 4:  # (B, h, w, D) or (B, D, h, w)
            x = x.flatten(1, 2) if x.shape[1] * x.shape[2] == count else x.flatten(2).mT
        elif x.shape[1] != count:
            x = x.mT
        # with several rows per image it is not known which are whose
        if x.shape[1] != count or len(x) != self.batch:
            return None, None
        return layout.picture(x.mT[:, :, None]).flatten(-2).mT.nan_to_num(), layout.grid


def modules_around(calls: Sequence[Key], located: Collection[Key], mixers: Iterable[str] = ()) -> dict[str, tuple[str, Key]]:
    """{module: ("tokens" or "output", the call it belongs to)}: see the head of this file.

    located: (module, number) of outputs that are known to lie on a grid. The block is the outermost
    of them. mixers: what stands in the place of attention, and counts as such here.
    """
    around: dict[str, tuple[str, Key]] = {}
    centres = [*(name for name, _ in calls), *mixers]
    for call in calls:
        own = call[0].split(".")
        names = [".".join(own[:n]) for n in range(1, len(own) + 1)]
        alone = [name for name in names if sum(f"{other}.".startswith(f"{name}.") for other in centres) == 1]
        if len(centres) == 1:  # nothing else tells a block from the list that it is in, but that lists number their items
            block = next((i for i, name in enumerate(alone) if name.rpartition(".")[2].isdecimal()), 0)
            alone = alone[block:]
        first = next((i for i, name in enumerate(alone) if (name, 0) in located), len(alone))
        for kind, name in zip(("tokens", "output"), alone[first:], strict=False):
            around[name] = (kind, call)
    return around


def first_tensor(output: Any) -> Tensor:
    """The tensor that an output is, or begins with."""
    while not isinstance(output, Tensor):
        if isinstance(output, Stream):
            return output.tokens()
        if isinstance(output, Opening):
            return output.x
        output = next(iter(output.values() if hasattr(output, "values") else output))
    return output
