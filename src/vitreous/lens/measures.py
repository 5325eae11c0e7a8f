"""Reduce every attention of a model to numbers per layer, head and image, while it happens and block by block.

The formulas are those of `lens.indicators` and `lens.spectra`. Here they run over blocks of rows in buffers that are made once,
so that no N x N map, nor a table of N x N distances, exists at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitreous.base.errors import DataError, NotReached
from vitreous.lens.formulas import indicators, spectra
from vitreous.lens.formulas.row_statistics import Distances, Sweep, same_places
from vitreous.lens.tap.attention_call import FULL_CHECK_ROWS, AttentionCall, Buffers

SOURCES = ("attention", *spectra.SOURCES)
KEYS = ("layer", "head", "image", "source", "kind")
COLUMNS = (
    "attention_entropy",  # nats
    "effective_tokens",
    "selectivity",
    "selectivity_paper",  # of all heads together
    "mean_distance",  # pixels
    "attention_width",  # pixels
    "angular_alignment",
    "angular_alignment_paper",  # of the noisy image
    "head_redundancy",
    "perturbation_robustness",
    "perturbation_robustness_paper",  # of all heads together
    "rank_collapse",  # of the tokens after the layer
    *spectra.INDICATORS,
)
BLOCK = 1 << 20  # numbers in a block: 4 MiB each in the map's buffer and in ours


@dataclass
class _Record:
    """Some rows of the table: values {column: (images, heads)}, from image `first` on; head -1 is all of them together."""

    layer: int
    source: str
    kind: str
    values: dict[str, np.ndarray]
    first: int = -1
    together: bool = False


class Measures:
    """The measures of every attention that a tap shows, as a tidy table.

        measures = Measures(model)
        for images in batches:
            watch(model, images, measures.see, on_output=measures.leave, outputs=measures.ends)
        table = measures.columns()            # {column: (rows,)}

    With `noisy=True` every batch is `torch.cat([images, perturbed(images, ...)])`: the first half is measured, the second says
    how much a little noise changes it (robustness) and gives the paper's alignment.

    Rows are by layer, head, image, source and kind. `layer` counts the attentions in the order of their first call. Source
    "attention" is the map: of kind "token", "channel" or "pooling", and once more as "effective" where the model changes the
    weights between softmax and values. "learned", "weight" and "score" are spectra. Head -1 is all heads together, image
    -1 is no single image. What does not apply is NaN: distances without places, alignment where tokens are not matched with
    themselves, entropies of an effective map whose rows are no distribution. Windows and rows count evenly; rows that are
    masked out altogether do not count.

    model: to find the weights and learned spectra of the modules that made the calls.
    sources: which of SOURCES to measure. first: the number of the first image. Learned and weight rows, and notes on
        them, come with image 0 alone.
    block: numbers per buffer, or one row of all heads and images if that is more: the map's (which holds a small map whole),
        ours of the same size, and two for distances, of the size of one head and image.
    `leave` is needed for `notes` to tell what lies between weights and scores, and for fused weights of unknown classes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        noisy: bool = False,
        sources: Sequence[str] = SOURCES,
        first: int = 0,
        block: int = BLOCK,
    ):
        self.noisy, self.sources, self.first, self.block = noisy, tuple(sources), first, block
        self.layers: dict[tuple[str, int], int] = {}  # (name, number of the call): layer
        self._modules = dict(model.named_modules())
        self._energies: dict[str, dict[str, Tensor]] = {}  # {module: {child: energies of its output}}
        self._counts: dict[int, int] = {}  # images seen by layer
        self._together: dict[int, _Record] = {}  # the latest row of all heads, by layer
        self._notes: dict[str, list[str]] = {}
        self._records: list[_Record] = []
        self._whole: Tensor | None = None  # places of the latest call whose tokens were not merged
        self._buffers, self._distances = Buffers(), Distances()

    @torch.no_grad()
    def see(self, call: AttentionCall) -> None:
        """Measure one attention; its tensors are let go at once."""
        key = (call.name, call.call_index)
        fresh = key not in self.layers
        layer = self.layers.setdefault(key, len(self.layers))
        with torch.autocast(call.v.device.type, enabled=False):
            if fresh:
                self._add_model(layer, call)
            count = self._half(call.v)
            first = self.first + self._counts.get(layer, 0)
            self._counts[layer] = self._counts.get(layer, 0) + count
            if "attention" in self.sources:
                self._add_attention(layer, first, call, count)
            if "score" in self.sources:
                self._add_scores(layer, first, call, count)

    @property
    def ends(self) -> set[str]:
        """The modules whose ends `leave` waits for: layers that may be a projection of an attention that is still unknown."""
        if self.first or "weight" not in self.sources:
            return set()
        parts = ((name, *name.rpartition(".")[::2]) for name in self._modules)
        return {name for name, parent, child in parts if child in spectra.NAMES and (parent, 0) not in self.layers}

    def leave(self, name: str, number: int, output: Any) -> None:
        """At the end of the forward of one of `ends`: keep its energies until the call."""
        parent, _, child = name.rpartition(".")
        fresh = self.first == 0 and "weight" in self.sources and (parent, 0) not in self.layers
        if fresh and child in spectra.NAMES and isinstance(output, Tensor) and output.is_floating_point():
            axis = 1 if isinstance(self._modules.get(name), nn.Conv2d) else output.ndim - 1
            others = [i for i in range(output.ndim) if i != axis]
            energies = output.detach().float().square().sum(dim=others)
            self._energies.setdefault(parent, {})[child] = energies

    @torch.no_grad()
    def tokens(self, name: str, number: int, tokens: Tensor) -> None:
        """Rank collapse of the tokens (B, N, D) after the layer whose latest call was (name, number)."""
        if "attention" not in self.sources:
            return
        record = self._together[self.layers[name, number]]
        record.values["rank_collapse"] = _numpy(indicators.rank_collapse(tokens[: self._half(tokens)]))[:, None]

    def columns(self) -> dict[str, np.ndarray]:
        """{column: (rows,)}: KEYS, then COLUMNS as float64, sorted by layer, source, kind, image and head.

        Raises NotReached if the layers did not see the same number of images.
        """
        if len(set(self._counts.values())) > 1:
            least = min(self._counts, key=self._counts.__getitem__)
            name = next(key[0] for key, layer in self.layers.items() if layer == least)
            raise NotReached(
                f"{name} saw {self._counts[least]} of {max(self._counts.values())} images. Expected every pass to go "
                "through it once. Remove what skips or repeats it, or measure the model without it."
            )
        return _table(self._records)

    def take(self) -> dict[str, np.ndarray]:
        """`columns()` of what was seen since the last `take`, which is then forgotten; numbers of images go on."""
        found = self.columns()
        self._records, self._together = [], {}
        return found

    @property
    def notes(self) -> list[str]:
        """What the spectra leave out, or why there are none, with the layers that it concerns."""
        return [f"{_listed(names)}: {note}" for note, names in self._notes.items()]

    def _half(self, x: Tensor) -> int:
        """The number of images to be measured, of those in the batch."""
        if self.noisy and len(x) % 2:
            raise DataError(
                f"Found a batch of {len(x)}. Expected images and as many noisy ones after them. "
                "Give torch.cat([images, perturbed(images, ...)]), or measure with noisy=False."
            )
        return len(x) // 2 if self.noisy else len(x)

    def _add_model(self, layer: int, call: AttentionCall) -> None:
        """The rows that follow from the model alone, with the first image; from the first call, which shows H and K."""
        module, energies = self._modules.get(call.name), self._energies.pop(call.name, {})
        if self.first or module is None or call.q is None or call.kind == "channel":
            return
        heads, width = call.q.shape[2], call.q.shape[4]
        found = []
        if "learned" in self.sources:
            found.append(spectra.learned(module, heads))
        if "weight" in self.sources:
            q, k = (x.float().square().sum(dim=(0, 1, 3)) for x in (call.q, call.k))
            found.append(spectra.weight(module, heads, width, spectra.Energies(q, k, energies)))
            if found[-1].note:
                self._notes.setdefault(f"weight spectrum: {found[-1].note}", []).append(call.name)
        for spectrum in found:
            if spectrum.values is not None:
                values = {name: _numpy(value)[None] for name, value in spectrum.indicators().items()}
                self._records.append(_Record(layer, spectrum.source, call.kind, values))

    def _add_attention(self, layer: int, first: int, call: AttentionCall, count: int) -> None:
        """The rows of the map, and of the effective one where it differs."""
        heads, together = self._swept(call, count, effective=False)
        heads |= self._alignment(call, count)
        self._records.append(_Record(layer, "attention", call.kind, heads, first))
        self._together[layer] = _Record(layer, "attention", call.kind, together, first, together=True)
        self._records.append(self._together[layer])
        if call.mixed:
            heads, _ = self._swept(call, count, effective=True)
            self._records.append(_Record(layer, "attention", "effective", heads, first))

    def _swept(self, call: AttentionCall, count: int, effective: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What one sweep over the rows gives: values per head (images, H), and of all heads together (images, 1)."""
        places, queries = self._places(call, count), call.output.shape[3]
        sweep = Sweep(count, self.noisy, not effective or call.stochastic, places, self._buffers, self._distances)
        size = max(1, self.block // (call.output[..., 0, 0].numel() * call.v.shape[3]))
        step = queries if queries <= FULL_CHECK_ROWS else size  # all rows of a small map are there already, from its check
        for rows, block in call.rows(step, effective):
            for start in range(0, block.shape[3], size):
                part = block[..., start : start + size, :]
                sweep.add(slice(rows.start + start, rows.start + start + part.shape[3]), part)
        heads, together = sweep.values()
        alone = _numpy(torch.stack([*heads.values()]))  # one way to numpy for all
        return dict(zip(heads, alone, strict=True)), {k: _numpy(v)[:, None] for k, v in together.items()}

    def _places(self, call: AttentionCall, count: int) -> tuple[Tensor, Tensor] | None:
        """(y, x) in pixels of queries (B or 1, W, N, 2) and keys (B or 1, W, M, 2); NaN: no place; None: not known.

        A token that our own grafts merged stands at the mean of the places that it speaks for, image by image.
        """
        if call.kind == "channel":
            return None
        windows, n, m = *call.output.shape[1:4:2], call.v.shape[3]
        if call.source is not None:
            if self._whole is None or len(self._whole) != call.source.shape[1] or n != m or windows > 1:
                return None
            places = _gathered(self._whole, call.source[:count].to(self._whole.device), n)
            return places, places
        layout = call.layout
        if layout is None or layout.queries.shape[:2] != (windows, n) or layout.keys.shape[:2] != (windows, m):
            return None
        if windows == 1 and not call.inserted:
            self._whole = layout.queries[0]
        return layout.queries[None], layout.keys[None]

    def _alignment(self, call: AttentionCall, count: int) -> dict[str, np.ndarray]:
        """Cosine of a token's own query and key, before a learned spectrum comes in; nothing where that cannot be told."""
        if call.kind != "token" or call.q is None or call.q.shape != call.k.shape:
            return {}
        places = self._places(call, count)
        if places is not None and not same_places(*places):  # attention to other tokens
            return {}
        q = call.q
        module = self._modules.get(call.name)
        sigma = None if module is None else spectra.learned(module, q.shape[2]).values
        if sigma is not None:
            q = _without(q, sigma)
            if q is None:
                note = "alignment: the learned spectrum cannot be taken off the queries (rotary embedding, or zeros in it)"
                names = self._notes.setdefault(note, [])
                names += [] if call.name in names else [call.name]
                return {}
        cosine = indicators.angular_alignment(q.flatten(0, 1), call.k.flatten(0, 1)).unflatten(0, q.shape[:2]).mean(dim=1)
        found = {"angular_alignment": _numpy(cosine[:count])}
        return found | ({"angular_alignment_paper": _numpy(cosine[count:])} if self.noisy else {})

    def _add_scores(self, layer: int, first: int, call: AttentionCall, count: int) -> None:
        """Spectra of the scores, some images at a time: the decomposition works in float64."""
        if call.q is None:
            return
        images = max(1, self.block // (2 * call.q[0].numel() + 2 * call.k[0].numel()))
        parts = [
            {name: value.mean(dim=1) for name, value in spectra.score(q, k, call.scale).indicators().items()}
            for q, k in zip(call.q[:count].split(images), call.k[:count].split(images), strict=True)
        ]
        values = {name: _numpy(torch.cat([part[name] for part in parts])) for name in spectra.INDICATORS}
        self._records.append(_Record(layer, "score", call.kind, values, first))


def perturbed(images: Tensor, noise: float, generator: torch.Generator, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """images (B, C, H, W) in the model's units -> the same with N(0, noise^2) on their [0, 1] pixels, clamped."""
    mean, std = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (mean, std))
    pixels = images * std + mean
    low, high = pixels.min().item(), pixels.max().item()
    if low < -1e-3 or high > 1 + 1e-3:
        raise DataError(
            f"Found pixels from {low:.3g} to {high:.3g}. Expected 0 to 1 before normalisation. "
            "Give the mean and std by which the images were normalised."
        )
    grain = torch.stack([torch.randn(images.shape[1:], generator=generator) for _ in images])
    return ((pixels + noise * grain.to(pixels)).clamp(0, 1) - mean) / std


def averaged(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mean over the images of a table: one row per layer, head, source and kind, image -1; NaN counts as absent."""
    keys = [name for name in KEYS if name != "image"]
    rows = list(zip(*(columns[name].tolist() for name in keys), strict=True))
    groups = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    index = np.array([groups[row] for row in rows], int)
    found = {name: np.array(values) for name, values in zip(keys, zip(*groups, strict=True), strict=True)}
    found["image"] = np.full(len(groups), -1)
    for name in columns.keys() - set(KEYS):
        there = np.isfinite(columns[name])
        total = np.bincount(index[there], columns[name][there], len(groups))
        count = np.bincount(index[there], minlength=len(groups))
        found[name] = np.divide(total, count, out=np.full(len(groups), np.nan), where=count > 0)
    return {name: found[name] for name in columns}


def _table(records: Sequence[_Record]) -> dict[str, np.ndarray]:
    """Records as columns, sorted."""
    shapes = [next(iter(record.values.values())).shape for record in records]  # (images, heads)
    sizes = np.array([images * heads for images, heads in shapes], int)
    found = {name: np.repeat([getattr(record, name) for record in records], sizes) for name in ("layer", "source", "kind")}
    found |= {name: np.full(sizes.sum(), -1) for name in ("head", "image")}
    found |= {name: np.full(sizes.sum(), np.nan) for name in COLUMNS}
    end = 0
    for record, (images, heads) in zip(records, shapes, strict=True):
        start, end = end, end + images * heads
        if not record.together:
            found["head"][start:end] = np.tile(np.arange(heads), images)
        if record.first >= 0:
            found["image"][start:end] = np.repeat(np.arange(images) + record.first, heads)
        for name, values in record.values.items():
            found[name][start:end] = values.ravel()
    source = np.array([SOURCES.index(name) for name in found["source"]], int)
    order = np.lexsort((found["head"], found["image"], found["kind"] == "effective", source, found["layer"]))
    return {name: found[name][order] for name in (*KEYS, *COLUMNS)}


def _gathered(places: Tensor, source: Tensor, tokens: int) -> Tensor:
    """Places (B, 1, tokens, 2) of merged tokens: the mean of those that each speaks for. NaN where there are none.

    places (N0, 2) of the original tokens; source (B, N0): which token speaks for each, -1: none.
    """
    kept = (source >= 0) & places.isfinite().all(dim=-1)
    image, token = kept.nonzero(as_tuple=True)
    index = image * tokens + source[kept]
    total = places.new_zeros(len(source) * tokens, 2).index_add(0, index, places[token])
    count = torch.bincount(index, minlength=len(source) * tokens)
    return (total / count[:, None]).unflatten(0, (len(source), 1, tokens))


def _without(q: Tensor, sigma: Tensor) -> Tensor | None:
    """Queries (B, W, H, N, K) before a spectrum (H, K) was multiplied on unit rows; None if what is left is not of one length.

    A rotation after the spectrum, or a zero in it, leaves other lengths: then there is no way back.
    """
    q = q.to(torch.promote_types(q.dtype, torch.float32)) / sigma.to(q.device)[:, None]
    norm = torch.linalg.vector_norm(q, dim=-1)
    low, high = norm.amin(dim=(0, 1, 3)), norm.amax(dim=(0, 1, 3))
    return q if bool((high - low <= 1e-2 * high).all()) else None


def _numpy(x: Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
