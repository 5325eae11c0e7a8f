"""Does the real ViT-Tiny/16 depend on the patches that its class attention marks, and is a bad explainer found out?

    python benchmarks/faithfulness/run.py ../shared/data          about 6 minutes on one core

Insertion and deletion curves on every twelfth of 500 ImageNet photographs (42, most likely training images), for attention
of the class token (mean over heads) and five maps that do not come from what the model sees in the photograph: the centre
prior, random values, one value everywhere, the attention of another photograph, and that of shuffled weights. The numbers
are differences in area to two random orders of the same photograph, with 95 % bootstrap intervals over photographs (2,000
draws): 0 is chance. Last column: Spearman's correlation over patches of a map with the same map of shuffled weights, mean.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vitreous.lens.faithfulness import Curves, curves, random_maps, randomised, rank_correlation, record
from vitreous.lens.formulas import scores

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import photographs, vit_tiny, write  # noqa: E402

BLOCKS, GRID, ORDERS = (8, 9, 12), (14, 14), 2  # blocks counted from 1
FRACTIONS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


@torch.no_grad()
def class_attention(model, images: torch.Tensor) -> torch.Tensor:
    """Attention of the class token to the patches after each of BLOCKS, mean over heads: (n, blocks, 196)."""
    given: dict[int, torch.Tensor] = {}
    hooks = [
        model.blocks[b - 1].attn.register_forward_pre_hook(lambda _, args, b=b: given.__setitem__(b, args[0])) for b in BLOCKS
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    found = []
    for b, x in given.items():
        attention = model.blocks[b - 1].attn
        q, k, _ = attention.qkv(x).reshape(*x.shape[:2], 3, 3, 64).permute(2, 0, 3, 1, 4)
        found.append((q[:, :, :1] @ k.mT * attention.scale).softmax(-1)[:, :, 0, 1:].mean(1))
    return torch.stack(found, 1)


def main(data: Path) -> None:
    torch.set_num_threads(1)
    model, images = vit_tiny(data), photographs(data, 500)[::12]
    attention, shuffled = (class_attention(m, images) for m in (model, randomised(model)))
    bad, at = scores.baselines(GRID, range(len(images)), seed=1), BLOCKS.index(9)
    maps = {f"attention, block {b}": attention[:, i] for i, b in enumerate(BLOCKS)} | {
        "centre prior": bad["centre"],
        "random": bad["random"],
        "the same everywhere": bad["area"],
        "attention, block 9, of another photograph": attention[:, at].roll(1, 0),
        "attention, block 9, of shuffled weights": shuffled[:, at],
    }
    correlations = rank_correlation(attention, shuffled).mean(0).tolist()
    table = []
    for fill in ("mean", "blur"):
        parts = {"maps": torch.stack(list(maps.values()), 1), "random": random_maps(GRID, range(len(images)), ORDERS)}
        found: dict[str, list[Curves]] = {name: [] for name in parts}
        for rows in torch.arange(len(images)).split(8):
            for name, values in parts.items():
                of = {"fractions": FRACTIONS, "fill": fill, "numbers": rows.tolist()}
                found[name].append(curves(model, images[rows], values[rows], GRID, **of))
            print(f"{fill}: {rows[-1] + 1} of {len(images)} photographs", flush=True)
        ours, random = (Curves.joined(found[name]) for name in parts)
        centre = ours.of(list(maps).index("centre prior"))
        for i, name in enumerate(maps):
            same = correlations[i] if i < len(BLOCKS) else None
            table.append({"map": name, **record(ours.of(i), random, centre), "randomised": same})
    command = "python benchmarks/faithfulness/run.py ../shared/data"
    write(HERE / "result.json", {"command": command, "images": len(images), "orders": ORDERS, "table": table})
    (HERE / "table.md").write_text(written(table))


def written(table: list[dict]) -> str:
    lines = [
        "| fill | map | insertion | deletion | both | both, to the centre prior | shuffled weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in table:
        names = ("insertion_difference", "deletion_difference", "difference", "difference_to_centre")
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*line[name]) for name in names]
        correlation = "" if line["randomised"] is None else f"{line['randomised']:+.2f}"
        lines.append("| " + " | ".join([line["fill"], line["map"], *cells, correlation]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
