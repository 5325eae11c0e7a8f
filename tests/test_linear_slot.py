"""The linear slot, by LoRA of a test: on every family of hosts it is grafted, read, saved and taken out as the slot says."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from timm.models.eva import EvaAttention
from torch import nn

from contract.hosts import HOSTS, build, folder, images, refused, stand_ins
from contract.low_rank import LowRank, LowRankLinear, merged
from contract.signatures import known_signature
from vitreous import calibrate, check, graft, grafts, new_parameters, parse, slots, ungraft
from vitreous.base.errors import GraftError, HostError
from vitreous.hosts.attention import Attention, query_key_weights, reads_around
from vitreous.lens.direction import Direction, identity, sample_of
from vitreous.lens.formulas import spectra
from vitreous.lens.layer_features import layer_features
from vitreous.lens.look import look
from vitreous.models import model_folder
from vitreous.testing import contract_checks

# fused qkv, q k v apart, rotary, EVA's own bias beside a fused qkv, grouped keys, several of a name in one block, a class of
# attention that we do not know, SwiGLU
FAMILIES = ("plain", "dinov2", "eva", "eva02", "dinov3", "rope_mixed", "grouped", "parallel_things", "diff_attention")
KNOWN = FAMILIES[:7]  # whose queries and keys can be named
LAWS = ("exact_at_init", "removal_is_exact", "training_new_parameters_keeps_the_host", "saved_weights_load")
OPEN = LowRank(start=0.5)
# Mixers take layers away that it names, and a linear layer has room for one: `contract/test_pairs.py`.
BESIDE = [text for text in stand_ins() if folder(text) not in ("mixer", "linear")]
STACKS = [(text, host) for text, host in itertools.product(BESIDE, ("dinov2", "eva")) if host not in refused(text)]


def pytest_generate_tests(metafunc):
    if "law_of_lora" in metafunc.fixturenames:
        every = list(HOSTS.keys() - {"parallel_scaling"}) if metafunc.config.getoption("full") else FAMILIES
        checks = contract_checks(LowRank(), hosts=every)
        if every is FAMILIES:
            checks = [c for c in checks if c.host in ("eva", None) or c.law.__name__ in LAWS]
        metafunc.parametrize("law_of_lora", checks, ids=lambda c: c.name)


def test_contract(law_of_lora):
    law_of_lora.run()


def closed(model):
    """In place: all adapters set to zero."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                module.b.zero_()
    return model


@pytest.mark.parametrize("host", FAMILIES)
def test_every_adapter_is_part_of_what_the_model_computes(host):
    """The output is that of merged weights; without any one of the adapters it is another."""
    model = check(graft(build(host), OPEN), images())
    x, logits = images(), model(images())
    torch.testing.assert_close(merged(graft(build(host), OPEN))(x), logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(closed(graft(build(host), OPEN))(x), build(host)(x))
    adapters = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert len(adapters) == len(new_parameters(model)) / 2 >= 4 * 4
    for adapter in adapters:
        start = adapter.b.detach().clone()
        adapter.b.data.zero_()
        assert (model(x) - logits).abs().max() > 1e-6
        adapter.b.data.copy_(start)
    assert torch.equal(model(x), logits)


def test_an_attention_that_reads_around_its_layer_is_adopted_for_qkv_alone():
    for linears, kind in ((("qkv",), Attention), (("proj", "fc1"), EvaAttention)):
        model = graft(build("eva"), LowRank(linears=linears, layers=(1,)))
        assert type(model.blocks[1].attn) is kind
        assert type(model.blocks[0].attn) is EvaAttention
        original = model.blocks[0].attn
        ungraft(model)
        assert type(model.blocks[1].attn) is EvaAttention
        assert reads_around(original, "qkv")


def three(host):
    """The host with adapters; with their weights merged; with all adapters set to zero."""
    return [change(graft(build(host), OPEN)) for change in (lambda model: model, merged, closed)]


def moved(a, b):
    return (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("host", KNOWN)
def test_what_is_read_of_the_weights_has_the_adapter(host):
    """Spectra, penalties' weights, and the features and the sample of a direction: of merged weights, not of the host's."""
    models = three(host)
    attentions = [model.blocks[1].attn for model in models]
    heads, width = attentions[0].num_heads, attentions[0].head_dim
    readings = {
        "spectra": [spectra.weight(attention, heads, width).values for attention in attentions],
        "queries": [query_key_weights(attention)[0] for attention in attentions],
        "keys": [query_key_weights(attention)[2] for attention in attentions],
        "features": [layer_features(model, images())[1].keys for model in models],
    }
    for name, (ours, theirs, without) in readings.items():
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert moved(ours, without), name
    direction = Direction((), (), (), 8, (4, 4), model=identity(models[0]), sample=sample_of(models[0]))
    direction.check(models[0])
    with pytest.raises(HostError, match="whose weights are others"):
        direction.check(models[2])


@pytest.mark.parametrize("host", ["plain", "eva"])
def test_a_reading_is_that_of_the_merged_model(host):
    readings = [look(model, images(), noise=0) for model in three(host)]
    ours, theirs, without = (torch.from_numpy(reading.table()["effective_rank"].copy()) for reading in readings)
    of_weights = torch.from_numpy(readings[0].table()["source"] == "weight")
    assert of_weights.sum() == 4 * 2
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3, equal_nan=True)
    assert moved(ours[of_weights], without[of_weights])
    # what stands between weights and scores is read off the layers' outputs, in which EVA's own bias is missing
    assert readings[0].facts["notes"] == look(build(host), images(), noise=0).facts["notes"]


@pytest.mark.parametrize("order", [(OPEN, "svda:start=import"), ("svda:start=import", OPEN)])
def test_svda_starts_from_the_attention_with_the_adapter(order):
    sigma = []
    for change in (lambda m: m, merged, closed):
        model = change(graft(build("plain"), *order))
        calibrate(model, images())
        sigma.append(model.blocks[1].attn.sigma.detach())
    torch.testing.assert_close(sigma[0], sigma[1], atol=1e-3, rtol=1e-3)
    assert moved(sigma[0], sigma[2])


@pytest.mark.parametrize(("text", "host"), STACKS)
def test_it_stacks_with_every_kind_of_mechanism(text, host):
    """In either order; an adapter set to zero moves the output; out again, all of it is the host bit for bit.

    What changes the grid of patches comes first, and refuses the other order.
    """
    outputs, orders = [], [(text, OPEN), (OPEN, text)]
    if "patch_embed.grid_size" in known_signature(parse(text)).places:
        with pytest.raises(GraftError, match=r"may be made for its grid of patches.*graft \w+ first"):
            graft(build(host), *orders.pop())
    for order in orders:
        model = check(graft(build(host), *order), images())
        outputs.append(model(images()))
        assert moved(closed(model)(images()), outputs[-1])
        assert len(ungraft(model, all=True).mechanisms) == 2
        assert torch.equal(model(images()), build(host)(images()))
    torch.testing.assert_close(outputs[0], outputs[-1], atol=1e-5, rtol=1e-5)


def test_it_is_saved_and_loaded(tmp_path):
    small = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    model = graft(
        timm.create_model("eva02_tiny_patch14_224", **small).eval(), LowRank(linears=("qkv", "fc1", "fc2"), start=0.5)
    )
    model_folder.save(model, tmp_path)
    again, x = model_folder.load(tmp_path, foreign=True), images(2, 16)
    assert grafts(again)[0].mechanism == grafts(model)[0].mechanism
    assert torch.equal(again(x), model(x))
    assert not torch.equal(closed(again)(x), model(x))


def test_a_second_adapter_on_a_layer_is_refused():
    model = graft(build("eva"), LowRank(linears=("qkv",)))
    before = model(images())
    with pytest.raises(GraftError, match=r"blocks\.0\.attn\.qkv already holds LowRankLinear.*Expected a plain.*Take"):
        graft(model, LowRank(linears=("proj", "qkv")))
    assert torch.equal(model(images()), before)
    graft(model, LowRank(linears=("proj",)))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_no_such_layer_is_refused():
    for host, name, there in (("plain", "q_proj", "qkv, proj, fc1, fc2"), ("parallel_scaling", "qkv", "in_proj")):
        with pytest.raises(HostError, match=rf"blocks\.0 has no linear layer '{name}'\. Expected one of {there}.* Give "):
            graft(build(host), LowRank(linears=(name,)))
    model = build("plain")
    model.blocks[2].mlp.fc1 = Scaled(32, 128)
    with pytest.raises(HostError, match=r"blocks\.2\.mlp\.fc1 is a .*\.Scaled\. Expected torch.*Linear itself"):
        graft(model, LowRank())
    assert "grafts" not in model.__dict__


def test_names_mean_every_layer_of_that_name_and_the_separate_ones_of_a_fused():
    paths = {
        "plain": ["attn.qkv", "mlp.fc1"],
        "eva02": ["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc1_g", "mlp.fc1_x"],
        "grouped": ["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc1"],
        "parallel_things": ["attns.0.attn.qkv", "attns.1.attn.qkv", "ffns.0.mlp.fc1", "ffns.1.mlp.fc1"],
        "eva": ["attn", "attn.qkv", "mlp.fc1"],
    }
    for host, expected in paths.items():
        changes = slots.adapt_linears(build(host), 2, ("qkv", "fc1"), lambda linear: linear, "mine")
        assert list(changes) == [f"blocks.2.{path}" for path in expected]
