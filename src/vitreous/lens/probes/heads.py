"""Which heads matter, where they look around each patch, and what pattern their maps have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitreous.base.errors import SettingError
from vitreous.lens.class_gradients import ClassProbe, explained_classes
from vitreous.lens.faithfulness import answer
from vitreous.lens.formulas import heads as formulas
from vitreous.lens.layer_features import first_tensor
from vitreous.lens.probe import BatchInfo, Figure, Measure, Observer, Readout, Rows, Source, name_range
from vitreous.lens.probes.queries import rows_on_grid, why_not
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.tap.capture_pass import prepare_images
from vitreous.lens.token_coordinates import TokenCoordinates
from vitreous.models.classes import activation, probabilities

PATTERNS = ("self", "ring", "row", "column", "global", "class")
SIDE = 48  # of a map as it is clustered
NAMED = 6  # heads that are named under a cluster
SAME = 1e-3  # relative: an output that the projection would give


@dataclass
class Projections:
    """Of a batch: {layer: (module, heads)} that gets what the heads give, side by side."""

    batch: BatchInfo
    found: dict[int, tuple[str, int]] = field(default_factory=dict)


class HeadsObserver(Observer):
    """Profiles and patterns of the common pass, and where each layer's heads are joined."""

    def initialise(self) -> None:
        self.count = max(0, min(self.batch.count, self.probe.images - self.batch.first))
        self.modules = dict(self.model.named_modules())
        self.pending: tuple[int, int, Tensor] | None = None  # layer, heads, their outputs side by side
        self.projections = self.batch.shared(Projections).found
        self.unread: dict[str, list[str]] = {}
        # layer, maps in bins (count, H, SIDE, 1 + SIDE), likeness to PATTERNS (count, H, 6)
        self.maps: list[tuple[int, Tensor, Tensor]] = []

    def on_attention(self, call: AttentionCall, where: TokenCoordinates) -> None:
        if not self.count:
            return
        if self.probe.prune and call.kind == "token":
            self.pending = where.layer, call.output.shape[2], call.output.transpose(2, 3).flatten(3).flatten(0, 2).clone()
        reason = why_not(call, where) or ("" if where.layout.grid == where.layout.key_grid else "its keys are on another grid")
        rows = None if reason else rows_on_grid(call, where, self.count).flatten(4).flatten(2, 3).nan_to_num()  # (B, H, P, P)
        if rows is not None and float(rows.sum(-1).max()) > 1 + SAME:
            reason = "its rows are no distributions"
        if reason:
            self.unread.setdefault(reason, []).append(call.name)
            return
        self.add_profiles(call, where, rows)
        self.add_patterns(call, where, rows)

    def add_profiles(self, call: AttentionCall, where: TokenCoordinates, rows: Tensor) -> None:
        """The attention by rings of patches, and of the class token."""
        alive = (rows.sum(-1) > 0).to(rows)  # a patch that was dropped has a row of zeros
        profile = formulas.ring_profile(rows, formulas.ring_index(where.grid), alive)  # (B, H, K)
        self.readout.others[f"figure/rings/{where.layer}"] = profile
        if where.has_class:
            row = next(call.rows(1, call.stochastic))[1][: self.batch.count].transpose(1, 3)[:, 0].clone()  # (B, H, W, M)
            picture = where.picture(row, shared=True).nan_to_num()[: self.count].flatten(2)[..., None, :]  # (B, H, 1, P)
            own = formulas.ring_profile(picture, formulas.middle_index(where.grid))
            self.readout.others[f"figure/class_rings/{where.layer}"] = own
        hops = torch.arange(profile.shape[-1], device=profile.device, dtype=profile.dtype)
        placed = profile.sum(-1)
        values = {
            "ring_self": profile[..., 0],
            "ring_hops": (profile @ hops) / placed,
            "ring_beside": (1 - placed).clamp(min=0),
        }
        self.readout.rows.append(Rows(where.layer, "head_pattern", call.kind, values, self.batch.first))

    def add_patterns(self, call: AttentionCall, where: TokenCoordinates, rows: Tensor) -> None:
        """How alike the maps are to known patterns, and the maps in bins."""
        beside = (1 - rows.sum(-1)).clamp(min=0)
        patterns = formulas.known_patterns(where.grid, where.prefix > 0)
        patterns = {name: tuple(x.to(rows) for x in pattern) for name, pattern in patterns.items()}
        whole = torch.cat([beside[..., None], rows], dim=-1)
        values = {
            f"like_{name}": formulas.likeness(whole, torch.cat([own[..., None], pattern], dim=-1))
            for name, (pattern, own) in patterns.items()
        }
        self.readout.rows.append(Rows(where.layer, "head_pattern", call.kind, values, self.batch.first))
        if self.batch.first == 0:
            none = torch.zeros_like(rows[..., 0, 0])
            alike = torch.stack([values.get(f"like_{name}", none) for name in PATTERNS], dim=-1)
            self.maps.append((where.layer, formulas.binned(rows, beside, SIDE).cpu(), alike.cpu()))

    def on_output(self, name: str, call_index: int, output: Any) -> None:
        """Find the module that would give this output of what the heads give side by side."""
        if self.pending is None:
            return
        layer, heads, joined = self.pending
        module, output = self.modules[name], first_tensor(output)
        if module.weight.shape[1] != joined.shape[1] or output.numel() // output.shape[-1] != len(joined):
            return
        # not by a call, which hooks would see
        expected, found = module.forward(joined.to(output.dtype)), output.flatten(0, -2)
        if float((expected - found).abs().max()) <= SAME * float(found.abs().max()):
            self.projections[layer], self.pending = (name, heads), None

    def finish(self) -> Readout:
        self.readout.notes += [f"{name_range(names)}: no rings and patterns: {why}" for why, names in self.unread.items()]
        if self.maps:
            self.add_clusters()
        return self.readout

    def add_clusters(self) -> None:
        """The kinds of maps in the first batch, and the known pattern that each is nearest to."""
        places = [(layer, head) for layer, maps, _ in self.maps for _ in maps for head in range(maps.shape[1])]
        every, likenesses = (torch.cat([entry[at].flatten(0, 1) for entry in self.maps]) for at in (1, 2))
        labels, names, pictures = formulas.clusters(every, self.probe.clusters), [], []
        for number in range(int(labels.max()) + 1):
            members = labels == number
            alike, nearest = (
                likenesses[members].mean(0).max(0)
            )  # of whole maps: bins would take a neighbour for the patch itself
            heads = list(dict.fromkeys(place for place, own in zip(places, members.tolist(), strict=True) if own))
            shown = " ".join(f"{layer}.{head}" for layer, head in heads[:NAMED]) + (" ..." if len(heads) > NAMED else "")
            names.append(f"nearest to {PATTERNS[nearest]}, {alike:.2f} alike; {int(members.sum())} maps of heads {shown}")
            pictures.append(every[members].mean(0).sqrt())
        self.readout.others["figure/patterns/-1"] = torch.stack(pictures)[None].float()
        self.readout.details["figure/patterns/-1"] = {"names": "|".join(names)}


@dataclass(frozen=True, kw_only=True)
class Heads(ClassProbe):
    """Importance of each head by pruning, its attention by rings, and the kind of its map.

    Importance: a head's output is set to 0 before the projection of its layer; what the
    probability of the class loses, how far the distribution over classes moves (Jensen-Shannon, in
    bits), whether the prediction changes. The class is the true one where the look knows it, else
    the predicted one, or `target`. keep=true: also the layer with that head alone. The module that
    joins the heads is found by what it computes, whatever the model; a layer where it is not found
    is left out, and named. Costs one pass of `images` images for each head; prune=false: none.

    Rings and patterns need no pass of their own. Ring k of a patch: the patches k rows or columns
    away. Maps are reduced to 48 x 49 and clustered by k-means on principal axes of their square
    roots; the paper trains a convolutional autoencoder for that. It has no code, and the formulas
    are ours.

    layers: numbers of attentions to prune; default all. clusters: kinds of maps, at most. Raises
    SettingError.
    """

    paper: ClassVar[str] = "Li, Wang, Dai, Wang, Yeh, Zheng, Zhang, Ma 2023, arXiv 2303.13731"
    order: ClassVar[int] = 129
    observer: ClassVar[type[Observer]] = HeadsObserver
    sources: ClassVar[tuple[Source, ...]] = (
        Source("head_pruning", "Importance of the heads",
               "What changes when the output of one head is set to 0 before the projection of its layer.", form="matrix"),
        Source("head_pattern", "Where the heads look",
               "Attention of patches by rings around each, and how alike a head's map is to patterns that are known.",
               form="matrix"),
    )  # fmt: skip
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("head_drop", "Probability lost", "", -1, 1,
                explains="How far the probability of the class falls. Below 0 it rises: the head spoke against it."),
        Measure("head_divergence", "Change of the answer", "bits", 0, 1,
                explains="How far the distribution over all classes moves (Jensen-Shannon). 0: not at all."),
        Measure("head_flip", "Prediction changes", "", 0, 1,
                explains="1: the model predicts another class. Over images: how often."),
        Measure("ring_self", "Attention to itself", "", 0, 1,
                explains="How much a patch looks at itself, ring 0, on average."),
        Measure("ring_hops", "Mean ring", "patches", 0,
                explains="How many patches away, by rings, the patches are that a patch looks at."),
        Measure("ring_beside", "Attention to no place", "", 0, 1,
                explains="How much of a patch's attention goes to tokens without a place: class token, registers."),
        *(Measure(f"like_{name}", f"Alike: {name}", "", 0, 1, explains=text) for name, text in zip(PATTERNS, (
            "How alike a map is to each patch looking at itself. 1: the same.",
            "How alike a map is to each patch looking at its 8 neighbours evenly. 1: the same.",
            "How alike a map is to each patch looking at its row evenly. 1: the same.",
            "How alike a map is to each patch looking at its column evenly. 1: the same.",
            "How alike a map is to each patch looking at all patches evenly. 1: the same.",
            "How alike a map is to each patch looking at tokens without a place alone. 1: the same.",
        ), strict=True)),
    )  # fmt: skip
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("rings", "Attention of patches by ring", axis="ring",
               explains="How much of a patch's attention goes to each ring of patches around it, on average: ring 0 is the "
                        "patch itself, ring 1 its 8 neighbours. Even attention rises with the size of the rings."),
        Figure("class_rings", "Attention of the class token by ring", axis="ring around the middle",
               explains="How much of the class token's attention goes to each ring of patches around the middle of the image, "
                        "since it has no place itself."),
        Figure("patterns", "Kinds of maps", of="kind",
               explains="Maps of heads in the first batch, sorted into kinds by likeness alone (k-means, the largest first), "
                        "and the known pattern that each is nearest to. A row is a patch that looks, a column one that is "
                        "looked at, in raster order; the first column is all tokens without a place. Colour: square root."),
    )  # fmt: skip

    prune: bool = True
    keep: bool = False
    layers: tuple[int, ...] | None = None
    images: int = 8
    clusters: int = 8

    def __post_init__(self):
        super().__post_init__()
        for name in ("images", "clusters"):
            if getattr(self, name) < 1:
                raise SettingError(f"Found {name}={getattr(self, name)}. Expected 1 or more. Give such a number.")

    def outputs(self, model: nn.Module, batch: BatchInfo) -> Iterable[str]:
        """Every linear layer: one of them joins the heads of each attention."""
        if not self.prune or batch.first >= self.images:
            return ()
        return [name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2]

    def extra(self, model: nn.Module, batch: BatchInfo, targets: Sequence[int]) -> Readout:
        count = max(0, min(batch.count, self.images - batch.first))
        if not self.prune or not count:
            return Readout()
        found, notes = batch.shared(Projections).found, []
        calls = [name for name, _ in batch.layouts.calls]
        if missing := [name for layer, name in enumerate(calls) if layer not in found]:
            notes.append(f"{name_range(missing)}: heads were not pruned: no module joins them by a product that was seen")
        if wrong := set(self.layers or ()) - set(range(len(calls))):
            raise SettingError(f"Found layers {sorted(wrong)}. Expected 0 to {len(calls) - 1}, by number. Choose among them.")
        images = prepare_images(dict(model.named_modules()), batch.images[: batch.count])
        logits, classes = explained_classes(model, model(images), self.target)
        labels = zip(classes, targets, strict=True)
        classes = [label if label >= 0 and not self.target else index for index, label in labels]
        measure = changes(model, images[:count], logits[:count], torch.tensor(classes[:count], device=logits.device))
        chosen = {layer: own for layer, own in found.items() if self.layers is None or layer in self.layers}
        rows = []
        for kind in ("all but one head", *(("one head alone",) if self.keep else ())):
            work = [(layer, head) for layer, (_, heads) in chosen.items() for head in range(heads)]
            values: dict[int, list[dict[str, Tensor]]] = {}
            for layer, head in batch.shown(work, "heads"):
                name, heads = chosen[layer]
                with pruned(model.get_submodule(name), heads, head, alone=kind == "one head alone"):
                    values.setdefault(layer, []).append(measure())
            for layer, each in values.items():
                table = {name: torch.stack([one[name] for one in each], dim=1) for name in each[0]}
                rows.append(Rows(layer, "head_pruning", kind, table, batch.first))
        return Readout(rows=rows, notes=notes, classes={"head_pruning": classes})


def changes(model: nn.Module, images: Tensor, logits: Tensor, classes: Tensor) -> Callable[[], dict[str, Tensor]]:
    """A function that runs the model as it then is, and gives {measure: (B,)} of the change."""
    full = probabilities(model, logits.double())
    apart = activation(model, logits.shape[-1]) == "sigmoid"  # each class is a distribution of its own

    def distributions(p: Tensor) -> Tensor:
        return torch.stack([p, 1 - p], dim=-1) if apart else p

    def measure() -> dict[str, Tensor]:
        changed = answer(model(images)).double()
        less = probabilities(model, changed)
        moved = formulas.divergence(distributions(full), distributions(less))
        return {
            "head_drop": (full - less).gather(1, classes[:, None])[:, 0],
            "head_divergence": moved.mean(-1) if apart else moved,
            "head_flip": (changed.argmax(-1) != logits.argmax(-1)).double(),
        }

    return measure


@contextmanager
def pruned(projection: nn.Module, heads: int, head: int, *, alone: bool) -> Iterator[None]:
    """In the body a projection gets zeros for one of the heads; alone: for all others."""

    def without(module: nn.Module, args: tuple) -> tuple:
        x = args[0].unflatten(-1, (heads, -1))
        mask = torch.arange(heads, device=x.device) == head
        return ((x * (mask if alone else ~mask)[:, None]).flatten(-2), *args[1:])

    handle = projection.register_forward_pre_hook(without)
    try:
        yield
    finally:
        handle.remove()
