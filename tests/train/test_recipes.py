"""Recipes: what is given wins, the rest is as published for the batch and the epochs, and a run records where it is from."""

import json

import numpy as np
import pytest
from torch import nn

from vitreous.base.errors import SettingError, UnknownName
from vitreous.train import TrainSettings, load, recipes, train
from vitreous.train.engine.prepare import prepare
from vitreous.train.engine.resume import recorded_settings
from vitreous.train.records.run_folder import read_metrics


@pytest.mark.parametrize(
    ("loaded", "images", "used"),
    [(True, 9_999, "finetune-small"), (True, 10_000, "finetune-large"), (False, 100, "scratch"), (False, 10**6, "scratch")],
)
def test_auto_goes_by_weights_and_number_of_images(loaded, images, used):
    settings, record = TrainSettings("cutouts", recipe="auto").with_recipe(loaded, images)
    assert settings.recipe == record["used"] == used
    assert record["asked"] == "auto"
    assert all(getattr(settings, name) == found["value"] for name, found in record["values"].items())
    assert settings.parsed_task().pairs_images == (used != "finetune-small")


def test_rate_and_warm_up_follow_batch_and_epochs():
    for batch in (16, 64, 256, 1024):
        settings, _ = TrainSettings("cutouts", recipe="finetune-small", batch_size=batch, epochs=7).with_recipe(True, 50)
        assert settings.lr == pytest.approx(5e-4 * (batch / 256) ** 0.5, rel=5e-3)
        assert settings.warmup_epochs == pytest.approx(0.7)


@pytest.mark.parametrize("name", ["finetune-small", "finetune-large", "scratch"])
def test_what_is_given_wins_even_where_it_is_the_plain_default(name):
    given = dict(epochs=10, lr=5e-4, mixup=0.0, cutmix=0.0, drop_path=0.0, warmup_epochs=0.0, layer_decay=1.0, aug="none")
    settings, record = TrainSettings("cutouts", recipe=name, **given).with_recipe(True, 50)
    assert {key: getattr(settings, key) for key in given} == given
    assert {key for key, found in record["values"].items() if found["from"] == "given"} == set(given)
    assert settings.smoothing == 0.1
    assert "epochs 10" in recipes.remarks(record)[1]


def test_no_recipe_is_the_plain_defaults():
    settings = TrainSettings("cutouts")
    assert settings.with_recipe(True, 50) == (settings, None)
    assert {name: getattr(settings, name) for name in recipes.PLAIN} == recipes.PLAIN


def test_a_resolved_record_is_read_back_as_it_is():
    settings, _ = TrainSettings("cutouts", recipe="auto").with_recipe(True, 50)
    kept = json.loads(json.dumps({"settings": {"data": settings.data} | vars(settings)}))
    assert recorded_settings(kept, {}) == settings
    assert settings.with_recipe(True, 10**6)[0] == settings  # as chosen at the start


def test_rates_of_other_optimizers_are_not_guessed():
    with pytest.raises(SettingError, match="--opt sgd and no --lr"):
        TrainSettings("cutouts", recipe="auto", opt="sgd")
    assert TrainSettings("cutouts", recipe="auto", opt="sgd", lr=0.01).lr == 0.01
    with pytest.raises(UnknownName, match="finetune-small"):
        TrainSettings("cutouts", recipe="finetune-smal")


def test_a_run_records_and_says_what_it_was_given(settings, quiet):
    folder = train(settings(recipe="auto", epochs=1), quiet)
    run = json.loads((folder / "run.json").read_text())
    assert run["settings"]["recipe"] == "scratch"
    assert run["settings"]["mixup"] == 0.8
    assert run["recipe"]["values"]["lr"] == {
        "value": pytest.approx(3.5e-4 / 4, rel=5e-3),
        "from": "DeiT, 5e-4 for 512, 0.00035 x sqrt(16 / 256)",
    }
    text = (folder / "summary.md").read_text()
    assert "Recipe: scratch (no trained weights)" in text
    assert "Given, over the recipe: epochs 1." in text
    assert np.isfinite(read_metrics(folder)[0]["losses"]["total"])


def test_trained_weights_bring_layer_decay_and_drop_path(settings, quiet, tmp_path):
    first = train(settings(epochs=1), quiet)
    session = prepare(settings(model=str(first), model_kwargs=(), recipe="auto", out=str(tmp_path / "b")))
    assert session.recipe["used"] == "finetune-small"
    assert sorted({group["lr_scale"] for group in session.optimizer.param_groups})[-2:] == pytest.approx([0.65, 1.0])
    assert session.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_strong_recipe_takes_grey_images_too(settings, quiet, tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, channels), np.uint8)
    from PIL import Image

    for k, x in enumerate(pixels):
        path = tmp_path / "photos" / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[..., 0] if channels == 1 else x).save(path)
    folder = train(settings(data=str(tmp_path / "photos"), image_size=16, recipe="scratch", epochs=1, batch_size=8), quiet)
    assert np.isfinite(read_metrics(folder)[0]["losses"]["total"])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_recipe_lets_a_new_classifier_on_trained_weights_start_without_an_opinion(settings, quiet, tmp_path, channels):
    """Its first loss is that of a guess, log of the classes. One for the same classes, or without a recipe, is left alone."""
    first = train(settings(epochs=1, out=str(tmp_path / "first")), quiet)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, channels), np.uint8)
    known = {"x_train": pixels, "x_test": pixels, "classes": ["a", "b", "c"]}
    np.savez(tmp_path / "other.npz", **known, y_train=np.arange(12) % 3, y_test=np.arange(12) % 3)
    onward = dict(data=str(tmp_path / "other.npz"), model=str(first), model_kwargs=(), epochs=1)
    plain, session = prepare(settings(**onward)), prepare(settings(**onward, recipe="finetune-small"))
    assert session.model.head.weight.abs().max() < 1e-4
    assert not session.model.head.bias.any()
    assert plain.model.head.weight.abs().max() > 1e-2
    body = {name: value for name, value in session.model.state_dict().items() if not name.startswith("head.")}
    assert all(value.equal(plain.model.state_dict()[name]) for name, value in body.items())
    images, labels = next(iter(session.train))
    assert nn.functional.cross_entropy(session.model.eval()(images), labels).item() == pytest.approx(np.log(3), abs=1e-3)
    assert any("starts near 0" in remark for remark in session.remarks)
    assert not any("starts near 0" in remark for remark in plain.remarks)
    same = prepare(settings(model=str(first), model_kwargs=(), recipe="finetune-small"))
    assert same.model.head.weight.equal(load(first).head.weight)
