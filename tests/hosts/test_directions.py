"""SVDA at the linear slot: the formula, the graft on a plain ViT, and hosts of which only the linear layers are known."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import ClassVar

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.volo import VOLO
from timm.models.xcit import Xcit
from torch import nn
from torch.nn import functional as F

import vitreous.architectures
from contract.low_rank import LowRank
from vitreous import check, graft, grafts, host_of, new_parameters, slots, ungraft
from vitreous.base.errors import GraftError, HostError, NotReached, SettingError
from vitreous.commands.cli import main
from vitreous.grafting import penalties
from vitreous.hosts.directions import Directions, attentions_in
from vitreous.hosts.host import embed
from vitreous.lens.look import look
from vitreous.lens.tap import trace, watch
from vitreous.models import model_folder
from vitreous.testing import contract_checks
from vitreous.testing.hosts import LINEAR_HOSTS, build, images

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
VOLO_SETTINGS = {
    "layers": (1, 1), "img_size": 32, "embed_dims": (16, 32), "stem_hidden_dim": 8, "num_heads": (2, 2), "num_classes": 5,
    "outlook_attention": (True, False), "downsamples": (True, False),
}  # fmt: skip
THREE_PARTS = re.compile(r"^\S.+?\. Expected .+?\. \S.+\.$", re.DOTALL)

# -- laws ------------------------------------------------------------------------------------------------------------

ITEMS = ("svda", "svda:scale=learned,start=gentle,layers=0+2")
LAWS = (  # that ask nothing of a stream of tokens, of masks or of a walk over blocks
    "changes_are_pure", "grafting_is_repeatable", "conversion_reaches_everything", "copies_are_whole", "moving_average_follows",
    "unusual_images_stay_finite", "ends_of_settings_stay_finite", "compiles", "exports", "exact_at_init",
    "batch_mates_do_not_matter", "calls_agree", "double_precision_agrees", "autocast", "new_parameters_learn",
    "plain_checkpoint_loads", "removal_is_exact", "training_new_parameters_keeps_the_host", "training_is_kept",
    "saved_weights_load", "gradient_checkpointing",
)  # fmt: skip
UNCHECKPOINTED = ("twins", "crossvit")  # timm has no gradient checkpointing there
GRAPHS = {"compiles": "crossvit", "exports": "swin"}  # 10 to 20 s each: in all hosts by --full


def holds_for(check, full):
    """Whether a law is held against a host."""
    law = check.law.__name__
    if law == "gradient_checkpointing":
        return check.host not in UNCHECKPOINTED
    return law in LAWS and (full or check.host == GRAPHS.get(law, check.host))


def pytest_generate_tests(metafunc):
    if "law_of_linears" in metafunc.fixturenames:
        first, second = ITEMS
        checks = [c for host in LINEAR_HOSTS for c in contract_checks(first, hosts=[host])]
        checks += contract_checks(second, hosts=["pvt"])
        full = metafunc.config.getoption("full")
        metafunc.parametrize("law_of_linears", [c for c in checks if holds_for(c, full)], ids=lambda c: c.name)


def test_contract(law_of_linears):
    law_of_linears.run()


@pytest.mark.parametrize("name", LINEAR_HOSTS)
def test_low_rank_adapters_stand_there_too(name):
    model, x = build(name), images()
    before = model(x)
    graft(model, LowRank(linears=("qkv", "proj"), start=0.5))
    check(model, x)
    assert (model(x) - before).abs().max() > 1e-3
    ungraft(model)
    assert torch.equal(model(x), before)
    assert torch.equal(graft(model, LowRank(linears=("qkv", "proj")))(x), before)


@pytest.mark.parametrize("name", LINEAR_HOSTS)
def test_svda_on_an_adapter_is_svda_on_the_merged_weight(name):
    adapter, x = LowRank(linears=("qkv",), start=0.5), images()
    model = check(graft(build(name), adapter, "svda"), x)
    merged = build(name)
    with torch.no_grad():
        for path, module in model.named_modules():
            if hasattr(module, "effective_weight"):
                merged.get_submodule(path).weight.copy_(module.effective_weight())
    graft(merged, "svda")
    torch.testing.assert_close(model(x), merged(x), atol=1e-4, rtol=1e-4)
    assert (model(x) - graft(build(name), "svda")(x)).abs().max() > 1e-3
    assert torch.allclose(penalties(model)["svda_orthogonality"], penalties(merged)["svda_orthogonality"])
    ungraft(model, all=True)
    assert torch.equal(model(x), build(name)(x))
    with pytest.raises(GraftError, match=r"already holds SpectralDirections.*Expected a plain"):
        graft(model, "svda", adapter)


# -- the formula -----------------------------------------------------------------------------------------------------


class Weighted(Directions):
    def query_weight(self):
        return self.sigma


@pytest.mark.parametrize("parts", ["qkv", "q", "k", "kv", "kqv"])
def test_a_layer_equals_loops(parts):
    torch.manual_seed(0)
    owner = nn.Module()
    owner.num_heads = 2
    layer = Weighted.holding(nn.Linear(5, len(parts) * 6).double(), parts, owner)
    layer.sigma = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = F.linear(x, layer.weight, layer.bias).detach()
    for b in range(2):
        for n in range(4):
            for p, part in enumerate(parts):
                for h in range(2):
                    row = expected[b, n, 6 * p + 3 * h : 6 * p + 3 * h + 3]
                    length = 1.0 if part == "v" else math.sqrt(sum(r.item() ** 2 for r in row))
                    for d in range(3):
                        row[d] = row[d] / length * (layer.sigma[h, d] if part == "q" else 1.0)
    assert (layer(x) - expected).abs().max() < 1e-14


# -- the lens --------------------------------------------------------------------------------------------------------


WIDE = {"embed_dims": (16, 32), "depths": (1, 2), "num_heads": (1, 2), "num_classes": 5}
MIXED = {"embed_dims": (16, 32, 32, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "num_classes": 5}
PPMA = MIXED | {"projection": 20}
SRET = {"embed_dims": (16, 32, 64), "depths": (1, 1, 1), "num_heads": (1, 2, 2), "img_size": 64, "num_classes": 5}
FURTHER = {  # name: (settings, side of the image, layers with softmax attention that have their queries from linear layers)
    "cvt_13": (WIDE, 32, "0-2"),
    "svt_h_s": (MIXED, 64, "1-5"),
    "spectformer_h_s": (MIXED, 64, "2-5"),
    "sret_t": (SRET, 64, "0-2"),
    "ppma_t": (PPMA, 64, "0-4"),
    "t2t_vit_7": ({"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}, 32, "0-1"),
    "naflexvit_base_patch16_gap": ({"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}, 64, "0-1"),
    "xcit_nano_12_p16_224": ({"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 32}, 32, "2-3"),
}


@pytest.mark.parametrize("name", [*(name for name in LINEAR_HOSTS if name != "crossvit"), *FURTHER])
def test_scores_are_those_of_the_settings_whatever_the_host_multiplies_by(name):
    """Queries and keys as they are multiplied: unit rows, sigma, and sqrt(K) in all.

    CrossViT multiplies behind the product. Rotary positions of PPMA stand behind sigma, so lengths tell only of an even one.
    """
    settings, side, layers = FURTHER.get(name, ({}, 32, ""))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name) if name in LINEAR_HOSTS else timm.create_model(name, **settings).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))  # attention of new networks is too even to matter
    x = images(2, side)
    before = model(x)
    check(graft(model, f"svda:scale=sqrt{layers and ',layers=' + layers}"), x)
    assert (model(x) - before).abs().max() > 1e-4
    if name == "ppma_t":
        for module in model.modules():
            if hasattr(module, "sigma"):
                module.sigma.data.fill_(1.0)
    lengths, seen = [], set()

    def see(call):
        sigma = [module.sigma for module in model.get_submodule(call.name).modules() if hasattr(module, "sigma")]
        if sigma:
            assert call.error <= 4e-7
            seen.add(call.name)  # SReT applies one more than once
            lengths.append((call.q / sigma[0][:, None]).norm(dim=-1) * (call.scale or 1.0) / sigma[0].shape[1] ** 0.5)
            lengths.append(call.k.norm(dim=-1))

    watch(model, x, see, layouts=trace(model, x))
    assert len(seen) == sum(hasattr(module, "sigma") for module in model.modules())
    for length in lengths:
        torch.testing.assert_close(length, torch.ones_like(length), atol=1e-6, rtol=0)
    assert ungraft(model).changed == ()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", LINEAR_HOSTS)
def test_look_shows_the_attention_that_runs_and_the_spectrum_in_it(name):
    model, x = graft(build(name), "svda:scale=sqrt"), images(2)
    calls = []
    seen = watch(model, x, lambda call: calls.append((call.name, call.error)), layouts=trace(model, x))
    paths = [host_of(model).attention(i) for i in range(slots.depth(model))]
    assert [path for path, _ in calls] == paths  # blocks are counted in the order in which they run
    assert not seen.refused
    assert max(error for _, error in calls) <= 4e-7
    reading = look(model, x, noise=0.1)
    table = reading.table()
    spectra = reading.spectra
    for layer, path in enumerate(paths):
        attention = model.get_submodule(path)
        sigma = next(module.sigma for module in attention.children() if hasattr(module, "sigma"))
        assert torch.equal(torch.as_tensor(spectra["learned", layer]), sigma.detach().float())
        here = table["layer"] == layer
        assert {"learned", "weight", "score", "attention"} <= set(table["source"][here])
        rank = table["effective_rank"][here & (table["source"] == "learned")]
        assert ((rank >= 1) & (rank <= sigma.shape[1])).all()
    notes = " ".join(reading.facts["notes"])
    assert "normalised, pooled or weighted between weights and product" in notes
    assert "could not be confirmed" not in notes
    alignment = table["angular_alignment"]
    assert (abs(alignment[~(alignment != alignment)]) <= 1 + 1e-6).all()


# -- which layers, and refusals --------------------------------------------------------------------------------------


def test_layers_count_attentions_in_running_order():
    expected = {
        "swin": ["layers.0.blocks.0.attn", "layers.0.blocks.1.attn", "layers.1.blocks.0.attn"],
        "pvt": ["stages.0.blocks.0.attn", "stages.0.blocks.1.attn", "stages.1.blocks.0.attn", "stages.1.blocks.1.attn"],
        "twins": ["blocks.0.0.attn", "blocks.0.1.attn", "blocks.1.0.attn", "blocks.1.1.attn"],
        "cait": ["blocks.0.attn", "blocks.1.attn", "blocks_token_only.0.attn"],
        "crossvit": [
            "blocks.0.blocks.0.0.attn",
            "blocks.0.blocks.1.0.attn",
            "blocks.0.fusion.0.attn",
            "blocks.0.fusion.1.attn",
        ],
    }
    for name, paths in expected.items():
        model = build(name)
        assert [path for _, path in attentions_in(model)] == paths
        graft(model, "svda:layers=1+2")
        assert {change.path.rpartition(".")[0] for change in grafts(model)[0].changes} == set(paths[1:3])
        with pytest.raises(SettingError, match=rf"layers=9.*{len(paths)} blocks"):
            graft(build(name), "svda:layers=9")
    stages = {"swin": 2, "pvt": 1, "cait": 1, "crossvit": 3}  # runs of blocks of one width
    for name, count in stages.items():
        assert len(host_of(build(name)).stages) == count
    assert [host_of(build("swin")).width(i) for i in range(3)] == [16, 16, 32]
    assert [host_of(build("pvt")).heads(i) for i in range(4)] == [1, 1, 2, 2]


def refused(model, text):
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(HostError) as caught:
        graft(model, text)
    assert THREE_PARTS.match(str(caught.value)), str(caught.value)
    assert {name: id(module) for name, module in model.named_modules()} == before
    return str(caught.value)


def test_outlook_attention_is_refused_and_the_layers_that_fit_are_named():
    message = refused(VOLO(**VOLO_SETTINGS), "svda")
    assert "network.0.0.attn is a timm.models.volo.OutlookAttention" in message
    assert "Choose layers=1-3, or some of these for svda" in message
    model, x = VOLO(**VOLO_SETTINGS).eval(), images()
    before = model(x)
    check(graft(model, "svda:layers=1+2+3"), x)
    assert (model(x) - before).abs().max() > 1e-6
    assert ungraft(model).changed == ()
    assert torch.equal(model(x), before)


REFUSED = {
    "unit length already": partial(SwinTransformerV2, 32, window_size=4, embed_dim=16, depths=(1,), num_heads=(2,)),
    "never calls the layer": partial(Beit, **SMALL),
    "channels attend to each other": partial(Xcit, cls_attn_layers=1, **SMALL | {"patch_size": 16}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_attention_that_has_no_such_layers_is_refused_by_name(reason):
    model = REFUSED[reason]()
    message = refused(model, "svda")
    assert reason in message
    assert "attn is a timm.models." in message


@pytest.mark.parametrize("text", ["spc", "gaussian_mask", "adaptformer", "token_merging", "ggem", "channelvit"])
def test_mechanisms_of_other_slots_are_refused(text):
    for name in LINEAR_HOSTS:
        message = refused(build(name), text)
        assert type(build(name)).__name__ in message
        assert "linear layers" in message
    with pytest.raises(HostError, match="linear layers"):
        embed(build("swin"), images())
    with pytest.raises(HostError, match="linear layers"):
        slots.prefix(build("swin"))


def test_a_fit_to_the_hosts_scores_and_a_second_graft_are_refused():
    assert "start=gentle" in refused(build("swin"), "svda:start=import")
    with pytest.raises(GraftError, match=r"qkv already holds SpectralDirections.*Expected plain attention"):
        graft(build("swin"), "svda:layers=0", "svda")


def test_networks_without_a_softmax_of_queries_and_keys_are_refused_by_name():
    spikes = timm.create_model("spikformer_8_384", embed_dim=32, depth=1, num_heads=2)
    assert "Spikformer" in refused(spikes, "svda")
    with pytest.raises(GraftError, match=r"blocks\.0\.attn already holds \w+, a mixer in the place of attention"):
        graft(timm.create_model("spectformer_tiny", img_size=32, patch_size=8, embed_dim=32, depth=5, num_heads=2), "svda")


def test_norms_behind_the_layer_are_refused():
    model = build("crossvit")
    model.blocks[0].blocks[0][0].attn.q_norm = nn.LayerNorm(8)
    assert "norms queries and keys behind" in refused(model, "svda:layers=0")


# -- networks of one's own -------------------------------------------------------------------------------------------


class Own(nn.Module):
    """An attention as one writes it: keys and values first, scores divided by the square root of the model's width."""

    projections: ClassVar[dict[str, str]] = {"kqv": "kqv"}

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.num_heads, self.scale = heads, width**-0.5
        self.kqv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        k, q, v = self.product(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (self.scale * q @ k.mT).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def product(self, x):
        return self.kqv(x)


class Around(Own):
    def product(self, x):
        return F.linear(x, self.kqv.weight, self.kqv.bias)


class Turned(nn.Module):
    def forward(self, x):
        return x.mT


def own_network(attention):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), Turned(), attention()).eval()


def test_an_attention_of_ones_own_takes_it_by_its_projections():
    model = graft(own_network(Own), "svda:scale=one")
    attention = model[3]
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    k, q, v = F.linear(x, attention.kqv.weight, attention.kqv.bias).view(1, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    scores = (F.normalize(q, dim=-1) * attention.kqv.sigma[:, None]) @ F.normalize(k, dim=-1).mT
    expected = attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected, atol=1e-6, rtol=1e-5)
    check(model, images())
    assert len(new_parameters(model)) == 1


def test_a_layer_that_the_host_reads_around_is_reported():
    model = graft(own_network(Around), "svda")
    with pytest.raises(NotReached, match=r"3\.kqv was not called"):
        check(model, images())


def test_a_class_that_does_not_fit_its_projections_is_refused():
    model = own_network(Own)
    model[3].num_heads = 3
    assert "layer of 48 numbers for the parts 'kqv' and num_heads=3" in refused(model, "svda")
    model[3].num_heads = 2
    model[3].scale = torch.ones(())
    assert "Own.scale of type Tensor" in refused(model, "svda")
    model[3].scale = 1.0
    model[3].kqv = nn.Bilinear(4, 4, 48)
    assert "Linear itself" in refused(model, "svda")
    with pytest.raises(TypeError, match="define query_weight"):
        Directions.holding(nn.Linear(4, 4), "q", Own()).query_weight()


def test_it_is_saved_and_loaded(tmp_path):
    small = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 3}
    model = graft(timm.create_model("swin_tiny_patch4_window7_224", **small).eval(), "svda:scale=learned")
    with torch.no_grad():
        model.layers[0].blocks[0].attn.qkv.sigma.mul_(2)
    model_folder.save(model, tmp_path)
    again, x = model_folder.load(tmp_path), images(2)
    assert grafts(again)[0].mechanism == grafts(model)[0].mechanism
    assert torch.equal(again(x), model(x))


SHORT = "cutouts:train=40,test=24,size=32"


def test_training_and_export(tmp_path, capsys):
    words = ["img_size=32", "window_size=4", "embed_dim=16", "depths=(1,1)", "num_heads=(2,2)"]
    model = ["--model", "swin_tiny_patch4_window7_224", "--model-kwargs", *words]
    run = ["train", SHORT, *model, "--graft", "svda:scale=sqrt", "--epochs", "1", "--batch-size", "16", "--device", "cpu"]
    assert main([*run, "--out", str(tmp_path / "run")]) == 0
    trained = vitreous.load(tmp_path / "run")
    assert [str(record.mechanism) for record in grafts(trained)] == ["svda:scale=sqrt"]
    assert main(["export", str(tmp_path / "run"), "--to", "torch-export", "--out", str(tmp_path / "swin.pt2")]) == 0
    program, x = torch.export.load(tmp_path / "swin.pt2").module(), images(2)
    torch.testing.assert_close(program(x), trained(x), atol=1e-5, rtol=1e-5)
