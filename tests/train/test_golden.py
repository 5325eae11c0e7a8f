"""Classification trains as before tasks were made a catalogue: numbers of two runs, and a run folder of the older form.

The numbers were written down by `train` at commit 14e1cc8 with these settings, on one thread; the bytes of all files but
run.json, summary.md and report.html, which hold times, were compared by hand then and were equal. Those of "balanced" were
written down anew when the smoothed part of a label took the weight of the image's own class.
"""

from __future__ import annotations

import json
import os
import signal

import pytest
import safetensors.torch

from train.interrupting import at_step, differing, in_child
from vitreous.train import train
from vitreous.train.engine import state
from vitreous.train.engine.resume import resume
from vitreous.train.records.run_folder import read_metrics, read_table

MIXED = dict(
    graft=("svda",), batch_size=8, lr=2e-3, warmup_epochs=0.5, clip_grad=1.0, mixup=0.3, cutmix=0.5, drop_path=0.2, aug="pad",
    model_ema=0.9, save_every=2, smoothing=0.1,
)  # fmt: skip
BALANCED = dict(class_weights="balanced", smoothing=0.1, hold_out=0.2, patience=2, batch_size=16, lr=3e-3, aug="flip", epochs=3)
# by epoch: loss and norm of the gradient in training, loss and accuracy on the test set; norms of weights; classes found
GOLDEN = {
    "mixed": (
        MIXED,
        [
            (1.8245007038116454, 3.771253538131714, 1.7586002349853516, 0.2916666666666667),
            (1.7620760917663574, 1.9082605123519898, 1.7136832475662231, 0.3333333333333333),
        ],
        {"head.weight": 0.2341436082740471, "blocks.1.attn.qkv.weight": 0.8561854306624801, "pos_embed": 0.4146963356651444},
        "114411111444111444111445",
    ),
    "balanced": (
        BALANCED,
        [
            (1.8304832472520716, 2.6092028617858887, 1.7285256385803223, 0.25),
            (1.6878476002637077, 2.20052433013916, 1.6613658666610718, 0.3333333333333333),
            (1.6321489740820492, 2.3854017655054727, 1.645787239074707, 0.375),
        ],
        {"head.weight": 0.2524227023205676, "blocks.1.attn.qkv.weight": 0.9134708095662872, "pos_embed": 0.42818590492695907},
        "522250202255000225002225",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_classification_has_the_numbers_it_had(settings, quiet, name):
    recipe, epochs, norms, classes = GOLDEN[name]
    folder = train(settings(**recipe), quiet)
    for line, (loss, gradient, tested, accuracy) in zip(read_metrics(folder), epochs, strict=True):
        assert line["losses"]["total"] == pytest.approx(loss, rel=1e-5)
        assert line["gradients"]["total"] == pytest.approx(gradient, rel=1e-5)
        assert line["tests"]["test"] == pytest.approx({"accuracy": accuracy, "loss": tested}, rel=1e-5)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert {key: weights[key].double().norm().item() for key in norms} == pytest.approx(norms, rel=1e-5)
    table = [row for row in read_table(folder / "predictions.csv") if row["set"] == "test"]
    columns = ["set", "index", "label", "predicted", "probability"]  # as ever; what is younger follows
    assert list(table[0]) == [*columns, "file", "label_class", "predicted_class"]
    assert "".join(row["predicted"] for row in table) == classes


@pytest.mark.forks
def test_a_run_of_the_older_form_goes_on_to_the_same_bytes(settings, quiet, tmp_path, monkeypatch):
    """States of format 1, and a run.json that knows no task."""
    whole, folder = train(settings(**MIXED, out=str(tmp_path / "whole")), quiet), tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert in_child(lambda: train(settings(**MIXED, out=str(folder)), quiet)) == 143
    record = json.loads((folder / "run.json").read_text())
    del record["task"], record["settings"]["task"], record["settings"]["update"]
    (folder / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr(state, "FORMAT", 1)
    for path in (folder / "state").iterdir():
        content = state.read_state(path)
        del content["settings"]["task"], content["settings"]["update"], content["objective"], content["objective_ema"]
        place = content.pop("progress")
        state.write_state(path, content | {"updates": place.pop("updates"), "place": place})
    monkeypatch.undo()
    resume(folder, console=quiet)
    assert differing(folder, whole) == []
