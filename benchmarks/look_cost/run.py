"""What does looking cost? Seconds and memory of a pass with its attention measured, against the plain forward pass.

    python benchmarks/look_cost/run.py ../shared/data        about 6 minutes on two cores; --device cuda for a GPU

Seconds: the real ViT-Tiny/16, 224 x 224 photographs, on the CPU in one thread; the arms take turns, every second round in
reverse order; median over pairs of rounds of the ratio to the plain pass, with its 95 % bootstrap interval. Arms:

    plain        model(images)
    pass         every attention captured and checked, nothing measured
    five         measured: alignment, selectivity and, of the weights, spectral entropy, effective rank, sparsity (these once
                 per model); attention entropy, effective tokens, distance, width and head redundancy come with them
    scores       five, and the same spectral indicators of each image's scores
    robustness   five, and robustness: a noisy copy of each image is in the batch

Memory: peak resident GiB of a process of its own with one 1024 x 1024 image (4,097 tokens, 12 layers), alone and beside a
process that keeps a core busy; on a GPU what torch allocated. Finished parts of result.json are not done again, unless they
are of another commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vitreous.bench.timing import interval, ratio, rounds
from vitreous.lens.batch_pass import BatchPass, perturbed
from vitreous.lens.probe import BatchInfo, chosen
from vitreous.lens.probe import table as rows_table
from vitreous.lens.tap import trace, watch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import photographs, vit_tiny, write  # noqa: E402
from speed_common import commit  # noqa: E402

BATCHES, ROUNDS, REPEATS = (1, 4), 82, 5
ARMS = ("plain", "pass", "five", "scores", "robustness")
MEMORY = ("plain", "pass", "scores")
FIVE = ("attention_rows", "alignment")
SPIN = "import torch; torch.set_num_threads(1); x = torch.rand(1500, 1500)\nwhile True: x = (x @ x).clamp(0, 1)"


def arms_of(model: torch.nn.Module, images: torch.Tensor, device: str) -> dict[str, Callable[[], object]]:
    """One pass of each arm. As in a look at many images, layouts and spectra of the weights are there from the first on."""
    noisy = torch.cat([images, perturbed(images, 0.01, torch.Generator().manual_seed(0), (0.5,), (0.5,))]).to(device)
    model, images = model.to(device), images.to(device)
    layouts = trace(model, images)

    def measured(batch: torch.Tensor, *names: str, noisy: bool = False) -> Callable[[], object]:
        probes = chosen((*FIVE, *names))
        count = len(batch) // (2 if noisy else 1)

        def act() -> object:
            info = BatchInfo(batch, count, layouts, noisy, first=1)
            one = BatchPass(model, probes, info)
            watch(model, batch, one.on_attention, layouts=layouts, on_output=one.on_output, outputs=one.outputs)
            return rows_table([row for readout in one.finish() for row in readout.rows], probes)

        return act

    return {
        "plain": lambda: model(images),
        "pass": lambda: watch(model, images, lambda call: None, layouts=layouts),
        "five": measured(images),
        "scores": measured(images, "spectra"),
        "robustness": measured(noisy, "robustness", noisy=True),
    }


def peak(options: argparse.Namespace) -> None:
    """Print the peak memory of this process, in GiB, after one pass over one large image."""
    model = vit_tiny(options.data, img_size=1024)
    image = torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    if options.memory == "plain":
        model.to(options.device)(image.to(options.device))
    else:
        arms_of(model, image, options.device)[options.memory]()
    if options.device == "cpu":
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        print(round(kilobytes / 2**20, 4))
    else:
        print(round(torch.cuda.max_memory_allocated(options.device) / 2**30, 4))


def peak_apart(options: argparse.Namespace, arm: str, load: str) -> float:
    """`peak` in a process of its own."""
    loading = subprocess.Popen([sys.executable, "-c", SPIN]) if load == "busy" else None
    try:
        command = [sys.executable, __file__, str(options.data), "--device", options.device, "--memory", arm]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    finally:
        if loading is not None:
            loading.kill()
            loading.wait()


def main(options: argparse.Namespace) -> None:
    on_cpu = options.device == "cpu"
    file = HERE / ("result.json" if on_cpu else "result-cuda.json")
    result = json.loads(file.read_text()) if file.exists() else {}
    if result.get("commit") != commit():  # times of other code are no part of this result
        result = {"seconds": {}, "memory": {}}
    result |= {
        "commit": commit(),
        "command": "python benchmarks/look_cost/run.py ../shared/data" + ("" if on_cpu else f" --device {options.device}"),
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(options.device),
        "threads": torch.get_num_threads(),
    }
    model = vit_tiny(options.data)
    for batch in BATCHES:
        rows = result["seconds"].setdefault(str(batch), [])
        arms = arms_of(model, photographs(options.data, batch), options.device)
        if len(rows) < ROUNDS:
            timed = rounds(arms, ROUNDS - len(rows), device=options.device)
            rows.extend({name: float(f"{timed[name][i]:.5g}") for name in ARMS} for i in range(ROUNDS - len(rows)))
        write(file, {**result, "rows": limits(result)})
    for load in ("idle", "busy") if on_cpu else ("idle",):
        for arm in MEMORY:
            values = result["memory"].setdefault(f"{arm}, {load}", [])
            while len(values) < REPEATS:
                values.append(peak_apart(options, arm, load))
                print(arm, load, values[-1], flush=True)
                write(file, {**result, "rows": limits(result)})
    (HERE / ("table.md" if on_cpu else "table-cuda.md")).write_text(table(result))


def limits(result: dict) -> list[dict]:
    """Rows for the page of speeds: the five indicators within one extra forward pass."""
    return [
        {
            "claim": "Five indicators, pass included",
            "cell": f"ViT-Ti/16, 224 px, batch {batch}" + (", one thread" if result["device"] == "cpu" else ""),
            "ours": "five",
            "base": "plain",
            "seconds": {arm: [row[arm] for row in rows] for arm in ("five", "plain")},
            "limit": 2.0,
            "goal": "at most",
            "slack": 0.01,
            "reason": "",
            "more": {},
        }
        for batch, rows in result["seconds"].items()
    ]


def table(result: dict) -> str:
    lines = [
        "Seconds over those of the plain pass; `over the pass` is what measuring adds, in plain passes.",
        "",
        "| batch | arm | seconds | of plain | over the pass |",
        "|---|---|---|---|---|",
    ]
    for batch, rows in result["seconds"].items():
        columns = {arm: np.array([row[arm] for row in rows]) for arm in ARMS}
        for arm, values in columns.items():
            found = ratio(values, columns["plain"])
            extra = interval((values - columns["pass"]) / columns["plain"])
            over = "" if arm in ("plain", "pass") else f"{extra[0]:.2f} [{extra[1]:.2f}, {extra[2]:.2f}]"
            said = f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"
            lines.append(f"| {batch} | {arm} | {np.median(values):.4f} | {said} | {over} |")
    loads = [load for load in ("idle", "busy") if f"plain, {load}" in result["memory"]]
    lines += ["", "Peak GiB with one image of 1024 x 1024, process by process.", ""]
    lines += [f"| arm | {' | '.join(loads)} |", "|---|" + "---|" * len(loads)]
    for arm in MEMORY:
        cells = (", ".join(f"{value:.2f}" for value in result["memory"][f"{arm}, {load}"]) for load in loads)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu | cuda: results of a GPU go to result-cuda.json")
    parser.add_argument("--memory", choices=MEMORY, help="only print the peak memory of this arm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    (peak if options.memory else main)(options)
