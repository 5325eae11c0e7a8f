"""CI2P against its formulas as loops, numbers of the released encoder, and the published counts."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from vitreous import CI2P, check, graft, new_parameters, ungraft
from vitreous.base.errors import GraftError, HostError, SettingError
from vitreous.bench.operation_count import operations
from vitreous.hosts.host import embed
from vitreous.layers.stream import to_grid
from vitreous.mechanisms.embed.ci2p import GDN, LEAST, PEDESTAL, Unit, divided, squared

SMALL = {"img_size": (32, 48), "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
TEXT = "ci2p:stride=8,channels=4,latent=6,expansion=2"


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | options).double().eval()


def drawn(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_gdn_is_the_formula():
    x, gdn = drawn(2, 4, 3, 2), GDN(4, dtype=torch.float64)
    gdn.beta, gdn.gamma = drawn(4, seed=2), drawn(4, 4, seed=3)
    found = gdn(x)

    def number(stored, least):
        return max(stored, math.sqrt(least + 2**-36)) ** 2 - 2**-36

    for b in range(2):
        for i in range(4):
            for row in range(3):
                for column in range(2):
                    total = number(gdn.beta[i].item(), 1e-6)
                    for j in range(4):
                        total += number(gdn.gamma[i, j].item(), 0.0) * x[b, j, row, column].item() ** 2
                    expected = x[b, i, row, column].item() / math.sqrt(total)
                    assert found[b, i, row, column].item() == pytest.approx(expected, abs=1e-12)
    assert (divided(x, torch.ones(4).double(), torch.zeros(4, 4).double()) - x).abs().max() == 0
    stored = torch.tensor([-1.0, 0.0, 1e-9], dtype=torch.float64)
    assert squared(stored, LEAST).tolist() == pytest.approx([1e-6] * 3)
    assert squared(stored, 0.0).abs().max() < PEDESTAL * 1e-6


# What `FactorizedPrior(4, 6).double().g_a` of compressai 1.2.8 gives for the weights and the image below: mean and standard
# deviation of (1, 6, 2, 3) values, and two places of all channels.
RELEASED = (
    0.40322106215184866,
    3.005067147174148,
    [1.9237679373509888, -1.0260988641922242, -2.2428118071328305, -0.5838746404366544, 1.7307652656924142, 2.4050789065444675],
    [0.7247389932818982, 4.633537393245512, 4.7646265233505005, 0.9481298228536418, -3.7043972682837225, -4.704960547518593],
)


def released_weights():
    """Under the names of a compressor's file, with parts that are not the encoder's."""
    shapes = {"0": (4, 3), "1": 4, "2": (4, 4), "3": 4, "4": (4, 4), "5": 4, "6": (6, 4)}
    tensors, i = {}, 0
    for layer, size in shapes.items():
        names = (
            (("weight", (*size, 5, 5)), ("bias", size[:1])) if isinstance(size, tuple) else (("beta", (4,)), ("gamma", (4, 4)))
        )
        for name, shape in names:
            i += 1
            wave = torch.sin(7 * i * torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64))
            tensors[f"g_a.{layer}.{name}"] = (0.3 * wave if len(shape) == 4 else 0.5 * wave + 0.4).view(shape)
        tensors[f"g_a.{layer}.beta_reparam.pedestal"] = torch.zeros(1)
    return tensors | {"g_s.0.weight": torch.zeros(2), "entropy_bottleneck._offset": torch.zeros(2)}


def test_encoder_is_the_released_one():
    model = graft(vit(img_size=(64, 96)), CI2P(stride=32, channels=4, latent=6, expansion=2))
    ours = CI2P().renamed(released_weights() | {"head.bias": torch.ones(5).double()})
    _, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected
    assert set(ours) == {"head.bias", *(name for name in model.state_dict() if ".encoder." in name)}
    image = (torch.sin(torch.arange(3 * 32 * 48, dtype=torch.float64) * 0.37).view(1, 3, 32, 48) + 1) / 2
    latent = model.patch_embed.proj.encoder(image)
    mean, std, first, second = RELEASED
    assert latent.shape == (1, 6, 2, 3)
    assert latent.mean().item() == pytest.approx(mean, abs=1e-10)
    assert latent.std().item() == pytest.approx(std, abs=1e-10)
    assert latent[0, :, 0, 0].tolist() == pytest.approx(first, abs=1e-10)
    assert latent[0, :, 1, 2].tolist() == pytest.approx(second, abs=1e-10)


def test_the_encoder_gets_pixels_from_0_to_1():
    model = vit()
    model.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    proj, seen = graft(model, TEXT).patch_embed.proj, []
    proj.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pixels = torch.rand(1, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[name]).double().view(3, 1, 1) for name in ("mean", "std"))
    model((pixels - mean) / std)
    assert (seen[0] - pixels).abs().max() < 1e-6


@pytest.mark.parametrize(("outputs", "stride"), [(4, 1), (4, 2), (6, 1)])
def test_unit_is_an_inverted_residual(outputs, stride):
    unit, x = Unit(4, outputs, stride, 3, dtype=torch.float64).eval(), drawn(2, 4, 6, 8)
    for i, tensor in enumerate((*unit.parameters(), *unit.buffers())):
        tensor.data = drawn(*tensor.shape, seed=i).abs() if tensor.ndim == 1 else drawn(*tensor.shape, seed=i)

    def normed(y, norm):
        scale = norm.weight / (norm.running_var + 1e-5).sqrt()
        return (y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

    y = normed(torch.einsum("oc,bchw->bohw", unit.expand.weight[:, :, 0, 0], x), unit.norm1).clamp(0, 6)
    padded, rows, columns = F.pad(y, (1, 1, 1, 1)), range(0, 6, stride), range(0, 8, stride)
    y = torch.stack(
        [torch.stack([(padded[..., r : r + 3, c : c + 3] * unit.depthwise.weight[:, 0]).sum((2, 3)) for c in columns], -1)
         for r in rows], -2
    )  # fmt: skip
    y = normed(y, unit.norm2).clamp(0, 6)
    y = normed(torch.einsum("oc,bchw->bohw", unit.project.weight[:, :, 0, 0], y), unit.norm3)
    expected = x + y if (outputs, stride) == (4, 1) else y
    torch.testing.assert_close(unit(x), expected, atol=1e-10, rtol=1e-10)
    assert y.abs().max() > 0.1


def test_the_encoder_is_frozen_and_the_units_learn():
    model = graft(vit(), TEXT).train()
    proj = model.patch_embed.proj
    assert not list(proj.encoder.parameters())
    before = {name: value.clone() for name, value in proj.encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p.requires_grad_() for p in new_parameters(model).values()], lr=0.1)
    for _ in range(2):
        model(drawn(3, 3, 32, 48)).square().sum().backward()
        optimizer.step()
    assert all(p.grad.any() for p in proj.units.parameters())
    assert all(torch.equal(value, before[name]) for name, value in proj.encoder.state_dict().items())
    assert len(before) == 2 * 2 + 2
    for tensor in proj.encoder.buffers():  # each takes part
        found, kept = proj.eval()(drawn(1, 3, 32, 48)), tensor.clone()
        tensor.add_(0.5)
        assert (proj(drawn(1, 3, 32, 48)) - found).abs().max() > 1e-6
        tensor.copy_(kept)


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_each_token_covers_its_square_of_the_picture(stride):
    """Patches at a square of the picture move with it most; far from it none moves."""
    options = {"img_size": (96, 144), "class_token": False, "global_pool": "avg"}
    model = graft(vit(**options), CI2P(stride=stride, channels=4, latent=6, expansion=2), "gaussian_mask")
    x, moved = drawn(1, 3, 96, 144), drawn(1, 3, 96, 144)
    check(model, x)
    moved[..., :stride, -stride:] += 1  # the corner above, on the right
    tokens, state = (stream := embed(model, x)).x, stream.state
    assert state.grid == model.patch_embed.grid_size == (96 // stride, 144 // stride)
    change = to_grid((embed(model, moved).x - tokens).abs().sum(-1), state, state.grid, 0)[0]
    assert change[0, -1] > 1e-6
    assert change[:2, -2:].max() == change.max()
    # windows of 5 x 5 reach 2 places of the latent picture, those of 3 x 3 in the units 1 and 1: 2 patches
    assert change[4:].max() == change[:, :-4].max() == 0
    _, maps = model.forward_intermediates(x, output_fmt="NCHW")
    assert maps[-1].shape == (1, 12, *state.grid)


# -- published numbers -------------------------------------------------------------------------------------------------


def vit_b(**options):
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", img_size=256, **options).eval()


def blocks(tokens):
    """Multiply-adds of the blocks of ViT-B."""
    return 12 * (12 * tokens * 768**2 + 2 * tokens**2 * 768)


def test_numbers_of_the_paper():
    """256 patches become 64, 63.35 % fewer operations; 88.95 M numbers with the frozen ones, where the paper says 88.96 M."""
    patches = vit_b().patch_embed.num_patches
    before = 3 * 768 * 256**2 + blocks(patches + 1) + 768 * 1000
    model = graft(vit_b(class_token=False, global_pool="avg", fc_norm=False), CI2P())
    assert (patches, model.patch_embed.num_patches, model.patch_embed.grid_size) == (256, 64, (8, 8))
    proj = model.patch_embed.proj.eval()
    with torch.no_grad():
        after = operations(lambda: proj(torch.zeros(1, 3, 256, 256))).total / 2 + blocks(64) + 768 * 1000
    assert 1 - after / before == pytest.approx(0.6335, abs=1e-3)
    assert sum(t.numel() for t in proj.encoder.buffers()) == 1_493_312  # of bmshj2018_factorized(quality=5)
    assert sum(p.numel() for p in proj.units.parameters()) == 1_580_160
    numbers = sum(p.numel() for p in model.parameters()) + 1_493_312
    assert numbers == 88_947_624
    assert blocks(64) / blocks(257) == pytest.approx(0.239, abs=1e-3)


def test_default_stride_is_twice_the_hosts():
    model = graft(vit(), CI2P(channels=4, latent=6, expansion=2))
    assert model.patch_embed.patch_size == (8, 8)
    assert len(model.patch_embed.proj.encoder) == 3


def test_it_comes_first_and_comes_out():
    model = graft(vit(), TEXT, "svda:layers=0", "retention:layers=1")
    assert check(model, drawn(2, 3, 32, 48))(drawn(2, 3, 32, 48)).isfinite().all()
    assert ungraft(model, all=True).changed == ()
    assert torch.equal(model(drawn(2, 3, 32, 48)), vit()(drawn(2, 3, 32, 48)))
    for other in ("svda", "patch_scale", TEXT, "tokens_to_token:strides=2+2"):
        with pytest.raises(GraftError, match="Expected"):
            graft(vit(), other, TEXT)


def test_bad_input():
    with pytest.raises(SettingError, match=r"^Found stride=12\. Expected a power of 2, 4 or more\."):
        CI2P(stride=12)
    with pytest.raises(SettingError, match=r"^Found latent=0\. Expected 1 or more\."):
        CI2P(latent=0)
    with pytest.raises(SettingError, match=r"^Found patches of 14 x 14 pixels and no stride\."):
        graft(vit(patch_size=14, img_size=28), "ci2p")
    with pytest.raises(SettingError, match=r"^Found patches of 64 x 64 pixels in images of 32 x 48\."):
        graft(vit(), CI2P(stride=64))
    with pytest.raises(HostError, match=r"^The model takes images of 1 channels\. Expected 3"):
        graft(vit(in_chans=1), TEXT)
    with pytest.raises(HostError, match="lays positions over a fixed list of tokens"):
        graft(Eva(**SMALL, use_rot_pos_emb=True), TEXT)
