"""Steps that are not finite: stopped before they are taken, kept, run again, named; and left out, if that was asked for."""

import copy
import json
import signal
import sys
from dataclasses import replace

import pytest
import torch

from train.interrupting import NAN, breaking, die, differing, in_child, output
from vitreous.base.errors import DataError
from vitreous.commands.cli import main
from vitreous.train import load, train
from vitreous.train.engine import loop, non_finite, step
from vitreous.train.engine.prepare import prepare
from vitreous.train.engine.resume import replay, resume
from vitreous.train.engine.state import NotFinite, read_state
from vitreous.train.engine.step import step_losses
from vitreous.train.records.run_folder import read_metrics

pytestmark = pytest.mark.forks


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * NAN


def gradient(name):
    def change(session, now):
        session.model.get_submodule(name).register_forward_hook(lambda m, i, out: BadGradient.apply(out) if now() else None)

    return change


def large(name):
    """Finite gradients whose norm is none."""

    def change(session, now):
        weight = session.model.get_parameter(name)
        weight.register_hook(lambda g: torch.full_like(g, 1e38) if now() else None)

    return change


def penalty(name):
    def change(session, now):
        module = session.model.get_submodule(name)
        original = module.penalties
        module.penalties = lambda: {name: value * (NAN if now() else 1) for name, value in original().items()}

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (output("blocks.1.mlp.fc1", NAN), r"the output of blocks.1.mlp.fc1 \(Linear\)"),
        (output("patch_embed.proj", float("inf")), r"the output of patch_embed.proj \(Conv2d\)"),
        (output("head", NAN), r"the output of head \(Linear\)"),
        (gradient("blocks.1.attn"), r"the gradient that comes out of blocks.1.attn \(SpectralAttention\)"),
        (gradient("blocks.0.mlp.act"), r"the gradient that comes out of blocks.0.mlp.act \(GELU\)"),
        (large("head.weight"), "the gradient of head.weight"),
        (penalty("blocks.0.attn"), r"the loss \w+, a penalty of blocks.0.attn \(SpectralAttention\)"),
    ],
)
def test_the_module_is_named_and_nothing_is_poisoned(settings, quiet, monkeypatch, capsys, tmp_path, change, named):
    recipe = dict(graft=("svda",), model_ema=0.9, mixup=0.3, drop_path=0.1, save_every=2, batch_size=12)
    with monkeypatch.context() as patch:
        breaking(patch, change)
        with pytest.raises(NotFinite, match=f"at step 5, in epoch 2.*begins with {named}"):
            train(settings(**recipe), quiet)
        folder = tmp_path / "run"
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert main(["replay", str(folder)]) == 0
        assert "Update 5, in epoch 2: what is not finite begins with the" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert replay(folder, quiet) is None  # what broke it is gone
    state = read_state(folder / "state/000000004.safetensors")
    assert all(value.isfinite().all() for part in ("model", "ema") for value in state[part].values())
    assert all(value.isfinite().all() for value in load(folder).state_dict().values())
    resume(folder, console=quiet)
    whole = train(settings(**recipe, out=str(tmp_path / "whole")), quiet)
    (folder / "not-finite.safetensors").unlink()
    assert differing(folder, whole) == []


def test_images_that_are_not_finite_are_named(settings, quiet, monkeypatch):
    original = loop.take_step

    def poisoned(session, run, batch, *others):
        if session.progress.updates == 1:
            batch[0][[2, 5]] = NAN
        original(session, run, batch, *others)

    monkeypatch.setattr(loop, "take_step", poisoned)
    with pytest.raises(NotFinite, match="the images themselves, numbers 2, 5 of the batch"):
        train(settings(), quiet)


def test_the_step_is_replayed_with_its_own_draws(settings, quiet, monkeypatch):
    """Mixup and dropped paths are those of the step that failed: the losses agree to the last digit."""
    seen = []

    def noted(session, *batch):
        losses = step_losses(session, *batch)
        seen.append({name: value.item() for name, value in losses.by_name.items()})
        made = losses.means["classification"] * (NAN if session.progress.updates == 4 else 0)
        return replace(losses, means=losses.means | {"made": made})

    recipe = settings(mixup=0.3, drop_path=0.3, batch_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(step, "step_losses", noted)
        patch.setattr(non_finite, "step_losses", step_losses)
        with pytest.raises(NotFinite):
            train(recipe, quiet)
    monkeypatch.setattr(non_finite, "step_losses", noted)
    assert replay(recipe.out, quiet) == "the loss made"
    assert seen[-1] == seen[-2]


def test_going_back_leaves_the_step_out(settings, quiet, monkeypatch, tmp_path):
    """As in a run that never had the step; the learning rate is that of its schedule; resumed, it ends the same."""
    recipe = dict(graft=("svda",), model_ema=0.9, drop_path=0.1, mixup=0.3, rollbacks=2, batch_size=8)
    breaking(monkeypatch, output("blocks.0.mlp", NAN), at=(3, 7))
    folder = train(settings(**recipe), quiet)
    assert [line["epoch"] for line in read_metrics(folder)] == [1, 2]
    assert all(value.isfinite().all() for value in load(folder).state_dict().values())
    taken, take_step = [], loop.take_step
    with monkeypatch.context() as patch:
        patch.setattr(
            loop, "take_step", lambda session, *others: (take_step(session, *others), taken.append(session.progress.updates))
        )
        again = train(settings(**recipe, out=str(tmp_path / "again")), quiet)
    assert differing(folder, again) == ["not-finite.safetensors"]  # which has times in it
    assert taken == [0, 1, 0, 1, 3, 4, 5, 5, 7, 8, 9]
    with monkeypatch.context() as patch:
        patch.setattr(
            loop, "take_step", lambda session, *others: die() if session.progress.updates == 8 else take_step(session, *others)
        )
        killed = tmp_path / "killed"
        assert in_child(lambda: train(settings(**recipe, out=str(killed)), quiet)) == -signal.SIGKILL
    resume(killed, console=quiet)
    assert differing(folder, killed) == ["not-finite.safetensors"]


def test_after_a_return_the_rate_is_lowered_if_told(settings, quiet, monkeypatch, tmp_path):
    breaking(monkeypatch, output("blocks.0.mlp", NAN))
    rates = {}
    for factor in (1.0, 0.5):
        folder = train(settings(sched="constant", rollbacks=1, rollback_lr=factor, out=str(tmp_path / str(factor))), quiet)
        rates[factor] = [line["lr"] for line in read_metrics(folder)]
    assert rates == {1.0: [5e-4, 5e-4], 0.5: [5e-4, 2.5e-4]}


def test_it_goes_back_no_more_often_than_told(settings, quiet, monkeypatch, tmp_path):
    breaking(monkeypatch, output("blocks.0.mlp", NAN), at=(5, 6))
    with pytest.raises(NotFinite, match="at step 6"):
        train(settings(rollbacks=1), quiet)
    resume(tmp_path / "run", console=quiet, rollbacks=2)
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [1, 2]


def test_a_damaged_state_is_written_again_after_a_return(settings, quiet, monkeypatch, tmp_path):
    newest, there = tmp_path / "run/state/000000004.safetensors", []

    def damage(session, now):
        def hook(module, inputs, out):
            if now():
                newest.write_bytes(b"damaged")
                return out * NAN
            return None

        session.model.get_submodule("blocks.0.mlp").register_forward_hook(hook)

    breaking(monkeypatch, damage)
    original = loop.take_step

    def noted(session, *others):
        original(session, *others)
        there.append((session.progress.updates + 1, newest.exists()))

    monkeypatch.setattr(loop, "take_step", noted)
    train(settings(rollbacks=1, save_every=1, batch_size=8), quiet)
    assert there[:6] == [(1, False), (2, False), (3, False), (4, False), (4, False), (6, True)]


def test_what_an_earlier_search_left_is_not_found_again(settings):
    """In a copy of the model that is no optimizer's, as of one that is spread over processes."""
    session = prepare(settings())
    alone = replace(session, objective=copy.deepcopy(session.objective))
    alone.model.head.weight.grad = torch.full_like(alone.model.head.weight, NAN)
    assert non_finite.diagnose(alone, next(iter(session.train))) is None


def test_a_step_of_a_spread_run_is_replayed_by_one_process_and_told_to_nobody(settings, quiet, monkeypatch, tmp_path):
    breaking(monkeypatch, output("blocks.1.mlp.fc1", NAN))
    with pytest.raises(NotFinite):
        train(settings(), quiet)
    path = tmp_path / "run/run.json"
    record = json.loads(path.read_text())
    record["settings"] |= {"shard": True, "tracker": ["tensorboard"]}
    path.write_text(json.dumps(record))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert replay(path.parent, quiet) == "the output of blocks.1.mlp.fc1 (Linear)"


def test_weights_that_a_step_made_infinite_are_not_saved(settings, quiet, monkeypatch, tmp_path):
    original = loop.take_step

    def bursts(session, *others):
        original(session, *others)
        if session.progress.updates == 4:
            session.model.head.weight.data[0, 0] = float("inf")

    monkeypatch.setattr(loop, "take_step", bursts)
    with pytest.raises(NotFinite, match=r"head.weight.*not saved|not finite"):
        train(settings(rollbacks=3, save_every=1), quiet)
    assert max(path.name for path in (tmp_path / "run/state").iterdir()) == "000000004.safetensors"


def test_there_is_nothing_to_replay_without_a_record(settings, quiet, tmp_path, capsys):
    folder = train(settings(epochs=1), quiet)
    with pytest.raises(DataError, match="nothing to replay"):
        replay(folder, quiet)
    record = json.loads((folder / "run.json").read_text())
    del record["settings"]
    (folder / "run.json").write_text(json.dumps(record))
    assert main(["replay", str(folder)]) == 2
    assert main(["replay", str(tmp_path / "none")]) == 2
    assert "Traceback" not in capsys.readouterr().err
