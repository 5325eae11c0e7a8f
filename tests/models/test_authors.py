"""Checkpoints under the names and in the shapes of the authors' own code, against their networks written out by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from vitreous import graft, load, load_weights, save
from vitreous.base.errors import DataError

CLASSES, WIDTH, HEADS, SIZE, PATCH, DEPTH = 3, 24, 2, 16, 4, 2
PLACES = (SIZE // PATCH) ** 2
NET = dict(img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, num_heads=HEADS, depth=DEPTH, num_classes=CLASSES)


def drawn(shapes):
    """{name: random tensor}; variances are positive, counts whole."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {name: 0.5 + tensors[name].abs() for name in tensors if name.endswith("running_var")}
    return tensors | {name: torch.tensor(7) for name in tensors if name.endswith("num_batches_tracked")}


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name):
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def images(channels=3):
    return torch.rand(2, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


class Theirs:
    """The authors' forward pass, on a table of their names."""

    def __init__(self, tensors, eps):
        self.t, self.eps = tensors, eps

    def linear(self, name, x):
        return F.linear(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"])

    def norm(self, name, x):
        return F.layer_norm(x, (WIDTH,), self.t[f"{name}.weight"], self.t[f"{name}.bias"], self.eps)

    def heads(self, x):
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def weigh(self, q, k, v):
        return ((q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def class_first(self, patches):
        return torch.cat([self.t["cls_token"].expand(len(patches), -1, -1), patches], 1)


# -- SVDA --------------------------------------------------------------------------------------------------------------


def svda_shapes(arm):
    shapes = {"cls_token": (1, 1, WIDTH), "embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "embed.proj.bias": (WIDTH,)}
    for i in range(DEPTH):
        block = f"blocks.{i}"
        if arm == "svda":
            for name in ("Wq", "Wk", "Wv", "Wo"):
                shapes |= linear(f"{block}.attn.{name}", WIDTH, WIDTH)
            shapes[f"{block}.attn.sigmas"] = (HEADS, WIDTH // HEADS)
        else:
            shapes |= {f"{block}.attn.mha.in_proj_weight": (3 * WIDTH, WIDTH), f"{block}.attn.mha.in_proj_bias": (3 * WIDTH,)}
            shapes |= linear(f"{block}.attn.mha.out_proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}.ff.0", 4 * WIDTH, WIDTH) | linear(f"{block}.ff.2", WIDTH, 4 * WIDTH)
        shapes |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
    return shapes | norm("norm") | linear("head", CLASSES, WIDTH)


class SVDA(Theirs):
    def attention(self, block, x):
        if f"{block}.attn.sigmas" in self.t:
            q, k, v = (self.heads(self.linear(f"{block}.attn.{name}", x)) for name in ("Wq", "Wk", "Wv"))
            q = F.normalize(q, dim=-1) * self.t[f"{block}.attn.sigmas"][:, None]
            return self.linear(f"{block}.attn.Wo", self.weigh(q, F.normalize(k, dim=-1), v))
        joint = F.linear(x, self.t[f"{block}.attn.mha.in_proj_weight"], self.t[f"{block}.attn.mha.in_proj_bias"])
        return self.linear(f"{block}.attn.mha.out_proj", self.weigh(*map(self.heads, joint.chunk(3, -1))))

    def __call__(self, x):
        x = F.conv2d(x, self.t["embed.proj.weight"], self.t["embed.proj.bias"], stride=PATCH).flatten(2).mT
        x = self.class_first(x)
        for i in range(DEPTH):
            block = f"blocks.{i}"
            x = self.norm(f"{block}.norm1", x + self.attention(block, x))
            x = self.norm(f"{block}.norm2", x + self.linear(f"{block}.ff.2", F.gelu(self.linear(f"{block}.ff.0", x))))
        return self.linear("head", self.norm("norm", x[:, 0]))


@pytest.mark.parametrize("arm", ["svda", "plain"])
def test_svda_and_its_plain_arm(tmp_path, arm):
    tensors = drawn(svda_shapes(arm))
    torch.save({"model_state_dict": tensors, "epoch": 3}, tmp_path / "theirs.pth")
    model = timm.create_model("scratch_vit_patch4_32", **NET).eval()
    if arm == "svda":
        graft(model, "svda")
    lines = []
    load_weights(model, tmp_path / "theirs.pth", say=lines.append)
    torch.testing.assert_close(model(images()), SVDA(tensors, 1e-5)(images()), atol=1e-5, rtol=1e-5)
    changed = {"svda": 2 + DEPTH * (4 + 2 + 2 + 1), "plain": 2 + DEPTH * (4 + 2 + 2)}[arm]
    assert lines[-1].startswith(f"Weights: {changed} of {len(model.state_dict())} tensors have other names here")
    save(model, tmp_path / "ours")
    assert torch.equal(load(tmp_path / "ours")(images()), model(images()))


# -- ViTs with other names ---------------------------------------------------------------------------------------------


def vit_shapes(attention=("qkv",), mlp=("mlp.fc1", "mlp.fc2")):
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + PLACES, WIDTH)}
    for i in range(DEPTH):
        block = f"blocks.{i}"
        for name in attention:
            shapes |= linear(f"{block}.attn.{name}", 3 * WIDTH // len(attention), WIDTH)
        shapes |= linear(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}.{mlp[0]}", 4 * WIDTH, WIDTH) | linear(f"{block}.{mlp[1]}", WIDTH, 4 * WIDTH)
        shapes |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
    return shapes | norm("norm")


class PreNorm(Theirs):
    attention, mlp = ("qkv",), ("mlp.fc1", "mlp.fc2")

    def beside(self, block, x):
        return 0

    def tokens(self, x):
        for i in range(DEPTH):
            block = f"blocks.{i}"
            y = self.norm(f"{block}.norm1", x)
            parts = [self.linear(f"{block}.attn.{name}", y) for name in self.attention]
            q, k, v = map(self.heads, parts if len(parts) == 3 else parts[0].chunk(3, -1))
            x = x + self.linear(f"{block}.attn.proj", self.weigh(q, k, v))
            y = F.gelu(self.linear(f"{block}.{self.mlp[0]}", self.norm(f"{block}.norm2", x)))
            x = x + self.linear(f"{block}.{self.mlp[1]}", y) + self.beside(block, x)
        return self.norm("norm", x)[:, 0]


class AdaptFormer(PreNorm):
    attention, mlp = ("q_proj", "k_proj", "v_proj"), ("fc1", "fc2")

    def beside(self, block, x):
        return 0.1 * self.linear(f"{block}.adaptmlp.up_proj", F.relu(self.linear(f"{block}.adaptmlp.down_proj", x)))

    def __call__(self, x):
        x = F.conv2d(x, self.t["patch_embed.proj.weight"], self.t["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
        x = self.tokens(self.class_first(x) + self.t["pos_embed"])
        x = (x - self.t["head.0.running_mean"]) / (self.t["head.0.running_var"] + 1e-6).sqrt()
        return self.linear("head.1", x)


def adaptformer_tensors():
    shapes = vit_shapes(AdaptFormer.attention, AdaptFormer.mlp) | linear("head.1", CLASSES, WIDTH)
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    for i in range(DEPTH):
        shapes |= linear(f"blocks.{i}.adaptmlp.down_proj", 5, WIDTH) | linear(f"blocks.{i}.adaptmlp.up_proj", WIDTH, 5)
    shapes |= {"head.0.running_mean": (WIDTH,), "head.0.running_var": (WIDTH,), "head.0.num_batches_tracked": ()}
    return drawn(shapes)


def test_adaptformer_with_its_batch_norm(tmp_path):
    tensors = adaptformer_tensors()
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "theirs.pth")
    model = graft(timm.create_model("vit_tiny_patch16_224", **NET).eval(), "adaptformer:bottleneck=5,batch_norm=true")
    load_weights(model, tmp_path / "theirs.pth")
    torch.testing.assert_close(model(images()), AdaptFormer(tensors, 1e-6)(images()), atol=1e-5, rtol=1e-5)


def test_what_has_no_place_is_named_and_counted(tmp_path):
    """A factor that they learned, and their batch norm, in a model without: refused, or left out and listed."""
    tensors = adaptformer_tensors() | {"blocks.0.adaptmlp.scale": torch.ones(1)}
    torch.save({"model": tensors}, tmp_path / "theirs.pth")
    model = graft(timm.create_model("vit_tiny_patch16_224", **NET), "adaptformer:bottleneck=5")
    with pytest.raises(DataError, match=r"Found 3 differences: unexpected .*--partial-weights"):
        load_weights(model, tmp_path / "theirs.pth", say=lambda line: None)
    lines = []
    load_weights(model, tmp_path / "theirs.pth", partial=True, say=lines.append)
    count = len(model.state_dict())
    assert f"{count} of the model's {count} tensors" in lines[-1]
    assert "blocks.0.adaptmlp.scale" in lines[-1]


class ChannelViT(PreNorm):
    def __call__(self, x):
        kernel, bias = self.t["patch_embed.proj.weight"], self.t["patch_embed.proj.bias"]
        x = F.conv3d(x[:, None], kernel, bias, stride=(1, PATCH, PATCH))  # (B, D, C, h, w)
        names = self.t.get("patch_embed.channel_embed")
        x = x + (self.t["patch_embed.channel_embed.weight"].T[None, :, :, None, None] if names is None else names)
        place = self.t["pos_embed"]
        place = torch.cat([place[:, :1], *[place[:, 1:]] * 5], 1)
        return self.tokens(self.class_first(x.flatten(2).mT) + place)


@pytest.mark.parametrize("sampling", [True, False])
@pytest.mark.parametrize("classifier", [True, False])
def test_channelvit(tmp_path, sampling, classifier):
    shapes = vit_shapes() | {"patch_embed.proj.weight": (WIDTH, 1, 1, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    if sampling:
        shapes["patch_embed.channel_embed.weight"] = (5, WIDTH)
    else:
        shapes["patch_embed.channel_embed"] = (1, WIDTH, 5, 1, 1)
    tensors = drawn(shapes)
    expected = ChannelViT(tensors, 1e-6)(images(5))
    stored = tensors
    if classifier:
        head = drawn(linear("classifier", CLASSES, WIDTH))
        stored = {f"backbone.{name}": value for name, value in tensors.items()} | head
        expected = F.linear(expected, head["classifier.weight"], head["classifier.bias"])
    torch.save(stored, tmp_path / "theirs.pth")
    net = NET | {"num_classes": CLASSES if classifier else 0, "in_chans": 5}
    model = graft(timm.create_model("vit_tiny_patch16_224", **net).eval(), "channelvit")
    load_weights(model, tmp_path / "theirs.pth", say=lambda line: None)
    torch.testing.assert_close(model(images(5)), expected, atol=1e-5, rtol=1e-5)


def test_evit_has_the_names_of_timm(tmp_path):
    shapes = vit_shapes() | linear("head", CLASSES, WIDTH)
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    torch.save({"model": drawn(shapes), "model_ema": drawn(shapes)}, tmp_path / "theirs.pth")
    model = graft(timm.create_model("deit_tiny_patch16_224", **NET).eval(), "evit:layers=0+1")
    lines = []
    load_weights(model, tmp_path / "theirs.pth", say=lines.append)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in drawn(shapes).items())
    assert not any("other names" in line for line in lines)
