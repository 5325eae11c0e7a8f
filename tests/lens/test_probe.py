import copy
import math

import numpy as np
import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitreous import SPC, SVDA, graft, grafts
from vitreous.errors import DataError, HostError, NotReached
from vitreous.lens import indicators
from vitreous.lens.measures import perturbed
from vitreous.lens.probe import measure

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
HOSTS = {
    "plain": lambda: VisionTransformer(**SMALL),
    "registers, qk norm": lambda: VisionTransformer(**SMALL, reg_tokens=2, qk_norm=True, init_values=0.1),
    "average pool": lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"),
    "rope": lambda: Eva(**SMALL, use_rot_pos_emb=True, use_abs_pos_emb=False, attn_type="rope"),
    "grouped": lambda: Eva(**SMALL, use_rot_pos_emb=True, attn_type="rope", num_kv_heads=1, qkv_fused=False),
    "eva": lambda: Eva(**SMALL, use_rot_pos_emb=True, scale_attn_inner=True),
}


def build(host="plain"):
    """A host with sharp attention, so that heads and images differ."""
    torch.manual_seed(0)
    model = HOSTS[host]().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and any(part in name for part in ("qkv", "q_proj", "k_proj")):
                weight.mul_(20)
    return model


def pictures(count=3, seed=1):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def table(rows):
    """{(layer, indicator, form): tensor over heads, or a scalar}, and each key once per head."""
    found = {}
    for row in rows:
        found.setdefault((row["layer"], row["indicator"], row["form"]), []).append((row["head"], row["value"]))
    for key, pairs in found.items():
        heads = [head for head, _ in pairs]
        assert heads in ([None], list(range(len(heads)))), (key, heads)
        found[key] = torch.tensor([value for _, value in pairs]).squeeze(0 if heads == [None] else ())
    return found


def noisy_copy(images, seed=0, noise=0.01):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([(x + noise * torch.randn(x.shape, generator=generator)).clamp(0, 1) for x in images])


def expected(q, k, maps):
    """One layer's recorded indicators from q, k, maps of three clean images and the same three with noise."""
    clean, noisy = maps[:3], maps[3:]
    return {
        ("angular_alignment", "paper"): indicators.angular_alignment(q, k)[3],
        ("perturbation_robustness", "paper"): torch.linalg.vector_norm(clean[0] - noisy[0]) / clean[0].numel(),
        ("selectivity", "paper"): indicators.selectivity(clean).mean(),
        ("angular_alignment", "corrected"): indicators.angular_alignment(q, k)[:3].mean(dim=0),
        ("selectivity", "corrected"): indicators.selectivity(clean).mean(dim=0),
        ("effective_tokens", "corrected"): indicators.effective_tokens(clean).mean(dim=0),
        ("attention_entropy", "corrected"): indicators.attention_entropy(clean).mean(dim=0),
        ("perturbation_robustness", "corrected"): indicators.relative_change(clean, noisy).mean(dim=0),
    }


@pytest.mark.parametrize("host", HOSTS)
def test_equals_what_the_unfused_host_computes(host):
    """The peer is timm's own unfused attention, whose dropout receives the map and whose q and k norms give q and k."""
    model, images = build(host), pictures()
    peer, seen = copy.deepcopy(model), {}
    for i, block in enumerate(peer.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda m, args, i=i: seen.update({(i, "map"): args[0]}))
        for name in ("q_norm", "k_norm"):
            getattr(block.attn, name).register_forward_hook(lambda m, a, out, at=(i, name): seen.update({at: out}))
    with torch.no_grad():
        peer(torch.cat([images, noisy_copy(images)]))

    found = table(measure(model, images))
    wanted = {}
    for i in range(2):
        q, k = seen[i, "q_norm"], seen[i, "k_norm"]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        wanted |= {(i, *key): value for key, value in expected(q, k, seen[i, "map"]).items()}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("scale", ["paper", "learned"])
def test_equals_the_formula_of_svda(scale):
    model = graft(build().double(), SVDA(scale=scale))
    images = pictures().double()
    seen = {}
    for i, block in enumerate(model.blocks):
        block.attn.qkv.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out}))
    noisy = torch.cat([images, noisy_copy(images.float()).double()])
    with torch.no_grad():
        model(noisy)
    raw = dict(seen)

    found = table(measure(model, images))
    for i, block in enumerate(model.blocks):
        q, k, _ = raw[i].reshape(6, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        sigma = block.attn.sigma.detach()
        factor = {"paper": 16**-0.5, "learned": math.sqrt(16)}[scale]
        maps = (factor * torch.einsum("bhik,hk,bhjk->bhij", q, sigma, k)).softmax(dim=-1)
        p = sigma**2 / (sigma**2).sum(dim=-1, keepdim=True)
        wanted = expected(q, k, maps) | {
            ("spectral_entropy", "paper"): indicators.spectral_entropy(sigma),
            ("effective_rank", "paper"): indicators.spectral_entropy(sigma).exp(),
            ("spectral_sparsity", "paper"): torch.zeros(2),
            ("spectral_entropy", "corrected"): -(p * p.log()).sum(dim=-1),
            ("effective_rank", "corrected"): (-(p * p.log()).sum(dim=-1)).exp(),
            ("effective_rank_l1", "corrected"): indicators.effective_rank_l1(sigma),
            ("spectral_sparsity", "corrected"): torch.zeros(2),
        }
        assert {key[1:] for key in found if key[0] == i} == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[i, *key].double(), value.double(), rtol=1e-5, atol=1e-6)


def test_batches_make_no_difference_but_for_the_papers_last_batch():
    model, images = build(), pictures(5)
    whole = table(measure(model, images))
    loader = [(images[:2], torch.zeros(2)), (images[2:4], torch.zeros(2)), (images[4:], torch.zeros(1))]
    split = table(measure(model, loader))
    last = table(measure(model, images[4:]))
    for key, value in whole.items():
        wanted = last[key] if key[1:] == ("selectivity", "paper") else value
        torch.testing.assert_close(split[key], wanted, rtol=1e-4, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


def test_noise_is_of_the_seed_alone_and_without_it_nothing_changes():
    model, images = build(), pictures()
    rows = measure(model, images, seed=3)
    torch.manual_seed(99)
    assert rows == measure(model, images, seed=3)
    assert rows != measure(model, images, seed=4)
    still = table(measure(model, images, noise=0.0))
    assert all(
        still[i, "perturbation_robustness", form].max() < 1e-6 for i in (0, 1) for form in ("paper", "corrected")
    )


def test_noise_is_added_to_pixels_and_clamped():
    images, mean, std = pictures().round(), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    m, s = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    found = perturbed((images - m) / s, 0.01, torch.Generator().manual_seed(0), mean, std) * s + m
    torch.testing.assert_close(found, noisy_copy(images), rtol=0, atol=1e-6)
    assert (found - images).abs().max() < 0.06
    with pytest.raises(DataError, match=r"pixels from -2\.5 to .*Give the mean and std"):
        measure(build(), (images - m) / s)


def test_the_model_is_as_before():
    model = graft(build(), SVDA(layers=(1,)), SPC(after=1))
    model.train()
    model.blocks[0].eval()
    model.blocks[0].attn.register_forward_hook(lambda *a: None)
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    values = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    measure(model, pictures())
    with pytest.raises(RuntimeError, match="stop"):
        measure(model, failing())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert len(grafts(model)) == 2


def failing():
    yield pictures()
    raise RuntimeError("stop")


def test_measures_attention_that_hands_its_queries_to_a_step():
    rows = measure(graft(build(), "evit"), pictures())
    assert {row["layer"] for row in rows} == {0, 1}


def test_inserted_tokens_are_among_those_attended_to():
    model = build()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:64] = 0  # no queries, no keys: uniform attention over all tokens there are
    graft(model, SPC(after=1, tokens=4))
    found = table(measure(model, pictures()))
    torch.testing.assert_close(found[0, "effective_tokens", "corrected"], torch.full((2,), 17.0))
    torch.testing.assert_close(found[1, "effective_tokens", "corrected"], torch.full((2,), 21.0))


@pytest.mark.parametrize("mechanisms", [(), (SVDA(),)], ids=["plain", "svda"])
def test_bfloat16_and_autocast_come_near_float32(mechanisms):
    model, images = graft(build(), *mechanisms), pictures()
    wide = table(measure(model, images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = table(measure(model, images))
    half = table(measure(copy.deepcopy(model).bfloat16(), images))
    for key in (key for key in wide if key[1] in ("selectivity", "effective_rank", "angular_alignment")):
        torch.testing.assert_close(mixed[key], wide[key], rtol=0.02, atol=0.02)
        torch.testing.assert_close(half[key], wide[key], rtol=0.02, atol=0.02)


def test_refuses_what_it_cannot_measure_honestly():
    images = pictures()
    with pytest.raises(HostError, match=r"Conv2d has no blocks\.i\.attn.*Give a timm ViT"):
        measure(nn.Conv2d(3, 4, 1), images)
    with pytest.raises(HostError, match=r"blocks\.0\.attn is a timm\.layers\.diff_attention\.DiffAttention"):
        measure(VisionTransformer(**SMALL, attn_layer="diff"), images)
    with pytest.raises(DataError, match="Found no images"):
        measure(build(), [])

    lying = build()
    lying.blocks[1].attn.register_forward_hook(lambda m, args, out: 1.01 * out)
    with pytest.raises(HostError, match=r"blocks\.1\.attn returned values .* recomputed map"):
        measure(lying, images)

    skipping = build()
    skipping.blocks[1].forward = lambda x, **masks: x
    with pytest.raises(NotReached, match=r"blocks\.1\.attn saw 0 of 3 images"):
        measure(skipping, images)


def test_a_trained_model(shared_data):
    """ImageNet ViT-Tiny on two photographs: sharp heads beside wide ones, little changed by 1 % of noise."""
    file = shared_data / "weights" / "vit_tiny_patch16_224" / "model.safetensors"
    model = timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    photographs = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:2]
    pixels = torch.from_numpy(photographs).permute(0, 3, 1, 2) / 255
    found = table(measure(model, (pixels - 0.5) / 0.5, mean=(0.5,), std=(0.5,)))
    tokens, change = (
        torch.stack([found[i, name, "corrected"] for i in range(12)])
        for name in ("effective_tokens", "perturbation_robustness")
    )
    assert tokens.shape == change.shape == (12, 3)
    assert 1 <= tokens.min() < 5 < 50 < tokens.max() <= 197
    assert 0 < change.min() < change.max() < 0.5
