"""What a model offers to mechanisms, and its walk in pieces: embed, run, finish.

finish(model, run(model, embed(model, images))) == model(images)        bit for bit, for every host, graft and image size
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate, groupby

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vitreous.base.errors import HostError, SettingError, UnknownName
from vitreous.hosts.attention import HOSTS as ATTENTIONS
from vitreous.hosts.block import HALVES, STATIONS, Block
from vitreous.hosts.by_attention import ByAttention
from vitreous.hosts.eva import EvaViT
from vitreous.hosts.stream_ends import StreamEnd
from vitreous.hosts.vit import WALKS, ViT
from vitreous.layers.stream import Assignment, Stream, opened, reduce, take

FAMILIES = (ViT(), EvaViT(), ByAttention())
SEPARATE = {
    "qkv": ("q_proj", "k_proj", "v_proj", "q", "k", "v", "kv", "wq", "wk", "wv"),
    "fc1": ("fc1_g", "fc1_x"),
}

# word: the error where a mechanism requires it and the model does not offer it. The fields are filled by `Host.require`.
CAPABILITIES: dict[str, str] = {
    "stream": (
        "The blocks of this {model} cannot be handed a state with their tokens. Expected ones that can. Use another host."
    ),
    "walk": "This {model} cannot be run block by block. Expected a model that can. Use another host.",
    "insert": (
        "The model is a {model}, which lays positions over a fixed list of tokens. Expected timm's "
        "VisionTransformer, whose tokens may become more, for {mechanism}. Use a mechanism of the attention "
        "slot here, such as svda."
    ),
    "remove": (
        "The model is a {model}, which lays positions over a fixed list of tokens. Expected timm's "
        "VisionTransformer, whose tokens may become fewer, for {mechanism}. Use a mechanism of the attention "
        "slot here, such as svda."
    ),
    "attention": (
        "blocks.0 is a {block}, whose attn is {attention}. Expected one of {attentions} (matched by class, "
        "since others of the same name work differently). {mechanism} cannot be grafted into this model."
    ),
    "projections": (
        "blocks.0 is a {block}, whose attn is {attention}. Expected one of {attentions} (matched by class, "
        "since others of the same name work differently). {mechanism} cannot be grafted into this model."
    ),
    "decaying_mixer": (
        "No block of this {model} holds a mixer whose weights decay along a sequence, such as retention. Expected one for "
        "{mechanism}. Graft one first (vitreous.graft(model, 'retention')), or use another reducer, such as evit."
    ),
    "halves": (
        "blocks.0 is a {block}, whose attention and MLP halves cannot be run apart. Expected one of {halves},"
        " or a block with the methods attention_half and mlp_half. Use a mechanism that stands before or "
        "after the block, or another host."
    ),
    "linear": "The blocks of this {model} hold no linear layer. Expected one for {mechanism}. Use another host.",
    "grid": (
        "patch_embed is a {embed}. Expected timm.layers.patch_embed.PatchEmbed, whose grid is known. "
        "{mechanism} cannot be grafted into this model."
    ),
    "rotary_free": ("The model is a {model} with rotary positions. Expected one without. Use another host for {mechanism}."),
    "class_token": (
        "The model has no class token, which {mechanism} reads. Expected a host with one. Use a mechanism or "
        "setting that needs none, such as token_merging or spc:sign=mean."
    ),
    "class_head": (
        "The head of this model pools over the patches, and {mechanism} drops some that nothing stands for. "
        "Expected a head that reads class tokens. Use a setting or mechanism that drops none, such as evit:fuse=true or "
        "token_merging."
    ),
    "poolable": (
        "{pool}, so {mechanism} cannot stand for it. Expected a head that pools without a module. Call "
        "model.reset_classifier(classes, 'avg') before grafting, or use a host without a distilled head."
    ),
    "classifier": (
        "This {model} has no dropout before one classifier. Expected a head of that kind for {mechanism}. Use a host with one "
        "classifier, which is not distilled, or a setting that leaves the head alone."
    ),
    "reads_inserted": (
        "The head of this model pools with global_pool={global_pool!r}, where inserted tokens have no share. "
        "Expected 'token', 'avg' or attention pooling. {mechanism} cannot be read here; call "
        "model.reset_classifier(classes, 'avg') before grafting, or insert tokens that are not read."
    ),
}


class Host:
    """A model and what it offers; made by `host_of`. It holds nothing but the model.

    blocks: dotted paths in running order. stages: ranges of blocks that share a width.
    prefix: class, distillation and register tokens before the patches. offers: words of `CAPABILITIES`.
    """

    def __init__(self, model: nn.Module, family: ViT):
        self.model, self.family = model, family

    @property
    def blocks(self) -> tuple[str, ...]:
        return self.family.blocks(self.model)

    @property
    def stages(self) -> tuple[range, ...]:
        runs = [len(list(run)) for _, run in groupby(range(len(self.blocks)), self.width)]
        return tuple(range(stop - run, stop) for run, stop in zip(runs, accumulate(runs), strict=True))

    @property
    def prefix(self) -> int:
        return self.family.prefix(self.model)

    @property
    def offers(self) -> frozenset[str]:
        return frozenset(self.family.offers(self.model))

    def width(self, block: int) -> int:
        """Features of a token at a block."""
        return self.family.width(self.model, block)

    def heads(self, block: int) -> int:
        """Attention heads of a block, or of the first one that has any."""
        modules = (m for path in (self.blocks[block], *self.blocks) for m in self.model.get_submodule(path).modules())
        return next(module.num_heads for module in modules if hasattr(module, "num_heads"))

    def attention(self, block: int) -> str:
        """Dotted path of a block's attention."""
        return self.family.attention(self.model, block)

    def linears(self, block: int) -> dict[str, str]:
        """{name: dotted path} of the linear layers of a block: qkv, proj, fc1, fc2, ...; a second fc1 by its whole path."""
        path, linears = self.blocks[block], {}
        for inner, module in self.model.get_submodule(path).named_modules():
            if isinstance(module, nn.Linear) and inner.partition(".")[0] not in STATIONS:  # a step that was grafted
                name = inner.rpartition(".")[2]
                linears[inner if name in linears else name] = f"{path}.{inner}".lstrip(".")
        return linears

    def linears_called(self, name: str, block: int) -> tuple[str, ...]:
        """Dotted paths of all linear layers of a block whose child's name is this; none if there are none.

        "qkv" and "fc1" mean the separate layers where a host has those instead of one.
        """
        paths = self.linears(block).values()
        by_name = (tuple(p for p in paths if p.rpartition(".")[2] in names) for names in ((name,), SEPARATE.get(name, ())))
        return next(filter(None, by_name), ())

    def projections(self, block: int) -> tuple[str, ...]:
        """Dotted paths of the linear layers of a block that give queries, keys and values; none if it has none by name."""
        return self.linears_called("qkv", block)

    def require(self, words: Iterable[str], mechanism: str) -> None:
        """Raise HostError with the sentence of the first of `CAPABILITIES` that is missing here.

        Raises UnknownName for a word that is none of them, which would otherwise be passed over.
        """
        words, offers = set(words), self.offers
        if unknown := sorted(words - CAPABILITIES.keys()):
            raise UnknownName(unknown[0], f"requirement of {mechanism}", CAPABILITIES)
        missing = next((word for word in CAPABILITIES if word in words - offers), None)
        if missing is None:
            return
        if sentence := self.family.sentence(self.model, missing):
            raise HostError(sentence.format(mechanism=mechanism))
        model, block = self.model, self.model.blocks[0]
        raise HostError(
            CAPABILITIES[missing].format(
                mechanism=mechanism,
                model=f"timm {type(model).__name__}",
                block=type(block).__name__,
                attention=class_names([type(block.attn)]) if hasattr(block, "attn") else "missing",
                attentions=class_names(ATTENTIONS),
                halves=", ".join(cls.__name__ for cls in HALVES),
                embed=class_names([type(model.patch_embed)]),
                pool=self.family.own_pool(model),
                global_pool=model.global_pool,
            )
        )


def family_of(model: nn.Module) -> ViT | None:
    """The family that a model belongs to, or None if it is no host."""
    return next((family for family in FAMILIES if family.has(model)), None)


def host_of(model: nn.Module) -> Host:
    """The model as a host. Raises HostError if it is of no family that we know."""
    family = family_of(model)
    if family is None:
        raise HostError(
            f"The model is a {type(model).__module__}.{type(model).__name__}. Expected timm's VisionTransformer (ViT, DeiT, "
            "DINOv2, SigLIP, CLIP, ...) or Eva (EVA-02, DINOv3, ...), or a subclass that keeps their "
            f"{' and '.join(WALKS)}; for linear layers also a model with an attention class that is known (Swin, PVTv2, "
            "...) or has `projections`. Create such a model with timm.create_model."
        )
    return Host(model, family)


def walkable(model: nn.Module) -> Host:
    """The model as a host whose blocks can be run one by one. Raises HostError."""
    host = host_of(model)
    host.require(("walk",), "a walk over the blocks")
    return host


def embed(model: nn.Module, images: Tensor, *, keep: Tensor | None = None, context: Tensor | None = None) -> Stream:
    """The stream that the first block gets: images (B, C, H, W) -> tokens with positions, and their state.

    keep: (B, n) indices of the patches that enter, chosen after positions were added; the others have no token, and read as
    0 where places are restored. context: (B, M, D') tokens of another modality. Raises HostError.
    """
    host = walkable(model)
    x, rope = host.family.begin(model, images)
    x, state = opened(x)
    prefix = host.prefix
    if state.grid is None and isinstance(model.patch_embed, PatchEmbed):
        height, width = model.patch_embed.dynamic_feat_size(images.shape[-2:])
        grid = (height, width) if prefix + height * width == x.shape[1] else None  # else patch dropout took some away
        state = replace(state, grid=grid)
    if keep is not None:
        if keep.ndim != 2 or keep.shape[0] != x.shape[0]:
            raise SettingError(
                f"Found keep of shape {tuple(keep.shape)}. Expected ({x.shape[0]}, n): indices of patches for each image. Give "
                "one row per image."
            )
        rope = host.family.keep_rope(model, x, rope, keep)
        step = Assignment.keeping(keep, x.shape[1] - prefix, prefix)
        entering = torch.cat([x[:, :prefix], take(x[:, prefix:], keep)], dim=1)
        x, state = reduce(x, state, step, tokens=entering)
    return Stream(x, replace(state, prefix=prefix, rope=rope, context=context))


def run(
    model: nn.Module,
    stream: Stream,
    start: int = 0,
    stop: int | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Stream:
    """The stream behind blocks start to stop - 1 (None: all): any split gives the same. Raises HostError."""
    family, masks = walkable(model).family, {}
    if attn_mask is not None or is_causal:
        masks = {"attn_mask": attn_mask, "is_causal": is_causal}
    x, state = stream.x, stream.state
    for i in range(len(model.blocks))[start:stop]:
        block, arguments = model.blocks[i], masks | family.rope(model, state.rope, i)
        out = block(Stream(x, state) if isinstance(block, Block) else x, **arguments)
        x, state = (out.x, out.state) if isinstance(out, Stream) else (out, state)
    return Stream(x, state)


def finish(model: nn.Module, stream: Stream) -> Tensor:
    """The model's answer to a stream behind its last block: norm, pool, head. Raises HostError."""
    walkable(model)
    return model.forward_head(model.norm(stream if isinstance(model.norm, StreamEnd) else stream.x))


def class_names(classes: Iterable[type]) -> str:
    return ", ".join(f"{cls.__module__}.{cls.__name__}" for cls in classes)
