import pytest
import torch
from timm.models._manipulate import group_with_matcher
from torch import nn

from vitreous.base.errors import SettingError
from vitreous.layers.pyramid import (
    DepthwiseConv,
    Pool,
    Pyramid,
    Stage,
    check_stages,
    conv_norm,
    head_width,
    to_picture,
    to_tokens,
)


class Mean(nn.Module):
    """x + W mean(x) over all tokens."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, grid):
        assert x.shape[1] in (grid[0] * grid[1], grid[0] * grid[1] + 2)
        return x + self.proj(x.mean(1, keepdim=True))


def network(**settings):
    torch.manual_seed(0)
    first = Stage(nn.Identity(), [Mean(4), Mean(4)], nn.LayerNorm(4))
    second = Stage(conv_norm(4, 6, stride=2), [Mean(6)], cls_token=nn.Parameter(torch.zeros(1, 2, 6)))
    pool = Pool("token", prefix=2, after=nn.LayerNorm(6))
    return Pyramid(conv_norm(3, 4, 5, 4, act=nn.ReLU), [first, second], (4, 6), pool, num_classes=5, **settings).eval()


def images(height=16, width=24):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolution_as_loops(stride):
    layer = DepthwiseConv(2, kernel=3, stride=stride, norm=nn.BatchNorm2d).double().eval()
    nn.init.normal_(layer.norm.running_mean)
    x, (h, w) = torch.randn(1, 1 + 15, 2, dtype=torch.float64), (3, 5)
    out = layer(x, (h, w))
    rows, columns = -(-h // stride), -(-w // stride)
    assert out.shape == (1, 1 + rows * columns, 2)
    assert torch.equal(out[:, 0], x[:, 0])
    for d in range(2):
        for i in range(rows):
            for j in range(columns):
                value = layer.conv.bias[d].clone()
                for a in (-1, 0, 1):
                    for b in (-1, 0, 1):
                        y, z = i * stride + a, j * stride + b
                        if 0 <= y < h and 0 <= z < w:
                            value += layer.conv.weight[d, 0, a + 1, b + 1] * x[0, 1 + y * w + z, d]
                expected = (value - layer.norm.running_mean[d]) / (1 + 1e-5) ** 0.5
                assert abs(out[0, 1 + i * columns + j, d] - expected) < 1e-12


def test_convolution_norm_and_activation_in_this_order():
    layers = conv_norm(3, 4, 5, 2, norm=nn.BatchNorm2d, act=nn.GELU, groups=1, bias=False)
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.BatchNorm2d, nn.GELU]
    assert layers(images(9, 8)).shape == (2, 4, 5, 4)
    assert layers[0].bias is None
    assert [type(layer) for layer in conv_norm(3, 4, norm=None)] == [nn.Conv2d]


def test_tokens_are_the_places_in_raster_order():
    picture = torch.arange(12.0).view(1, 2, 2, 3)
    tokens = to_tokens(picture)
    assert tokens[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(to_picture(tokens, (2, 3)), picture)


def test_the_pass_by_hand():
    model, x = network(), images()
    first, second = model.stages
    picture = model.patch_embed(x)
    tokens = picture.flatten(2).mT
    for block in first.blocks:
        tokens = tokens + block.proj(tokens.mean(1, keepdim=True))
    tokens = nn.functional.layer_norm(tokens, (4,))
    picture = second.downsample(tokens.mT.reshape(2, 4, 4, 6))
    tokens = torch.cat([second.cls_token.expand(2, 2, 6), picture.flatten(2).mT], 1)
    tokens = tokens + second.blocks[0].proj(tokens.mean(1, keepdim=True))
    torch.testing.assert_close(model.forward_features(x), tokens)
    logits = model.head(nn.functional.layer_norm(tokens[:, 0], (6,)))
    torch.testing.assert_close(model(x), logits)
    with torch.no_grad():
        second.cls_token.zero_()
    assert not torch.allclose(model(x), logits)  # the class tokens count


def test_pools():
    x = torch.randn(2, 7, 3)
    patches = x[:, 2:]
    expected = {"avg": patches.mean(1), "max": patches.amax(1), "token": x[:, 0], "": x}
    for name, value in expected.items():
        torch.testing.assert_close(Pool(name, prefix=2)(x), value)
    twice = Pool("avg", before=nn.Linear(3, 4), after=nn.Linear(4, 5))
    torch.testing.assert_close(twice(x), twice.after(twice.before(x).mean(1)))
    with pytest.raises(SettingError, match=r"Found global_pool='token'.*with 0 prefix tokens"):
        Pool("token")
    model = network()
    model.reset_classifier(3, "avg")
    features = model.forward_features(images())
    torch.testing.assert_close(model(images()), model.head(model.pool.after(features[:, 2:].mean(1))))


def test_layers_from_stem_to_head():
    model = network()
    fine = group_with_matcher(model.named_parameters(), model.group_matcher())
    layers = [sorted({".".join(name.split(".")[:4]) for name in names}) for names in fine.values()]
    assert layers[0] == sorted(["patch_embed.0.weight", "patch_embed.0.bias", "patch_embed.1.weight", "patch_embed.1.bias"])
    assert layers[1] == ["stages.0.blocks.0"]
    assert layers[2] == ["stages.0.blocks.1", "stages.0.norm.bias", "stages.0.norm.weight"]
    assert layers[3] == ["stages.1.blocks.0", "stages.1.cls_token", "stages.1.downsample.0", "stages.1.downsample.1"]
    assert layers[4] == ["head.bias", "head.weight", "pool.after.bias", "pool.after.weight"]
    assert len(group_with_matcher(model.named_parameters(), model.group_matcher(coarse=True))) == 4
    assert model.no_weight_decay() == {"stages.1.cls_token"}


def test_start_of_the_weights():
    model = network()
    assert (model.head.bias == 0).all()
    assert 0 < model.head.weight.abs().max() < 0.1
    assert 0 < model.stages[1].cls_token.abs().max() < 0.1
    assert model.patch_embed[0].weight.abs().max() > 0.1  # PyTorch's start: within 1 / sqrt(75)


def test_stages_that_are_not_asked_for_do_not_run():
    model, calls = network(), []
    model.stages[1].register_forward_hook(lambda *_: calls.append(1))
    final, (picture,) = model.forward_intermediates(images(), indices=[0], stop_early=True)
    torch.testing.assert_close(final, to_tokens(picture))
    assert not calls
    assert model.prune_intermediate_layers([0]) == [0]
    assert len(model.stages) == 1
    assert model.forward(images()).shape == (2, 24, 4)  # no pool and no head any more


def test_bad_input():
    with pytest.raises(SettingError, match=r"Found dims of 3, depths of 2 stages\. Expected equally many"):
        check_stages(dims=(1, 2, 3), depths=(1, 2))
    with pytest.raises(SettingError, match=r"Found num_heads=7\. Expected a list with a value per stage"):
        check_stages(dims=(1, 2, 3), num_heads=7)
    with pytest.raises(SettingError, match="Found 3 heads for a width of 8"):
        head_width(8, 3)
    with pytest.raises(SettingError, match="Found output_fmt='NLC'"):
        network().forward_intermediates(images(), output_fmt="NLC")
