"""Alarms: by hand-made histories, on runs that are spoilt on purpose, and none on runs that work."""

import json
import math

import numpy as np
import pytest
import torch

from vitreous.base.errors import HostError
from vitreous.lens.reading import read
from vitreous.report.folders import open_folders
from vitreous.train import train
from vitreous.train.engine import loop
from vitreous.train.engine.resume import resume
from vitreous.train.records import alarms
from vitreous.train.records.run_folder import read_metrics


def history(indicator, *values):
    """One layer's indicator by epoch; the others are missing."""
    empty = {"attention_entropy": {}, "below_uniform": {}, "rank_collapse": {}}
    return [empty | {indicator: {"3": value}} for value in values]


@pytest.mark.parametrize(
    ("indicator", "values", "kind"),
    [
        ("rank_collapse", (0.8, 0.7, 0.05), "rank collapse"),
        ("rank_collapse", (0.8, 0.7, 0.11), None),  # not low
        ("rank_collapse", (0.08, 0.07, 0.05), None),  # low from the start
        ("rank_collapse", (0.8, 0.05, 0.04), None),  # said before
        ("rank_collapse", (0.8, 0.05, 0.7, 0.05), "rank collapse"),  # it had come back
        ("rank_collapse", (0.8, 0.05, math.nan, 0.05), None),
        ("attention_entropy", (5.0, 4.0, 0.3), "entropy collapse"),
        ("attention_entropy", (5.0, 4.0, 0.6), None),
        ("attention_entropy", (0.6, 0.5, 0.4), None),
        ("below_uniform", (0.0, 0.4, 0.5, 0.02), "entropy spike"),
        ("below_uniform", (0.0, 0.4, 0.5, 0.06), None),
        ("below_uniform", (0.0, 0.002, 0.003, 0.0), None),  # even by design
        ("below_uniform", (0.5,), None),
    ],
)
def test_what_is_an_alarm(indicator, values, kind):
    found = alarms.alarms(history(indicator, *values))
    assert [one["alarm"] for one in found] == ([kind] if kind else [])
    for one in found:
        assert one["layer"] == 3
        assert one["value"] == values[-1]


def test_before_is_the_median_of_epochs_without_an_alarm():
    (found,) = alarms.alarms(history("rank_collapse", 0.9, 0.7, 0.05, 0.8, 0.01))
    assert found["before"] == 0.8


def test_indicators_are_means_over_images_and_heads(settings, quiet):
    folder = train(settings(epochs=1), quiet)
    found = alarms.indicators(read(folder / "readings/epoch-001"))
    assert found == read_metrics(folder)[0]["indicators"]
    table = read(folder / "readings/epoch-001").table()
    for layer in (0, 1):
        entropies, ranks = [], []
        for i in range(len(table["layer"])):
            if table["layer"][i] == layer and table["source"][i] == "attention":
                entropies.append(table["attention_entropy"][i])
                ranks.append(table["rank_collapse"][i])
        entropies, ranks = ([value for value in values if not math.isnan(value)] for values in (entropies, ranks))
        assert len(entropies) == 2 * len(ranks) == 32
        assert found["attention_entropy"][str(layer)] == pytest.approx(sum(entropies) / 32)
        assert found["below_uniform"][str(layer)] == pytest.approx(math.log(17) - sum(entropies) / 32)
        assert found["rank_collapse"][str(layer)] == pytest.approx(sum(ranks) / 16)


@pytest.mark.parametrize("mechanisms", [(), ("svda",), ("svda:scale=sqrt",), ("spc:after=1",)])
def test_runs_that_work_give_none(settings, quiet, mechanisms):
    folder = train(settings(graft=mechanisms, epochs=5, lr=2e-3, data="cutouts:train=120,test=24,size=16"), quiet)
    lines = read_metrics(folder)
    assert lines[-1]["losses"]["total"] < lines[0]["losses"]["total"]
    assert [line["alarms"] for line in lines] == [[]] * 5


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(epoch, how)`: do something to the weights when an epoch of training is over."""

    def planned(at, how):
        real = loop.train_epoch

        def spoilt(session, run, stopping, console):
            real(session, run, stopping, console)
            if session.progress.epoch == at:
                with torch.no_grad():
                    how(session.model)

        monkeypatch.setattr(loop, "train_epoch", spoilt)

    return planned


def scaled_queries(factor):
    def how(model):
        for block in model.blocks:
            width = block.attn.qkv.weight.shape[1]
            block.attn.qkv.weight[: 2 * width] *= factor

    return how


def said_everywhere(folder, kind, epoch, said):
    found = {line["epoch"]: [one["alarm"] for one in line["alarms"]] for line in read_metrics(folder)}
    assert kind in found[epoch]
    assert not any(kind in kinds for at, kinds in found.items() if at < epoch)
    assert f"Alarm after epoch {epoch}: " in (folder / "summary.md").read_text()
    assert f"Alarm after epoch {epoch}: " in said
    assert open_folders([folder])[0].metrics[epoch - 1]["alarms"]


def test_attention_on_single_tokens_is_an_entropy_collapse(settings, spoil, capsys):
    spoil(2, scaled_queries(100.0))
    folder = train(settings())
    said_everywhere(folder, "entropy collapse", 2, capsys.readouterr().out.replace("\n", " "))


def test_attention_that_forgets_to_select_is_a_spike(settings, spoil, capsys):
    spoil(1, scaled_queries(20.0))  # selects from the first epoch on
    spoil(3, scaled_queries(0.0))
    folder = train(settings(epochs=3))
    said_everywhere(folder, "entropy spike", 3, capsys.readouterr().out.replace("\n", " "))


def test_equal_tokens_are_a_rank_collapse(settings, spoil, capsys):
    def how(model):
        model.pos_embed.zero_()
        model.patch_embed.proj.weight.zero_()
        model.cls_token.copy_(model.patch_embed.proj.bias.expand_as(model.cls_token))

    spoil(2, how)
    folder = train(settings(train="all"))
    said_everywhere(folder, "rank collapse", 2, capsys.readouterr().out.replace("\n", " "))


def test_a_rate_far_too_high_gives_an_alarm_and_the_run_goes_on(settings, quiet):
    folder = train(settings(epochs=4, lr=1.0, data="cutouts:train=120,test=24,size=16"), quiet)
    lines = read_metrics(folder)
    assert len(lines) == 4
    assert {one["alarm"] for line in lines for one in line.get("alarms", [])} & {"entropy collapse", "rank collapse"}


def test_a_network_that_shows_no_attention_any_more_goes_on_without_a_reading(settings, quiet, monkeypatch):
    real = loop.look

    def fails_once(model, *arguments, out, **options):
        if out.name == "epoch-001":
            out.mkdir(parents=True)
            (out / "part").write_text("begun")
            raise HostError("Found nothing. Expected attention. Look elsewhere.")
        return real(model, *arguments, out=out, **options)

    monkeypatch.setattr(loop, "look", fails_once)
    folder = train(settings(epochs=3), quiet)
    assert sorted(path.name for path in folder.glob("readings/*")) == ["epoch-000", "epoch-002", "epoch-003"]
    assert "No reading after epoch 1: Found nothing." in (folder / "summary.md").read_text()
    assert [("indicators" in line) for line in read_metrics(folder)] == [False, True, True]


def test_a_resumed_run_gives_the_same_alarms(settings, quiet, spoil, monkeypatch, tmp_path):
    spoil(1, scaled_queries(20.0))
    spoil(3, scaled_queries(0.0))
    whole = train(settings(epochs=4, out=str(tmp_path / "whole")), quiet)
    with monkeypatch.context() as patch:
        calls = iter([None, None])
        patch.setattr(loop.summary, "write", lambda folder: next(calls) if folder else None)
        with pytest.raises(StopIteration):
            train(settings(epochs=4), quiet)
    folder = resume(settings().out, console=quiet)
    for a, b in zip(read_metrics(whole), read_metrics(folder), strict=True):
        assert json.dumps([a["alarms"], a["indicators"]]) == json.dumps([b["alarms"], b["indicators"]])
    assert any(line["alarms"] for line in read_metrics(whole))
    assert np.isfinite(list(read_metrics(whole)[0]["indicators"]["rank_collapse"].values())).all()
