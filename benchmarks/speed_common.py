"""What every speed benchmark here needs: arms timed in turns, and rows stored one part at a time so that a run can go on.

    from speed_common import Results, arguments

    options = arguments(__doc__)
    results = Results(HERE, options)
    results.row("SVDA inference", "ViT-Ti/16, batch 16", lambda: {"svda": act, "plain": other}, count=60, limit=1.03)

`python benchmarks/page.py` makes the page from what is stored.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine

from vitreous.bench.timing import ratio, rounds

HERE = Path(__file__).parent
PART = 20  # rounds that are timed before they are stored


def arguments(text: str, **more: dict) -> argparse.Namespace:
    """Words of a speed benchmark's command: --device, --threads, and more={"full": {"action": "store_true"}}."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu | cuda: results of a GPU go to result-cuda.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch on the CPU")
    for name, words in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **words)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


class Results:
    """The stored rows of one benchmark; a row that is there with all its rounds is not timed again.

    folder: of the benchmark; part: of a benchmark that keeps several files. Rows go to <part>.json, or <part>-cuda.json.
    """

    def __init__(self, folder: Path, options: argparse.Namespace, part: str = "result"):
        cuda = torch.device(options.device).type == "cuda"
        self.device = options.device
        self.path = folder / f"{part}{'-cuda' * cuda}.json"
        stored = json.loads(self.path.read_text()) if self.path.exists() else {"rows": []}
        script = Path(sys.argv[0]).resolve().relative_to(HERE.resolve().parent)
        self.facts = {
            "machine": machine(),
            "commit": commit(),
            "command": shlex.join(["python", str(script), *map(from_here, sys.argv[1:])]),
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "threads": torch.get_num_threads(),
        }
        same = ("machine", "device", "threads")
        if self.path.exists() and [stored.get(name) for name in same] != [self.facts[name] for name in same]:
            raise SystemExit(
                f"Found {self.path} from another machine, version or number of threads. Expected the same for all rounds of a "
                "result. Move that file away to measure anew."
            )
        self.rows = stored["rows"]
        self.means: list[dict] = []
        self.notes: dict[str, str] = {}

    def row(
        self,
        claim: str,
        cell: str,
        build: Callable[[], dict[str, Callable[[], object]]],
        *,
        count: int = 60,
        limit: float | None = None,
        goal: str = "at most",
        slack: float = 0.0,
        reason: str = "",
        more: dict | None = None,
        warmup: int = 3,
    ) -> dict:
        """Time `count` rounds of the arms that build() gives, ours first and base second, and store them every PART rounds.

        build is called only if rounds are missing. goal "at most": the limit is one of ours/base; "at least": of base/ours,
        a speed-up. More arms than two: give pairs of them their own rows, or list the others' seconds for the record.
        """
        row = next((row for row in self.rows if (row["claim"], row["cell"]) == (claim, cell)), None)
        if row is None:
            row = {"claim": claim, "cell": cell, "ours": "", "base": "", "seconds": {}}
            self.rows.append(row)
        row |= {"limit": limit, "goal": goal, "slack": slack, "reason": reason, "more": {**row.get("more", {}), **(more or {})}}
        done = min(map(len, row["seconds"].values()), default=0)
        arms = build() if done < count else {}
        while done < count:
            timed = rounds(arms, min(PART, count - done), warmup=warmup, device=self.device)
            row["ours"], row["base"] = list(arms)[:2]
            for name, values in timed.items():
                row["seconds"].setdefault(name, []).extend(float(f"{value:.5g}") for value in values)
            commits = row["commit"].split(", ") if "commit" in row else []
            row["commit"] = ", ".join(dict.fromkeys([*commits, self.facts["commit"]]))
            done += len(next(iter(timed.values())))
            self.write()
        if arms:
            found = ratio(row["seconds"][row["ours"]], row["seconds"][row["base"]])
            print(f"{claim}, {cell}: {found.median:.3f} [{found.low:.3f}, {found.high:.3f}] of {row['base']}", flush=True)
        self.write()
        return row

    def mean(self, claim: str, *, limit: float, goal: str = "at least", slack: float = 0.0, reason: str = "") -> None:
        """Hold the geometric mean of a claim's ratios against a limit, beside those of its rows."""
        self.means.append({"claim": claim, "limit": limit, "goal": goal, "slack": slack, "reason": reason})
        self.write()

    def note(self, claim: str, sentence: str) -> None:
        """Say under the table of a claim what its times do not."""
        self.notes[claim] = sentence
        self.write()

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        more = {name: values for name, values in (("means", self.means), ("notes", self.notes)) if values}
        part.write_text(json.dumps({**self.facts, **more, "rows": self.rows}, indent=1) + "\n")
        part.replace(self.path)


def from_here(word: str) -> str:
    """An absolute path as seen from the project, for a record that says nothing of the machine's folders; else the word."""
    return os.path.relpath(word, HERE.parent) if os.path.isabs(word) else word


def commit() -> str:
    """The short hash of the checkout, with + if its code differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ":(top)src", ":(top,glob)benchmarks/**/*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
