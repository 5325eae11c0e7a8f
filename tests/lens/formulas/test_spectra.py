"""Spectra of heads against torch and scipy on explicit matrices: learned, of the weights, of the scores."""

from __future__ import annotations

import pytest
import scipy.linalg
import timm
import torch
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitreous.layers.spectral import singular_values
from vitreous.lens.formulas import spectra
from vitreous.lens.formulas.spectra import Energies

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module, seed=0):
    """A module with weights of size one, biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return module.eval()


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=tolerance, atol=tolerance)


def form(w_q, b_q, w_k, b_k, heads):
    """[W_q b_q]^T [W_k b_k] of each head as an explicit (H, D + 1, D + 1) matrix."""
    parts = [torch.cat([w, b[:, None]], dim=1).detach().double().unflatten(0, (heads, -1)) for w, b in ((w_q, b_q), (w_k, b_k))]
    return parts[0].mT @ parts[1]


def of_pass(module, x, heads, change=lambda q, k: (q, k)):
    """Energies of a module with a fused layer `qkv`, as one pass over x (B, N, D) shows them."""
    out = module.qkv(x).detach()
    q, k, _ = out.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = change(q, k)
    return Energies(*(t.square().sum(dim=(0, 2)) for t in (q, k)), {"qkv": out.square().sum(dim=(0, 1))})


# -- weights -----------------------------------------------------------------------------------------------------------


def test_the_weights_of_a_real_network(shared_data):
    """The score of two tokens is x W_Q^T W_K y: all of its singular values, with biases, for every head of two blocks."""
    file = shared_data / "weights" / "vit_tiny_patch16_224" / "model.safetensors"
    model = timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    for i in (0, 11):
        attention = model.blocks[i].attn
        w, b = (t.detach().double() for t in (attention.qkv.weight, attention.qkv.bias))
        dense = form(w[:192], b[:192], w[192:384], b[192:384], 3)
        found = spectra.weight(attention, 3, 64)
        assert found.values.shape == (3, 64)
        close(found.values, torch.linalg.svdvals(dense)[:, :64], 1e-9)
        close(found.values[1], scipy.linalg.svdvals(dense[1].numpy())[:64], 1e-9)
        for name, value in found.indicators().items():
            assert value.shape == (3,), name
            assert value.isfinite().all(), name


def conv(rows):
    return nn.Conv2d(24, rows, 1)


class Separate(nn.Module):
    """Queries and keys as two layers under any names."""

    def __init__(self, names, layer=lambda rows: nn.Linear(24, rows), keys=24):
        super().__init__()
        self.add_module(names[0], layer(24))
        self.add_module(names[1], layer(keys))


@pytest.mark.parametrize("names", spectra.PAIRS)
@pytest.mark.parametrize("layer", [lambda rows: nn.Linear(24, rows), conv], ids=["linear", "1x1"])
def test_separate_layers_are_found_by_name(names, layer):
    module = filled(Separate(names, layer))
    q, k = (getattr(module, name) for name in names)
    dense = form(q.weight.flatten(1), q.bias, k.weight.flatten(1), k.bias, 3)
    close(spectra.weight(module, 3, 8).values, singular_values(dense)[:, :8])


def test_heads_that_share_keys():
    module = filled(Separate(("q_proj", "k_proj"), keys=8))
    dense = form(module.q_proj.weight, module.q_proj.bias, module.k_proj.weight.repeat(3, 1), module.k_proj.bias.repeat(3), 3)
    close(spectra.weight(module, 3, 8).values, singular_values(dense)[:, :8])


@pytest.mark.parametrize("kdim", [24, 10])
def test_the_weights_of_pytorchs_own_attention(kdim):
    module = filled(nn.MultiheadAttention(24, 3, kdim=kdim, vdim=kdim))
    b = module.in_proj_bias
    w = module.in_proj_weight.chunk(3) if kdim == 24 else (module.q_proj_weight, module.k_proj_weight)
    dense = form(w[0], b[:24], w[1], b[24:48], 3)
    found = spectra.weight(module, 3, 8)
    close(found.values, singular_values(dense)[:, :8])
    assert found.note == ""


@pytest.mark.parametrize("cls", [EvaAttention, BeitAttention])
def test_biases_beside_the_fused_layer(cls):
    module = filled(cls(24, num_heads=3, qkv_bias=True, **({"norm_layer": nn.LayerNorm} if cls is EvaAttention else {})))
    w = module.qkv.weight
    dense = form(w[:24], module.q_bias, w[24:48], module.k_bias, 3)
    found = spectra.weight(module, 3, 8)
    close(found.values, singular_values(dense)[:, :8])
    assert "not seen" in found.note


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(24, 72)


def test_the_order_of_an_unknown_fused_layer_is_checked_in_the_pass():
    module, x = filled(Fused()), random(2, 9, 24).float()
    assert spectra.weight(module, 3, 8).values is None  # nothing seen, nothing claimed
    found = spectra.weight(module, 3, 8, of_pass(module, x, 3))
    w, b = module.qkv.weight, module.qkv.bias
    close(found.values, singular_values(form(w[:24], b[:24], w[24:48], b[24:48], 3))[:, :8])
    assert found.note == ""

    out = module.qkv(x).detach()
    q, k, _ = out.unflatten(-1, (3, 3, 8)).permute(3, 0, 2, 1, 4)  # heads outside, q | k | v within each
    other = Energies(*(t.square().sum(dim=(0, 2)) for t in (q, k)), {"qkv": out.square().sum(dim=(0, 1))})
    refused = spectra.weight(module, 3, 8, other)
    assert refused.values is None
    assert refused.indicators() == {}
    assert refused.note == "the order of the rows of Fused.qkv could not be confirmed"


@pytest.mark.parametrize("names", [("q", "kv"), ("qk",)])
def test_partly_fused_layers_are_checked_too(names):
    module, x = nn.Module(), random(2, 9, 24).float()
    for name in names:
        module.add_module(name, nn.Linear(24, 24 * len(name)))
    filled(module)
    outs = {name: getattr(module, name)(x).detach() for name in names}
    q, k = (outs["q"], outs["kv"][..., :24]) if len(names) == 2 else outs["qk"].chunk(2, dim=-1)
    energies = [t.unflatten(-1, (3, 8)).square().sum(dim=(0, 1)) for t in (q, k)]
    seen = {name: out.square().sum(dim=(0, 1)) for name, out in outs.items()}
    w = [torch.cat([getattr(module, name).weight for name in names])[i : i + 24] for i in (0, 24)]
    b = [torch.cat([getattr(module, name).bias for name in names])[i : i + 24] for i in (0, 24)]
    found = spectra.weight(module, 3, 8, Energies(*energies, seen))
    close(found.values, singular_values(form(w[0], b[0], w[1], b[1], 3))[:, :8])
    assert spectra.weight(module, 3, 8).values is None
    assert spectra.weight(module, 3, 8, Energies(*reversed(energies), seen)).values is None  # the other way round


def test_one_head_says_nothing_by_its_sum():
    module, x = filled(Fused()), random(2, 9, 24).float()
    pooled = of_pass(module, x, 1, lambda q, k: (q.cumsum(dim=2), k.cumsum(dim=2)))
    assert spectra.weight(module, 1, 24, pooled).values is None


def test_what_lies_between_weights_and_scores_is_noted():
    module, x = filled(Fused()), random(2, 9, 24).float()
    angles = random(9, 4, seed=3)[None, None]

    def rotated(t):
        a, b = t[..., :4], t[..., 4:]
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)

    def scaled(q, k):
        return 8**-0.5 * q, k

    def turned(q, k):
        return rotated(q), rotated(k)

    def normed(q, k):
        return q / q.norm(dim=-1, keepdim=True), k

    assert spectra.weight(module, 3, 8, of_pass(module, x, 3, scaled)).note == ""
    assert "rotary" in spectra.weight(module, 3, 8, of_pass(module, x, 3, turned)).note
    plain = filled(VisionTransformer(**SMALL)).blocks[0].attn  # a class whose order of rows is known
    assert "normalised" in spectra.weight(plain, 3, 8, of_pass(plain, x, 3, normed)).note


def test_modules_without_weights_that_are_known():
    for module, found in ((nn.Identity(), "Identity"), (Fused(), "Fused"), (nn.Linear(24, 72), "Linear")):
        spectrum = spectra.weight(module, 4, 8)  # 4 x 8 rows are in none of them
        assert spectrum.values is None
        assert spectrum.note.endswith(f"by name, in {found}")


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "width"), [(20, 30, 8), (6, 30, 8), (5, 4, 8)])
def test_scores_equal_those_of_the_explicit_matrix(n, m, width):
    q, k = random(2, 3, 4, n, width), random(2, 3, 4, m, width, seed=1)
    found = spectra.score(q.float(), k.float(), 0.25).values
    wanted = torch.linalg.svdvals(0.25 * q @ k.mT)[..., : min(n, m, width)]
    close(found, wanted)
    close(found[1, 2, 3], scipy.linalg.svdvals(0.25 * (q @ k.mT)[1, 2, 3].numpy())[: min(n, m, width)])
    close(spectra.score(q, k).values, 4 * wanted, 1e-9)


def test_with_orthonormal_rows_the_three_sources_agree():
    """If W_Q and W_K of a head have orthonormal rows, singular values of W_Q^T diag(sigma) W_K are |sigma|."""
    rows = torch.linalg.qr(random(24, 8)).Q.mT, torch.linalg.qr(random(24, 8, seed=1)).Q.mT
    sigma = torch.tensor([3.0, -2.0, 1.5, 1.0, 0.5, 0.25, 0.1, 0.0]).double()
    whole = Separate(("q", "k"), lambda n: nn.Linear(24, 8, bias=False)).double()
    with torch.no_grad():
        whole.q.weight.copy_(sigma[:, None] * rows[0])
        whole.k.weight.copy_(rows[1])
    learned, weight = spectra.Spectrum("learned", sigma[None]), spectra.weight(whole, 1, 8)
    tokens = torch.linalg.qr(random(30, 24, seed=2)).Q  # the scores of orthonormal features
    score = spectra.score((tokens @ whole.q.weight.mT)[None, None, None], (tokens @ whole.k.weight.mT)[None, None, None])
    close(weight.values[0], sigma.abs(), 1e-9)
    close(score.values.flatten(), sigma.abs(), 1e-9)
    assert learned.indicators()
    for name, value in learned.indicators().items():
        close(weight.indicators()[name], value, 1e-7)
        close(score.indicators()[name].flatten(), value, 1e-7)
