"""Do SPC's components point the same way in all images? Per block, rule and component, on the real ViT-Tiny/16.

    python benchmarks/spc_signs/run.py ../shared/data          about 3 minutes on two cores

The right vectors v of one component over all images span a common line, the leading right singular vector of their stack.
The number is the share of images whose v lies on the majority side of it: 0.5 is chance, 1.0 is full agreement. Brackets:
95 % bootstrap over images (1,000 draws). It measures agreement, not truth: which side is the foreground is another question.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vitreous.layers.spectral import leading_subspace, unit_rows
from vitreous.mechanisms.tokens.spc import sign_reference

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import photographs, vit_tiny, write  # noqa: E402

BLOCKS, RULES, COMPONENTS, IMAGES = (4, 6, 8, 9, 10, 11, 12), ("mean", "class", "sum"), 4, 500


def agreement(v: torch.Tensor, generator: torch.Generator) -> tuple[float, float, float]:
    """Share of v (n, D) on the majority side of their common line, with its interval."""
    line = leading_subspace(v[None].double(), 1, method="exact").V[0, :, 0]
    side = (v.double() @ line > 0).double()
    draws = side[torch.randint(len(side), (1000, len(side)), generator=generator)].mean(1)
    share = side.mean()
    share, draws = (share, draws) if share >= 0.5 else (1 - share, 1 - draws)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return round(share.item(), 3), round(low.item(), 3), round(high.item(), 3)


@torch.no_grad()
def main(data: Path) -> None:
    model, images = vit_tiny(data), photographs(data, IMAGES)
    found: dict[tuple[int, str, str], list[torch.Tensor]] = {}
    for batch in images.split(50):
        outputs = model.forward_intermediates(
            batch, indices=[b - 1 for b in BLOCKS], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        for block, (patches, prefix) in zip(BLOCKS, outputs, strict=True):
            x = torch.cat([prefix, patches], dim=1)
            for rows in ("raw", "unit"):
                matrix = unit_rows(x) if rows == "unit" else x
                for rule in RULES:
                    space = leading_subspace(matrix, COMPONENTS, method="exact", sign=sign_reference(x, rule))
                    found.setdefault((block, rows, rule), []).append(space.V)
        print(f"{len(next(iter(found.values()))) * 50} of {IMAGES} images", flush=True)
    generator = torch.Generator().manual_seed(0)
    names = ("block", "rows", "rule")
    table = [
        dict(zip(names, key, strict=True), component=i + 1, agreement=agreement(torch.cat(v)[..., i], generator))
        for key, v in found.items()
        for i in range(COMPONENTS)
    ]
    command = "python benchmarks/spc_signs/run.py ../shared/data"
    write(HERE / "result.json", {"command": command, "images": IMAGES, "table": table})
    lines = ["| after block | rows | rule | u1 | u2 | u3 | u4 |", "|---|---|---|---|---|---|---|"]
    for key in found:
        cells = [row["agreement"] for row in table if tuple(row[name] for name in names) == key]
        lines.append("| " + " | ".join([*map(str, key), *(f"{a:.2f} [{b:.2f}, {c:.2f}]" for a, b, c in cells)]) + " |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
