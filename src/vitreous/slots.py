"""The places in a ViT where something can be exchanged, and the changes that put it there.

What a host must offer is asked once, before (`hosts.host.Host.require`); what is checked here depends on a setting, on a
layer, or on other grafts in the model. Blocks and attentions are matched by class object: thirteen files of timm have a
class called `Attention`, and they do not do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from timm.layers import DropPath, PatchEmbed, use_reentrant_ckpt
from torch import nn

from vitreous.base.errors import GraftError, HostError, SettingError
from vitreous.base.text_form import written
from vitreous.hosts.attention import HOSTS as ATTENTIONS
from vitreous.hosts.attention import Attention, reads_around
from vitreous.hosts.block import STATIONS, Block, check_between, check_halves, check_within
from vitreous.hosts.directions import Projections, never_calls, projections_of, unsuitable
from vitreous.hosts.host import class_names, host_of
from vitreous.hosts.mixer import Mixer
from vitreous.hosts.read_out import read_tokens
from vitreous.hosts.residual import ATTENTION, MLP, branches_of
from vitreous.hosts.stream_ends import Embed, StreamEnd
from vitreous.layers.linear import Linear

Changes = dict[str, Any]
P = TypeVar("P", bound=Projections)
M = TypeVar("M", bound=Mixer)


def check_checkpointing() -> None:
    """Raise GraftError under re-entrant gradient checkpointing, which does not look inside a stream."""
    if use_reentrant_ckpt():
        raise GraftError(
            "timm is set to re-entrant gradient checkpointing, which cannot see parameters behind inserted tokens and "
            "would leave them without gradient. Expected timm's default. Call timm.layers.set_reentrant_ckpt(False) "
            "before grafting."
        )


def depth(model: nn.Module) -> int:
    """The number of blocks, in running order."""
    return len(host_of(model).blocks)


def prefix(model: nn.Module) -> int:
    """The number of class, distillation and register tokens that stand before the patches."""
    return host_of(model).prefix


def width(model: nn.Module) -> int:
    return host_of(model).width(0)


def walks(model: nn.Module) -> bool:
    """True if attention, blocks and tokens of the model can be exchanged; False where only linear layers can."""
    return "walk" in host_of(model).offers


def heads(model: nn.Module) -> int:
    """The number of attention heads of a block."""
    return host_of(model).heads(0)


def heads_of_a_mixer(model: nn.Module, wanted: int | None) -> int:
    """A mixer's number of heads, the host's if None. Raises SettingError unless it divides the width."""
    count = heads(model) if wanted is None else wanted
    if count < 1 or width(model) % count:
        raise SettingError(f"Found heads={count}. Expected a divisor of the width {width(model)}. Give such a number.")
    return count


def layer_indices(model: nn.Module, layers: Iterable[int] | None) -> tuple[int, ...]:
    """The chosen block indices, all if None. Raises SettingError for one that the model does not have."""
    n = depth(model)
    chosen = tuple(range(n)) if layers is None else tuple(layers)
    wrong = [i for i in chosen if not 0 <= i < n]
    if wrong:
        raise SettingError(
            f"Found layers={'+'.join(map(str, wrong))}, but this model has {n} blocks. Expected 0 to {n - 1}, counted in "
            "the order in which they run. Give layers in that range."
        )
    return chosen


def block_count(model: nn.Module, after: int | None) -> int:
    """`after` as a number of blocks, 1 to depth; None: one before the last. Raises SettingError if out of range."""
    n = depth(model)
    if after is None:
        return max(1, n - 1)
    if not 1 <= after <= n:
        raise SettingError(
            f"Found after={after}, but this model has {n} blocks. Expected 1 to {n}: after=n means after n blocks have "
            "run. Give a number in that range."
        )
    return after


def own_attention(model: nn.Module, layer: int, mechanism: str) -> nn.Module:
    """The attention at `blocks.layer.attn`, of any class, if the block has one and no other graft holds it."""
    block, path = model.blocks[layer], f"blocks.{layer}.attn"
    attention = getattr(block, "attn", None)
    if attention is None:
        raise HostError(
            f"{path} does not exist: blocks.{layer} is a {type(block).__name__} without an attention module of its own. "
            f"Expected one of {class_names(ATTENTIONS)}. {mechanism} cannot be grafted into this model."
        )
    if isinstance(attention, Mixer) or (isinstance(attention, Attention) and type(attention) is not Attention):
        reason = (
            f"a mixer in the place of attention; {mechanism} would find no queries and keys, or undo it"
            if isinstance(attention, Mixer)
            else f"which overrides attention itself; {mechanism} would undo it"
        )
        raise GraftError(
            f"{path} already holds {type(attention).__name__}, {reason}. Expected plain attention. Take the other graft out "
            "first (vitreous.ungraft), or choose other layers."
        )
    return attention


def plain_attention(model: nn.Module, layer: int, mechanism: str) -> nn.Module:
    """The attention at `blocks.layer.attn`, if it is one that a mechanism may take over; else HostError or GraftError."""
    attention = own_attention(model, layer, mechanism)
    kind = type(attention)
    if kind is Attention or kind in ATTENTIONS:
        return attention
    raise HostError(
        f"blocks.{layer}.attn is a {kind.__module__}.{kind.__name__}. Expected one of {class_names(ATTENTIONS)} (matched by "
        f"class, since others of the same name work differently). {mechanism} cannot be grafted into this model."
    )


def displaced_attention(model: nn.Module, layer: int, mechanism: str) -> nn.Module:
    """The attention at `blocks.layer.attn`, of any class, if a mixer may take its place (`Mixer.instead_of`).

    The mixer gets its state through `open_stream`. Raises HostError where a block has no attention
    or cannot hand it the state, GraftError where another graft holds it or reads its queries and keys.
    """
    block, path = model.blocks[layer], f"blocks.{layer}.attn"
    attention = own_attention(model, layer, mechanism)
    check_halves(block, f"blocks.{layer}")
    steps = block.steps("between") if isinstance(block, Block) else ()
    lost = [f"{type(step).__name__} behind it, which reads its queries and keys" for step in steps] + [
        f"{change.path} of {record.mechanism}"
        for record in getattr(model, "grafts", ())
        for change in record.changes
        if change.path.startswith(f"{path}.")
    ]
    if lost:
        raise GraftError(
            f"{path} belongs together with {lost[0]}; {mechanism} would take it away. Expected attention that no other graft "
            "uses. Take the other graft out first (vitreous.ungraft), or choose other layers."
        )
    return attention


def put_mixers(
    model: nn.Module, layers: Iterable[int], cls: type[M], initialise: Callable[[M, int], None], mechanism: str
) -> Changes:
    """Changes that put a `cls` in the place of the attention of each block in `layers`.

    initialise: of (the new mixer, its layer), makes its parameters. Raises HostError, GraftError.
    """
    changes = open_stream(model, mechanism)
    if cls.mix_tokens is Mixer.mix_tokens:
        check_still_read(model, layers, mechanism)
    for i in layers:
        new = cls.instead_of(displaced_attention(model, i, mechanism))
        initialise(new, i)
        changes[f"blocks.{i}.attn"] = new
    return changes


def check_still_read(model: nn.Module, layers: Iterable[int], mechanism: str) -> None:
    """Raise HostError if class tokens are read, but mixers in `layers` would leave none of them a view of the patches.

    For mixers that give the prefix nothing; all images would get the same answer.
    """
    mixing = {
        i for i, attention in enumerate(attentions(model)) if getattr(type(attention), "mix_tokens", 0) is Mixer.mix_tokens
    }
    if not read_tokens(model)[1] and len(mixing.union(layers)) == depth(model):
        raise HostError(
            f"The head of this model reads class tokens, and with {mechanism} no block would let them see the patches. "
            "Expected one block with attention, or a head that pools over patches. Choose fewer layers, or call "
            "model.reset_classifier(classes, 'avg') before grafting."
        )


def attentions(model: nn.Module) -> list[nn.Module | None]:
    """The attention of every block, in order; None where a block has none of its own."""
    return [getattr(block, "attn", None) for block in getattr(model, "blocks", ())]


def adapt_linears(
    model: nn.Module, layer: int, names: Iterable[str], make: Callable[[nn.Linear], Linear], mechanism: str
) -> Changes:
    """Changes that put `make(linear)`, which adopts it (`Linear.of`), in the place of linear layers of `blocks.layer`.

    A name is that of a child ("qkv", "proj", "fc1", ...), and means what `Host.linears_called` says. An attention that reads
    its layer's weight and never calls the layer is adopted, too. Raises HostError, GraftError.
    """
    host, changes = host_of(model), {}
    for name in names:
        paths = host.linears_called(name, layer)
        if not paths:
            raise HostError(
                f"blocks.{layer} has no linear layer {name!r}. Expected one of {', '.join(host.linears(layer))}. Give such "
                f"names for {mechanism}, or use another host."
            )
        for path in paths:
            owner, _, child = path.rpartition(".")
            if reads_around(attention := model.get_submodule(owner), child):
                changes[owner] = Attention.of(attention)  # first: the new layer has to come to stand in it
            if never_calls(attention, child):
                raise HostError(
                    f"{path} of this {type(model).__name__} stands in an attention that reads its weight and never calls it. "
                    f"Expected a layer that is called. Give other names for {mechanism}, such as proj, or use another host."
                )
            changes[path] = make(plain_linear(model, path, mechanism))
    return changes


def adapt_projections(
    model: nn.Module, layer: int, cls: type[P], mechanism: str, parts: Iterable[str] = ("q", "k")
) -> dict[str, P]:
    """Changes that put a `cls` in the place of each linear layer of the attention at `layer` that gives these parts.

    parts: of "q", "k", "v", any of which the layer may give. Raises HostError where the attention has
    no such layers, naming those that have; GraftError where a graft is there already.
    """
    host = host_of(model)
    path = host.attention(layer)
    attention = model.get_submodule(path)
    if reason := unsuitable(attention):
        others = tuple(i for i in range(depth(model)) if unsuitable(model.get_submodule(host.attention(i))) is None)
        advice = f"Choose layers={written(others)}, or some of these" if others else "Use another host"
        raise HostError(
            f"{path} is a {class_names([type(attention)])}, {reason}. Expected attention whose linear layers give queries and "
            f"keys for a softmax of their products. {advice} for {mechanism}."
        )
    changes = {}
    for name, letters in projections_of(attention).items():
        inner = f"{path}.{name}"
        linear = model.get_submodule(inner)
        if not set(parts) & set(letters):
            continue
        if isinstance(linear, Projections):
            raise GraftError(
                f"{inner} already holds {type(linear).__name__}, which changes queries or keys itself; {mechanism} "
                "would undo it. Expected plain attention. Take the other graft out first (vitreous.ungraft), or choose other "
                "layers."
            )
        if not isinstance(linear, Linear):
            plain_linear(model, inner, mechanism)
        changes[inner] = cls.holding(linear, letters, attention)
    return changes


def plain_linear(model: nn.Module, path: str, mechanism: str) -> nn.Linear:
    """The linear layer at a path, if it is one that a mechanism may take over; else HostError or GraftError."""
    linear = model.get_submodule(path)
    if type(linear) in (nn.Linear, Linear):
        return linear
    if isinstance(linear, Linear):
        raise GraftError(
            f"{path} already holds {type(linear).__name__}, which overrides the layer; {mechanism} would undo it. Expected a "
            "plain linear layer. Take the other graft out first (vitreous.ungraft), or choose other layers."
        )
    raise HostError(
        f"{path} is a {class_names([type(linear)])}. Expected {class_names([nn.Linear])} itself, since a subclass may compute "
        f"something else. {mechanism} cannot be grafted there; choose other layers."
    )


def block_of(model: nn.Module, layer: int, cls: type[Block]) -> Block:
    """The block at `blocks.layer`, adopted as a `cls`, which overrides one of its halves.

    Stations may be added to any block of ours, and it keeps its class (`add_step`); only a plain one may change class, for
    the second class would undo what the first one overrides. Raises HostError, GraftError.
    """
    block, path = model.blocks[layer], f"blocks.{layer}"
    if isinstance(block, Block) and type(block) is not Block:
        raise GraftError(
            f"{path} is already of class {type(block).__name__}, which overrides a half of the block; {cls.__name__} would "
            "undo that. Expected a plain block. Take the other graft out first (vitreous.ungraft), or choose other layers."
        )
    check_halves(block, path)
    check_within(block, cls, path)
    return cls.of(block)


def before_the_sums(model: nn.Module, layer: int, mechanism: str) -> list[tuple[str, nn.Module]]:
    """(path, module) of attention and of MLP: what passes last all that they add to the tokens of `blocks.layer`.

    Raises HostError where the two have not one sum each, GraftError where another graft stands.
    """
    block, ends = model.blocks[layer], []
    check_halves(block, f"blocks.{layer}")
    paths = {half: path for path, half in branches_of(block).items()}
    if not {ATTENTION, MLP} <= paths.keys():
        raise HostError(
            f"blocks.{layer} is a {getattr(block, 'host', type(block)).__name__}, in which attention and MLP have not one sum "
            f"each. Expected one for attention and one for MLP. Choose other layers for {mechanism}, or another host."
        )
    for path in (paths[ATTENTION], paths[MLP]):
        end = block.get_submodule(path)
        if type(end) not in (nn.Identity, DropPath):
            raise GraftError(
                f"blocks.{layer}.{path} already holds {type(end).__name__}. Expected the host's own, so that one graft stands "
                f"before each sum. Take the other graft out first (vitreous.ungraft), or choose other layers for {mechanism}."
            )
        ends.append((f"blocks.{layer}.{path}", end))
    return ends


def plain_embedding(model: nn.Module, mechanism: str) -> PatchEmbed:
    """The patch embedding at `patch_embed`, if it is one that a mechanism may take over; else HostError or GraftError."""
    kind = type(model.patch_embed)
    if kind in (PatchEmbed, Embed):
        return model.patch_embed
    if issubclass(kind, Embed):
        raise GraftError(
            f"patch_embed already holds {kind.__name__}, which {mechanism} would undo. Expected plain patches. Take the "
            "other graft out first (vitreous.ungraft)."
        )
    raise HostError(
        f"patch_embed is a {class_names([kind])}. Expected {class_names([PatchEmbed])}, whose grid is known. {mechanism} "
        "cannot be grafted into this model."
    )


def plain_projection(model: nn.Module, mechanism: str) -> nn.Conv2d:
    """The convolution at `patch_embed.proj` that makes the patches, if a mechanism may take its place.

    Raises HostError or GraftError.
    """
    projection = plain_embedding(model, mechanism).proj
    if type(projection) is nn.Conv2d:
        return projection
    raise GraftError(
        f"patch_embed.proj is a {class_names([type(projection)])}, which {mechanism} would undo. Expected the host's "
        "convolution of patches. Take out the graft that put it there (vitreous.ungraft), or use another host."
    )


def open_stream(model: nn.Module, mechanism: str, embed: Embed | None = None) -> Changes:
    """Changes after which every block, and the attention in it, gets a state with the grid of the images.

    The patch embedding (or `embed`, which adopted it) opens the stream, all blocks hand it on, `norm` ends it. What is there
    already stays. Raises HostError where the patch embedding is not timm's, GraftError under re-entrant checkpointing.
    """
    check_checkpointing()
    changes: Changes = {} if embed is None else {"patch_embed": embed}
    if embed is None and not isinstance(model.patch_embed, Embed):
        changes["patch_embed"] = Embed.of(plain_embedding(model, mechanism), prefix(model))
    changes |= {f"blocks.{i}": Block.of(block) for i, block in enumerate(model.blocks) if not isinstance(block, Block)}
    return changes | stream_end(model)


def stream_end(model: nn.Module) -> Changes:
    """The change that lets `norm` end the stream for the head as it is now; none if it does already."""
    heads, pooled = read_tokens(model)
    if isinstance(model.norm, StreamEnd) and (model.norm.heads, model.norm.pooled) == (heads, pooled):
        return {}
    return {"norm": StreamEnd.of(model.norm, heads, pooled)}


def after_positions(model: nn.Module) -> tuple[str, nn.Module]:
    """(path, module) through which all tokens, (B, N, D) -> (B, N, D), pass once they have their positions."""
    path = host_of(model).family.after_positions(model)
    return path, getattr(model, path)


def before_classifier(model: nn.Module) -> tuple[str, nn.Module]:
    """(path, module) of the dropout (B, D) -> (B, D) before the one classifier ("classifier" in `requires`)."""
    return "head_drop", model.head_drop


def add_step(model: nn.Module, layer: int, station: str, step: nn.Module, *, behind_mixer: bool = False) -> Changes:
    """Changes that put a token step at a station ("before", "between", "after") of `blocks.layer`.

    Every block from there on learns to hand on tokens with their state, and `norm` closes the stream. Raises GraftError
    for a second step at `between` (`hosts.block.check_between`).
    """
    check_checkpointing()
    if station == "between":
        check_between(model.blocks[layer], f"blocks.{layer}")
    changes: Changes = {}
    for i in range(layer, depth(model)):
        block = model.blocks[i]
        if i > layer and isinstance(block, Block):
            continue
        new = (type(block) if isinstance(block, Block) else Block).of(block)
        changes[f"blocks.{i}"] = new
        if i > layer:
            continue
        new.add_step(station, step)
        if station == "between":
            check_halves(block, f"blocks.{i}")
            if not (isinstance(block.attn, Attention) or (behind_mixer and isinstance(block.attn, Mixer))):
                changes[f"blocks.{i}.attn"] = Attention.of(plain_attention(model, i, "a step after attention"))
    return changes | stream_end(model)


def check_running(model: nn.Module) -> None:
    """Raise GraftError if a model with a stream was set, since, to run in a way that would pass grafts by."""
    if isinstance(getattr(model, "norm", None), StreamEnd):
        check_checkpointing()


def read_out_moved(model: nn.Module) -> str | None:
    """Why the read-out at `norm` no longer fits the head, or None. `reset_classifier(n, pool)` can change the head."""
    if not walks(model):
        return None
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    steps = any(block.merges_within() or any(map(block.steps, STATIONS)) for block in blocks)
    if steps and isinstance(model.norm, StreamEnd):
        heads, pooled = read_tokens(model)
        if (model.norm.heads, model.norm.pooled) != (heads, pooled):
            return f"norm reads inserted tokens into {model.norm.heads}, but the head now reads {heads}"
    return None


def check_pool(model: nn.Module, mechanism: str) -> None:
    """Raise GraftError if another graft is in the model that the pool of `mechanism` would undo or fail."""
    if model.attn_pool is not None:
        raise GraftError(
            f"attn_pool already holds {type(model.attn_pool).__name__}, which {mechanism} would throw out with its weights. "
            "Expected a head that pools without a module. Take the other graft out first (vitreous.ungraft)."
        )
    earlier = [record.mechanism for record in getattr(model, "grafts", ()) if "class_head" in record.mechanism.requires]
    if earlier:
        raise GraftError(
            f"{earlier[0]} is in the model, which needs a head that reads no patches. Expected none such, since {mechanism} "
            f"pools over patches. Take {earlier[0].name} out first (vitreous.ungraft), or choose other settings for it."
        )


def prefix_at_pool(model: nn.Module) -> int:
    """How many tokens that are no patches reach `attn_pool`, once `pool_changes` are in."""
    return host_of(model).family.prefix_at_pool(model)


def pool_changes(model: nn.Module, pool: nn.Module) -> Changes:
    """Changes that let `pool`, (B, N, D) -> (B, D), see the patches and stand for what the head did before.

    From then on the head reads patches, so whatever reads inserted tokens (`StreamEnd`, a gated step) reads into these.
    """
    changes: Changes = {"attn_pool": pool}
    if getattr(model, "pool_include_prefix", False):
        changes["pool_include_prefix"] = False
    for name, module in model.named_modules():
        if hasattr(module, "heads") and hasattr(module, "pooled"):
            changes |= {f"{name}.heads": (prefix(model), None), f"{name}.pooled": True}
    return changes
