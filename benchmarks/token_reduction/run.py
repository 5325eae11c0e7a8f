"""How far do EViT and token merging carry a trained ViT-Tiny/16 without training, and what do they save in fact?

    python benchmarks/token_reduction/run.py ../shared/data        about 10 minutes on two busy cores

Agreement: share of the 500 ImageNet photographs whose top-1 class stays the host's, with its 95 % Wilson interval.
Operations: multiply-adds of one image, counted by torch from the shapes of all matrix products, the mechanism's own included.
Merging takes, for each keep of EViT, the tokens per block whose operations come nearest.
Latency: seconds of an arm over seconds of the host, batch of 16, one thread, measured in turns (host, arm, host, arm, ...);
median over the rounds and, in brackets, its 95 % bootstrap interval. Finished parts of result.json are not done again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitreous import EViT, Mechanism, TokenMerging, graft, ungraft
from vitreous.base.statistics import wilson

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import photographs, vit_tiny, write  # noqa: E402

KEEPS, IMAGES, BATCH, ROUNDS = (0.9, 0.8, 0.7, 0.5), 500, 16, 25


def operations(model: torch.nn.Module) -> float:
    """Multiply-adds of one image, in G."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() / 2e9


def with_graft(model: torch.nn.Module, mechanism: Mechanism, act) -> object:
    """act(model) while the mechanism is in."""
    graft(model, mechanism)
    try:
        return act(model)
    finally:
        ungraft(model)


def arms_of(model: torch.nn.Module) -> dict[str, tuple[float, Mechanism, float]]:
    """{name: (keep, mechanism, G multiply-adds)}: EViT at each keep, and merging with the nearest operations."""
    merging = {r: with_graft(model, TokenMerging(tokens=r), operations) for r in range(1, 20)}
    arms = {}
    for keep in KEEPS:
        cost = with_graft(model, EViT(keep=keep), operations)
        nearest = min(merging, key=lambda r: abs(merging[r] - cost))
        arms[f"evit:keep={keep}"] = (keep, EViT(keep=keep), cost)
        arms[f"token_merging:tokens={nearest}"] = (keep, TokenMerging(tokens=nearest), merging[nearest])
    return arms


def classes(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(batch).argmax(1) for batch in images.split(25)])


def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    started = time.perf_counter()
    model(images)
    return round(time.perf_counter() - started, 4)


def ratio(pairs: list[list[float]]) -> tuple[float, float, float]:
    """Median of arm over host, and its 95 % bootstrap interval over rounds."""
    each = torch.tensor([arm / host for host, arm in pairs], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = each[torch.randint(len(each), (2000, len(each)), generator=generator)].quantile(0.5, dim=1)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return each.quantile(0.5).item(), low.item(), high.item()


@torch.no_grad()
def main(data: Path) -> None:
    torch.set_num_threads(1)
    host, file = vit_tiny(data), HERE / "result.json"
    images, arms, plain = photographs(data, IMAGES), arms_of(host), operations(host)
    result = json.loads(file.read_text()) if file.exists() else {"arms": {}}
    result["command"] = "python benchmarks/token_reduction/run.py ../shared/data"
    result |= {"images": IMAGES, "host_gmac": round(plain, 4)}
    expected, models = None, {}
    for name, (keep, mechanism, cost) in arms.items():
        models[name] = graft(vit_tiny(data), mechanism)
        row = result["arms"].setdefault(name, {"keep": keep, "gmac": round(cost, 4), "seconds": []})
        if "same" not in row:
            expected = classes(host, images) if expected is None else expected
            row["same"] = int((classes(models[name], images) == expected).sum())
            write(file, result)
        print(name, f"{cost:.3f} G", row["same"], flush=True)
    batch = images[:BATCH]
    while any(len(row["seconds"]) < ROUNDS for row in result["arms"].values()):
        for name, row in result["arms"].items():
            if len(row["seconds"]) < ROUNDS:
                row["seconds"].append([seconds(host, batch), seconds(models[name], batch)])
        write(file, result)
    (HERE / "table.md").write_text(table(result))


def table(result: dict) -> str:
    lines = [
        f"The host needs {result['host_gmac']:.3f} G multiply-adds per image.",
        "",
        "| arm | G multiply-adds | of the host | latency of the host | top-1 as the host |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["arms"].items():
        low, high = wilson(row["same"], result["images"])
        middle, first, last = ratio(row["seconds"])
        cost, same = row["gmac"], row["same"] / result["images"]
        lines.append(
            f"| `{name}` | {cost:.3f} | {cost / result['host_gmac']:.2f} | {middle:.2f} [{first:.2f}, {last:.2f}] "
            f"| {same:.3f} [{low:.3f}, {high:.3f}] |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
