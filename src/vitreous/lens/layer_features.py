"""What each layer shows of a batch on the true grid: features and attention of the patches, from one pass of any model.

Three features stand for a layer, each (B, P, D), patches only, in raster order:

    keys     "k"   keys of all heads side by side
    output   "o"   what the attention adds to the residual stream: the output of the module around it
    tokens   "x"   the residual stream after the block

Which modules those are follows from the names alone: the block is the outermost module around one attention and no other,
the attention module is the part of the block that the attention lies in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vitreous.hosts.stream_ends import Opening
from vitreous.layers.stream import Stream, take
from vitreous.lens.coordinates.layout import Layout
from vitreous.lens.formulas.maps import rollout_map, rollout_step
from vitreous.lens.tap import Layouts, trace, watch
from vitreous.lens.tap.attention_call import AttentionCall

FEATURES = {"k": "keys", "o": "output", "x": "tokens"}
ROLLOUT = 1100  # tokens up to which rollout is followed: its cost grows with their cube
Key = tuple[str, int]  # name of a module, how-manieth call


@dataclass
class Sight:
    """One layer and one batch. grid: of attention and keys; token_grid: of output and tokens; None where it is not known.

    layer counts the attentions in the order of their calls; kind is that of the call, key its name and number.
    attention (B, H, P): the class token's attention to the patches, or, without one (`has_class` False), the mean
    attention that each patch receives. rollout (B, P): attention rollout up to this layer; None where it is not defined.
    merged: tokens were merged or dropped before it, by a graft of ours. Where no token is, features and maps are 0. prefix: how
    many tokens without a place come first.
    """

    layer: int
    key: Key
    kind: str
    has_class: bool = False
    grid: tuple[int, int] | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    token_grid: tuple[int, int] | None = None
    output: Tensor | None = None
    tokens: Tensor | None = None
    rollout: Tensor | None = None
    merged: bool = False
    prefix: int = 0

    def feature(self, letter: str) -> Tensor | None:
        """The feature that "k", "o" or "x" stands for."""
        return getattr(self, FEATURES[letter])


def sights(model: nn.Module, images: Tensor, layouts: Layouts | None = None) -> list[Sight]:
    """One sight per attention of a pass of images (B, C, h, w). layouts: from `trace`, for callers with several batches."""
    layouts = trace(model, images) if layouts is None else layouts
    collector = Collector(layouts, len(images), class_token=has_class_token(model))
    watch(model, images, collector.see, layouts=layouts, on_output=collector.leave, outputs=collector.around)
    return collector.sights


class Collector:
    """Gathers the sights of one pass: `see` and `leave` are the callbacks of `watch`.

    images: how many of the batch count, from the first on. class_token: as of `has_class_token`. rollout: whether to follow
    it. on_tokens(name, number, tokens): told the residual stream (B, N, D), of all images, after the block around the
    attention (name, number). done(sight): told when all of a sight is there, to reduce it before the next; the rest is told
    by `finish`.
    """

    def __init__(
        self,
        layouts: Layouts,
        images: int,
        *,
        class_token: bool = True,
        rollout: bool = False,
        on_tokens: Callable[[str, int, Tensor], None] | None = None,
        done: Callable[[Sight], None] | None = None,
    ):
        self.layouts, self.images, self.class_token, self.follow = layouts, images, class_token, rollout
        self.on_tokens, self.done = on_tokens, done
        self.told = 0
        self.around = modules_around(list(layouts.calls), layouts.outputs)
        self.sights: list[Sight] = []
        self.whole: Layout | None = None  # of the original tokens, for calls of our own token grafts
        self.joint: Tensor | None = None
        self.spare: Tensor | None = None

    def see(self, call: AttentionCall) -> None:
        """Take in one attention."""
        sight = Sight(len(self.sights), (call.name, call.call_index), call.kind)
        self.sights.append(sight)
        place = self.place_of(call)
        if place is None or call.kind == "channel":
            return
        sight.merged = place.source is not None
        sight.prefix = place.layout.prefix
        sight.has_class = self.class_token and sight.prefix > 0 and place.layout.windows == 1
        sight.grid = place.layout.key_grid
        if sight.grid is not None:
            sight.attention = place.keys(self.attention(call, sight.has_class)).flatten(-2).nan_to_num()  # (B, H, P)
            if call.k is not None:
                keys = place.keys(call.k[: self.images].permute(0, 2, 4, 1, 3).float())  # (B, H, K, rows, cols)
                sight.keys = keys.flatten(3).flatten(1, 2).mT.nan_to_num()
        if self.follow:
            sight.rollout = self.rolled(call, place, sight)

    def place_of(self, call: AttentionCall) -> Place | None:
        """Where the tokens of a call are; None: unknown. Merged, dropped and inserted tokens go by what our grafts recorded."""
        if self.whole is None and call.layout is not None:
            self.whole = without_last(call.layout, call.inserted)
        if call.source is None and not call.inserted:
            return None if call.layout is None else Place(call.layout)
        return None if self.whole is None else Place(self.whole, call.source, call.inserted, self.images)

    def attention(self, call: AttentionCall, has_class: bool) -> Tensor:
        """(B, H, W, M): the class token's row, or the mean of all rows."""
        effective = call.stochastic
        if has_class or call.output.shape[3] == 1:
            rows = next(call.rows(1, effective))[1][: self.images, :, :, 0].clone()
        else:
            total = sum(block[: self.images].sum(3) for _, block in call.rows(256, effective))
            rows = total / call.output.shape[3]
        return rows.transpose(1, 2)

    def rolled(self, call: AttentionCall, place: Place, sight: Sight) -> Tensor | None:
        """The rollout up to this call, (B, P); it ends where tokens change in number or attend in windows."""
        tokens, keys = call.output.shape[3], call.v.shape[3]
        known = self.joint is not None or sight.layer == 0
        if not known or tokens != keys or call.output.shape[1] > 1 or not call.stochastic or place.recorded:
            self.joint = None
            return None
        if tokens > ROLLOUT or (self.joint is not None and self.joint.shape[-1] != tokens) or place.layout.grid is None:
            self.joint = None
            return None
        blocks = ((rows, block[: self.images, 0]) for rows, block in call.rows(256, True))
        joint = rollout_step(self.joint, blocks, self.spare)
        self.joint, self.spare = joint, self.joint
        everything = rollout_map(joint, slice(None), sight.has_class)  # (B, N)
        return place.layout.picture(everything[:, None]).flatten(-2).nan_to_num()

    def leave(self, name: str, number: int, output: Any) -> None:
        """Take in the output of a module, if it is one that a sight shows."""
        if number or name not in self.around:
            return
        sight = next((s for s in reversed(self.sights) if s.key == self.around[name][1]), None)
        kind, x = self.around[name][0], first_tensor(output)
        if sight is None or (kind == "output" and sight.merged):  # a bare tensor does not say which token is where
            return
        patches, grid = self.patches(x, self.layouts.outputs.get((name, number)))
        if patches is not None:
            if kind == "tokens" and self.on_tokens is not None:
                self.on_tokens(*sight.key, x if x.ndim == 3 else patches)
            setattr(sight, kind, patches[: self.images].float())
            sight.token_grid = grid
        if kind == "tokens":
            self.finish(sight.layer + 1)

    def finish(self, count: int | None = None) -> None:
        """Tell of the first `count` sights that they are complete; None: of all."""
        for sight in self.sights[self.told : count]:
            self.told += 1
            if self.done is not None:
                self.done(sight)

    def patches(self, x: Tensor, layout: Layout | None) -> tuple[Tensor | None, tuple[int, int] | None]:
        """Features (B, P, D) of a module's output on its layout, or else on that of the first call; None: on no grid."""
        layout = layout or self.whole
        if layout is None or layout.grid is None or x.ndim not in (3, 4) or len(layout.queries) > 1:
            return None, None
        count = layout.queries.shape[1]
        if x.ndim == 4:  # (B, h, w, D) or (B, D, h, w)
            x = x.flatten(1, 2) if x.shape[1] * x.shape[2] == count else x.flatten(2).mT
        elif x.shape[1] != count:
            x = x.mT
        if x.shape[1] != count or len(x) < self.images:
            return None, None
        return layout.picture(x.mT[:, :, None]).flatten(-2).mT.nan_to_num(), layout.grid


@dataclass(frozen=True)
class Place:
    """Where the keys of a call are: by its layout, or by that of the original tokens and what became of them.

    source, inserted: as in `TokenState`, for a call of our own token grafts. images: how many count.
    """

    layout: Layout
    source: Tensor | None = None
    inserted: int = 0
    images: int = 0

    @property
    def recorded(self) -> bool:
        """Whether tokens were merged, dropped or inserted."""
        return self.source is not None or self.inserted > 0

    def keys(self, values: Tensor) -> Tensor:
        """One value per key (B, ..., W, M) -> (B, ..., rows, cols); 0 where a token was dropped."""
        if self.inserted:
            values = values[..., : values.shape[-1] - self.inserted]
        if self.source is not None:
            source = self.source[: self.images]
            flat = values.flatten(1, -2).mT  # (B, M, ...)
            values = take(flat, source, absent=0).mT.unflatten(1, values.shape[1:-1])
        return self.layout.key_picture(values)


def has_class_token(model: nn.Module) -> bool:
    """Whether the first of tokens without a place is a class token: not where parameters speak of registers alone."""
    names = [name.rpartition(".")[2].lower() for name, _ in model.named_parameters()]
    return any("cls" in name or "class" in name for name in names) or not any("reg" in name for name in names)


def modules_around(calls: Sequence[Key], placed: Collection[Key]) -> dict[str, tuple[str, Key]]:
    """{module: ("tokens" or "output", the call it belongs to)}: see the head of this file.

    placed: (module, number) of outputs that are known to lie on a grid. The block is the outermost of them.
    """
    found: dict[str, tuple[str, Key]] = {}
    for call in calls:
        own = call[0].split(".")
        around = [".".join(own[:n]) for n in range(1, len(own) + 1)]
        alone = [name for name in around if sum(f"{other}.".startswith(f"{name}.") for other, _ in calls) == 1]
        first = next((i for i, name in enumerate(alone) if (name, 0) in placed), len(alone))
        for kind, name in zip(("tokens", "output"), alone[first:], strict=False):
            found[name] = (kind, call)
    return found


def without_last(layout: Layout, count: int) -> Layout:
    """The layout without the last `count` tokens, those that a graft inserted."""
    if not count:
        return layout
    queries, keys = layout.queries.shape[1] - count, layout.keys.shape[1] - count
    return replace(
        layout,
        queries=layout.queries[:, :queries],
        keys=layout.keys[:, :keys],
        cells=None if layout.cells is None else layout.cells[:, :queries],
        key_cells=None if layout.key_cells is None else layout.key_cells[:, :keys],
    )


def first_tensor(output: Any) -> Tensor:
    """The tensor that an output is, or begins with."""
    while not isinstance(output, Tensor):
        if isinstance(output, Stream):
            return output.tokens()
        if isinstance(output, Opening):
            return output.x
        output = next(iter(output.values() if hasattr(output, "values") else output))
    return output
