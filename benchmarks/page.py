"""speed.md from the stored results of all speed benchmarks: every ratio with its interval, met or not, and why not.

    python benchmarks/page.py

A result is met if its whole interval keeps the limit, open if the interval reaches beyond it, and falls short if all of it
lies beyond. Ratios and intervals are computed here from the stored seconds.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from vitreous.bench.timing import Ratio, ratio

HERE = Path(__file__).parent
HEAD = """\
# Speed

Made by `python benchmarks/page.py` from the stored seconds; edit nothing here. Models take turns in one process, one call
of each per round, every second round in reverse order. A ratio is the median over pairs of rounds, in brackets its 95 %
bootstrap interval, which is too narrow where there are fewer than 16 rounds. A limit counts as **met** if the whole
interval keeps it (within the slack that is named), as **open** if the interval reaches beyond it, as **falls short** if all
of the interval lies beyond.
"""


def page(folder: Path) -> str:
    """The page of all results under the folder."""
    found = {path.name: stored(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    parts = [part(name, files) for name, files in found.items() if files]
    return "\n".join([HEAD, *(parts or ["No results are stored yet.\n"])])


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """{file name: result} of the files of speed benchmarks in a folder."""
    files = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        rows = result.get("rows") if isinstance(result, dict) else None
        if isinstance(rows, list) and rows and all(isinstance(row, dict) and {"claim", "seconds"} <= set(row) for row in rows):
            files[path.name] = result
    return files


def part(name: str, files: dict[str, dict[str, Any]]) -> str:
    """One benchmark: what each file was measured on, and its claims."""
    lines = [f"## {name}", ""]
    for result in files.values():
        lines += [measured_on(result), ""]
        for claim in dict.fromkeys(row["claim"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["claim"] == claim]
            means = [mean for mean in result.get("means", []) if mean["claim"] == claim]
            lines += [
                f"### {claim}" + (f", {result['device']}" if result["device"] != "cpu" else ""),
                "",
                *table(rows, means),
                "",
                *([result["notes"][claim], ""] if claim in result.get("notes", {}) else []),
            ]
    if not any(result["device"] != "cpu" for result in files.values()):
        command = files.get("result.json", next(iter(files.values())))["command"]
        lines += [f"**The GPU half is open**: it was never run. `{command} --device cuda` measures it.", ""]
    return "\n".join(lines)


def measured_on(result: dict[str, Any]) -> str:
    """One line: command, commit, device, machine and versions."""
    machine = result["machine"]
    commits = ", ".join(dict.fromkeys(one for row in result["rows"] for one in row.get("commit", result["commit"]).split(", ")))
    device = f"CPU, {result['threads']} threads" if result["device"] == "cpu" else result["device"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "timm") if name in machine)
    return f"`{result['command']}`; commit {commits}; {device}; {machine['processor']}, {machine['cores']} cores; {versions}."


def table(rows: list[dict[str, Any]], means: list[dict[str, Any]]) -> list[str]:
    """The rows of one claim, the geometric mean of their ratios if there are several, and why limits are not kept."""
    upward = rows[0]["goal"] == "at least"
    what = "{base} / {ours} (times as fast)" if upward else "{ours} / {base}"
    pairs = {(row["ours"], row["base"]) for row in rows}
    names = {"ours": rows[0]["ours"], "base": rows[0]["base"]} if len(pairs) == 1 else {"ours": "ours", "base": "base"}
    lines = [
        f"| cell | {names['ours']} | {names['base']} | {what.format(**names)} | rounds | limit | |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios, reasons = [], []
    for row in rows:
        found = ratio_of(row)
        ratios.append(found)
        verdict = judged(found, row)
        ours, base = (seconds(row["seconds"][row[side]]) for side in ("ours", "base"))
        cell = row["cell"] if len(pairs) == 1 else f"{row['cell']}: {row['ours']}, {row['base']}"
        lines.append(f"| {cell} | {ours} | {base} | {said(found)} | {found.rounds} | {limit(row)} | {verdict} |")
        if verdict not in ("", "met"):
            reasons.append(f"- {row['cell']}: {verdict}. {row.get('reason') or 'No reason is stored.'}")
    if len(rows) > 1:
        mean = geometric(ratios)
        asked = means[0] if means else {"limit": None, "goal": rows[0]["goal"]}
        verdict = judged(mean, asked)
        lines.append(f"| geometric mean | | | {said(mean)} | | {limit(asked)} | {verdict} |")
        if verdict not in ("", "met"):
            reasons.append(f"- geometric mean: {verdict}. {asked.get('reason') or 'No reason is stored.'}")
    return lines + (["", *reasons] if reasons else [])


def ratio_of(row: dict[str, Any]) -> Ratio:
    """ours / base, or base / ours where the goal is to be at least so many times as fast."""
    ours, base = row["seconds"][row["ours"]], row["seconds"][row["base"]]
    return ratio(base, ours) if row["goal"] == "at least" else ratio(ours, base)


def judged(found: Ratio, asked: dict[str, Any]) -> str:
    """met, open, falls short; empty without a limit."""
    if asked["limit"] is None:
        return ""
    slack = asked.get("slack", 0.0)
    if asked["goal"] == "at least":
        edge = asked["limit"] - slack
        return "met" if found.low >= edge else "open" if found.high >= edge else "falls short"
    edge = asked["limit"] + slack
    return "met" if found.high <= edge else "open" if found.low <= edge else "falls short"


def geometric(ratios: list[Ratio]) -> Ratio:
    """The geometric mean, with the interval that independent rows give it."""
    count = len(ratios)
    middle = sum(math.log(found.median) for found in ratios) / count

    def away(ends: list[float]) -> float:
        return math.sqrt(sum(math.log(end / found.median) ** 2 for end, found in zip(ends, ratios, strict=True))) / count

    low, high = away([found.low for found in ratios]), away([found.high for found in ratios])
    surely = (away([found.surely[0] for found in ratios]), away([found.surely[1] for found in ratios]))
    ends = (math.exp(middle - surely[0]), math.exp(middle + surely[1]))
    rounds = sum(found.rounds for found in ratios)
    return Ratio(math.exp(middle), math.exp(middle - low), math.exp(middle + high), rounds=rounds, surely=ends)


def said(found: Ratio) -> str:
    return f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]"


def limit(asked: dict[str, Any]) -> str:
    if asked["limit"] is None:
        return ""
    slack = f", slack {asked['slack']:g}" if asked.get("slack") else ""
    return f"{asked['goal']} {asked['limit']:g}{slack}"


def seconds(values: list[float]) -> str:
    """The median time, in a unit that suits it."""
    middle = statistics.median(values)
    return f"{middle:.3g} s" if middle >= 1 else f"{1000 * middle:.3g} ms"


if __name__ == "__main__":
    (HERE / "speed.md").write_text(page(HERE))
