"""The tables of the studies, from their stored results alone: python benchmarks/study_tables.py

Differences are paired by seed (same data, order and host weights at the start), with Student's 95 % interval over the seeds
that both arms have. The verdict is the project's one rule: better or worse where the interval leaves out 0, no difference
where all of it lies within one point, else undecided. Broken runs (below the floor of their data) are left out, and counted.
Seconds are in the result files, as they came on a shared machine; `vitreous bench` and `svda_speed` measure in turns.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from adapters.run import ARMS as ADAPTERS  # noqa: E402
from adapters.run import __doc__ as ADAPTERS_TEXT  # noqa: E402
from networks.run import ARMS as NETWORKS  # noqa: E402
from networks.run import __doc__ as NETWORKS_TEXT  # noqa: E402
from study import Arm, broken, results  # noqa: E402
from svd_vit.run import ARMS as SVD_VIT  # noqa: E402
from svda.run import ARMS as SVDA  # noqa: E402

from vitreous.base.statistics import of_mean, verdict  # noqa: E402

ENOUGH = 3  # seeds before a difference is judged
Results = Mapping[str, Mapping[int, dict]]


def accuracy(part: str):
    return lambda result: 100 * result["accuracy"][part]


def looking(name: str, scenes: str = "usual", factor: float = 1.0):
    """A number of what the model attends to."""
    return lambda result: (
        factor * result["looking"][scenes][name] if name in result.get("looking", {}).get(scenes, {}) else None
    )


def pooled(measure: str, factor: float = 1.0):
    """Of how much each token has to do with the SPC tokens, at the one place where those are made."""

    def number(result: dict) -> float | None:
        usual = result.get("looking", {}).get("usual", {})
        values = [value for key, value in usual.items() if key.startswith(f"exposed_spc_share {measure}, ")]
        return factor * values[0] if values else None

    return number


def mean(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean, and lowest to highest."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    return f"{statistics.mean(numbers):.{digits}f} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def against(ours: Mapping[int, dict], base: Mapping[int, dict], number) -> str:
    """Mean difference over the seeds of both, its interval, and the verdict."""
    seeds = sorted(ours.keys() & base.keys())
    differences = [number(ours[seed]) - number(base[seed]) for seed in seeds]
    if len(seeds) < ENOUGH:
        return f"seeds: {len(seeds)}" if seeds else ""
    low, high = of_mean(differences)
    return f"{statistics.mean(differences):+.1f} [{low:+.1f}, {high:+.1f}] {verdict([(low / 100, high / 100)])}"


def table(
    arms: Mapping[str, Arm],
    stored: Results,
    bases: Sequence[str],
    parts: Sequence[str],
    more: Mapping[str, Mapping[str, str]] | None = None,
) -> list[str]:
    """One row per arm that has results: accuracy in %, mean and range over seeds, and differences from each base.

    more: {title: {arm: cell}} of further columns.
    """
    more = more or {}
    bases = [base for base in bases if base in arms and stored.get(base)]
    titles = ["arm", "what it is", "seeds", *parts]
    titles += [*(f"{part}, to {base}" for base in bases for part in parts), *more]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, arm in arms.items():
        runs = stored.get(name)
        if not runs:
            continue
        cells = [name, arm.what, str(len(runs)), *(mean([accuracy(part)(run) for run in runs.values()]) for part in parts)]
        for base in bases:
            cells += ["" if name == base else against(runs, stored.get(base, {}), accuracy(part)) for part in parts]
        cells += [column.get(name, "") for column in more.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def images_per_second(path: Path) -> dict[str, dict[str, str]]:
    """{title: {arm: images per second}} of the stored rounds of `networks/speed.py`; none where there are none."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {
        f"images per second, {row['claim']}": {
            arm: f"{64 / statistics.median(seconds):,.0f}" for arm, seconds in row["seconds"].items()
        }
        for row in rows
    }


def networks_page(folder: Path) -> str:
    """The table of all networks and mixers."""
    arms, stored = NETWORKS["cutouts-64"], results(folder, "cutouts-64")
    count = sum(map(len, stored.values()))
    more = {"parameters": {name: f"{next(iter(runs.values()))['parameters']:,}" for name, runs in stored.items()}}
    more |= images_per_second(folder / "speed.json")
    text = ["# Networks and mixers at one budget", "", NETWORKS_TEXT.split("\n\n", 2)[2].strip(), ""]
    text += [
        f"{count} runs, {broken(folder, 'cutouts-64')} of them broken and left out. Differences are paired by seed, that is by",
        "data and order, with Student's 95 % interval; the verdict is the project's one rule. Images per second are medians of",
        "rounds in turns, one thread.",
        "",
    ]
    return "\n".join([*text, *table(arms, stored, ["avg"], ["test", "swapped"], more)])


def adapters_page(folder: Path) -> str:
    """The tables of all adapters, against the linear probe and LoRA."""
    text = ["# Adapters on a new task", "", ADAPTERS_TEXT.split("\n\n", 2)[2].strip(), ""]
    for data, arms in ADAPTERS.items():
        if not (stored := results(folder, data)):
            continue
        count, lost = sum(map(len, stored.values())), broken(folder, data)
        more = {"parameters": {name: f"{next(iter(runs.values()))['parameters']:,}" for name, runs in stored.items()}}
        text += [
            f"## {data}",
            "",
            f"{count} runs, {lost} of them broken and left out. Differences are paired by seed, that is by data and order,",
            "with Student's 95 % interval; the verdict is the project's one rule.",
            "",
            *table(arms, stored, ["probe", "lora"], ["test"], more),
            "",
        ]
    return "\n".join(text)


def attention_table(arms: Mapping[str, Arm], stored: Results, layer: int, scenes: Sequence[str]) -> list[str]:
    """What the trained models attend to in a layer, on images with masks or boxes."""
    columns = {"the object's area, %": looking("area energy_inside, -1", factor=100)}
    for name in scenes:
        before = "" if name == "usual" else f"{name}: "
        columns[f"{before}on the object, %"] = looking(f"attention energy_inside, {layer}", name, 100)
        columns[f"{before}AUROC"] = looking(f"attention auroc, {layer}", name)
        columns[f"{before}pointing game, %"] = looking(f"attention pointing, {layer}", name, 100)
    columns |= {"SPC weights u_i^2 on the object, %": pooled("energy_inside", 100), "their AUROC": pooled("auroc")}
    columns["artifact tokens, %"] = looking(f"artifacts, {layer}", factor=100)
    columns["effective tokens"] = looking(f"attention effective_tokens, {layer}")
    columns["attention entropy, nats"] = looking(f"attention attention_entropy, {layer}")
    runs = [run for name in arms for run in stored.get(name, {}).values()]
    columns = {title: number for title, number in columns.items() if any(number(run) is not None for run in runs)}
    digits = {title: 3 for title in columns if "AUROC" in title} | {"attention entropy, nats": 2}
    lines = ["| arm | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in arms:
        if runs := stored.get(name):
            cells = [mean([number(run) for run in runs.values()], digits.get(title, 1)) for title, number in columns.items()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def page(
    folder: Path, title: str, arms_by_data: Mapping[str, Mapping[str, Arm]], bases: Sequence[str], more: Mapping[str, Results]
) -> str:
    """The page of one study; more: {data: results} of arms that another study has stored."""
    text = [f"# {title}", "", __doc__.partition("\n\n")[2].strip(), ""]
    for data, arms in arms_by_data.items():
        if not list((folder / data).glob("*.json")):
            continue
        stored = dict(results(folder, data)) | dict(more.get(data, {}))
        seeds = sorted({seed for runs in stored.values() for seed in runs})
        count = sum(len(runs) for name, runs in stored.items() if name in arms)
        parts = sorted({part for runs in stored.values() for run in runs.values() for part in run["accuracy"]}, reverse=True)
        parts = ["test", *(part for part in parts if part != "test")]
        lost = broken(folder, data)
        text += [f"## {data}", "", f"Seeds {seeds[0]} to {seeds[-1]}; {count} runs, {lost} of them broken and left out.", ""]
        text += [*table(arms, stored, bases, parts), ""]
        looks = [run["looking"] for runs in stored.values() for run in runs.values() if "looking" in run]
        if looks:
            layer = max(int(key.rpartition(" ")[2]) for key in looks[0]["usual"] if key.startswith("attention auroc"))
            images = "128 test scenes with masks" if "swapped" in looks[0] else "128 test photographs with boxes"
            text += [f"The class token's attention in the last layer, heads averaged, on {images}:", ""]
            text += [*attention_table(arms, stored, layer, list(looks[0])), ""]
    return "\n".join(text)


def pages() -> dict[Path, str]:
    svda, svd_vit = HERE / "svda", HERE / "svd_vit"
    plain = {"cutouts": {"plain": results(svda, "cutouts").get("plain", {})}}  # trained once for both
    with_plain = SVD_VIT | {"cutouts": {"plain": SVDA["cutouts"]["plain"], **SVD_VIT["cutouts"]}}
    return {
        svda / "table.md": page(svda, "SVDA: what its parts cost and win", SVDA, ["plain", "qk-norm"], {}),
        HERE / "adapters" / "table.md": adapters_page(HERE / "adapters"),
        HERE / "networks" / "table.md": networks_page(HERE / "networks"),
        svd_vit / "table.md": page(svd_vit, "SVD-ViT's tokens", with_plain, ["plain", "cls-5", "cls-5-late"], plain),
    }


def main() -> None:
    for path, text in pages().items():
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
        print(path.relative_to(HERE.parent))


if __name__ == "__main__":
    main()
