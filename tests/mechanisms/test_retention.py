"""Retention against its sums as loops: three forms, decay, causality, order of tokens, and the map that it applies."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from vitreous import Retention, check, graft, new_parameters
from vitreous.base.errors import GraftError, SettingError
from vitreous.layers.stream import TokenState
from vitreous.mechanisms.mixer.retention import (
    chunkwise,
    decay_mask,
    inverse,
    log_decay,
    parallel,
    recurrent,
    sequence,
)

SMALL = {"img_size": (12, 16), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
HEADS, WIDTH = 3, 4


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | {"reg_tokens": 2} | options).double().eval()


def random(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn(tokens=50):
    return (*random(3, 2, HEADS, tokens, WIDTH).unbind(0), log_decay("vir", HEADS))


def loops(q, k, v, gamma):
    """o_i = sum over j <= i of gamma^(i - j) <q_i, k_j> / sqrt(K) v_j."""
    out = torch.zeros_like(v)
    for h, g in enumerate(gamma.tolist()):
        for i in range(q.shape[2]):
            for j in range(i + 1):
                score = (q[:, h, i] * k[:, h, j]).sum(-1) / math.sqrt(WIDTH)
                out[:, h, i] += g ** (i - j) * score[:, None] * v[:, h, j]
    return out


def mixer(**settings):
    """A mixer of 24 channels with weights away from their small start, and a state of 2 x 4 patches and 3 prefix tokens."""
    module = graft(vit(), Retention(**settings)).blocks[0].attn
    for i, parameter in enumerate(module.parameters()):
        parameter.data = random(*parameter.shape, seed=i) / (parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 3)
    return module, TokenState(grid=(2, 4), prefix=3)


def test_parallel_is_the_sum_of_the_paper():
    q, k, v, rate = drawn(9)
    for scale in (1.0, 30.0):  # decays that hardly and that quickly fall
        expected = loops(q, k, v, (scale * rate).exp())
        assert (parallel(q, k, v, scale * rate) - expected).abs().max() < 1e-12
        assert (expected - loops(q, k, v, torch.ones(HEADS))).abs().max() > 0.1


@pytest.mark.parametrize("form", [recurrent, *(lambda *x, n=n: chunkwise(*x, n) for n in (1, 7, 16, 50, 64))])
def test_the_forms_are_one(form):
    q, k, v, rate = drawn()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    outcomes = []
    for way in (parallel, form):
        out = way(*inputs, 10 * rate)
        outcomes.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for one, other in zip(*outcomes, strict=True):
        assert (one - other).abs().max() < 1e-12


def test_limits():
    q, k, v, rate = drawn(20)
    plain = ((q @ k.mT) / math.sqrt(WIDTH)).tril() @ v
    assert (parallel(q, k, v, 0 * rate) - plain).abs().max() < 1e-12  # gamma = 1: causal linear attention
    diagonal = (q * k).sum(-1, keepdim=True) / math.sqrt(WIDTH) * v
    assert (parallel(q, k, v, 1e4 * rate - 1e4) - diagonal).abs().max() < 1e-12  # gamma = 0: each token alone
    assert (parallel(q, k, v, rate) - plain).abs().max() > 0.01


def test_decay():
    gamma = log_decay("vir", 3).exp()
    assert torch.allclose(gamma, torch.tensor([1 - 1 / 32, 1 - 1 / 128, 1 - 1 / 512], dtype=torch.float64), atol=1e-15)
    assert torch.allclose(log_decay("vir", 1).exp(), gamma[:1])
    steps = [math.exp(s) for s in torch.linspace(math.log(1 / 32), math.log(1 / 512), 6, dtype=torch.float64).tolist()]
    assert (log_decay("vir", 6).exp() - 1 + torch.tensor(steps, dtype=torch.float64)).abs().max() < 1e-15
    assert log_decay("retnet", 24).expm1().neg().log2().tolist() == pytest.approx([-5.0 - h for h in range(24)])
    mask = decay_mask(torch.tensor([math.log(0.5)]), torch.arange(3000))[0]
    assert mask.isfinite().all()  # a power of negative distances, 2^3000, is not
    assert mask[:3, :3].tolist() == [[1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]]


def test_order_of_the_sequence():
    """Inserted registers, patches, inserted tokens that are read out, then the prefix, its class token last."""
    state = TokenState(grid=(2, 2), prefix=3, read_out=(True, False, True, False))
    assert sequence(11, state) == [8, 10, 3, 4, 5, 6, 7, 9, 2, 1, 0]
    assert sequence(4, TokenState(grid=(2, 2))) == [0, 1, 2, 3]
    order = sequence(11, state)
    assert [order[i] for i in inverse(order)] == list(range(11))


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise"])
def test_who_sees_whom(form):
    """A patch sees those before it and inserted registers, tokens that are read all patches, the class token everything."""
    module, state = mixer(form=form, chunk=3)
    state = replace(state, read_out=(True, False))
    x = random(1, 13, 24)
    sees = torch.zeros(13, 13, dtype=torch.bool)
    for j in range(13):
        moved = x.clone()
        moved[:, j] += random(24, seed=j)
        sees[:, j] = (module(moved, state=state) - module(x, state=state)).abs().amax((0, 2)) > 1e-12
    order = [12, *range(3, 12), 2, 1, 0]
    assert torch.equal(sees[order][:, order], torch.ones(13, 13, dtype=torch.bool).tril())


def test_the_module_is_the_formula():
    module, state = mixer()
    x = random(2, 11, 24)
    order = [*range(3, 11), 2, 1, 0]
    rows = [x[:, order] @ layer.weight.T + layer.bias for layer in (module.q_proj, module.k_proj, module.v_proj)]
    q, k, v = (y.unflatten(-1, (3, 8)).transpose(1, 2) for y in rows)
    gamma, o = [1 - 1 / 32, 1 - 1 / 128, 1 - 1 / 512], torch.zeros_like(v)
    for h in range(3):
        for i in range(11):
            for j in range(i + 1):
                o[:, h, i] += gamma[h] ** (i - j) * ((q[:, h, i] * k[:, h, j]).sum(-1) / 8**0.5)[:, None] * v[:, h, j]
    o = o.transpose(1, 2).flatten(2)
    normed = (o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    inner = F.gelu(normed * module.norm.weight + module.norm.bias)
    expected = torch.empty_like(x)
    expected[:, order] = inner @ module.proj.weight.T + module.proj.bias
    assert (module(x, state=state) - expected).abs().max() < 1e-12


def test_the_effective_map_times_the_values_is_the_output():
    module, state = mixer(output="plain", decay="retnet")
    x = random(2, 11, 24)
    a, v = module.effective_map(x, state), module.project(x)[2]
    expected = module.proj((a @ v).transpose(1, 2).flatten(2))
    assert (module(x, state=state) - expected).abs().max() < 1e-12
    order = [*range(3, 11), 2, 1, 0]
    assert a[:, :, order][..., order].triu(1).abs().sum() == 0
    assert (a < 0).any()
    assert torch.equal(module.reading()["decay"], 1 - 2.0 ** torch.tensor([-5, -6, -7], dtype=torch.float64))


def test_forms_are_one_in_a_model_of_any_image_size():
    images, outputs = random(2, 3, 20, 12), []
    for form in ("parallel", "recurrent", "chunkwise"):
        model = check(graft(vit(dynamic_img_size=True), Retention(form=form, chunk=4)), images)
        outputs.append(model(images))
    for other in outputs[1:]:
        assert (other - outputs[0]).abs().max() < 1e-12
    assert not list(model.buffers())


def test_parameters_of_vir_small():
    """ViR-S/16: width 384, 12 blocks, 6 heads; about those of ViT-S (22 M)."""
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224")
    new = new_parameters(graft(model, Retention()))
    assert sum(p.numel() for p in new.values()) == 12 * (4 * (384**2 + 384) + 2 * 384)
    assert sum(p.numel() for p in model.parameters()) == 22_050_664 + 12 * 2 * 384


def test_bad_input():
    with pytest.raises(SettingError, match=r"chunk=0\. Expected 1 or more"):
        Retention(chunk=0)
    with pytest.raises(SettingError, match=r"heads=5\. Expected a divisor of the width 24"):
        graft(vit(), Retention(heads=5))
    with pytest.raises(GraftError, match="already holds RetentionMixer, a mixer"):
        graft(vit(), "retention", "svda")
