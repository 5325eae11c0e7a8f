"""How far do reducers carry a trained ViT-Tiny/16 without training, and what do they save in fact?

    python benchmarks/token_reduction/run.py ../shared/data [--rounds 5]      half an hour on a busy core

Agreement: share of the ImageNet photographs of odd position whose top-1 class stays the host's; whatever was open in a
reducer was chosen on those of even position. Top-1: share whose class is right. Both with 95 % Wilson intervals.
Divergence: Kullback-Leibler, of the host's probabilities from the arm's, mean over photographs, in nats.
Operations: multiply-adds of one image, counted by torch from the shapes of all matrix products, the mechanism's own included.
Latency: processor seconds of an arm over those of the host, one thread, in turns (arm, host, arm, arm, host, arm, ...);
median over the rounds. Processor seconds, since other work ran on the machine. Finished parts of result.json are not done
again. `peer.json` holds points of the authors' code of ToMe, measured in the same process as a run of this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitreous import graft
from vitreous.base.errors import SettingError
from vitreous.base.statistics import wilson
from vitreous.mechanism import catalogue, mechanism_class
from vitreous.reducer import Reducer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import photographs, vit_tiny, write  # noqa: E402

BUDGETS = (0.6, 0.5, 0.7)
BATCHES = (16, 1, 64)
OURS = "weighted_merging:tokens={}+class_query"
FIRST = (OURS.format(14), OURS.format("21,layers=3-10"), OURS.format(18), OURS.format(9), "class_query")
MERGING = tuple(f"token_merging:tokens={tokens}" for tokens in (13, 16, 8))  # as many as the peer's points
EVERYWHERE = (OURS.format(14), "evit:macs=0.6", MERGING[0])  # arms timed at each of BATCHES


def arms() -> list[str]:
    """Grafts in text form, joined by +; every reducer of the catalogue at each budget."""
    names = [name for name in catalogue() if issubclass(mechanism_class(name), Reducer)]
    others = [name for name in names if name not in ("weighted_merging", "token_merging")]
    return [*FIRST, *MERGING, *(f"{name}:macs={macs}" for macs in BUDGETS for name in others)]


def with_grafts(data: Path, arm: str) -> torch.nn.Module | None:
    """The real model with the grafts of an arm; None where a reducer does not reach its budget."""
    try:
        return graft(vit_tiny(data), *arm.split("+"))
    except SettingError as error:
        print(arm, error, flush=True)
        return None


def operations(model: torch.nn.Module) -> float:
    """Multiply-adds of one image, in G."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() / 2e9


def labels(data: Path) -> torch.Tensor:
    with tarfile.open(data / "imagenet1k-samples" / "imagenet_500_224px.tar") as tar:
        return torch.tensor([int(name[-7:-4]) for name in tar.getnames() if name.endswith(".jpg")])


def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(batch) for batch in images.split(25)])


def answers(found: torch.Tensor, host: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Of logits (n, classes): how many have the host's class and the right one, and the mean divergence from the host."""
    ours, theirs = found.log_softmax(1), host.log_softmax(1)
    return {
        "same": int((found.argmax(1) == host.argmax(1)).sum()),
        "right": int((found.argmax(1) == right).sum()),
        "divergence": round((theirs.exp() * (theirs - ours)).sum(1).mean().item(), 4) + 0.0,
    }


def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    started = time.process_time()
    model(images)
    return round(time.process_time() - started, 5)


def agreement(
    models: dict[str, torch.nn.Module], rows: dict, images: torch.Tensor, right: torch.Tensor, done: Callable
) -> None:
    """What each arm answers, into its row."""
    expected = None
    for name, model in models.items():
        if "same" not in rows[name]:
            expected = logits(models["host"], images) if expected is None else expected
            rows[name] |= answers(logits(model, images), expected, right) | {"gmac": round(operations(model), 4)}
            print(name, rows[name], flush=True)
            done()


def latency(models: dict[str, torch.nn.Module], rows: dict, images: torch.Tensor, rounds: int, done: Callable) -> None:
    """Seconds of every arm, into its row: [host, arm] per round, the host measured between every two arms."""
    key = f"seconds_{len(images)}"
    if all(len(rows[name].get(key, ())) >= rounds for name in models if name != "host"):
        return
    names = [name for name in models if name != "host"]
    models["host"](images)
    for turn in range(rounds):
        missing = [name for name in names if len(rows[name].setdefault(key, [])) <= turn]
        for first, second in zip_longest(missing[::2], missing[1::2]):
            before = seconds(models[first], images)
            between = seconds(models["host"], images)
            rows[first][key].append([between, before])
            if second is not None:
                rows[second][key].append([between, seconds(models[second], images)])
        done()


def ratio(pairs: list[list[float]]) -> float:
    """Median of arm over host."""
    return torch.tensor([arm / host for host, arm in pairs], dtype=torch.float64).quantile(0.5).item()


def enough(row: dict, batch: int) -> bool:
    return len(row.get(f"seconds_{batch}", ())) >= 3


def share(count: int, of: int) -> str:
    low, high = wilson(count, of)
    return f"{count / of:.3f} [{low:.3f}, {high:.3f}]"


def table(result: dict, peer: dict) -> str:
    images, rows = result["images"], result["arms"]
    host = rows["host"]["gmac"]
    lines = [
        f"{images} photographs of odd position. The host needs {host:.3f} G multiply-adds per image; its top-1 is "
        f"{share(rows['host']['right'], images)}. Speed-up: the measured one, of what the operations promise. Latency only of "
        "arms measured three times or more.",
        "",
        "| arm | operations, of the host | latency, batch of 16 | batch of 1 | batch of 64 | speed-up "
        "| top-1 as the host | top-1 | divergence |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in {**rows, **peer.get("arms", {})}.items():
        if name == "host" or "same" not in row:
            continue
        times = {batch: ratio(row[f"seconds_{batch}"]) for batch in BATCHES if enough(row, batch)}
        cells = " | ".join(f"{times[batch]:.2f}" if batch in times else "" for batch in BATCHES)
        operations_share = row["gmac"] / host
        gain = f"{operations_share / times[16]:.2f}" if 16 in times else ""
        lines.append(
            f"| `{name}` | {operations_share:.2f} | {cells} | {gain} | {share(row['same'], images)} "
            f"| {share(row['right'], images)} | {row.get('divergence', '')} |"
        )
    return "\n".join(lines) + "\n"


def draw(result: dict, peer: dict, path: Path) -> None:
    """Agreement against latency, a line per reducer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[float, float]]] = {}
    for name, row in {**result["arms"], **peer.get("arms", {})}.items():
        if name not in ("host", "class_query") and enough(row, 16) and "same" in row:
            family = "weighted_merging + class_query" if name.startswith("weighted") else name.split(":")[0]
            lines.setdefault(family, []).append((ratio(row["seconds_16"]), row["same"] / result["images"]))
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    for (family, points), marker in zip(lines.items(), "os^vD<>PX*", strict=False):
        own, theirs = family.startswith("weighted"), family.startswith("ToMe")
        style = {"lw": 2.6, "color": "#c0392b"} if own else {"lw": 1.8, "color": "black", "ls": "--"} if theirs else {"lw": 1.2}
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, ms=5, label=family, **style)
    axes.axhline(0.95, color="grey", lw=0.7)
    axes.axvline(0.60, color="grey", lw=0.7)
    axes.set(xlabel="latency, of the host (batch of 16, one CPU thread)", ylabel="top-1 class as the host", ylim=(0.6, 1.005))
    axes.set_title("ViT-Ti/16 without training, 250 ImageNet photographs")
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file, peer_file = HERE / "result.json", HERE / "peer.json"
    result = json.loads(file.read_text()) if file.exists() else {"arms": {}}
    result["command"] = "python benchmarks/token_reduction/run.py ../shared/data"
    models = {"host": vit_tiny(arguments.data)}
    models |= {arm: model for arm in arms() if (model := with_grafts(arguments.data, arm)) is not None}
    rows = {name: result["arms"].get(name, {}) for name in models}
    images, right = photographs(arguments.data, 500)[1::2], labels(arguments.data)[1::2]
    result |= {"images": len(images), "arms": rows}
    rows["host"].setdefault("gmac", round(operations(models["host"]), 4))

    def done() -> None:
        write(file, result)

    agreement(models, rows, images, right, done)
    for batch in BATCHES:
        timed = models if batch == 16 else {name: models[name] for name in ("host", *EVERYWHERE)}
        latency(timed, rows, images[:batch], arguments.rounds, done)
    peer = json.loads(peer_file.read_text()) if peer_file.exists() else {}
    (HERE / "table.md").write_text(table(result, peer))
    draw(result, peer, HERE / "frontier.svg")


if __name__ == "__main__":
    main()
