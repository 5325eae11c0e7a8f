"""Dense adapters against their formula as loops, and on a randomly filled CLIPSeg: counts, gradients, the frozen output."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn
from torch.nn import functional as F

from vitreous import AdaptFormer, DenseAdapter, check, graft, new_parameters, parse, ungraft
from vitreous.base.errors import GraftError, HostError, SettingError
from vitreous.mechanisms.block.dense_adapter import AdaptedBranch, Adapter, rectified


def vit(**kwargs):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **settings | kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def images(count=2):
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_loops(adapter, row):
    """z + ReLU(W_2 ReLU(W_1 z + b_1) + b_2) of one token, number by number."""

    def layer(linear, values):
        rows = zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)
        return [max(0.0, sum(w * v for w, v in zip(ws, values, strict=True)) + b) for ws, b in rows]

    update = layer(adapter.up, layer(adapter.down, row))
    return [z + u for z, u in zip(row, update, strict=True)]


def through(adapter, z):
    return torch.tensor([[by_loops(adapter, row) for row in image] for image in z.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}])
def test_stands_in_each_branch_before_the_sum(options):
    model = graft(vit(**options), DenseAdapter(width=3))
    block, x = model.blocks[1], torch.randn(2, 17, 24, dtype=torch.float64)
    y = x + through(block.drop_path1.adapter, block.ls1(block.attn(block.norm1(x))))
    y = y + through(block.drop_path2.adapter, block.ls2(block.mlp(block.norm2(y))))
    assert (block(x) - y).abs().max() < 1e-12
    assert (block(x) - vit(**options).blocks[1](x)).abs().max() > 0.01


def test_hosts_that_norm_behind_the_branch():
    block, x = graft(vit(block_fn=ResPostBlock), DenseAdapter(width=3)).blocks[0], torch.randn(2, 17, 24, dtype=torch.float64)
    y = x + through(block.drop_path1.adapter, block.norm1(block.attn(x)))
    y = y + through(block.drop_path2.adapter, block.norm2(block.mlp(y)))
    assert (block(x) - y).abs().max() < 1e-12


def test_the_update_is_never_negative():
    adapter = Adapter(24, 3, "usual", torch.Generator().manual_seed(0)).double()
    x = torch.randn(50, 24, dtype=torch.float64)
    update = adapter(x) - x
    assert update.min() >= 0
    assert 0.2 < (update == 0).double().mean() < 0.8


def test_relu_has_a_slope_at_zero():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    rectified(x).sum().backward()
    assert rectified(x).tolist() == [0.0, 0.0, 2.0]
    assert x.grad.tolist() == [0.0, 1.0, 1.0]


def test_drop_path_takes_the_adapted_branch():
    model = graft(vit(drop_path_rate=0.5), DenseAdapter(width=3))
    path = model.blocks[2].drop_path1
    assert (path.host, path.drop_prob) == (DropPath, 0.5)
    x = torch.ones(64, 2, 24, dtype=torch.float64)
    out, whole = path.train()(x), path.eval()(x)
    taken = (out == 0).all(-1).all(-1)
    assert 0 < taken.sum() < 64
    assert torch.allclose(out[~taken], whole[~taken] / 0.5)


@pytest.mark.parametrize("start", ["usual", "zero"])
def test_start(start):
    """W and b as in any linear layer, U(-1, 1) / sqrt(in); start=zero is the host bit for bit, and learns from there."""
    model, x = vit(), images()
    before = model(x)
    model = check(graft(model, DenseAdapter(start=start)), x)
    adapter = model.blocks[0].drop_path1.adapter
    assert adapter.down.weight.abs().max() <= 24**-0.5
    assert adapter.down.weight.std().item() == pytest.approx((3 * 24) ** -0.5, rel=0.05)
    assert adapter.down.bias.any()
    assert torch.equal(model(x), before) == (start == "zero")
    assert bool(adapter.up.weight.any()) == (start == "usual")
    model(x).square().sum().backward()
    assert adapter.up.weight.grad.abs().max() > 0
    assert torch.equal(adapter.down.weight, graft(vit(), DenseAdapter()).blocks[0].drop_path1.adapter.down.weight)


def test_only_new_parameters_train():
    """With the rest frozen no host tensor gets a gradient, the loss falls, and removal gives back the host bit for bit."""
    model, x = vit(), images(8)
    before, labels = model(x), torch.arange(8) % 5
    new = new_parameters(graft(model, DenseAdapter(start="zero")))
    model.requires_grad_(False)
    for parameter in new.values():
        parameter.requires_grad_(True)
    optimizer, losses = torch.optim.Adam(new.values(), lr=0.01), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for name, p in model.named_parameters() if name not in new)
    assert ungraft(model).changed == ()
    assert torch.equal(model(x), before)


def test_real_weights(shared_data):
    """On the real ViT-Tiny at start=zero the logits are the same bit for bit, with 12 blocks of two adapters of 24,832."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:2]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = model(x)
        assert torch.equal(graft(model, DenseAdapter(start="zero"))(x), before)
    assert sum(p.numel() for p in new_parameters(model).values()) == 12 * 2 * (2 * 192 * 64 + 64 + 192)


# -- CLIPSeg, the paper's network -----------------------------------------------------------------------------------------


def clipseg(**sizes):
    """transformers' CLIPSeg of its published sizes (vision 768, text 512, extract layers 3, 6, 9), or smaller; random."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPSegConfig(**sizes)
    torch.manual_seed(0)
    return transformers.CLIPSegForImageSegmentation(config).eval().requires_grad_(False)


def small_clipseg():
    tower = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 4}
    return clipseg(
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        text_config=tower | {"hidden_size": 16, "vocab_size": 99, "max_position_embeddings": 8, "eos_token_id": 98},
        projection_dim=12, reduce_dim=16, extract_layers=[1, 2, 3], decoder_num_attention_heads=2, decoder_intermediate_size=32,
    )  # fmt: skip


def adapters(features, width, count=1, start="usual"):
    generator = torch.Generator().manual_seed(0)
    return nn.ModuleList(Adapter(features, width, start, generator) for _ in range(count))


def dense(model, width=64, conditioning=256, start="usual"):
    """The paper's dense form by hooks: in the first max(extract) layers of both towers, and on the vector of the text."""
    new = {"conditioning": adapters(model.config.projection_dim, conditioning, start=start)}
    for name, tower in {"vision": model.clip.vision_model, "text": model.clip.text_model}.items():
        for part in ("self_attn", "mlp"):
            layers = tower.encoder.layers[: max(model.config.extract_layers)]
            new[f"{name}_{part}"] = adapters(tower.config.hidden_size, width, len(layers), start)
            for layer, adapter in zip(layers, new[f"{name}_{part}"], strict=True):
                getattr(layer, part).register_forward_hook(lambda _m, _x, out, adapter=adapter: on_output(adapter, out))
    return nn.ModuleDict(new)


def on_output(adapter, out):
    """What a branch gives, adapted; attention gives its weights with it."""
    return (adapter(out[0]), *out[1:]) if isinstance(out, tuple) else adapter(out)


def shallow(model, width=512, conditioning=256):
    """The paper's shallow form: at the extracted states of both towers, and on the vector of the text."""
    count, config = len(model.config.extract_layers), model.config
    return nn.ModuleDict(
        {
            "conditioning": adapters(config.projection_dim, conditioning),
            "vision": adapters(config.vision_config.hidden_size, width, count),
            "text": adapters(config.text_config.hidden_size, width, count),
        }
    )


def count(new):
    return sum(p.numel() for p in new.parameters())


def segmented(model, pixels, words, conditioning=nn.Identity()):  # noqa: B008
    """Logits (B, H, W). The towers are run here, since transformers runs them without gradients."""
    states = model.clip.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
    vector = model.clip.get_text_features(input_ids=words).pooler_output
    return model.decoder([states[i + 1] for i in model.config.extract_layers], conditioning(vector)).logits


def inputs():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([[1, 5, 98], [2, 7, 98]])


def test_parameters_on_clipseg_are_the_published_numbers():
    with torch.device("meta"):
        model = clipseg()
    towers = model.clip.vision_model.config, model.clip.text_model.config
    assert [tower.hidden_size for tower in towers] == [768, 512]
    assert count(dense(model)) == 3_237_376
    assert count(shallow(model)) == 4_201_984
    assert count(shallow(model, width=64)) == 758_656


def test_on_clipseg_the_adapters_alone_learn():
    model, x = small_clipseg(), inputs()
    frozen = segmented(model, *x)
    new = dense(model, width=6, conditioning=5)
    out = segmented(model, *x, new["conditioning"][0])
    assert (out - frozen).abs().max() > 1e-3
    out.square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.any() for name, p in new.named_parameters() if name.endswith("up.weight"))


def test_on_clipseg_zero_w2_and_bias_are_the_frozen_output():
    model, x = small_clipseg(), inputs()
    frozen = segmented(model, *x)
    assert torch.equal(model(pixel_values=x[0], input_ids=x[1]).logits, frozen)
    new = dense(model, width=6, conditioning=5, start="zero")
    assert torch.equal(segmented(model, *x, new["conditioning"][0]), frozen)
    for adapter in (adapter for part in new.values() for adapter in part):  # each moves the output once it is open
        with torch.no_grad():
            adapter.up.bias.copy_(torch.arange(len(adapter.up.bias)) % 2)  # a constant would be normed away
        assert (segmented(model, *x, new["conditioning"][0]) - frozen).abs().max() > 1e-4
        with torch.no_grad():
            adapter.up.bias.zero_()


def test_stacks_with_adaptformer_and_refuses_itself():
    model = check(graft(vit(), AdaptFormer(bottleneck=2), DenseAdapter(width=3)), images())
    assert type(model.blocks[0].drop_path1) is AdaptedBranch
    with pytest.raises(GraftError, match=r"blocks\.0\.drop_path1 already holds AdaptedBranch.*ungraft"):
        graft(model, DenseAdapter())


def test_bad_input():
    with pytest.raises(SettingError, match=r"Found width=0\. Expected 1 or more"):
        parse("dense_adapter:width=0")
    with pytest.raises(SettingError, match="has 3 blocks"):
        graft(vit(), DenseAdapter(layers=(3,)))
    with pytest.raises(HostError, match=r"blocks\.0 is a ParallelScalingBlock.*cannot be run apart"):
        graft(vit(block_fn=ParallelScalingBlock), DenseAdapter())
    spectral = timm.create_model("spectformer_tiny", img_size=32, patch_size=8, embed_dim=24, depth=2, spectral=1)
    with pytest.raises(HostError, match=r"blocks\.0 is a SpectralBlock, .*one sum.*Choose other layers"):
        graft(spectral, DenseAdapter())
    check(graft(spectral, DenseAdapter(layers=(1,))), torch.randn(1, 3, 32, 32))
