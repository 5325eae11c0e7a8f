"""Models of other packages: what `look` shows of each, beside what the model itself computed.

    python benchmarks/foreign_models/run.py [NAME ...]      # those that result.json has are not run again, unless named
    python benchmarks/foreign_models/run.py --page          # the second table of docs/support.md, from result.json

Nothing of the lens finds what is true. `Recorder` takes the weights of every softmax, of
`scaled_dot_product_attention` and of `multi_head_attention_forward` as the model computes them, of
one image alone. Where tokens are is found by changing the image at one place after the other while
all attention is silent: the scores of the key that stands there change, and those of no other.

What `watch` and `look` show of two images in a batch is compared with that: weights, places of
tokens in pixels, and the map in the reading with the weights summed up at these places.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitreous import look
from vitreous.base.errors import VitreousError
from vitreous.lens.reading import Reading
from vitreous.lens.tap import AttentionCall, watch

sys.path.insert(0, str(Path(__file__).parent))
from models import MODELS, Model

RESULTS = Path(__file__).with_name("result.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
HEAD = "# Models of other packages"
SAME = 1e-4  # of weights, which are at most 1
SAME_MAP = 2e-3  # of the largest value of a map, which is stored in half precision
MASKED = 1e6  # scores beyond are masks


class Recorder(TorchFunctionMode):
    """The scores and weights (lead, N, M) of every attention of a pass; silent: attention adds nothing."""

    def __init__(self, silent: bool = False):
        super().__init__()
        self.silent, self.scores, self.weights = silent, [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is F.multi_head_attention_forward:
            out, weights = func(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})
            self.keep(packed_scores(*args, **kwargs), weights)
            return (torch.zeros_like(out) if self.silent else out), weights.mean(1)
        out = func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            scores = fused_scores(*args, **kwargs)
            self.keep(scores, scores.softmax(-1).nan_to_num())
        elif name in ("softmax", "_softmax") and out.ndim > 1:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            dim = -1 if dim is None else dim
            self.keep(args[0].movedim(dim, -1), out.movedim(dim, -1))
        else:
            return out
        return torch.zeros_like(out) if self.silent else out

    def keep(self, scores: Tensor, weights: Tensor) -> None:
        self.scores.append(scores.detach().double().clone())
        self.weights.append(weights.detach().double().clone())


def fused_scores(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """Scores of `scaled_dot_product_attention` with its mask."""
    q, k = q.double(), k.double()
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3) if enable_gqa else k
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return masked(scores, attn_mask if attn_mask is None or attn_mask.dtype != torch.bool else ~attn_mask)


def packed_scores(query, key, value, width, heads, in_proj, bias, *_, attn_mask=None, **given) -> Tensor:
    """Scores (B, H, N, M) of `multi_head_attention_forward`, without masks of padded keys."""
    given = {"q_proj_weight": None, "k_proj_weight": None} | given
    q_weight, k_weight = in_proj.chunk(3)[:2] if in_proj is not None else (given["q_proj_weight"], given["k_proj_weight"])
    q_bias, k_bias = (None, None) if bias is None else bias.chunk(3)[:2]
    pairs = ((query, q_weight, q_bias), (key, k_weight, k_bias))
    q, k = (F.linear(*pair).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for pair in pairs)
    scores = q @ k.mT / math.sqrt(width // heads)
    return masked(scores, attn_mask.unflatten(0, (-1, heads)) if attn_mask is not None and attn_mask.ndim == 3 else attn_mask)


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores under a mask: True where a key takes no part, or what is added."""
    if mask is None:
        return scores
    return scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask


@torch.no_grad()
def record(model: nn.Module, images: Tensor, silent: bool = False) -> Recorder:
    torch.manual_seed(0)
    with Recorder(silent) as recorder:
        model(images)
    return recorder


@torch.no_grad()
def prepare(model: nn.Module, images: Tensor, gain: float) -> None:
    """Seeded weights that make sharp maps; batch norms with the statistics of the images."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1 and p.numel() and not name.endswith(("temperature", "logit_scale")):
            p.copy_(gain * torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
            if p.ndim > 3 and p.shape[-1] > 2:
                p.mul_(centred(p.shape[2:]))
        elif name.endswith("bias"):  # so that padding has keys, too
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    model(images)  # an error here is the model's own
    for norm in norms:
        norm.eval()


def centred(kernel: torch.Size) -> Tensor:
    """A filter whose weights fall off from its middle, so that what it gives is from there."""
    window = torch.ones(())
    for size in kernel:
        offset = (torch.arange(size) - (size - 1) / 2) / size
        window = window[..., None] * torch.exp(-18 * offset.square())
    return window / window.square().mean().sqrt()


# --- what is true -----------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """One attention: for each image its weights (lead, N, M), and places (lead, N or M, 2); NaN: nowhere."""

    weights: list[Tensor]
    queries: list[Tensor]
    keys: list[Tensor]


def truths(model: nn.Module, images: Tensor, case: Model) -> list[Truth]:
    """Of each image alone; of the batch, where chance draws for all of it."""
    if case.chance:
        batch = record(model, images).weights
        own = [[weights[i : i + 1] for weights in batch] for i in range(len(images))]
        places = [located(model, images, i, case) for i in range(len(images))]
    else:
        own = [record(model, image[None]).weights for image in images]
        places = [located(model, images[:1], 0, case)] * len(images)
    return [Truth([w[n] for w in own], [p[n][0] for p in places], [p[n][1] for p in places]) for n in range(len(own[0]))]


def located(model: nn.Module, images: Tensor, at: int, case: Model) -> list[tuple[Tensor, Tensor]]:
    """Places of queries and keys of every attention of one image."""
    before, step = record(model, images, silent=True).scores, case.step
    centres, rows, columns = [], [[] for _ in before], [[] for _ in before]
    for y in range(0, images.shape[-2], step):
        for x in range(0, images.shape[-1], step):
            changed = images.clone()
            patch = changed[at, :, y : y + step, x : x + step]
            patch.copy_(-0.5 * patch.roll(1, -1) + 0.7)
            for n, (new, old) in enumerate(zip(record(model, changed, silent=True).scores, before, strict=True)):
                new, old = (s[at : at + 1] if case.chance else s for s in (new, old))
                delta = torch.where((new.abs() < MASKED) & (old.abs() < MASKED), new - old, torch.nan)
                delta = delta - delta.nanmedian(-1, keepdim=True)[0] if case.shifted else delta
                # a key that changes changes the scores of all queries, whatever else changes one
                columns[n].append(torch.nanquantile(delta.abs(), 0.1, -2).nan_to_num())
                rows[n].append(torch.nanquantile(delta.abs(), 0.1, -1).nan_to_num())
            centres.append((y + step / 2, x + step / 2))
    centres = torch.tensor(centres, dtype=torch.float64)
    return [(centroid(torch.stack(r), centres), centroid(torch.stack(c), centres)) for r, c in zip(rows, columns, strict=True)]


def centroid(changes: Tensor, centres: Tensor) -> Tensor:
    """changes (places of the image, ..., tokens) -> (..., tokens, 2)."""
    peak = changes.amax(0)
    weight = torch.where(changes > 0.5 * peak, changes, 0.0)
    place = torch.einsum("p...,pc->...c", weight, centres) / weight.sum(0)[..., None]
    return torch.where((peak > 0.02 * peak.max())[..., None], place, torch.nan)


# --- comparison -------------------------------------------------------------------------------------------------------


def compare(case: Model) -> dict[str, Any]:
    """The record of one model."""
    torch.manual_seed(0)
    model = case.build().eval()
    images = torch.rand(2, 3, *case.size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    try:
        prepare(model, images, case.gain)
    except Exception as error:
        return {"verdict": "fails by itself", "reason": f"{type(error).__name__}: {error}"}
    calls: list[tuple[AttentionCall, Tensor, Tensor]] = []

    def see(call: AttentionCall) -> None:
        calls.append((call, call.map().double(), call.map(effective=call.stochastic).double()))

    torch.manual_seed(0)
    refused = watch(model, images, see).refused
    torch.manual_seed(0)
    reading = look(model, images, noise=0.0)
    torch.manual_seed(0)
    noisy = None if case.chance else look(model, images, inputs={"mean": [0.5] * 3, "std": [0.5] * 3}, noise=0.01)
    result: dict[str, Any] = {"refused": [f"{each.name}: {each.reason}" for each in refused], "attentions": []}
    left = truths(model, images, case)
    for (call, maps, effective), layer in zip(calls, reading.facts["layers"], strict=True):
        entry = {"name": call.name, "kind": call.kind, "shape": list(maps.shape[1:]), "grid": layer["grid"]}
        entry |= {"class": layer["has_class"], "note": layer["note"]}
        match = next((match for truth in left if (match := matched(maps, truth))), None)
        if match is None:
            entry["wrong"] = "no attention of the model has these weights"
        else:
            truth, order, entry["error"] = match
            left = [other for other in left if other is not truth]
            if call.kind != "channel" and call.layout is not None:
                entry |= placed(truth, order, call.layout) if case.places else {"placed": 0}
                entry |= pictured(reading, noisy, layer, effective, call.layout)
        result["attentions"].append(entry | faults(entry, case))
    result["verdict"] = "WRONG" if any("wrong" in entry for entry in result["attentions"]) else "right"
    return result


def matched(maps: Tensor, truth: Truth) -> tuple[Truth, Tensor, float] | None:
    """(truth, its leading axes for each window and head (W, H), error), if these are its weights."""
    windows, heads, n, m = maps.shape[1:]
    if any(own.numel() != maps[0].numel() for own in truth.weights):
        return None
    orders, errors = [], []
    for image, own in zip(maps, truth.weights, strict=True):
        own = own.reshape(-1, n, m)
        distance = torch.stack([(own - one).abs().flatten(1).amax(1) for one in image.reshape(-1, n, m)])
        orders.append(distance.argmin(1))
        errors.append(float(distance.amin(1).max()))
    return (truth, orders[0].reshape(windows, heads), max(errors)) if max(errors) <= SAME else None


def placed(truth: Truth, order: Tensor, layout: Any) -> dict[str, Any]:
    """Distances of the tokens of a layout from where they are."""
    pairs, alone = [], 0
    for name in ("queries", "keys"):
        for i, true in enumerate(getattr(truth, name)):
            own = getattr(layout, name)[i] if layout.images else getattr(layout, name)
            true = true.reshape(-1, *true.shape[-2:])
            for w, places in enumerate(own):
                there = true[int(order[w, 0]) if len(true) > 1 else 0]
                if len(there) == len(places):
                    both = places[:, 0].isfinite() & there[:, 0].isfinite()
                    pairs.append(torch.cat([places[both], there[both]], 1))
                    alone += int((places[:, 0].isnan() & there[:, 0].isfinite()).sum()) if name == "keys" else 0
    pairs = torch.cat(pairs) if pairs else torch.empty(0, 4)
    if not len(pairs):
        return {"placed": 0}
    distance = (pairs[:, :2] - pairs[:, 2:]).abs().amax(1)
    alike = [float(torch.corrcoef(pairs[:, [axis, axis + 2]].T)[0, 1]) for axis in range(2) if len(pairs[:, axis].unique()) > 1]
    numbers = {"distance": float(distance.median()), "farthest": float(distance.max()), "correlation": min(alike, default=1.0)}
    return {"placed": len(pairs), "left_out": alone} | {name: round(value, 3) for name, value in numbers.items()}


def pictured(reading: Reading, noisy: Reading | None, layer: dict, maps: Tensor, layout: Any) -> dict[str, Any]:
    """The map of a reading beside the weights at the places of the layout's keys; and with noisy copies in the pass."""
    grid, key = layer["grid"], ("attention", layer["layer"])
    if grid is None:
        return {}
    shown = torch.from_numpy(reading.maps.heads(*key).copy()).double()
    rows = maps[:, :, :, 0] if layer["has_class"] or maps.shape[3] == 1 else maps.mean(3)  # (B, W, H, M)
    worst = 0.0
    for i, own in enumerate(rows):
        keys = layout.keys[i] if layout.images else layout.keys
        there = keys[..., 0].isfinite()
        cells = (keys[there] / torch.tensor(layout.size) * torch.tensor(grid)).long().clamp(min=0)
        flat = cells[:, 0].clamp(max=grid[0] - 1) * grid[1] + cells[:, 1].clamp(max=grid[1] - 1)
        total = own.new_zeros(own.shape[1], math.prod(grid)).index_add(1, flat, own.transpose(0, 1)[:, there])
        expected = (total / torch.bincount(flat, minlength=math.prod(grid))).nan_to_num().unflatten(1, grid)
        worst = max(worst, float((expected - shown[i]).abs().max() / expected.abs().max().clamp(min=1e-12)))
    beside = shown if noisy is None else torch.from_numpy(noisy.maps.heads(*key).copy()).double()
    worst = max(worst, float((shown - beside).abs().max() / shown.abs().max()))
    return {"map": round(worst, 6)}


def faults(entry: dict[str, Any], case: Model) -> dict[str, str]:
    """{"wrong": what is wrong} of an attention that is shown on a grid without a note; {} if nothing is."""
    if "wrong" in entry or entry.get("map") is None:
        return {}
    if entry["map"] > SAME_MAP:
        return {"wrong": f"its map is off by {entry['map']:.2g}"}
    pitch = max(case.step, *(n / m for n, m in zip(case.size, entry["grid"], strict=True)))
    if entry["placed"] and (entry["distance"] > 0.75 * pitch or entry["correlation"] < 0.8):
        return {"wrong": f"tokens are {entry['distance']} pixels away, correlation {entry['correlation']}"}
    return {}


def run(case: Model) -> dict[str, Any]:
    """The record of one model; an error is part of it."""
    start = time.perf_counter()
    try:
        result = compare(case)
    except VitreousError as error:
        result = {"verdict": "refused", "reason": str(error)}
    except Exception:
        result = {"verdict": "TRACEBACK", "reason": traceback.format_exc(limit=-3)}
    return {
        "package": case.package,
        "version": version(case.package),
        "seconds": round(time.perf_counter() - start, 1),
    } | result


# --- the page ---------------------------------------------------------------------------------------------------------

ABOUT = f"""
{HEAD}

Not part of the tests, since it needs these packages: `python benchmarks/foreign_models/run.py` compares, `--page` writes this
table. Small models with random weights, two images in a batch. No line of the lens finds what is true: weights are those of
every softmax and attention that the model itself computes for each image alone, and places are found by changing the image at
one place after the other while attention is silent, to see whose scores change.

- *Attentions*: that were shown, and of how many of them there is a map on a grid. *Weights*: largest difference.
- *Places*: median and largest distance of tokens, in pixels, of all attentions of which it could be found. Below a network of
  filters it is found only as well as a random filter and the step of the change allow, and no more than that is verified.
  "-": not found, as where attention is not silent or nothing goes around it. Less alike than a correlation of 0.8 is WRONG.
- *Map*: largest difference of the map in the reading to the weights at these places, relative to its largest value (it is
  stored in half precision), also with noisy copies in the pass.
- Whether the first token was taken for a class token ("class" in result.json) was compared with the models' code by reading it.
- *Said*: the notes of a reading beside its layers, and what was refused. "Fails by itself": the model's own forward raises.
"""
COLUMNS = ["Model", "Package", "Attentions", "Weights", "Places", "Map", "Result", "Said"]


def row(name: str, result: dict[str, Any]) -> list[str]:
    """The cells of one model."""
    entries = result.get("attentions", [])
    found = [entry for entry in entries if entry.get("placed") and "map" in entry]
    places = (
        f"{max(entry['distance'] for entry in found):.3g}, {max(entry['farthest'] for entry in found):.3g}" if found else "-"
    )
    maps = [entry["map"] for entry in entries if "map" in entry]
    said = [entry["note"] for entry in entries if entry["note"]]
    said += [text.partition(": ")[2] for text in result.get("refused", ())] + [
        entry["wrong"] for entry in entries if "wrong" in entry
    ]
    reason = result.get("reason", "").partition(" Expected ")[0]
    errors = [entry["error"] for entry in entries if "error" in entry]
    return [
        name,
        f"{result['package']} {result['version']}",
        f"{len(entries)}, {len(maps)}",
        f"{max(errors):.0e}" if errors else "-",
        places,
        f"{max(maps):.0e}" if maps else "-",
        result["verdict"],
        "; ".join(dict.fromkeys([*said, *filter(None, [reason])])).replace("|", "/").replace("\n", " "),
    ]


def section(results: dict[str, dict[str, Any]]) -> str:
    """The second part of docs/support.md."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(row(name, result) for name, result in sorted(results.items()))]
    verdicts = [result["verdict"] for result in results.values()]
    counts = ", ".join(f"{verdicts.count(each)} {each}" for each in sorted(set(verdicts), key=verdicts.count, reverse=True))
    table = "".join("| " + " | ".join(cells) + " |\n" for cells in rows)
    return f"{ABOUT}\n{len(results)} models: {counts}.\n\n{table}"


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models to run, also again (default: all that are not stored)")
    parser.add_argument("--page", action="store_true", help="write the table of docs/support.md")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.page:
        PAGE.write_text(PAGE.read_text().partition(f"\n{HEAD}")[0] + section(results))
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name in args.names or [name for name in MODELS if name not in results]:
        results[name] = run(MODELS[name])
        print(*row(name, results[name]), sep=" | ", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
