"""Spikformer against the released network's counts and answers; spikes, steps, sizes, training."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from architectures.released import fill
from architectures.released import pictures as recorded
from vitreous import graft
from vitreous.architectures.spikformer import SpikingAttention, attend, checkpoint_filter_fn, firing_rates
from vitreous.base.errors import HostError, SettingError
from vitreous.layers.spikes import LIF
from vitreous.models.weights import fill as load

COUNTS = {"spikformer_8_384": 16_816_024, "spikformer_8_512": 29_689_384, "spikformer_8_768": 66_338_632}
UNUSED = {"spikformer_8_384": 12_288, "spikformer_8_512": 16_384, "spikformer_8_768": 24_576}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SMALL_NETWORKS = {"spikformer_8_384": SMALL}


def small(**settings):
    torch.manual_seed(0)
    model = timm.create_model("spikformer_8_384", **SMALL | settings).eval()
    for module in model.modules():  # away from the start, where deep layers are silent
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.bias, 1.2, 0.5)
    return model


def pictures(count=2, height=32, width=48, channels=3):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))


def released_name(name):
    """The authors' name of a tensor of ours."""
    name = name.replace("blocks.", "block.").replace(".norm.", ".bn.")
    name = re.sub(r"^stem\.(\d)\.(\w+)", lambda m: f"patch_embed.proj_{m[2]}{m[1].replace('0', '')}", name)
    name = re.sub(r"^position\.", "patch_embed.rpe_", name)
    return re.sub(r"\.(q|k|v|proj|fc1|fc2)\.", r".\1_", name)


def released_weights(model):
    weights = {}
    for name, value in model.state_dict().items():
        theirs = released_name(name)
        lifted = 0.8 if re.search(r"_bn\d?\.bias$", theirs) else 0.0
        weights[theirs] = value if theirs.endswith("num_batches_tracked") else fill(theirs, value.shape) + lifted
    for i in range(len(model.blocks)):
        for j in (1, 2):
            weights |= {f"block.{i}.norm{j}.{part}": torch.ones(model.embed_dim) for part in ("weight", "bias")}
    return weights


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert 2 * 2 * len(model.blocks) * model.embed_dim == UNUSED[name]  # what the released files hold beside


def test_logits_are_the_released_ones():
    model = timm.create_model("spikformer_8_384").eval()
    load(model, released_weights(model), "released.pth")
    with torch.no_grad():
        logits = model(recorded(1, 64))
        torch.testing.assert_close(logits[0, :4], torch.tensor([4.55892, 9.55689, -2.52061, 0.91625]), atol=1e-4, rtol=0)
        moments = torch.stack([logits.mean(), logits.std()])
        torch.testing.assert_close(moments, torch.tensor([0.15829, 4.46418]), atol=1e-4, rtol=0)
        last = [f"blocks.7.{part}" for part in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")]
        for part in ("stem.3", "position", *last):  # each of them takes part
            norm = model.get_submodule(part).norm
            bias = norm.bias.clone()
            norm.bias.fill_(-10.0)
            assert (model(recorded(1, 64)) - logits).abs().max() > 0.01, part
            norm.bias.copy_(bias)


def test_released_names_are_ours_and_unused_norms_leave():
    model = small()
    weights = released_weights(model)
    assert set(checkpoint_filter_fn(weights, model)) == set(model.state_dict())
    ours = dict(model.state_dict())
    assert checkpoint_filter_fn(ours, model).keys() == ours.keys()


def test_attention_is_the_product_of_spikes():
    q, k, v = (torch.randint(2, (2, 1, 3, 4, 5), generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    expected = torch.zeros_like(q)
    for t in range(2):
        for h in range(3):
            for n in range(5):
                for m in range(5):
                    score = sum(q[t, 0, h, c, n] * k[t, 0, h, c, m] for c in range(4))
                    expected[t, 0, h, :, n] += 0.125 * score * v[t, 0, h, :, m]
    assert torch.equal(attend(q, k, v), expected)


def test_heads_are_apart():
    """The second head's values move the second half of the features that go into the projection, and no others."""
    attention, x = SpikingAttention(8, 2).eval(), 3 * torch.randn(2, 1, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    seen = []
    attention.spikes.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for layer in (attention.q, attention.k, attention.v):
        nn.init.constant_(layer.norm.bias, 1.0)
    attention(x)
    nn.init.constant_(attention.v.norm.bias[4:], -10.0)
    attention(x)
    assert torch.equal(seen[0][:, :, :4], seen[1][:, :, :4])
    assert seen[0][:, :, 4:].any()
    assert not seen[1][:, :, 4:].any()


def test_all_neurons_give_0_or_1_and_rates_are_read():
    model, x, outputs = small(), pictures(), {}
    for name, module in model.named_modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda module, args, out, name=name: outputs.update({name: out}))
    rates = firing_rates(model, x)
    assert list(rates)[:6] == ["stem.0", "stem.1", "stem.2", "stem.3", "position", "blocks.0.attn.q"]
    assert len(rates) == 5 + 2 * 7 == len(outputs)
    for name, out in outputs.items():
        assert ((out == 0) | (out == 1)).all()
        assert out.shape[:2] == (4, 2)
        assert rates[name.removesuffix(".spikes")] == pytest.approx(out.mean().item())
        assert 0 < out.mean() < 1, name
    assert all(len(module._forward_hooks) == 1 for module in model.modules() if isinstance(module, LIF))  # ours left


def test_calls_agree_and_images_are_alone():
    model, x = small(), pictures(3)
    logits = model(x)
    assert torch.equal(model(x), logits)
    torch.testing.assert_close(model(x[1:2]), logits[1:2], atol=1e-6, rtol=0)
    assert not torch.equal(logits[0], logits[1])


def test_the_first_current_is_computed_once():
    """As if the image were given anew in every step."""
    model, x = small(), pictures()
    layer = model.stem[0]
    assert torch.equal(layer(x[None], 4), layer(x.expand(4, *x.shape)))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps(steps):
    model = small(steps=steps)
    assert model.embed(pictures()).shape == (steps, 2, 32, 2, 3)
    assert model(pictures()).shape == (2, 5)


def test_other_sizes_channels_and_pools():
    model = small(in_chans=1, pools=(0, 0, 1, 1))
    assert model.forward_features(pictures(channels=1)).shape == (2, 32, 8, 12)
    assert small().forward_features(pictures(height=33, width=20)).shape == (2, 32, 3, 2)
    features = timm.create_model("spikformer_8_384", features_only=True, out_indices=(0, 1), **SMALL)
    assert [tuple(f.shape) for f in features(pictures())] == [(2, 32, 2, 3)] * 2
    assert features.feature_info.reduction() == [16, 16]
    model = small()
    final, maps = model.forward_intermediates(pictures())
    assert torch.equal(final, maps[-1])
    assert torch.equal(final, model.forward_features(pictures()))
    model.reset_classifier(3)
    assert model(pictures()).shape == (2, 3)
    model.reset_classifier(0)
    assert model(pictures()).shape == (2, 32)
    for settings in ({"embed_dim": 20}, {"num_heads": 3}, {"steps": 0}, {"pools": (1, 1)}, {"global_pool": "token"}):
        with pytest.raises(SettingError, match=r"^Found .*Expected .*\. \w"):
            small(**settings)
    with pytest.raises(HostError, match=r"The model is a vitreous\.architectures\.spikformer\.Spikformer"):
        graft(small(), "svda")


def test_checkpointing_and_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = small().train()
        model.set_grad_checkpointing(checkpointing)
        F.cross_entropy(model(pictures()), torch.tensor([0, 3])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_dropped_half_is_dropped_in_all_steps():
    model = small(drop_path_rate=0.5).train()
    block, x = model.blocks[1], model.embed(pictures(8))
    block.attn.register_forward_hook(lambda module, args, out: torch.ones_like(out))
    block.mlp = nn.Identity()
    block.mlp.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    added = block(x) - x
    assert set(added.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(added, added[:1, :, :1, :1, :1].expand_as(added))


def test_it_learns():
    model, x = small().train(), pictures(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), torch.tensor([1, 3, 0, 2])))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
