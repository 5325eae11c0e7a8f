"""PPMA against the logits of the authors' code, and both forms of its attention against loops."""

from __future__ import annotations

import math
import re

import pytest
import timm
import torch
from torch.nn import functional as F

from architectures.released import fill, pictures
from vitreous.architectures.ppma import PolylineAttention, checkpoint_filter_fn, rotation
from vitreous.base.errors import SettingError

SMALL = {"embed_dims": (8, 12, 16, 24), "depths": (1, 1, 1, 1), "num_heads": (2, 3, 2, 4), "projection": 20, "num_classes": 5}
SMALL_NETWORKS = {"ppma_t": SMALL}
GRID = 3, 4
RELEASED = {  # names of ours in the authors' code
    **{rf"^patch_embed\.{i}\.{j}\.": f"patch_embed.proj.{3 * i + j}." for i in range(4) for j in range(2)},
    **{rf"^stages\.{i + 1}\.downsample\.0\.": f"layers.{i}.downsample.reduction." for i in range(3)},
    **{rf"^stages\.{i + 1}\.downsample\.1\.": f"layers.{i}.downsample.norm." for i in range(3)},
    r"^stages\.": "layers.",
    r"\.norm1\.": ".retention_layer_norm.",
    r"\.norm2\.": ".final_layer_norm.",
    r"\.ls([12])\.gamma$": r".gamma_\1",
    r"\.attn\.rates\.weight$": ".retention.path_embed.dt_linear.weight",
    r"\.attn\.rates\.rate_bias$": ".retention.path_embed.dt_bias",
    r"\.attn\.rates\.log_factor$": ".retention.path_embed.A_log",
    r"\.attn\.([qkv])\.": r".retention.\1_proj.",
    r"\.attn\.proj\.": ".retention.out_proj.",
    r"\.attn\.": ".retention.",
    r"\.mlp\.": ".ffn.",
    r"^pool\.before\.0\.": "proj.",
    r"^pool\.before\.1\.": "norm.",
}


def filled(model):
    """Load the weights of the stored logits, through the authors' names and shapes."""
    released = {"layers.0.Relpos.angle": torch.zeros(16)}
    for name, value in model.state_dict().items():
        for pattern, replacement in RELEASED.items():
            name = re.sub(pattern, replacement, name)
        shape = (1, 1, 1, *value.shape) if "gamma" in name else value.shape
        released[name] = value if "num_batches" in name else fill(name, shape)
    model.load_state_dict(checkpoint_filter_fn(released, model))
    return model.eval()


@pytest.mark.parametrize(("name", "count"), [("ppma_t", 14_335_272), ("ppma_s", 26_969_472), ("ppma_b", 54_158_524)])
def test_has_the_published_parameters(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


@torch.no_grad()
def test_equals_the_released_network():
    """Logits of the authors' code with the same weights, whose rates are large."""
    model = filled(timm.create_model("ppma_t"))
    logits = model(pictures(1, 128))[0]
    torch.testing.assert_close(logits[:4], torch.tensor([-16.4014, -18.3694, -6.2476, 11.4657]), rtol=0, atol=5e-4)
    torch.testing.assert_close(torch.stack([logits.mean(), logits.std()]), torch.tensor([0.27162, 19.6278]), rtol=0, atol=5e-4)
    wide = model(pictures(1, 160)[:, :, :96])[0]  # 96 x 160 pixels
    torch.testing.assert_close(wide[:4], torch.tensor([-11.7634, -17.7221, -2.9775, 9.0759]), rtol=0, atol=5e-4)
    for stage in model.stages:
        for block in stage.blocks:
            block.attn.rates.log_factor.fill_(-1e4)
    assert (model(pictures(1, 128))[0] - logits).abs().max() > 0.1


@torch.no_grad()
def test_layer_scale_equals_the_released_network():
    """A small one of the kind of PPMA-B: the chunk form in three stages, LayerScale in two."""
    settings = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": (2, 2, 3, 4), "projection": 24}
    model = filled(timm.create_model("ppma_b", num_classes=7, **settings))
    logits = model(pictures(2, 64))[0]
    expected = torch.tensor([0.2027, 0.1364, -0.0138, 0.0414, 0.0298, -0.0895, 0.0770])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    model.stages[2].blocks[0].ls1.gamma.zero_()
    assert (model(pictures(2, 64))[0] - logits).abs().max() > 1e-5


def attention(whole):
    """An attention of 2 heads of 4 numbers whose rates are of order 1."""
    module = PolylineAttention(8, 2, whole).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
        module.rates.log_factor.mul_(0.1)
    return module


def parts(module, x):
    """Scores (H, h, w, h, w), values (h, w, H, K), and rates along rows and columns (H, h, w) of tokens x (N, D)."""
    q, k, v = ((x @ layer.weight.T + layer.bias).unflatten(1, (2, 4)) for layer in (module.q, module.k, module.v))
    turned = []
    for rows in (q, k):
        out = torch.zeros_like(rows)
        for n in range(len(x)):
            for pair in range(2):
                angle = n / 10000**pair  # linspace(0, 1, 2)
                a, b = rows[n, :, 2 * pair], rows[n, :, 2 * pair + 1]
                out[n, :, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                out[n, :, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
        turned.append(out)
    scores = torch.einsum("nhc,mhc->hnm", *turned) / 4**0.5
    logits = torch.einsum("nhc,rc->rhn", x.unflatten(1, (2, 4)), module.rates.weight)
    rates = -module.rates.log_factor.exp()[:, None] * F.softplus(logits + module.rates.rate_bias[:, None])
    return scores.unflatten(2, GRID).unflatten(1, GRID), v.unflatten(0, GRID), *rates.unflatten(2, GRID)


def line(rates, start, stop):
    """The sum of rates (L) between two places of a line, the smaller one left out."""
    return sum(rates[min(start, stop) + 1 : max(start, stop) + 1].tolist())


def finished(module, z, v):
    """The convolution of the values beside z (h, w, H, K), and the projection."""
    lepe = F.conv2d(v.flatten(2).permute(2, 0, 1)[None], module.lepe.conv.weight, module.lepe.conv.bias, padding=2, groups=8)
    return (z.flatten(2) + lepe[0].permute(1, 2, 0)).flatten(0, 1) @ module.proj.weight.T + module.proj.bias


def whole_by_hand(module, x, wrong=False):
    """wrong: along the query's column in place of the key's."""
    scores, v, alpha, beta = parts(module, x)
    paths = torch.zeros_like(scores)
    for h in range(2):
        for i in range(3):
            for j in range(4):
                for k in range(3):
                    for l in range(4):
                        paths[h, i, j, k, l] = line(alpha[h, i], j, l) + line(beta[h, :, j if wrong else l], i, k)
    flat, paths = scores.flatten(3).flatten(1, 2), paths.flatten(3).flatten(1, 2)
    weights = ((flat + paths).softmax(-1) + (flat + paths.mT).softmax(-1)) / 2
    z = torch.einsum("hnm,mhc->nhc", weights, v.flatten(0, 1)).unflatten(0, GRID)
    return finished(module, z, v)


def chunk_by_hand(module, x):
    scores, v, alpha, beta = parts(module, x)

    def in_rows(values):
        out = torch.zeros_like(values)
        for h in range(2):
            for i in range(3):
                for j in range(4):
                    weights = torch.stack([scores[h, i, j, i, l] + line(alpha[h, i], j, l) for l in range(4)]).softmax(0)
                    out[i, j, h] = weights @ values[i, :, h]
        return out

    def in_columns(values):
        out = torch.zeros_like(values)
        for h in range(2):
            for i in range(3):
                for j in range(4):
                    weights = torch.stack([scores[h, i, j, k, j] + line(beta[h, :, j], i, k) for k in range(3)]).softmax(0)
                    out[i, j, h] = weights @ values[:, j, h]
        return out

    return finished(module, (in_columns(in_rows(v)) + in_rows(in_columns(v))) / 2, v)


@torch.no_grad()
def test_whole_form_as_loops():
    module, x = attention(whole=True), torch.randn(2, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = module(x, GRID)
    for n in range(2):
        torch.testing.assert_close(out[n], whole_by_hand(module, x[n]), atol=1e-5, rtol=1e-5)
    wrong = whole_by_hand(module, x[0], wrong=True)
    assert (out[0] - wrong).abs().max() > 0.1


@torch.no_grad()
def test_chunk_form_as_loops():
    module, x = attention(whole=False), torch.randn(2, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = module(x, GRID)
    for n in range(2):
        torch.testing.assert_close(out[n], chunk_by_hand(module, x[n]), atol=1e-5, rtol=1e-5)
    module.whole = True
    assert (module(x, GRID) - out).abs().max() > 0.1  # the two forms are two functions


def test_positions_are_those_of_the_flattened_grid():
    """So another width of the image turns every place by another angle, as released."""
    sine, cosine = rotation((2, 3), 4, torch.zeros(1)).chunk(2, dim=-1)
    assert sine[4].tolist() == pytest.approx([math.sin(4)] * 2 + [math.sin(4e-4)] * 2)
    assert cosine[4].tolist() == pytest.approx([math.cos(4)] * 2 + [math.cos(4e-4)] * 2)
    assert torch.equal(rotation((3, 2), 4, sine), rotation((2, 3), 4, sine))


def test_small_ones_take_any_image():
    model = timm.create_model("ppma_t", in_chans=1, **SMALL).eval()
    for size in ((32, 32), (64, 40), (7, 90)):
        assert model(torch.randn(2, 1, *size)).shape == (2, 5)
    maps = model.forward_intermediates(torch.randn(1, 1, 64, 40), intermediates_only=True)
    assert [tuple(x.shape[1:]) for x in maps] == [(8, 16, 10), (12, 8, 5), (16, 4, 3), (24, 2, 2)]
    assert "stages.0.blocks.0.attn.rates.rate_bias" in model.no_weight_decay()


def test_bad_input():
    with pytest.raises(SettingError, match=r"Found 4 heads for a width of 12: 3 channels per head\. Expected an even number"):
        timm.create_model("ppma_t", **(SMALL | {"num_heads": (2, 4, 2, 4)}))
    with pytest.raises(SettingError, match="whole of 3"):
        timm.create_model("ppma_t", whole=(True, True, True))
