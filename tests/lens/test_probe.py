"""Probes as a third party writes them: table, page, summary; alone as among others; imported only when asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from lens.explicit import explicit, pixels, vit
from vitreous.base.errors import SettingError, UnknownName
from vitreous.commands._looking import overview
from vitreous.data import Cutouts
from vitreous.layers.exposed import Exposed
from vitreous.lens.evaluation import SCORES
from vitreous.lens.look import look
from vitreous.lens.probe import PROBES, Component, Measure, Observer, Probe, Readout, Rows, Source, chosen, records
from vitreous.lens.reading import read
from vitreous.report.page import write

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "read-a-report.md"


class LengthsObserver(Observer):
    def on_layer(self, features):
        lengths = features.tokens.norm(dim=-1)
        layer, first = features.layer, self.batch.first
        self.readout.maps[f"length/{layer}"] = lengths.unflatten(-1, features.token_grid)
        grid = lengths.unflatten(-1, features.token_grid)
        self.readout.maps[f"volume/{layer}"] = torch.stack([grid, grid + 1, 2 * grid], 1)
        values = {"token_length": lengths.mean(1)[:, None]}
        self.readout.rows.append(Rows(layer, "lengths", features.kind, values, first, together=True))


@dataclass(frozen=True, kw_only=True)
class Lengths(Probe):
    """The lengths of tokens behind each layer: what no probe of ours measures."""

    observer: ClassVar[type[Observer]] = LengthsObserver
    sources: ClassVar[tuple[Source, ...]] = (Source("lengths", "Lengths of tokens", "Of the stream."),)
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("token_length", "Token length", "units", 0, None, "lower", "Mean length of the tokens.", "length"),
    )
    components: ClassVar[tuple[Component, ...]] = (
        Component("length", "Length of tokens", explains="Long ones are bright."),
        Component("volume", "Lengths, three times", explains="A grid of three dimensions."),
    )


def page_data(folder: Path, out: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', write([folder], out).read_text(), re.S)[1])


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """A reading with a probe from here among ours, on scenes with masks; its folder and its model."""
    model, folder = vit(img_size=(16, 16)), tmp_path_factory.mktemp("looked") / "out"
    scenes = Cutouts(3, size=48, seed=1)
    passes = [name for name in PROBES.files if PROBES.item(name).passes]
    return look(model, scenes, probes=["all", *passes, Lengths()], curves=1, out=folder), folder, model, scenes


def test_a_probe_from_elsewhere_reaches_table_page_summary_and_command_line(looked, tmp_path):
    reading, folder, _, _ = looked
    table = reading.table()
    here = table["source"] == "lengths"
    assert here.sum() == 3 * 3
    assert (table["token_length"][here] > 0).all()
    assert np.isnan(table["token_length"][~here]).all()
    np.testing.assert_allclose(table["token_length"][here].reshape(3, 3)[1], reading.maps["length", 1].mean((1, 2)), rtol=1e-3)
    assert "length" in reading.facts["summary"]["component"]
    assert "length" in {entry["component"] for entry in reading.curves}
    data = page_data(folder, tmp_path / "page.html")
    shown = data["sources"][0]["readings"][0]
    assert "token_length" in shown["table"]["columns"]
    assert "length/1" in shown["maps"]
    measure = next(record for record in data["words"]["measures"] if record["name"] == "token_length")
    assert (measure["label"], measure["unit"], measure["explains"]) == ("Token length", "units", "Mean length of the tokens.")
    assert {"name": "lengths", "label": "Lengths of tokens", "explains": "Of the stream.", "form": "layers"} in data["words"][
        "sources"
    ]
    assert "length" in [column.header for table in overview(reading) for column in table.columns]


def test_grids_of_three_dimensions_are_kept_and_shown_by_slices_but_not_scored(looked, tmp_path):
    reading, folder, _, _ = looked
    volume, length = reading.maps["volume", 1], reading.maps["length", 1]
    assert volume.shape == (3, 3, 4, 4)
    assert reading.maps.heads("volume", 1).shape == (3, 1, 3, 4, 4)
    np.testing.assert_allclose(volume[:, 2], 2 * length, rtol=2e-3)
    assert "volume" not in reading.scores()["component"]
    entry = page_data(folder, tmp_path / "page.html")["sources"][0]["readings"][0]["maps"]["volume/1"]
    assert (entry["heads"], entry["depth"], entry["height"], entry["width"]) == (0, 3, 4, 4)


@pytest.mark.parametrize("name", PROBES.files)
def test_a_probe_alone_gives_the_same_numbers_as_among_all_others(looked, name):
    reading, _, model, scenes = looked
    alone, together = look(model, scenes, probes=[name]), reading.table()
    table, (probe,) = alone.table(), chosen([name])
    for measure in (record.name for record in probe.measures):
        ours = {key: table[key][np.isfinite(table[measure])] for key in ("layer", "head", "image", measure)}
        theirs = {key: together[key][np.isfinite(together[measure])] for key in ours}
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    for component, layer in alone.maps:
        np.testing.assert_array_equal(alone.maps.heads(component, layer), reading.maps.heads(component, layer))
        ours, theirs = (one.maps.confidence(component, layer) for one in (alone, reading))
        np.testing.assert_array_equal(ours, theirs)
    components = {record.name for record in probe.components}
    assert set(alone.maps) == {key for key in reading.maps if key[0] in components}
    others = {
        key: value for key, value in alone.parts[0].tensors.items() if key.split("/")[0] in ("queries", "tokens", "spectrum")
    }
    for key, value in others.items():
        np.testing.assert_array_equal(value, reading.parts[0].tensors[key])
    # the model exposes nothing, and merges no tokens
    assert probe.measures or probe.components or others or name in ("exposed", "token_groups")


def test_what_is_not_asked_for_is_not_imported():
    code = (
        "import sys, torch; from lens.explicit import pixels, vit; from vitreous.lens.look import look\n"
        "assert not any(name.startswith('vitreous.lens.probes.') for name in sys.modules)\n"
        "look(vit(), pixels(1), probes=['rank_collapse'])\n"
        "print(*sorted(name for name in sys.modules if name.startswith('vitreous.lens.probes.')))"
    )
    tests = Path(__file__).parents[1]
    paths = {"PYTHONPATH": f"{tests}:{tests.parent / 'src'}", "PATH": ""}
    found = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["vitreous.lens.probes.rank_collapse"]


def test_two_probes_of_one_measure_and_names_that_are_none_are_refused():
    with pytest.raises(SettingError, match="token_length, volume in two probes"):
        chosen([Lengths(), Lengths()])
    with pytest.raises(UnknownName, match=r"'rank_colapse'.*rank_collapse"):
        chosen("rank_colapse")
    beside = [probe.text() for probe in chosen(["all", "spectra:scores=false"])]
    assert "spectra:scores=false" in beside
    assert len(beside) == len(chosen(None))
    assert [probe.text() for probe in chosen(["spectra:scores=false", "attention_rows"])] == [
        "attention_rows",
        "spectra:scores=false",
    ]


def test_probes_are_a_part_of_what_a_folder_goes_on_with(tmp_path):
    model, images = vit(), pixels(2)
    look(model, images, out=tmp_path / "out", probes="rank_collapse")
    assert read(tmp_path / "out").facts["probes"] == ["rank_collapse"]
    with pytest.raises(SettingError, match="another reading"):
        look(model, images, out=tmp_path / "out")


# -- passes of its own -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Curvature(Probe):
    """A probe that needs gradients: the length of that of the loss, by image."""

    passes: ClassVar[bool] = True
    measures: ClassVar[tuple[Measure, ...]] = (Measure("gradient", "Length of the gradient"),)

    def extra(self, model, batch, targets):
        images = batch.clean(batch.images).clone().requires_grad_()
        with torch.enable_grad():
            model.head.weight.requires_grad_(False)
            batch.loss(model(images), torch.tensor(targets)).backward()
        values = {"gradient": images.grad.flatten(1).norm(dim=1)[:, None]}
        return Readout([Rows(0, "attention", "token", values, batch.first, together=True)])


def test_passes_of_its_own_come_after_the_common_one_and_leave_the_model_as_it_was():
    model, images = vit().train(), pixels(3)
    model.head.bias.grad = torch.ones(5)
    reading = look(model, images, probes=[Curvature()], loss=lambda output, targets: output.logsumexp(-1).sum())
    given = images.clone().requires_grad_()
    model.eval()(given).logsumexp(-1).sum().backward()
    table = reading.table()
    np.testing.assert_allclose(table["gradient"], given.grad.flatten(1).norm(dim=1), rtol=1e-4)
    assert model.head.weight.requires_grad
    again = vit().train()
    again.head.bias.grad = torch.ones(5)
    look(again, images, probes=[Curvature()], loss=lambda output, targets: output.sum())
    assert torch.equal(again.head.bias.grad, torch.ones(5))
    assert all(p.grad is None for name, p in again.named_parameters() if name != "head.bias")
    assert again.training


# -- what modules expose -----------------------------------------------------------------------------------------------


class Showing(nn.Module):
    """The model, with values of its own beside the second attention."""

    def __init__(self, number):
        super().__init__()
        self.vit = vit()
        attn = self.vit.blocks[1].attn
        attn.heat = Exposed("heat", "number", "How hot a head is.")
        attn.kept = Exposed("kept", "index", "Tokens that were chosen.")
        attn.mask = Exposed("mask", "map", "A value for each token.")
        attn.links = Exposed("links", "pairs", "What is connected.")
        index = torch.tensor([[1, 4], [2, 24], [3, 5]])
        ramp = torch.arange(25.0)

        def show(module, args):
            module.heat(number)
            module.kept(index.repeat(len(args[0]) // 3 or 1, 1)[: len(args[0])])
            module.mask(ramp.expand(len(args[0]), -1))
            module.links(ramp.expand(25, 25))

        attn.register_forward_pre_hook(show)

    def forward(self, x):
        return self.vit(x)


@pytest.mark.parametrize(("number", "expected"), [(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), [2, 6]), (torch.tensor(4.0), [4])])
def test_exposed_values_have_rows_and_maps_at_their_layer(number, expected):
    reading = look(Showing(number), pixels(3), probes="exposed", noise=0.0)
    table, record = reading.table(), reading.measures["exposed_heat"]
    assert (record["label"], record["explains"]) == ("Heat", "How hot a head is.")
    assert table["exposed_heat"].tolist() == expected
    assert set(table["layer"]) == {1}
    assert table["head"].tolist() == ([0, 1] if len(expected) > 1 else [-1])
    assert set(reading.maps) == {(f"exposed_{name}", 1) for name in ("kept", "mask", "links")}
    ramp = np.arange(1.0, 25).reshape(4, 6)
    for name in ("mask", "links"):
        np.testing.assert_array_equal(reading.maps[f"exposed_{name}", 1], np.stack([ramp] * 3))
    assert [np.flatnonzero(image).tolist() for image in reading.maps["exposed_kept", 1]] == [[0, 3], [1, 23], [2, 4]]


# -- records -----------------------------------------------------------------------------------------------------------


def test_every_record_is_complete():
    probes = chosen(PROBES.files)
    for record in [*records(probes, "measures").values(), *records(probes, "components").values(), *SCORES]:
        assert record.label
        assert record.explains.endswith(".")
        assert record.better in ("higher", "lower", "neither")
        assert record.low is None or record.high is None or record.low < record.high
        assert json.dumps(asdict(record))


def test_the_how_to_lists_them_as_they_are():
    """The tables of read-a-report.md are the records."""
    text = PAGE.read_text()
    for record in [*records(chosen(["all", "mixing", "paths", "heads", "patch_perturbation"]), "measures").values(), *SCORES]:
        if not record.name.endswith("_paper"):
            bounds = f"{record.low} to {record.high}" if record.low is not None and record.high is not None else ""
            assert f"| {record.label} | {record.unit or bounds} | {record.explains} |" in text


def test_values_lie_within_the_bounds_that_are_declared(looked):
    table = looked[0].table()
    for name, record in looked[0].measures.items():
        values = table[name][np.isfinite(table[name])]
        low, high = (end if bound is None else bound for end, bound in ((-np.inf, record["low"]), (np.inf, record["high"])))
        assert ((values >= low - 1e-6) & (values <= high + 1e-6)).all(), name


def test_maps_of_explicit_attention_come_alone():
    model, images = vit(), pixels(2)
    maps = look(model, images, probes="attention_maps", noise=0.0).maps
    expected = explicit(model, images)[2].attention[:, :, 0, 1:].unflatten(-1, (4, 6))
    np.testing.assert_allclose(maps.heads("attention", 2), expected, rtol=6e-4, atol=1e-6)
