"""Write table.md from the run folders beside this file: python benchmarks/fashion_mnist/table.py"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from vitreous.base.statistics import wilson

HERE = Path(__file__).parent
INDICATORS = ("effective_tokens", "spectral_entropy", "effective_rank", "angular_alignment", "perturbation_robustness")


def main() -> None:
    indicators = " | ".join(name.replace("_", " ") for name in INDICATORS)
    lines = [
        f"| arm | seed | epoch | accuracy, 10,000 test images | {indicators} |",
        "|---" * (4 + len(INDICATORS)) + "|",
    ]
    for run in sorted(path.parent for path in HERE.glob("*/run.json")):
        arm, seed = run.name.split("-")
        epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for epoch in range(len(epochs) + 1):
            with open(run / "readings" / f"epoch-{epoch:03d}.csv") as file:
                rows = [row for row in csv.DictReader(file) if row["head"]]
            means = []
            for name in INDICATORS:
                values = [float(row[name]) for row in rows if row.get(name)]
                means.append(f"{sum(values) / len(values):.3f}" if values else "")
            accuracy = ""
            if epoch:
                share = epochs[epoch - 1]["tests"]["test"]["accuracy"]
                low, high = wilson(round(share * 10_000), 10_000)
                accuracy = f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
            lines.append(f"| {arm} | {seed} | {epoch} | {accuracy} | " + " | ".join(means) + " |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
