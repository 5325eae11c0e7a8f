"""Temperature of attention against loops, its limits, and the same number through linear layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from contract.low_rank import LowRank
from vitreous import Temperature, check, graft, new_parameters, ungraft
from vitreous.base.errors import GraftError, HostError, SettingError
from vitreous.lens.look import look
from vitreous.lens.tap import trace, watch
from vitreous.testing.hosts import LINEAR_HOSTS, build, images

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}


def vit(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(**SMALL | options).double().eval()
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.qkv.weight, std=1.0)  # attention of a new network is nearly uniform
    return model


def tokens(count=5, width=12):
    return torch.randn(1, count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_loops(attention, x, temperatures):
    """softmax(q k / (T sqrt(K))) V of one image, entry by entry; T of each head."""
    rows = (x[0] @ attention.qkv.weight.T + attention.qkv.bias).unflatten(1, (3, 3, 4)).tolist()  # n, part, head, K
    n, out = len(rows), torch.zeros(len(rows), 12, dtype=torch.float64)
    for h, t in enumerate(temperatures):
        for i in range(n):
            scores = [sum(a * b for a, b in zip(rows[i][0][h], rows[j][1][h], strict=True)) / (t * 2) for j in range(n)]
            weights = [math.exp(s - max(scores)) for s in scores]
            for j in range(n):
                for d in range(4):
                    out[i, 4 * h + d] += weights[j] / sum(weights) * rows[j][2][h][d]
    return attention.proj(out)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [0.5, 1.5, 7.0])
def test_attention_is_the_papers(value, fused):
    attention = graft(vit(), Temperature(temperature=value)).blocks[0].attn
    attention.fused_attn, x = fused, tokens()
    expected = by_loops(attention, x, [value] * 3)
    assert (attention(x)[0] - expected).abs().max() < 1e-12
    assert (by_loops(attention, x, [1.0] * 3) - expected).abs().max() > 1e-2


def test_learned_temperatures_are_those_of_the_heads():
    model = graft(vit(), Temperature(temperature=2.0, learned=True))
    attention, x = model.blocks[0].attn, tokens()
    assert (attention(x)[0] - by_loops(attention, x, [2.0] * 3)).abs().max() < 1e-7  # ln 2 in float32
    with torch.no_grad():
        attention.log_temperature.copy_(torch.tensor([0.5, 1.0, 4.0]).log())
    attention.double()
    assert (attention(x)[0] - by_loops(attention, x, attention.log_temperature.exp().tolist())).abs().max() < 1e-12
    assert sum(p.numel() for p in new_parameters(model).values()) == 2 * 3


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("host", ["plain", "qk_norm", "eva", "eva02", "grouped", *LINEAR_HOSTS])
def test_one_is_the_host_bit_for_bit(host, learned):
    """On every kind of host, through the scale or through the layers of queries; two is another model, and comes out again."""
    model, x = build(host), images()
    before = model(x)
    check(graft(model, Temperature(temperature=1, learned=learned)), x)
    assert torch.equal(model(x), before)
    ungraft(model)
    graft(model, Temperature(temperature=2, learned=learned))
    assert (model(x) - before).abs().max() > 1e-3
    assert ungraft(model).changed == ()
    assert torch.equal(model(x), before)


def test_large_temperatures_give_the_mean_of_the_values():
    attention, x = graft(vit(), Temperature(temperature=1e6)).blocks[0].attn, tokens()
    v = (x @ attention.qkv.weight[24:].T + attention.qkv.bias[24:]).mean(1, keepdim=True).expand(-1, 5, -1)
    torch.testing.assert_close(attention(x), attention.proj(v), atol=1e-4, rtol=0)
    sharp = graft(vit(), Temperature(temperature=1e-3)).blocks[0].attn
    assert (sharp(x) - attention(x)).abs().max() > 0.1
    x = 10 * x  # scores a hundred times as far apart
    q, k, v = sharp.project(x)
    best = v.gather(2, (q @ k.mT).argmax(-1)[..., None].expand(-1, -1, -1, 4))
    torch.testing.assert_close(sharp(x), sharp.merge(best, x), atol=1e-9, rtol=0)


def test_the_entropy_of_every_row_rises():
    x, before = tokens(), torch.zeros(())
    for value in (0.25, 0.5, 1.0, 1.5, 3.0, 300.0):
        attention = graft(vit(), Temperature(temperature=value)).blocks[0].attn
        q, k, _ = attention.project(x)
        entropy = torch.special.entr(attention.normalize(attention.scores(q, k))).sum(-1)
        assert (entropy > before).all()
        before = entropy
    assert (math.log(5) - before < 0.05).all()


def maps_of(model, x):
    """The maps of every attention of a pass."""
    maps = []
    watch(model, x, lambda call: maps.append(call.map().clone()), layouts=trace(model, x))
    return maps


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("host", LINEAR_HOSTS)
def test_layers_of_queries_give_the_same_attention(host, learned):
    """In the first attention, whose input is the host's: the map at T is the host's map to the power 1/T.

    But for what the host adds to its scores: relative positions of Swin are not divided.
    """
    model, x = build(host), images(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "relative_position_bias_table" in name:
                p.zero_()
    before = maps_of(model, x)[0]
    after = maps_of(graft(model, Temperature(temperature=3, learned=learned)), x)[0]
    power = before.double() ** (1 / 3)
    if host != "cait":  # mixes heads behind the softmax and before it
        torch.testing.assert_close(after.double(), power / power.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4)
    assert (after - before).abs().max() > 1e-5


def test_on_an_adapter_it_divides_the_merged_queries_once():
    """Also where the layer below makes its output from its effective weight, which is that before the division."""
    adapter, x = LowRank(linears=("qkv",), start=0.5), images()
    model, merged = graft(build("swin"), adapter, Temperature(temperature=4)), build("swin")
    with torch.no_grad():
        for path, module in model.named_modules():
            if hasattr(module, "effective_weight"):
                merged.get_submodule(path).weight.copy_(module.effective_weight())
    torch.testing.assert_close(model(x), graft(merged, Temperature(temperature=4))(x), atol=1e-5, rtol=1e-5)
    assert (model(x) - graft(build("swin"), Temperature(temperature=4))(x)).abs().max() > 1e-3
    rounded = graft(build("swin"), "shift_linear:linears=qkv,form=q,layers=0")
    layer, inputs = rounded.layers[0].blocks[0].attn.qkv, torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    out = layer(inputs).unflatten(-1, (3, -1))
    divided = graft(rounded, Temperature(temperature=4)).layers[0].blocks[0].attn.qkv(inputs).unflatten(-1, (3, -1))
    assert torch.equal(divided[:, 0], out[:, 0] / 4)
    assert torch.equal(divided[:, 1:], out[:, 1:])
    assert out[:, 0].any()


def test_relative_positions_decide_for_large_temperatures():
    """Swin adds them behind the division: at T = 1e6 its map is their softmax, not uniform."""
    model = build("swin")
    window = model.layers[0].blocks[0].attn
    with torch.no_grad():
        torch.nn.init.normal_(window.relative_position_bias_table, generator=torch.Generator().manual_seed(0))
    here = maps_of(graft(model, Temperature(temperature=1e6)), images(1))[0]
    expected = window._get_rel_pos_bias().softmax(-1)
    torch.testing.assert_close(here[0, 0], expected[0], atol=1e-4, rtol=0)
    assert expected.std() > 0.01


def test_look_verifies_maps_and_reads_learned_temperatures():
    model = graft(vit().float(), Temperature(temperature=2, learned=True))
    reading = look(model, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), noise=0)
    assert [layer["error"] < 1e-5 for layer in reading.layers] == [True, True]
    table = reading.table()
    named = [name for name in table if name not in ("layer", "head", "image", "source", "kind")]
    assert any(((table[name] - 2.0) < 1e-6).any() for name in named)


def test_real_weights_bear_little_smoothing(shared_data):
    """The real ViT-Tiny, untrained: most answers to 16 photographs stay at T = 1.2, hardly one at 3."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:16]
    photographs, same = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, []
    with torch.no_grad():
        plain = model(photographs).argmax(1)
        for value in (1.2, 3):
            same.append((graft(model, Temperature(temperature=value))(photographs).argmax(1) == plain).sum().item())
            ungraft(model)
    assert same[0] > 12
    assert same[1] < 4


def test_only_the_layers_that_are_named():
    model, plain = graft(vit(), Temperature(temperature=2, layers=(1,))), vit()
    assert type(model.blocks[0].attn) is type(plain.blocks[0].attn)
    assert model.blocks[1].attn.scale == plain.blocks[1].attn.scale / 2


def test_bad_input():
    for value in (0, -1, 1e-9, math.inf, 1e9):
        with pytest.raises(SettingError, match=r"Found temperature=.*Expected 0\.001 to 1e\+06; 1 is the host.*Give such"):
            Temperature(temperature=value)
    with pytest.raises(SettingError, match="Expected a number"):
        Temperature(temperature=math.nan)
    with pytest.raises(GraftError, match=r"already holds TemperedAttention.*Expected plain attention"):
        graft(vit(), "temperature", "svda")
    with pytest.raises(GraftError, match=r"already holds SpectralAttention.*temperature would undo it"):
        graft(vit(), "svda", "temperature")
    for first, second in (("svda", "temperature"), ("temperature", "svda")):
        with pytest.raises(GraftError, match=r"qkv already holds .*, which changes queries or keys itself"):
            graft(build("swin"), first, second)
    with pytest.raises(HostError, match="have unit length already"):
        graft(
            timm.create_model("swinv2_tiny_window8_256", img_size=64, embed_dim=16, depths=(1, 1), num_heads=(1, 2)),
            "temperature",
        )
