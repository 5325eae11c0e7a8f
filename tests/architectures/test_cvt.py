import math
import re

import pytest
import timm
import torch
from torch import nn
from transformers import CvtConfig, CvtForImageClassification

from architectures.released import fill, pictures
from vitreous.architectures.cvt import ConvAttention, checkpoint_filter_fn
from vitreous.base.errors import SettingError
from vitreous.lens.look import look
from vitreous.models.create import create_model
from vitreous.testing.networks import Network

SMALL = {"embed_dims": (8, 12, 16), "depths": (1, 1, 2), "num_heads": (1, 3, 2), "num_classes": 5}
SMALL_NETWORKS = {"cvt_13": SMALL}
RELEASED = {  # names of ours in the authors' code
    r"^patch_embed\.": "stage0.patch_embed.",
    r"^stages\.(\d)\.downsample\.": r"stage\1.patch_embed.",
    r"^stages\.(\d)\.": r"stage\1.",
    r"\.attn\.conv_([qkv])\.norm\.": r".attn.conv_proj_\1.bn.",
    r"\.attn\.conv_([qkv])\.": r".attn.conv_proj_\1.",
    r"\.attn\.([qkv])\.": r".attn.proj_\1.",
    r"^pool\.before\.": "norm.",
}
OF_TRANSFORMERS = {  # names of theirs in ours
    r"^cvt\.encoder\.stages\.0\.embedding\.convolution_embeddings\.": "patch_embed.",
    r"^cvt\.encoder\.(stages\.\d)\.embedding\.convolution_embeddings\.": r"\1.downsample.",
    r"^cvt\.encoder\.(stages\.\d)\.layers\.": r"\1.blocks.",
    r"^cvt\.encoder\.": "",
    r"\.projection\.": ".proj.",
    r"\.normalization\.": ".norm.",
    r"\.attention\.attention\.convolution_projection_([qkv])\w*\.convolution_projection\.convolution\.": r".attn.conv_\1.conv.",
    r"\.attention\.attention\.convolution_projection_([qkv])\w*\.convolution_projection\.norm\.": r".attn.conv_\1.norm.",
    r"\.attention\.attention\.projection_([qkv])\w*\.": r".attn.\1.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"^layernorm\.": "pool.before.",
    r"^classifier\.": "head.",
}


def substituted(name, patterns):
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name


def filled(model):
    """Load the weights of the stored logits, through the authors' names."""
    released = {substituted(name, RELEASED): value for name, value in model.state_dict().items()}
    weights = {name: value if "num_batches" in name else fill(name, value.shape) for name, value in released.items()}
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    return model.eval()


@pytest.mark.parametrize(("name", "count"), [("cvt_13", 19_997_480), ("cvt_21", 31_622_696)])
def test_has_the_published_parameters(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


@torch.no_grad()
def test_equals_the_released_network():
    """Logits of the authors' code with the same weights, which have QuickGELU."""
    model = filled(timm.create_model("cvt_13"))
    logits = model(pictures(2, 224))[0]
    torch.testing.assert_close(logits[:4], torch.tensor([0.59650, 0.58308, 2.09100, 0.94543]), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.stack([logits.mean(), logits.std()]), torch.tensor([-0.10563, 1.19727]), rtol=0, atol=1e-4)


@torch.no_grad()
def test_equals_transformers_with_gelu():
    """In float64, with weights so large that each part moves the logits."""
    zeros = [0.0] * 3
    config = CvtConfig(
        embed_dim=[8, 12, 16], depth=[1, 2, 3], num_heads=[1, 3, 2], num_labels=5, drop_rate=zeros, drop_path_rate=zeros
    )
    theirs = CvtForImageClassification(config).double().eval()
    for name, value in theirs.state_dict().items():
        if "num_batches" not in name:
            value.copy_(fill(name, value.shape) * (5 if value.ndim > 1 else 1))
    weights = {substituted(name, OF_TRANSFORMERS): value for name, value in theirs.state_dict().items()}
    x = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = theirs(x).logits

    def difference(act_layer="gelu", changed=""):
        model = timm.create_model("cvt_13", act_layer=act_layer, **(SMALL | {"depths": (1, 2, 3)})).double().eval()
        model.load_state_dict({name: value * 0 if changed and changed in name else value for name, value in weights.items()})
        return (model(x) - expected).abs().max()

    assert difference() < 1e-12
    assert difference("quick_gelu") > 1e-3  # that of the authors is another activation
    for part in ("conv_q.conv", "conv_k.conv", "conv_v.conv", ".q.", "attn.proj.", "mlp.", "cls_token", "downsample.norm"):
        assert difference(changed=part) > 1e-4, part


@torch.no_grad()
def test_attention_as_loops():
    dim, heads, (h, w) = 4, 2, (3, 4)
    attention = ConvAttention(dim, heads, kv_stride=2).double().eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 1 + h * w, dim, dtype=torch.float64)
    convolved = {
        name: torch.cat([x[:, :1], picture(attention.get_submodule(f"conv_{name}"), x[:, 1:], h, w, stride)], 1)[0]
        for name, stride in (("q", 1), ("k", 2), ("v", 2))
    }
    q, k, v = (attention.get_submodule(name)(convolved[name]) for name in "qkv")
    assert (len(q), len(k)) == (1 + 12, 1 + 4)
    rows = []
    for n in range(len(q)):
        parts = []
        for head in range(heads):
            at = slice(2 * head, 2 * head + 2)
            scores = [math.exp(sum(q[n, at] * key[at]) / math.sqrt(dim)) for key in k]  # the whole width, not the head's
            parts.append(sum(s / sum(scores) * value[at] for s, value in zip(scores, v, strict=True)))
        rows.append(attention.proj(torch.cat(parts)))
    assert (attention(x, (h, w))[0] - torch.stack(rows)).abs().max() < 1e-12


def picture(layer, patches, h, w, stride):
    """Depth-wise convolution and batch norm of one convolution in front of a projection, by torch's own functions."""
    grid = patches.mT.reshape(1, -1, h, w)
    out = nn.functional.conv2d(grid, layer.conv.weight, None, stride, 1, groups=grid.shape[1])
    norm = layer.norm
    out = nn.functional.batch_norm(out, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return out.flatten(2).mT


def test_grids_and_keys():
    model = timm.create_model("cvt_13", **SMALL).eval()
    keys = []
    for stage in model.stages:
        stage.blocks[0].attn.k.register_forward_hook(lambda module, inputs, out: keys.append(out.shape[1]))
    shapes = [tuple(x.shape[2:]) for x in model.forward_intermediates(torch.randn(1, 3, 224, 224), intermediates_only=True)]
    assert shapes == [(56, 56), (28, 28), (14, 14)]
    assert keys == [28**2, 14**2, 7**2 + 1]


def test_drop_path_of_the_last_stage_alone():
    model = timm.create_model("cvt_13", drop_path_rate=0.1, **SMALL)
    rates = [block.drop_path1.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0, 0, 0.1])


def test_bad_input():
    with pytest.raises(SettingError, match="Found embed_dims of 3, depths of 2, num_heads of 3 stages"):
        timm.create_model("cvt_13", depths=(1, 2))
    with pytest.raises(SettingError, match="Found global_pool='token'"):
        timm.create_model("cvt_13", class_token=False)
    model = timm.create_model("cvt_13", class_token=False, global_pool="avg", **SMALL).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_the_authors_file_loads_under_its_own_names(tmp_path):
    """Also for images of one channel, and whatever the classes are called."""
    source = timm.create_model("cvt_13", **SMALL).eval()
    released = {substituted(name, RELEASED): value for name, value in source.state_dict().items()}
    assert not {"patch_embed.proj.weight", "stages.1.downsample.proj.weight"} & set(released)
    torch.save(released, tmp_path / "cvt.pth")
    x, sizes = torch.randn(2, 3, 32, 32), {name: value for name, value in SMALL.items() if name != "num_classes"}
    model = create_model("cvt_13", weights=tmp_path / "cvt.pth", **sizes)
    assert torch.equal(model(x), source(x))
    grey = create_model("cvt_13", weights=tmp_path / "cvt.pth", channels=1, classes=("a", "b"), **sizes)
    assert grey(x[:, :1]).shape == (2, 2)
    torch.testing.assert_close(grey.patch_embed.proj.weight[:, 0], source.patch_embed.proj.weight.sum(1))


def test_look_reads_every_block():
    network = Network("cvt_13", SMALL)
    reading = look(network.build(), network.images(1), noise=0, probes=["attention_maps", "queries"])
    assert [layer["name"] for layer in reading.layers] == [
        f"stages.{i}.blocks.{j}.attn" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1))
    ]
    assert [(layer["queries"], layer["keys"]) for layer in reading.layers] == [(256, 64), (64, 16), (17, 5), (17, 5)]
    assert [layer["has_class"] for layer in reading.layers] == [False, False, True, True]
    assert max(layer["error"] for layer in reading.layers) < 1e-5
