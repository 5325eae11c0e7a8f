import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from vitreous import SVDA, check, graft, ungraft
from vitreous.hosts.block import halves_of

NETWORKS = {  # name, classes -> parameters of the paper's networks (as its experiments count them): plain, with SVDA
    ("scratch_vit_patch4_28", 10): (3_166_730, 3_167_754),
    ("scratch_vit_patch4_32", 10): (3_174_922, 3_175_946),
    ("scratch_vit_patch4_32", 100): (3_198_052, 3_199_076),
    ("scratch_vit_patch8_224", 100): (923_236, 924_004),
}
SMALL_NETWORKS = {"scratch_vit_patch4_28": {"img_size": 12, "embed_dim": 32, "num_heads": 4, "depth": 3}}


def count(model):
    return sum(p.numel() for p in model.parameters())


def small(**settings):
    torch.manual_seed(0)
    return timm.create_model("scratch_vit_patch4_28", img_size=12, embed_dim=32, num_heads=4, depth=3, **settings)


@pytest.mark.parametrize(("name", "classes"), NETWORKS)
def test_has_the_parameters_of_the_paper(name, classes):
    model = timm.create_model(name, num_classes=classes)
    plain = count(model)
    assert (plain, count(graft(model, SVDA()))) == NETWORKS[name, classes]
    ungraft(model)
    assert count(model) == plain


class PeerBlock(nn.Module):
    """The post-norm block written out on torch's own multi-head attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        x = self.norm1(x + self.attn(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.mlp(x))


class Peer(nn.Module):
    """The whole network: patches by `unfold` and a linear layer, class token in front, head on it."""

    def __init__(self, patch, channels, width, heads, depth, classes):
        super().__init__()
        self.unfold = nn.Unfold(patch, stride=patch)
        self.embed = nn.Linear(channels * patch**2, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(PeerBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images):
        x = self.embed(self.unfold(images).transpose(1, 2))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


RENAMED = {
    "cls": "cls_token",
    "embed.": "patch_embed.proj.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.fc2.",
}


def our_name(name):
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def test_equals_a_network_of_multihead_attention_with_the_same_weights():
    model = small(num_classes=7).double()
    peer = Peer(patch=4, channels=1, width=32, heads=4, depth=3, classes=7).double()
    ours, theirs = dict(model.named_parameters()), dict(peer.named_parameters())
    assert sorted(map(our_name, theirs)) == sorted(ours)
    with torch.no_grad():
        for name, value in theirs.items():
            value.copy_(ours[our_name(name)].view_as(value))

    images = torch.rand(3, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 6])
    logits, expected = model(images), peer(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    nn.functional.cross_entropy(logits, labels).backward()
    nn.functional.cross_entropy(expected, labels).backward()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[our_name(name)].grad.view_as(value), value.grad, rtol=0, atol=1e-12)


def test_starts_as_the_docstring_says():
    model = timm.create_model("scratch_vit_patch4_28")
    model.init_weights()
    assert torch.equal(model.cls_token, torch.zeros(1, 1, 256))
    for layer in (model.blocks[0].attn.qkv, model.head):  # PyTorch: uniform within 1 / sqrt(width), bias as well
        assert 0.9 / 16 < layer.weight.abs().max() <= 1 / 16
        assert 0.5 / 16 < layer.bias.abs().max() <= 1 / 16
    assert model.norm.eps == 1e-5
    assert model.pos_embed is None
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["mean"], config["std"]) == ((1, 28, 28), (0.0,), (1.0,))


def test_is_a_bag_of_patches():
    model = small().double().eval()
    image = torch.rand(1, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).reshape(9, 4, 4)
    shuffled = patches[torch.randperm(9, generator=torch.Generator().manual_seed(3))]
    shuffled = shuffled.reshape(3, 3, 4, 4).permute(0, 2, 1, 3).reshape(1, 1, 12, 12)
    assert not torch.equal(image, shuffled)
    torch.testing.assert_close(model(image), model(shuffled), rtol=0, atol=1e-12)


def test_timm_paths_agree():
    model = small().train()
    images = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(4))
    features = model.forward_features(images)
    features.square().sum().backward()
    gradient = model.patch_embed.proj.weight.grad.clone()

    model.zero_grad()
    model.set_grad_checkpointing(True)
    checkpointed = model.forward_features(images)
    checkpointed.square().sum().backward()
    torch.testing.assert_close(checkpointed, features)
    torch.testing.assert_close(model.patch_embed.proj.weight.grad, gradient)
    model.set_grad_checkpointing(False)

    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, features)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 3, 3)] * 3
    everything = torch.ones(10, 10, dtype=torch.bool)
    torch.testing.assert_close(model.forward_features(images, attn_mask=everything), features)
    causal = model.forward_features(images, is_causal=True)
    torch.testing.assert_close(model.forward_features(images, attn_mask=everything.tril()), causal)
    assert not torch.allclose(causal, features)


def test_other_heads_sizes_and_channels():
    model = small(num_classes=0)
    images = torch.rand(2, 1, 12, 12)
    assert model(images).shape == (2, 32)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    assert small(in_chans=3, class_token=False, global_pool="avg")(torch.rand(2, 3, 12, 12)).shape == (2, 10)
    assert timm.create_model("scratch_vit_patch4_32", features_only=True)(torch.rand(1, 3, 32, 32))[-1].shape[1] == 256


def test_importing_the_package_registers_the_networks():
    code = "import timm, vitreous.architectures; print(*timm.list_models('scratch_vit*'))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["scratch_vit_patch4_28", "scratch_vit_patch4_32", "scratch_vit_patch8_224"]


@pytest.mark.parametrize("text", ["adaptformer:dropout=0.0", "evit:keep=0.5,layers=1", "token_merging:tokens=2"])
def test_mechanisms_between_the_halves_of_its_blocks(text):
    """The block brings its halves along: what changes nothing leaves it bit for bit, and what changes tokens runs."""
    model, x = small().eval(), torch.rand(2, 1, 12, 12)
    block, halves = model.blocks[0], halves_of(model.blocks[0])
    tokens = torch.randn(2, 10, 32)
    assert torch.equal(halves.mlp(block, halves.attention(block, tokens)), block(tokens))
    plain = model(x)
    check(graft(model, text), x)
    assert torch.equal(model(x), plain) == text.startswith("adaptformer")
    ungraft(model)
    check(graft(model, {"evit": "evit:keep=1", "token_merging": "token_merging:tokens=0"}.get(text.partition(":")[0], text)), x)
    assert torch.equal(model(x), plain)
