"""The README's second example, word for word but in miniature: a folder of photographs to a file that runs anywhere."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import made
from vitreous.commands.cli import main

ROOT = Path(__file__).resolve().parents[1]
SECTION = (ROOT / "README.md").read_text().split("## On your own photographs", 1)[1].split("\n## ", 1)[0]
COMMANDS = [shlex.split(line) for line in re.search(r"```sh\n(.*?)```", SECTION, re.S)[1].splitlines()]
SMALLER = {"vit_tiny_patch16_224": "test_vit", "--pretrained": "--freeze=patch_embed", "96": "32", "2": "1"}
CLASSES, EACH = ("n01443537", "n02504458", "n02123045"), {"train": 8, "val": 4}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """JPEGs of two sizes as the section lays them out, with one box per image, and the page's script."""
    top = tmp_path_factory.mktemp("photographs")
    lines = ["split,wnid,label,file,x0,y0,x1,y1"]
    for label, name in enumerate(CLASSES):
        for part, count in EACH.items():
            folder = top / "tiny-imagenet" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                file = "val_1230.JPEG" if part == "val" and not i else f"{name}_{i}.JPEG"
                raw = made.picture(1000 * label + 10 * i + (part == "val"), (64, 64 - 16 * (i % 2)), kind="JPEG")
                (folder / file).write_bytes(raw)
                lines.append(f"{part},{name},{label},{file},4,6,40,40")
    (top / "tiny-imagenet/boxes.csv").write_text("\n".join(lines) + "\n")
    script = re.findall(r"```py\n(.*?)```", (ROOT / "docs/how-to/ship-a-model.md").read_text(), re.S)[-1]
    (top / "classify.py").write_text(script)
    return top


def test_every_command_of_the_example_runs(photographs, monkeypatch, capsys):
    monkeypatch.chdir(photographs)
    kinds = [tuple(words[:3] if words[1] == "data" else words[:2]) for words in COMMANDS]
    assert [kind[1] for kind in kinds] == ["data", "train", "look", "predict", "export", "classify.py"]
    for words in COMMANDS[:-1]:
        assert words[0] == "vitreous"
        assert main([SMALLER.get(word, word) for word in words[1:]]) == 0, capsys.readouterr().err
    capsys.readouterr()
    with open("animals.csv", encoding="utf-8", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert len(rows) == len(CLASSES) * EACH["val"]
    assert {row["skipped"] for row in rows.values()} == {""}
    assert {row["predicted"] for row in rows.values()} <= set(CLASSES)
    record = json.loads(Path("runs/animals/run.json").read_text())
    assert record["data"]["images"] == {"train": 24, "test": 12}
    assert Path("goldfish/report.html").is_file()
    with open("goldfish/scores.csv", encoding="utf-8", newline="") as file:
        assert {row["image"] for row in csv.DictReader(file)} == {str(i) for i in range(EACH["val"])}  # all have boxes
    assert COMMANDS[-1][0] == "python"
    done = subprocess.run([sys.executable, *COMMANDS[-1][1:]], capture_output=True, text=True, check=True)
    name, said, probability = done.stdout.split()
    row = rows["n01443537/val_1230.JPEG"]
    assert (name, said) == ("tiny-imagenet/val/n01443537/val_1230.JPEG", row["predicted"])
    assert float(probability) == pytest.approx(float(row["probability"]), abs=1e-3)


def test_the_stored_numbers_are_those_of_the_text():
    """What the section says it came to is what benchmarks/tiny_imagenet/result.json holds, interval above zero."""
    found = json.loads((ROOT / "benchmarks/tiny_imagenet/result.json").read_text())
    right = {arm: np.array([c == "1" for c in found[arm]["correct"]]) for arm in ("probe", "fine-tuned")}
    assert {len(values) for values in right.values()} == {1600}
    gain = right["fine-tuned"].astype(float) - right["probe"]
    draws = np.random.default_rng(7).integers(0, len(gain), (2000, len(gain)))
    low, high = np.quantile(gain[draws].mean(1), [0.025, 0.975])
    assert low > 0
    said = " ".join(SECTION.split())
    for values in right.values():
        assert f"{100 * values.mean():.1f} %" in said
    given = re.search(r"([\d.]+) points more \(95 % interval ([\d.]+) to ([\d.]+)", said)
    numbers = [float(text) for text in given.groups()]
    assert numbers == pytest.approx([100 * gain.mean(), 100 * low, 100 * high], abs=0.35)
    assert numbers[0] == pytest.approx(100 * gain.mean(), abs=0.06)
