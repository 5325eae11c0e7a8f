"""Do maps that are made for the predicted class mark more of what the real ViT-Tiny/16 needs than maps for none?

    python benchmarks/faithfulness/class_maps.py ../shared/data          about 10 minutes on one core

Insertion and deletion curves (fill: the mean colour) on the same 42 ImageNet photographs as run.py, for relevance and
attention times its gradient after Chefer et al. 2021, beside attention of the class token (mean over heads) and rollout, as
they come from `look`. Differences in area to two random orders of the same photograph, with 95 % bootstrap intervals over
photographs, and, last column, in insertion to attention after block 9, the best map for no class of run.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from vitreous.lens.faithfulness import Curves, compare, curves, random_maps, record
from vitreous.lens.formulas import scores
from vitreous.lens.look import look

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import photographs, vit_tiny, write  # noqa: E402

GRID, ORDERS, BASE = (14, 14), 2, "attention, block 9"


def maps_of(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: (n, 196)}."""
    maps = look(model, images, probes=["attention_maps", "rollout", "relevance", "grad_attention"], noise=0).maps
    fused = look(model, images, probes=["rollout:fusion=max,discard=0.9"], noise=0).maps
    named = {
        "relevance for the predicted class": maps["relevance"],
        "attention for the predicted class, block 12": maps["grad_attention", 11],
        BASE: maps["attention", 8],
        "attention, block 12": maps["attention", 11],
        "rollout": maps["rollout", 11],
        "rollout, maximum of heads, lowest 90 % discarded": fused["rollout", 11],
    }
    flat = {name: torch.from_numpy(values).flatten(1) for name, values in named.items()}
    return flat | {"centre prior": scores.baselines(GRID, range(len(images)), seed=1)["centre"]}


def main(data: Path) -> None:
    torch.set_num_threads(1)
    model, images = vit_tiny(data), photographs(data, 500)[::12]
    maps = maps_of(model, images)
    parts = {"maps": torch.stack(list(maps.values()), 1), "random": random_maps(GRID, range(len(images)), ORDERS)}
    found: dict[str, list[Curves]] = {name: [] for name in parts}
    for rows in torch.arange(len(images)).split(8):
        for name, values in parts.items():
            found[name].append(curves(model, images[rows], values[rows], GRID, numbers=rows.tolist()))
        print(f"{rows[-1] + 1} of {len(images)} photographs", flush=True)
    ours, random = (Curves.joined(found[name]) for name in parts)
    names = list(maps)
    base, centre = ours.of(names.index(BASE)), ours.of(names.index("centre prior"))
    base = replace(base, insertion=base.insertion[:, None], deletion=base.deletion[:, None])
    table = [
        {"map": name, **record(ours.of(i), random, centre), "insertion_over_base": compare(ours.of(i), base)["insertion"]}
        for i, name in enumerate(names)
    ]
    command = "python benchmarks/faithfulness/class_maps.py ../shared/data"
    write(HERE / "class_maps.json", {"command": command, "images": len(images), "orders": ORDERS, "base": BASE, "table": table})
    (HERE / "class_maps.md").write_text(written(table))


def written(table: list[dict]) -> str:
    lines = ["| map | insertion | deletion | both | both, to the centre prior | insertion, to attention, block 9 |"]
    lines.append("|---|---|---|---|---|---|")
    for line in table:
        keys = ("insertion_difference", "deletion_difference", "difference", "difference_to_centre", "insertion_over_base")
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*line[name]) for name in keys]
        lines.append("| " + " | ".join([line["map"], *cells]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
