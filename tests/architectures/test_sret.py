import math
import re

import pytest
import timm
import torch
from torch import nn

from architectures.released import fill, pictures
from vitreous.architectures.sret import RecursiveBlock, SlicedAttention, checkpoint_filter_fn, eval_order, resized
from vitreous.base.errors import SettingError
from vitreous.lens.look import look
from vitreous.testing.networks import Network

SMALL = {"embed_dims": (8, 16, 32), "depths": (1, 1, 1), "num_heads": (1, 2, 2), "img_size": 64, "num_classes": 5}
SMALL_NETWORKS = {"sret_t": SMALL}


def released_names(name):
    """The names of one of our tensors in the authors' code: two for what is of a shared block."""
    name = re.sub(r"^patch_embed\.(\d)\.0\.", lambda m: f"patch_embed.conv{int(m[1]) + 1}.", name)
    name = re.sub(r"^patch_embed\.(\d)\.1\.", lambda m: f"patch_embed.bn{int(m[1]) + 1}.", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"pools.{int(m[1]) - 1}.conv.", name)
    name = re.sub(r"^pool\.after\.", "norm.", name)
    name = re.sub(r"\.c(\d)$", r".coefficient\1.bias", name)
    shared = re.match(r"stages\.(\d)\.blocks\.(\d+)\.(?:projections\.(\d)\.)?(.*)", name)
    if not shared:
        return [name]
    stage, block, projection, rest = shared.groups()
    entries = [4 * int(block), 4 * int(block) + 2] if projection is None else [4 * int(block) + 2 * int(projection) + 1]
    return [f"transformers.{stage}.blocks.{i}.{rest}" for i in entries]


def small(**settings):
    return timm.create_model("sret_t", **(SMALL | settings)).eval()


@pytest.mark.parametrize(("name", "count"), [("sret_t", 4_755_979), ("sret_lt", 4_988_024), ("sret_s", 20_899_692)])
def test_has_the_published_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == count


@torch.no_grad()
def test_equals_the_released_network():
    """Logits of the authors' code with the same weights, which permutes at random: in their order, from the same seed.

    Coefficients are near 1 as at their start: near 0, as the rule alone draws them, the image moves no logit by 1e-4.
    """
    model = timm.create_model("sret_t").eval()
    released = {name: value for ours, value in model.state_dict().items() for name in released_names(ours)}
    assert len([name for name in released if "num_batches" not in name]) == 510 - 3
    weights = {
        name: value if "num_batches" in name else fill(name, value.shape) + ("coefficient" in name)
        for name, value in released.items()
    }
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    fixed = model(pictures(1, 224))[0]
    for module in model.modules():  # without dropout, training differs in the order alone
        if isinstance(module, SlicedAttention):
            module.train()
    torch.manual_seed(1)
    logits = model(pictures(1, 224))[0]
    torch.testing.assert_close(logits[:4], torch.tensor([0.99859, -0.15006, -0.78269, 0.41015]), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.stack([logits.mean(), logits.std()]), torch.tensor([-0.01308, 0.93893]), rtol=0, atol=1e-4)
    assert 5e-4 < (fixed - logits).abs().max() < 0.1  # another order
    logits = model.eval()(pictures(1, 64))[0]
    parts = ("patch_embed.0.0", "pos_embed", "0.blocks.0.attn", "1.downsample", "projections.1.mlp", ".c1", ".c4", "pool")
    for part in parts:  # without any one of them the logits would be others
        tensors = [tensor for name, tensor in model.named_parameters() if part in name]
        values = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.zero_()
        assert (model(pictures(1, 64))[0] - logits).abs().max() > 1e-2, part
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


@torch.no_grad()
@pytest.mark.parametrize(("again", "slices"), [(False, 3), (True, 2), (True, 1)])
def test_attention_inside_slices_as_loops(again, slices):
    dim, heads, n = 4, 2, 12
    attention = SlicedAttention(dim, heads, (3, slices)).double().eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, n, dim, dtype=torch.float64)
    order = eval_order(n) if again and slices > 1 else list(range(n))
    assert sorted(order) == list(range(n))
    q, k, v = attention.qkv(x[0]).chunk(3, dim=-1)
    expected = torch.empty(n, dim, dtype=torch.float64)
    for position, token in enumerate(order):
        start = position // (n // slices) * (n // slices)
        mates = order[start : start + n // slices]  # those of its slice
        parts = []
        for head in range(heads):
            at = slice(2 * head, 2 * head + 2)
            weights = [math.exp(sum(q[token, at] * k[mate, at]) / math.sqrt(2)) for mate in mates]
            parts.append(sum(w / sum(weights) * v[mate, at] for w, mate in zip(weights, mates, strict=True)))
        expected[token] = attention.proj(torch.cat(parts))
    assert (attention(x, again)[0] - expected).abs().max() < 1e-12


@torch.no_grad()
def test_block_twice_with_a_projection_behind_each():
    block = small().double().stages[0].blocks[0]
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 64, 8, dtype=torch.float64)
    expected = x
    for r in range(2):
        expected = block.c1 * expected + block.c2 * block.attn(block.norm1(expected), r == 1)
        expected = block.c3 * expected + block.c4 * block.mlp(block.norm2(expected))
        after = block.projections[r]
        expected = after.c1 * expected + after.c2 * after.mlp(after.norm1(expected))
    assert (block(x, (8, 8)) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_order_is_fixed_in_eval_and_drawn_in_training():
    attention = SlicedAttention(4, 2, (1, 2)).eval()
    x = torch.randn(1, 8, 4)
    assert torch.equal(attention(x, True), attention(x, True))
    attention.train()
    torch.manual_seed(0)
    outputs = [attention(x, True) for _ in range(4)]
    assert any(not torch.allclose(outputs[0], other) for other in outputs[1:])


def test_more_loops_cost_projections_alone():
    twice, four = small(), small(loops=4)
    counts = [sum(p.numel() for p in model.parameters()) for model in (twice, four)]
    blocks = [module for module in twice.modules() if isinstance(module, RecursiveBlock)]
    assert counts[1] - counts[0] == sum(p.numel() for block in blocks for p in block.projections.parameters())


def test_other_image_sizes():
    model = small()
    assert torch.equal(resized(model.pos_embed, (8, 8)), model.pos_embed)
    flat = torch.full((1, 2, 8, 8), 0.3)
    torch.testing.assert_close(resized(flat, (12, 10)), torch.full((1, 2, 12, 10), 0.3))
    assert resized(flat.bfloat16(), (12, 10)).dtype == torch.bfloat16
    assert model(torch.randn(1, 3, 128, 96)).shape == (1, 5)
    with pytest.raises(SettingError, match=r"^Found images of 72 x 72 pixels .* 81 places in stage 0, for 8 slices\. Expected"):
        model(torch.randn(1, 3, 72, 72))
    larger = small(img_size=128)
    names = checkpoint_filter_fn(model.state_dict(), larger)
    larger.load_state_dict(names)
    assert names["pos_embed"].shape[-2:] == (16, 16)


def test_bad_input():
    with pytest.raises(SettingError, match=r"Found embed_dims=\(8, 20\)\. Expected multiples"):
        small(embed_dims=(8, 20), depths=(1, 1), num_heads=(1, 1), slices=(1, 1), later_slices=(1, 1))
    with pytest.raises(SettingError, match="Found embed_dims of 3, depths of 2"):
        small(depths=(1, 1))
    with pytest.raises(SettingError, match="Found 3 heads for a width of 8"):
        small(num_heads=(3, 2, 2))


@torch.no_grad()
def test_look_puts_permuted_slices_back_to_their_places():
    """How much each place is looked at, on average over its slice, in the first and second application of a block."""
    network = Network("sret_t", SMALL)
    model, x = network.build(), network.images(1)
    reading = look(model, x, noise=0, probes=["attention_maps"])
    assert [layer["windows"] for layer in reading.layers] == [8, 2, 4, 1, 1, 1]
    assert max(layer["error"] for layer in reading.layers) < 1e-5
    attention, inputs = model.stages[0].blocks[0].attn, []
    attention.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    model(x)
    for layer, order in enumerate((list(range(64)), eval_order(64))):
        slices = attention.slices[layer]
        q, k, _ = attention.qkv(inputs[layer][0]).chunk(3, dim=-1)
        expected = torch.zeros(64)
        for start in range(0, 64, 64 // slices):
            mates = order[start : start + 64 // slices]
            expected[mates] = (q[mates] @ k[mates].T / math.sqrt(8)).softmax(-1).mean(0)
        shown = torch.from_numpy(reading.maps["attention", layer][0]).flatten()
        torch.testing.assert_close(shown, expected, rtol=0, atol=expected.max().item() / 500)
        assert expected.std() > 0.2 * expected.mean()  # far from equal shares
