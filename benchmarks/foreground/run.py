"""Where is the subject? Foreground maps of the real ViT-Tiny/16 against hand-drawn masks, centred and off the centre.

    python benchmarks/foreground/run.py ../shared/data          about 5 minutes on one core

The direction is calibrated on 500 ImageNet photographs without masks or labels, and written beside this file. What was open
was chosen on the ECSSD images of even position ("tune", stored in result.json): the number and kinds of features, how they are
ranked, and the block of the attention that the maps are compared with. The images of odd position are for the table.
Near-duplicates between the two sets of photographs were not searched for. Brackets: 95 % bootstrap over images, 2,000 draws.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitreous.base.statistics import bootstrap, paired
from vitreous.layers.geometry import centre_prior
from vitreous.lens.direction import Direction, Scan, centre_bump, corners, rows_of
from vitreous.lens.foreground import foreground_of, references
from vitreous.lens.formulas.maps import (
    blurred,
    correlation,
    gram_filter,
    log_attention,
    signed,
    singular_maps,
    standardised,
)
from vitreous.lens.formulas.scores import (
    auroc,
    baselines,
    ranks,
    scores,
)
from vitreous.lens.layer_features import LayerFeatures, layer_features
from vitreous.lens.tap import trace

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import photographs, vit_tiny, write  # noqa: E402
from objects import GRID, Objects, objects  # noqa: E402

BATCH, PHOTOGRAPHS = 25, 500
OURS = ("ours, class token", "ours, no class token")
MEASURES = ("auroc", "average_precision", "iou_otsu", "iou_best", "pointing")
KINDS, COUNTS = ("ko", "kox", "k", "o"), (1, 2, 3, 4)


@torch.no_grad()
def main(data: Path) -> None:
    torch.set_num_threads(1)
    model, images = vit_tiny(data), photographs(data, PHOTOGRAPHS)
    layouts = trace(model, images[:1])
    start, scan = time.process_time(), Scan()
    for take in (scan.learn, scan.judge):
        for first in range(0, len(images), BATCH):
            part = images[first : first + BATCH]
            take(layer_features(model, part if take == scan.learn else corners(part, first), layouts))
    direction = scan.direction(model)
    seconds = round(time.process_time() - start)  # of one core, which may be shared
    direction.save(HERE / "vit_tiny_patch16_224.safetensors")
    print(f"calibrated in {seconds} core seconds: {direction.features}, attention {direction.attention}", flush=True)

    sets = objects(data)
    tune = {name: s for name, s in sets.items() if name.startswith("tune")}
    choices = chosen_on_tune(model, layouts, scan, direction, tune, centred_agreement(model, layouts, scan, images))
    found = {}
    for name, part in sets.items():
        maps = all_maps(model, layouts, direction, part, choices["attention block"])
        found[name] = {kind: scores(m, part.cover) for kind, m in maps.items()}
        print(name, {kind: round(s["auroc"].nanmean().item(), 4) for kind, s in found[name].items()}, flush=True)
    result = {
        "command": "python benchmarks/foreground/run.py ../shared/data",
        "calibration": {
            "photographs": direction.photographs,
            "core seconds": seconds,
            "features": [f"{kind}{layer}" for layer, kind in direction.features],
            "attention": list(direction.attention),
            "strength": direction.strength,
        },
        "choices": choices,
        "images": {name: int((~part["centre prior"]["auroc"].isnan()).sum()) for name, part in found.items()},
        "scores": {name: {kind: summary(s) for kind, s in part.items()} for name, part in found.items()},
        "ours minus": {
            name: {kind: rounded(paired(part[OURS[0]]["auroc"], s["auroc"])) for kind, s in part.items()}
            for name, part in found.items()
        },
        "images below 0.9": {
            name: {kind: round((s["auroc"] < 0.9).double().mean().item(), 4) for kind, s in part.items()}
            for name, part in found.items()
        },
    }
    write(HERE / "result.json", result)
    (HERE / "table.md").write_text(table(result))


def batched(model, layouts, part: Objects):
    for first in range(0, len(part.images), BATCH):
        yield layer_features(model, part.images[first : first + BATCH], layouts)


def all_maps(model, layouts, direction: Direction, part: Objects, block: int) -> dict[str, Tensor]:
    """{name: (n, 196)} of ours and of what they are compared with."""
    found: dict[str, list[Tensor]] = {}
    centre = centre_prior(GRID).float()
    for seen in batched(model, layouts, part):
        both, free = references(seen, direction), references(seen, direction, class_token=False)
        plain = torch.stack([seen[n].attention.mean(1) for n in direction.attention]).mean(0)
        u, _, _ = singular_maps(seen[9].keys, 1, rows="unit")
        maps = {
            OURS[0]: foreground_of(both).maps.flatten(1),
            OURS[1]: foreground_of(free).maps.flatten(1),
            "Zw, no filter": free.fixed,
            "ours, no direction, class token": foreground_of(references(seen)).maps.flatten(1),
            "ours, no direction, no class token": foreground_of(references(seen, class_token=False)).maps.flatten(1),
            "centre prior": centre.expand(len(plain), -1),
            f"attention, best block ({block + 1})": seen[block].attention.mean(1),
            "attention, blurred": blurred(both.attention, GRID, 1.0),
            "attention times Gaussian": plain * centre,
            "G(attention times Gaussian)": gram_filter(both.rows, standardised(plain * centre)),
            "G(centre bump), the trap": gram_filter(both.rows, standardised(centre.expand(len(plain), -1))),
            "u1 of keys of block 10, signed": signed(u, **both.on(GRID)).maps[:, 0],
        }
        for name, m in maps.items():
            found.setdefault(name, []).append(m)
    found = {name: torch.cat(m) for name, m in found.items()}
    return found | {"random": baselines(GRID, range(len(part.images)))["random"]}


def centred_agreement(model, layouts, scan: Scan, images: Tensor) -> dict[str, float]:
    """What a scan without corners would go by: correlation of Zw with the centre bump, on whole photographs."""
    found: dict[str, list[Tensor]] = {}
    bump = centre_bump(GRID)
    for first in range(0, len(images), BATCH):
        for s in layer_features(model, images[first : first + BATCH], layouts):
            for kind, _, z in rows_of(s):
                match = correlation(z @ scan.features[s.layer, kind].vector(), bump)
                found.setdefault(f"{kind}{s.layer}", []).append(match)
    return {name: round(torch.cat(match).mean().item(), 4) for name, match in found.items()}


def chosen_on_tune(
    model, layouts, scan: Scan, direction: Direction, tune: dict[str, Objects], centred: dict[str, float]
) -> dict:
    """How well the ranking without masks agrees with masks, and what each number and kind of features would give."""
    ranked = {
        kind: sorted((n for n, k in scan.features if k == kind), key=lambda n: -direction.strength[f"{kind}{n}"])
        for kind in "kox"
    }
    sets = {(kinds, n): [(m, k) for k in kinds for m in ranked[k][:n]] for kinds in KINDS for n in COUNTS}
    single: dict[str, list[float]] = {}
    several: dict[str, list[float]] = {}
    attention: dict[int, list[float]] = {}
    for part in tune.values():
        maps: dict[tuple, list[Tensor]] = {}
        for seen in batched(model, layouts, part):
            for key, m in choices_of(seen, scan, sets):
                maps.setdefault(key, []).append(m)
        for (group, key), m in maps.items():
            value = auroc(torch.cat(m), part.cover).nanmean().item()
            {"single": single, "several": several, "attention": attention}[group].setdefault(key, []).append(round(value, 4))
    names = sorted(single)
    masks = ranks(torch.tensor([sum(single[name]) for name in names]))
    agreement = {
        title: round(float(np.corrcoef(ranks(torch.tensor([by[name] for name in names])), masks)[0, 1]), 3)
        for title, by in (("strength, from corners", direction.strength), ("agreement with the centre bump", centred))
    }
    block = max(attention, key=lambda n: sum(attention[n]))
    return {
        "sets": "AUROC on tune and tune off-centre",
        "rank correlation with AUROC over features": agreement,
        "agreement with the centre bump": centred,
        "Zw of one feature": single,
        "map of the best n features of each kind": several,
        "attention of one block": attention,
        "attention block": block,
    }


def choices_of(seen: list[LayerFeatures], scan: Scan, sets: dict):
    """((group, name), map (B, 196)) of everything that was tried on tune."""
    rows = {(s.layer, kind): z for s in seen for kind, _, z in rows_of(s)}
    along = {f: z @ scan.features[f].vector() for f, z in rows.items()}
    for layer, kind in rows:
        yield ("single", f"{kind}{layer}"), along[layer, kind]
    for (kinds, n), features in sets.items():
        seed = standardised(sum(along[f] for f in features))
        yield ("several", f"{kinds} {n}"), blurred(gram_filter([rows[f] for f in features], seed), GRID)
    for s in seen:
        yield ("attention", s.layer), log_attention(s.attention)


def summary(values: dict[str, Tensor]) -> dict[str, list[float]]:
    return {measure: rounded(bootstrap(values[measure])) for measure in MEASURES}


def rounded(numbers: tuple) -> list[float]:
    return [round(float(x), 4) for x in numbers]


def table(result: dict) -> str:
    """Held-out images, centred and off-centre."""
    sets = ("held-out", "held-out off-centre")
    counts = " and ".join(f"{result['images'][name]} {name}" for name in sets)
    lines = [
        f"ECSSD, {counts}. Required of ours on both: AUROC 0.975, average precision 0.92.",
        "",
        "| map | AUROC | off-centre | average precision | off-centre | IoU, Otsu | IoU, best | pointing | below 0.9 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in result["scores"][sets[0]]:
        whole, off = (result["scores"][name][kind] for name in sets)
        cells = [cell(whole["auroc"]), cell(off["auroc"]), cell(whole["average_precision"]), cell(off["average_precision"])]
        cells += [f"{whole[m][0]:.3f}" for m in ("iou_otsu", "iou_best", "pointing")]
        below = result["images below 0.9"][sets[0]][kind]
        lines.append("| " + " | ".join([kind, *cells, f"{below:.1%}"]) + " |")
    return "\n".join(lines) + "\n"


def cell(numbers: list[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*numbers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
