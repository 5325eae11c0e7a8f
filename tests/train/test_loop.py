"""Training end to end: the folder is complete, repeats exactly, and does what a loop written by hand does."""

import gc
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import vitreous
from vitreous import grafts, ungraft
from vitreous.base.errors import DataError, NotReached, SettingError, VitreousError
from vitreous.lens.direction import Direction, find_direction
from vitreous.lens.reading import read
from vitreous.train import TrainSettings, load, train
from vitreous.train.engine.loop import NotFinite
from vitreous.train.engine.loop import test as run_test
from vitreous.train.engine.prepare import check_start, prepare
from vitreous.train.records.run_folder import read_metrics, read_table

FILES = {
    "run.json",
    "manifest.csv",
    "metrics.jsonl",
    "readings",
    "predictions.csv",
    "classes.csv",
    "mistakes.safetensors",
    "summary.md",
    "model.safetensors",
    "config.json",
    "mechanisms.json",
}


def numbers(folder):
    """What must repeat: all but times."""
    timed = ("seconds", "images_per_second")
    return [{name: value for name, value in line.items() if name not in timed} for line in read_metrics(folder)]


@pytest.mark.parametrize("mechanisms", [(), ("svda",), ("spc:after=1,sketch=4+1+true", "svda:scale=learned")])
def test_a_run_leaves_a_folder_that_explains_itself(settings, quiet, mechanisms):
    folder = train(settings(graft=mechanisms), quiet)
    names = {path.name for path in folder.iterdir()}
    assert names - {"foreground.safetensors"} == FILES
    assert ("foreground.safetensors" in names) != ("uncalibrated" in read_metrics(folder)[-1])
    epochs = read_metrics(folder)
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert set(epochs[0]["tests"]) == {"test", "swapped"}
    assert epochs[0]["losses"]["total"] == pytest.approx(sum(v for k, v in epochs[0]["losses"].items() if k != "total"))
    lines = read_table(folder / "predictions.csv")
    for name, found in epochs[-1]["tests"].items():
        right = [line["label"] == line["predicted"] for line in lines if line["set"] == name]
        assert len(right) == 24
        assert found["accuracy"] == pytest.approx(sum(right) / 24)
    run = json.loads((folder / "run.json").read_text())
    assert TrainSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in run["settings"].items()}) == settings(
        graft=mechanisms
    )
    assert "| 2 |" in (folder / "summary.md").read_text()


def test_readings_by_epoch_layer_and_head_for_both_arms(settings, quiet, tmp_path):
    for arm in ("plain", "svda"):
        folder = train(settings(graft=() if arm == "plain" else (arm,), out=str(tmp_path / arm)), quiet)
        found = sorted((folder / "readings").iterdir())
        assert [path.name for path in found] == ["epoch-000", "epoch-001", "epoch-002"]
        for path in found:
            table = read(path).table()
            heads = set(zip(table["layer"].tolist(), table["head"].tolist(), strict=True))
            assert heads == {(layer, head) for layer in (0, 1) for head in (-1, 0, 1)}
            entropy = table["attention_entropy"]
            entropy = entropy[np.isfinite(entropy)]
            assert len(entropy) == 2 * 2 * len(read(path).images)
            assert (entropy > 0).all()
            assert (entropy <= np.log(17) + 1e-6).all()
            assert ("learned" in table["source"]) == (arm == "svda")
            assert "energy_inside" in read(path).scores()  # made scenes have masks


def test_gradient_norms_of_what_the_grafts_brought_are_logged(settings, quiet):
    folder = train(settings(graft=("spc:after=1,sketch=4+1+true",)), quiet)
    gradients = read_metrics(folder)[0]["gradients"]
    model = load(folder)
    names = {name for name, _ in model.named_parameters()}
    ungraft(model, all=True)
    fresh = names - {name for name, _ in model.named_parameters()}
    assert fresh
    assert set(gradients) == fresh | {"total"}
    assert all(value > 0 for value in gradients.values())


def test_two_runs_are_equal_and_another_seed_is_not(settings, quiet, tmp_path):
    recipe = dict(graft=("svda",), drop_path=0.2, aug="flip", mixup=0.3, model_ema=0.9)
    first, second, other = (
        train(settings(**recipe, out=str(tmp_path / name), seed=seed), quiet)
        for name, seed in zip("abc", (0, 0, 1), strict=True)
    )
    assert numbers(first) == numbers(second)
    for name in ("model.safetensors", "predictions.csv", "readings/epoch-002/table.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert numbers(first) != numbers(other)


def test_the_loop_does_what_a_loop_by_hand_does(settings, quiet):
    chosen = settings(graft=("svda",), opt="adam", sched="none", weight_decay=0.0, lr=1e-3, clip_grad=0.5)
    session = prepare(chosen)
    model, parameters = session.model, list(session.model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for epoch in (1, 2):
        model.train()
        session.train.set_epoch(epoch)
        for images, labels in session.train:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            for block in model.blocks:
                loss = loss + sum(block.attn.penalties().values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
    trained = load(train(chosen, quiet))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_modules_with_a_schedule_hear_how_far_training_is(settings, quiet, monkeypatch):
    heard = []
    monkeypatch.setattr(torch.nn.LayerNorm, "schedule", lambda module, progress: heard.append(progress), raising=False)
    train(settings(), quiet)
    norms = 5  # two in each of two blocks, and the last
    steps = [0, 1 / 6, 2 / 6, 3 / 6, 3 / 6, 4 / 6, 5 / 6, 1]  # before each step, and before the tests of each epoch
    assert heard == pytest.approx([step for step in steps for _ in range(norms)])


def test_arms_share_start_and_order(settings):
    plain, svda = prepare(settings()), prepare(settings(graft=("svda",)))
    there = svda.model.state_dict()
    assert all(torch.equal(there[name], value) for name, value in plain.model.state_dict().items())
    for (a, _), (b, _) in zip(plain.train, svda.train, strict=True):
        assert torch.equal(a, b)


def test_foreground_maps_of_a_run_show_the_object(settings, quiet):
    """By a direction that is found on the training images; the masks of the scenes only judge it."""
    shipped = str(Path(vitreous.__file__).parent / "weights/cutouts")
    folder = train(settings(data="cutouts:train=64,test=24", model=shipped, model_kwargs=(), epochs=1, lr=1e-5), quiet)
    Direction.load(folder / "foreground.safetensors").check(load(folder))
    summary = read(folder / "readings/epoch-001").facts["summary"]
    chosen = (summary["component"] == "foreground") & (summary["measure"] == "auroc")
    assert summary["mean"][chosen].item() > 0.9
    model = timm.create_model(f"local-dir:{folder}").eval()  # the same network, not trained: no feature follows an object
    with pytest.raises(DataError, match="follows"):
        find_direction(model, torch.randn(16, 3, 32, 32))


def test_averaged_weights_are_what_is_saved(settings, quiet):
    chosen = settings(model_ema=0.5, epochs=1, sched="constant")
    session = prepare(chosen)
    start = {name: value.clone() for name, value in session.model.state_dict().items()}
    saved = load(train(chosen, quiet)).state_dict()
    raw = load(train(settings(epochs=1, sched="constant", out=chosen.out + "-raw"), quiet)).state_dict()
    name = "head.weight"
    moved = (raw[name] - start[name]).norm()
    assert 0 < (saved[name] - start[name]).norm() < moved  # behind the raw weights


@pytest.mark.parametrize("recipe", [{"amp": True}, {"cutmix": 1.0, "smoothing": 0.1}, {"aug": "pad", "workers": 1}])
def test_recipes_run(settings, quiet, recipe):
    folder = train(settings(graft=("svda",), epochs=1, **recipe), quiet)
    assert read_metrics(folder)[0]["losses"]["classification"] > 0


def test_no_worker_outlives_the_training(settings, quiet):
    before = set(multiprocessing.active_children())
    gc.disable()  # the session is a cycle, collected at some time or other
    try:
        train(settings(epochs=1, aug="pad", workers=1), quiet)
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


def test_a_step_that_is_not_finite_is_not_taken(settings, quiet, monkeypatch):
    calls = []

    def breaks_in_the_fifth_step(model):
        calls.append(model)
        return {"made": model.head.weight.sum() * (float("nan") if len(calls) >= 5 else 0.0)}

    monkeypatch.setattr("vitreous.grafting.penalties", breaks_in_the_fifth_step)
    with pytest.raises(
        NotFinite, match=r"made nan.* at step 5, in epoch 2; 1 gradients are not finite, the first of head.weight; it begins "
    ):
        train(settings(), quiet)
    assert len(calls) == 6  # the fifth was run again, to find out where it begins
    folder = settings().out
    assert [line["epoch"] for line in read_metrics(Path(folder))] == [1]
    assert all(value.isfinite().all() for value in load(folder).state_dict().values())


def test_a_run_can_go_on_from_a_run(settings, quiet, tmp_path):
    first = train(settings(graft=("svda",), epochs=1), quiet)
    again = settings(model=str(first), model_kwargs=(), graft=("extra_tokens:tokens=2",), epochs=1, out=str(tmp_path / "b"))
    session = prepare(again)
    assert torch.equal(session.model.state_dict()["head.weight"], load(first).head.weight)
    assert [record.mechanism.name for record in grafts(load(train(again, quiet)))] == ["svda", "extra_tokens"]


def test_several_seeds_have_folders_of_their_own_and_a_mean(settings, quiet):
    folder = train(settings(seeds=2, seed=4, epochs=1), quiet)
    assert {path.name for path in folder.iterdir()} == {"seed-4", "seed-5", "summary.md"}
    scores = [100 * read_metrics(folder / f"seed-{seed}")[-1]["tests"]["test"]["accuracy"] for seed in (4, 5)]
    mean, spread = sum(scores) / 2, abs(scores[0] - scores[1]) / 2**0.5
    text = (folder / "summary.md").read_text()
    assert f"{mean:.2f} %" in text
    assert f"{spread:.2f} |" in text


def test_default_folders_are_numbered(settings, quiet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [train(settings(out=None, epochs=1), quiet) for _ in range(2)]
    assert [folder.as_posix() for folder in found] == ["runs/cutouts-plain", "runs/cutouts-plain-2"]


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"model": "no/such/folder"}, DataError, "no/such/folder"),
        ({"data": "no/such/folder"}, DataError, "no/such/folder"),
        ({"data": "cutouts:train=40,test=24,size=18"}, SettingError, "18 x 18"),
        ({"graft": ("svda:layers=7",)}, SettingError, "0 to 1"),
        ({"model_kwargs": ("no_such=1",)}, SettingError, "no_such"),
        ({"model_kwargs": ("img_size=32",)}, SettingError, r"img_size=32 for a run with \(16, 16\)"),
        ({"model_kwargs": ("num_classes=5",)}, SettingError, "num_classes=5 for a run with 6"),
        ({"model_kwargs": ("in_chans=1",)}, SettingError, "in_chans=1 for a run with 3"),
        (
            {"model_kwargs": ("pretrained=True",)},
            SettingError,
            "Found --model-kwargs pretrained=True. Expected the network's own",
        ),
        ({"opt": "adahessian"}, SettingError, "second derivatives"),
        ({"model": "test_resnet", "model_kwargs": (), "batch_size": 13}, SettingError, "a batch of one image .40 images"),
        ({"train": "new"}, SettingError, "no parameter to learn"),
        ({"graft": ("svda", "svda")}, VitreousError, "already"),
    ],
)
def test_nothing_is_written_when_something_does_not_fit(settings, quiet, tmp_path, changes, kind, said):
    with pytest.raises(kind, match=said):
        train(settings(**changes), quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("num_classes=6", "in_chans=3", "img_size=16"), ("img_size=(16, 16)",)])
def test_arguments_that_say_what_the_data_say_are_taken(settings, words):
    chosen = settings(epochs=1)
    check_start(prepare(settings(model_kwargs=(*chosen.model_kwargs, *words))))


@pytest.mark.parametrize(("network", "more"), [("cvt_13", ()), ("pvt_v2_b0", ("sr_ratios=2", "mlp_ratios=(2, 2)"))])
def test_a_network_in_stages_trains(settings, quiet, network, more):
    """Its patches have no one number, and overlap."""
    sizes = ("embed_dims=(8, 12)", "depths=(1, 1)", "num_heads=(1, 2)", *more)
    run = train(settings(data="cutouts:train=24,test=8,size=32", model=network, model_kwargs=sizes, epochs=1), quiet)
    assert load(run).head.out_features == 6


def test_batches_of_one_image_are_taken_where_batch_norm_can(settings, quiet):
    """On feature maps of more than one pixel; and a network without it takes them in any case."""
    train(settings(model="test_resnet", model_kwargs=(), data="cutouts:train=9,test=6,size=64", batch_size=4, epochs=1), quiet)
    check_start(prepare(settings(batch_size=13)))


def test_a_classifier_that_does_not_name_its_classes_is_said(settings, quiet, tmp_path):
    first = train(settings(epochs=1, out=str(tmp_path / "first")), quiet)
    kept = dict(weights=str(first / "model.safetensors"), model_kwargs=(*settings().model_kwargs, "img_size=16"))
    session = prepare(settings(**kept))
    assert session.model.head.weight.equal(load(first).head.weight)
    (remark,) = [remark for remark in session.remarks if remark.startswith("Classifier:")]
    assert "has 6 classes and does not name them" in remark
    assert "0 disc, 1 square, 2 triangle, 3 star, ..." in remark
    others = [dict(model=str(first), model_kwargs=()), kept | {"data": "cutouts:train=40,test=24,size=16,classes=5"}]
    for changes in others:  # it names them; another number of classes
        assert not any(remark.startswith("Classifier:") for remark in prepare(settings(**changes)).remarks)


def test_the_plan_of_a_reducer_is_said(settings):
    (plan,) = [remark for remark in prepare(settings(graft=("evit:macs=0.8",))).remarks if remark.startswith("Plan: ")]
    assert plan.startswith("Plan: 1. evit:macs=0.8 at blocks.")
    assert "; tokens in attention: 17, 14; tokens in mlp: 14, 11; " in plan
    assert plan.endswith(" of those with all tokens.")
    assert not any(remark.startswith("Plan: ") for remark in prepare(settings(graft=("svda",))).remarks)


def test_a_folder_in_use_is_left_alone(settings, quiet, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(SettingError, match="new or empty"):
        train(settings(), quiet)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_models_without_readable_attention_train_without_readings(settings, quiet):
    folder = train(settings(model="test_resnet", model_kwargs=(), epochs=1), quiet)
    assert not (folder / "readings").exists()
    assert "No readings" in (folder / "summary.md").read_text()


def test_a_graft_that_is_passed_by_is_found_before_training(settings, quiet, tmp_path, monkeypatch):
    monkeypatch.setattr("vitreous.train.engine.prepare.check", lambda *_: (_ for _ in ()).throw(NotReached("passed by")))
    with pytest.raises(NotReached):
        train(settings(graft=("svda",)), quiet)
    assert list(tmp_path.iterdir()) == []


def test_real_weights_score_what_is_published_for_them(settings, shared_data):
    chosen = settings(
        data=str(shared_data / "cifar10/cifar10_5k2k.npz"), model=str(shared_data / "weights/vit_cifar10"), model_kwargs=()
    )
    session = prepare(chosen)
    accuracy = session.tested.score(run_test(session, session.tests["test"], bool))["accuracy"]
    assert accuracy == pytest.approx(0.6900, abs=0.0011)


def test_real_weights_are_fitted_to_other_images(settings, shared_data):
    weights = shared_data / "weights/vit_tiny_patch16_224"
    fitted = dict(model="vit_tiny_patch16_224", model_kwargs=(), data="cutouts:train=24,test=12,size=64", image_size=64)
    session = prepare(
        settings(**fitted, weights=str(weights / "model.safetensors"), freeze=("blocks.0-9",), graft=("svda:layers=10-11",))
    )
    theirs = timm.create_model(f"local-dir:{weights}", pretrained=True, img_size=64, num_classes=6)
    ours = session.model.state_dict()
    for name, value in theirs.state_dict().items():
        if not name.startswith("head."):
            torch.testing.assert_close(ours[name], value)
    assert session.inputs.mean == session.inputs.std == (0.5, 0.5, 0.5)  # the weights' own, not the data's
