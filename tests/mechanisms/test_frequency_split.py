"""The frequency split: what is folded equals what is not, its attention as loops, its frequencies, sizes and refusals."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitreous import FrequencySplit, check, graft, new_parameters
from vitreous.base.errors import SettingError
from vitreous.mechanisms.mixer.frequency_split import ParallelConv, in_fewer_groups, pooled

SMALL = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | options).double().eval()


def drawn(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pictures(height=12, width=20):
    return drawn(2, 3, height, width)


def moved(module):
    """Statistics and factors of norms away from their start."""
    generator = torch.Generator().manual_seed(5)
    for conv in (m for m in module.modules() if isinstance(m, ParallelConv)):
        for tensor in (conv.scale, conv.shift, conv.mean):
            tensor.data.normal_(generator=generator)
        conv.variance.uniform_(0.3, 3, generator=generator)
    return module


@pytest.mark.parametrize(
    ("shapes", "identity"), [([(3, 2), (3, 8), (1, 2)], True), ([(1, 1), (1, 4)], False), ([(5, 4), (3, 8), (1, 4)], True)]
)
def test_folded_equals_unfolded(shapes, identity):
    conv = moved(ParallelConv(8, shapes, identity, torch.Generator().manual_seed(0))).eval()
    x = drawn(2, 8, 5, 6)
    assert (conv(x.float()) - conv.branches(x.float())).abs().max() < 1e-5
    conv.double()
    expected = conv.branches(x)
    torch.testing.assert_close(conv(x), expected, atol=1e-12, rtol=1e-12)
    for scale in conv.scale:  # each branch takes part
        start = scale.detach().clone()
        scale.data.zero_()
        assert (conv(x) - expected).abs().max() > 1e-3
        scale.data.copy_(start)


def test_training_takes_the_statistics_of_the_batch():
    conv, x = ParallelConv(8, [(3, 2), (1, 8)], True, torch.Generator().manual_seed(0)).double(), 3 + drawn(4, 8, 5, 6)
    y = conv.train()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(8).double(), atol=1e-10, rtol=0)
    assert not torch.equal(conv.mean[2], torch.zeros(8).double())
    assert (conv.eval()(x) - y).abs().max() > 0.1


@pytest.mark.parametrize(("groups", "fewer"), [(4, 1), (4, 2), (8, 2), (2, 2)])
def test_fewer_groups_are_the_same_convolution(groups, fewer):
    weight, x = drawn(8, 8 // groups, 3, 3), drawn(1, 8, 4, 4, seed=2)
    wide = in_fewer_groups(weight, groups, fewer)
    assert wide.shape == (8, 8 // fewer, 3, 3)
    expected = nn.functional.conv2d(x, weight, groups=groups)
    torch.testing.assert_close(nn.functional.conv2d(x, wide, groups=fewer), expected, atol=1e-13, rtol=1e-13)


def test_attention_to_the_smaller_picture():
    mixer = graft(vit(), FrequencySplit(heads=2, reduction=2)).blocks[0].attn
    x = drawn(1, 3, 5, 12)
    means = torch.stack([x[0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1)) for r in range(2) for c in range(3)])
    torch.testing.assert_close(pooled(x, 2)[0].flatten(0, 1), means)
    q = (x @ mixer.q.weight.T)[0].flatten(0, 1)
    k, v = (means @ mixer.kv.weight.T).chunk(2, -1)
    expected = torch.zeros(15, 12, dtype=torch.float64)
    for h in (slice(0, 6), slice(6, 12)):
        for n in range(15):
            weights = torch.stack([q[n, h] @ k[m, h] / 6**0.5 for m in range(6)]).softmax(0)
            expected[n, h] = sum(weights[m] * v[m, h] for m in range(6))
    torch.testing.assert_close(mixer.attend(x)[0].flatten(0, 1), expected, atol=1e-12, rtol=1e-12)


def test_mixer_is_the_two_branches_joined():
    mixer, x = moved(graft(vit(), FrequencySplit(high=1 / 3)).blocks[0].attn), drawn(2, 3, 5, 24)
    high, low = x[..., :8], x[..., 8:]
    joined = torch.cat([mixer.local.branches(high.permute(0, 3, 1, 2)), mixer.attend(low).permute(0, 3, 1, 2)], 1)
    expected = mixer.join.branches(joined).permute(0, 2, 3, 1)
    torch.testing.assert_close(mixer.mix(x), expected, atol=1e-12, rtol=1e-12)


def test_the_low_branch_does_not_see_what_the_pool_takes_away():
    """A chessboard has mean 0 in 2 x 2 places: keys and values of the low branch are 0, the high branch answers."""
    mixer = graft(vit(), FrequencySplit()).blocks[0].attn
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(2, 3)[None, :, :, None]
    x = board * drawn(12)
    assert mixer.attend(x).abs().max() < 1e-14
    assert mixer.local(x.permute(0, 3, 1, 2)).abs().max() > 0.1
    assert mixer.attend(x + drawn(12, seed=3)).abs().max() > 0.1


def test_in_a_model_of_any_size():
    model = check(graft(vit(dynamic_img_size=True), "frequency_split:reduction=3"), pictures())
    assert model(pictures(20, 8)).isfinite().all()
    assert graft(vit(dynamic_img_size=True), "frequency_split:reduction=9")(pictures(4, 8)).isfinite().all()
    assert {"blocks.0.attn.local.weight_2", "blocks.0.attn.join.scale", "blocks.0.attn.kv.weight"} <= set(new_parameters(model))


def test_branches_are_torchs_modules():
    conv, x = moved(ParallelConv(8, [(3, 2), (1, 4)], True, torch.Generator().manual_seed(0)).double()), drawn(2, 8, 5, 6)
    expected = 0
    for i, (size, groups) in enumerate([(3, 2), (1, 4), (1, 8)]):
        layer = nn.Conv2d(8, 8, size, padding=size // 2, groups=groups, bias=False).double()
        norm = nn.BatchNorm2d(8).double()
        layer.weight.data.copy_(conv.weights()[i][0])
        for tensor, value in ((norm.weight, conv.scale), (norm.bias, conv.shift), (norm.running_mean, conv.mean)):
            tensor.data.copy_(value[i])
        norm.running_var.copy_(conv.variance[i])
        expected = expected + norm.train()(layer(x))
        running = norm.running_mean
    torch.testing.assert_close(conv.train()(x), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(conv.mean[2], running)


def test_bad_settings():
    for settings in ({"high": 0.0}, {"high": 1.0}, {"kernel": 2}, {"groups": 0}, {"reduction": 0}, {"heads": 0}):
        with pytest.raises(SettingError, match=r"^Found .*Expected .*\. \w"):
            FrequencySplit(**settings)
    for text in ("heads=5", "groups=5", "high=0.01"):
        with pytest.raises(SettingError, match=r"^Found \d+ channels for convolutions and .*Expected .*\. \w"):
            graft(vit(), f"frequency_split:{text}")
