"""What does it cost to turn a pretrained model's attention into SVDA? On the real ViT-Tiny/16, photographs not fitted.

    python benchmarks/svda_import/run.py ../shared/data        about 3 minutes on two cores

Per layer, the mean over heads of |A' - A|_F / |A|_F, with A the host's attention and A' SVDA's on the same input; and the
share of the 100 photographs whose top-1 prediction stays the host's, with all twelve layers replaced, before any training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vitreous import SVDA, calibrate, graft, ungraft
from vitreous.mechanisms.attn.svda import import_error

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import photographs, vit_tiny, write  # noqa: E402

ARMS = {"gentle, paper scale": SVDA(start="gentle"), "gentle, sqrt scale": SVDA(start="gentle", scale="sqrt")}
FITTED = (4, 16, 64)


@torch.no_grad()
def main(data: Path) -> None:
    model, images = vit_tiny(data), photographs(data, 200)
    fit, held_out = images[::2], images[1::2]
    host = model(held_out).argmax(1)
    arms = {name: (arm, 1) for name, arm in ARMS.items()}
    arms |= {f"import from {n} photographs": (SVDA(start="import"), n) for n in FITTED}
    result = {}
    for name, (arm, count) in arms.items():
        calibrate(graft(model, arm), fit[:count])
        errors = [import_error(model, batch) for batch in held_out[:50].split(10)]
        layers = [round(torch.stack([e[i] for e in errors]).mean().item(), 3) for i in range(12)]
        same = (model(held_out).argmax(1) == host).float().mean().item()
        ungraft(model)
        result[name] = {"layers": layers, "mean": round(sum(layers) / 12, 3), "top1_agreement": round(same, 3)}
        print(name, result[name], flush=True)
    write(HERE / "result.json", {"command": "python benchmarks/svda_import/run.py ../shared/data", "arms": result})
    lines = ["| start | mean error | worst layer | top-1 as the host |", "|---|---|---|---|"]
    lines += [f"| {n} | {r['mean']:.2f} | {max(r['layers']):.2f} | {r['top1_agreement']:.2f} |" for n, r in result.items()]
    (HERE / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
