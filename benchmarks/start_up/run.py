"""What does a call cost before it does anything? CPU seconds of whole processes, in turns, against another checkout.

    python benchmarks/start_up/run.py --against PATH

PATH is a checkout of the commit before. Each round starts every call once of this checkout and once of that one, and an
`import torch` and an `import timm` between them, so that all meet the same machine; CPU time is that of the process with its
children, as the system counts it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import write

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("--help", "--version", "list", "list svda", "trian", "train --help", "train cutouts --epochz 3")
LIMITS = {name: 0.1 for name in ("--help", "--version", "list", "trian")}
IMPORT_LIMIT = 1.1  # of `import vitreous` to `import torch`


def cpu_seconds(words: list[str], checkout: Path) -> float:
    """User and system time of a process that runs with the sources of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *words], env=environment, **quiet)
    used = os.wait4(process.pid, 0)[2]
    return used.ru_utime + used.ru_stime


def summary(seconds: list[float]) -> dict[str, float | list[float]]:
    """Median and quartiles, beside all values."""
    low, median, high = statistics.quantiles(seconds, n=4)
    numbers = {"median": median, "quartile_1": low, "quartile_3": high}
    return {name: round(value, 4) for name, value in numbers.items()} | {"seconds": [round(value, 4) for value in seconds]}


def commit(checkout: Path) -> str:
    """The short name of the commit of a checkout, with + where files differ from it."""
    words = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"ours": ROOT, "theirs": options.against.resolve()}
    calls = {f"import {name}": (["-c", f"import {name}"], ["ours"]) for name in ("torch", "timm")}
    calls["import vitreous"] = (["-c", "import vitreous"], list(checkouts))
    calls |= {f"vitreous {words}": (["-m", "vitreous", *words.split()], list(checkouts)) for words in COMMANDS}
    seconds = {call: {side: [] for side in sides} for call, (_, sides) in calls.items()}
    for number in range(options.rounds + 1):  # the first round fills the caches of the disk and is not counted
        for call, (words, sides) in calls.items():
            for side in sides if number % 2 else reversed(sides):
                value = cpu_seconds(words, checkouts[side])
                if number:
                    seconds[call][side].append(value)
    results = {call: {side: summary(values) for side, values in sides.items()} for call, sides in seconds.items()}
    torch = results["import torch"]["ours"]["median"]
    for call, sides in results.items():
        if "theirs" in sides:
            sides["ratio"] = round(sides["ours"]["median"] / sides["theirs"]["median"], 4)
            limit = LIMITS.get(call.removeprefix("vitreous "))
            if limit:
                sides |= {"limit": limit, "met": sides["ratio"] <= limit}
    ours = results["import vitreous"]["ours"]["median"]
    results["import vitreous"] |= {
        "to_torch": round(ours / torch, 4),
        "limit": IMPORT_LIMIT,
        "met": ours <= IMPORT_LIMIT * torch,
    }
    names = {f"{side}_commit": commit(checkout) for side, checkout in checkouts.items()}
    write(Path(__file__).with_name("result.json"), {**names, "rounds": options.rounds, "calls": results})
    for call, sides in results.items():
        print(f"{call:36}", *(f"{side} {found['median']:.2f} s" for side, found in sides.items() if isinstance(found, dict)))


if __name__ == "__main__":
    main()
