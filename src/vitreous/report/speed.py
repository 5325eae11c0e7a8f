"""A folder of `vitreous bench` -> one HTML file: ratios with their intervals.

And every number behind them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitreous.base.errors import DataError
from vitreous.base.files import write_text
from vitreous.report import packing
from vitreous.report.folders import read_json
from vitreous.report.page import assemble

SCRIPTS = ("base", "table", "speed")
FIELDS = ("name", "command", "settings", "machine", "versions", "ratios")


def write(folder: Path, out: Path) -> Path:
    """Write the page of FOLDER/bench.json to `out` and return its path.

    Equal files give equal bytes. Raises DataError.
    """
    path = Path(folder) / "bench.json"
    result = read_json(path)
    if result.get("format") != 1 or not all(name in result for name in (*FIELDS, "rows")):
        raise DataError(f"Found no bench of format 1 in {path}. Expected a file of `vitreous bench`. Bench again.")
    write_text(Path(out), render(result))
    return Path(out)


def render(result: dict[str, Any]) -> str:
    """The page as text; the seconds of every round stay in bench.json."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in result["rows"]]
    data = packing.legible({name: result[name] for name in FIELDS} | {"rows": rows})
    return assemble(data, SCRIPTS, title=data["name"], kind="speed", first=("numbers", "numbers"))
