"""`vitreous bench` from words to a folder: what is compared, what is said of it, and what mistakes are called."""

from __future__ import annotations

import io
import json

import pytest
import timm
import torch
from rich.console import Console

from vitreous import graft
from vitreous.base.errors import DataError, SettingError, UnknownName
from vitreous.bench import run
from vitreous.bench.arms import Arm, Cell
from vitreous.bench.memory import OUT
from vitreous.bench.run import bench, compared
from vitreous.bench.settings import BenchSettings
from vitreous.commands.bench import Bench
from vitreous.commands.cli import main
from vitreous.models.model_folder import save


@pytest.fixture
def folder(tmp_path):
    """A model folder with a graft."""
    torch.manual_seed(1)
    model = graft(timm.create_model("test_vit", num_classes=5), "svda:layers=1")
    save(model, tmp_path / "model", classes=list("abcde"))
    return tmp_path / "model"


def test_grafts_are_compared_with_the_plain_model_and_others():
    arms = BenchSettings("test_vit", graft=("svda",), against=("test_vit2", "test_vit")).arms()
    assert [arm.name for arm in arms] == ["test_vit + svda", "test_vit", "test_vit2", "test_vit (3)"]
    assert [arm.grafts for arm in arms] == [("svda",), (), (), ()]
    assert [arm.name for arm in BenchSettings("test_vit").arms()] == ["test_vit"]


def test_the_same_weights_grafted_and_plain(folder):
    arms = BenchSettings("test_vit", graft=("svda",)).arms()
    ours, plain = (arm.build().state_dict() for arm in arms)
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())
    assert set(ours) > set(plain)
    arms = BenchSettings(str(folder), graft=("adaptformer",)).arms()
    assert arms[0].name == f"{folder} + svda:layers=1 + adaptformer"
    assert arms[1].name == f"{folder} plain"
    ours, plain = (arm.build() for arm in arms)
    assert len(ours.grafts) == 2
    assert plain.grafts == []
    assert torch.equal(ours.blocks[0].mlp.fc1.weight, plain.blocks[0].mlp.fc1.weight)


def test_cells_are_every_mode_size_and_batch_once():
    settings = BenchSettings("test_vit", mode=("inference", "training"), batch=(1, 4, 1), device="cpu")
    cells = settings.cells(160)
    assert [(cell.mode, cell.batch, cell.size) for cell in cells] == [
        ("inference", 1, 160), ("inference", 4, 160), ("training", 1, 160), ("training", 4, 160)
    ]  # fmt: skip
    assert str(cells[0]) == "inference, batch 1, 160 px"


def test_a_training_call_is_a_step_of_adamw_and_inference_changes_nothing():
    model = Arm("a", "test_vit").build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Cell("inference", 2, 160).act(model)()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    Cell("training", 2, 160).act(model)()
    assert all(p.grad is not None for p in model.parameters())
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) > 20


def test_training_pays_for_the_penalties_of_grafts():
    """A weight whose gradient comes from a penalty alone."""
    model = Arm("a", "test_vit").build()
    model.free = torch.nn.Linear(2, 2)
    model.free.penalties = lambda: {"length": model.free.weight.square().sum()}
    with torch.no_grad():
        expected = 2 * model.free.weight.clone()
    Cell("training", 2, 160).act(model)()
    assert torch.equal(model.free.weight.grad, expected)


def test_names_and_reasons_are_shown_as_they_are():
    row = {"arm": "runs/[/x] [bold]a", "failed": "cannot run: Error: [/y]"}
    text = io.StringIO()
    Console(file=text, width=120).print(run.table([row], [], Cell("inference", 1, 160)))
    assert row["arm"] in text.getvalue()
    assert row["failed"] in text.getvalue()


def test_bf16_runs_the_forward_pass_in_bfloat16():
    seen = []
    model = Arm("a", "test_vit").build()
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for dtype in ("fp32", "bf16"):
        Cell("inference", 1, 160, dtype).act(model)()
    assert seen == [torch.float32, torch.bfloat16]


def test_a_bench_from_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "bench test_vit --graft svda --against test_vit2 --batch 1 2 --mode inference training --rounds 16"
    words += " --image-size 32 --device cpu"
    assert main(words.split()) == 0
    found = json.loads((tmp_path / "bench/test_vit/bench.json").read_text())
    assert [(row["mode"], row["batch"]) for row in found["rows"][::3]] == [
        ("inference", 1), ("inference", 2), ("training", 1), ("training", 2)
    ]  # fmt: skip
    assert len(found["rows"]) == 12
    assert len(found["ratios"]) == 8
    for row in found["rows"]:
        assert row["failed"] is None
        assert len(row["seconds"]) == 16
        assert row["latency"]["low"] <= row["latency"]["median"] <= row["latency"]["high"]
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["latency"]["median"])
        assert row["uncounted"] == []
    one, two = found["rows"][1], found["rows"][4]
    assert two["operations"] == 2 * one["operations"]
    assert found["rows"][7]["operations"] > 2.8 * one["operations"]  # three products for one, but for the embedding
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert (tmp_path / "bench/test_vit/report.html").is_file()
    said = capsys.readouterr().out
    assert "test_vit + svda" in said
    assert "Report: bench/test_vit/report.html" in said
    bench(BenchSettings("test_vit", batch=(1,), rounds=16, device="cpu"))
    assert (tmp_path / "bench/test_vit-2/bench.json").is_file()


def test_a_compiled_bench(tmp_path, monkeypatch):
    """With the compiler's first half alone: its second half makes machine code for ten seconds."""
    compiled, compiling = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **how: compiled.append(model) or compiling(model, backend="eager", **how)
    )
    bench(BenchSettings("test_vit", batch=(1,), rounds=16, device="cpu", compile=True, out=str(tmp_path / "out")))
    row = json.loads((tmp_path / "out/bench.json").read_text())["rows"][0]
    assert len(compiled) == 1
    assert "compiled" in row["peak_mib"]
    assert row["operations"] > 0


class Scarce:
    """Stands for the process beside: memory runs out for one arm."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def peak(self, arm, cell):
        return OUT if cell.batch == 2 and arm.grafts else 10.0


def test_what_runs_out_of_memory_has_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Residents", Scarce)
    settings = BenchSettings("test_vit", graft=("svda",), batch=(2, 1), rounds=16, device="cpu", out=str(tmp_path / "out"))
    text = io.StringIO()
    bench(settings, Console(file=text, width=120))
    found = json.loads((tmp_path / "out/bench.json").read_text())
    assert [(row["batch"], row["arm"], row["failed"]) for row in found["rows"]] == [
        (2, "test_vit + svda", OUT), (2, "test_vit", None), (1, "test_vit + svda", None), (1, "test_vit", None)
    ]  # fmt: skip
    assert [ratio["batch"] for ratio in found["ratios"]] == [1]
    assert OUT in text.getvalue()


def test_memory_that_runs_out_in_a_call_is_a_row_too(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Residents", Scarce)

    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "rounds", fails)
    rows = run.measure(BenchSettings("test_vit").arms(), Cell("inference", 1, 160), 4, None, None)
    assert rows[0]["failed"] == "out of memory beside the others"
    assert compared(rows) == []


def test_a_network_that_refuses_has_a_row_with_its_own_words(monkeypatch):
    """The images are of 56 pixels, the patches of the other network of 16."""
    arms = BenchSettings("test_vit").arms()
    assert run.measure(arms, Cell("inference", 1, 160), 4, None, None)[0]["failed"] is None
    monkeypatch.setattr(Arm, "build", lambda self, size: timm.create_model("vit_tiny_patch16_224", img_size=160))
    (row,) = run.measure(arms, Cell("inference", 1, 56), 4, None, None)
    assert row["failed"] == "cannot run: AssertionError: Input height (56) doesn't match model (160)"


def test_other_errors_are_not_hidden(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("mat1 and mat2")

    monkeypatch.setattr(run, "rounds", fails)
    with pytest.raises(RuntimeError, match="mat1"):
        run.measure(BenchSettings("test_vit").arms(), Cell("inference", 1, 160), 4, None, None)
    with pytest.raises(SettingError, match=r"torch\.compile fails: RuntimeError: mat1 and mat2\. Expected"):
        run.measure(BenchSettings("test_vit").arms(), Cell("inference", 1, 160, compile=True), 4, None, None)


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ("test_vti", UnknownName, "Did you mean 'test_vit"),
        ("no/such/folder", DataError, "no folder"),
        ("test_vit --against test_vti", UnknownName, "test_vti"),
        ("test_vit --graft svdaa", UnknownName, "Did you mean 'svda'"),
        ("test_vit --device meta", SettingError, "Expected cpu or cuda"),
        ("test_vit --rounds 15", SettingError, "--rounds 15. Expected 16"),
        ("test_vit --batch 0", SettingError, "--batch 0. Expected 1"),
        ("test_vit --image-size 0", SettingError, "--image-size 0"),
        ("test_vit --model-kwargs depth", SettingError, "--model-kwargs depth"),
        (
            "test_vit --compile --against test_vit test_vit test_vit test_vit test_vit test_vit test_vit",
            SettingError,
            "7 models",
        ),
    ],
)
def test_mistakes_in_words(words, error, said):
    with pytest.raises(error, match=said):
        Bench.read(words.split()).settings()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(SettingError, match="Found --device cuda"):
        Bench.read(["test_vit", "--device", "cuda"]).settings()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("resnet10t --graft svda", "error: "),
        ("test_vit --image-size 100", "Expected a multiple"),
        ("test_vit --mode training --model-kwargs num_classes=0", "without a classifier"),
        ("test_vit --model-kwargs no_such=1", "timm cannot build test_vit"),
        ("test_vit --out full", "Found something in full already"),
    ],
)
def test_what_does_not_fit_leaves_nothing(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert main(["bench", *words.split(), "--device", "cpu", "--rounds", "16"]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
