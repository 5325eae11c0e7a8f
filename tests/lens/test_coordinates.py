"""Places against gradients, against images of coordinates sent through the same partition, and against planted grids."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitreous.lens.coordinates.coordinate_tracer import CoordinateTracer, plain_name
from vitreous.lens.coordinates.layout import channel, layout

HEIGHT, WIDTH = 6, 8


class Following(TorchFunctionMode):
    """Moves shadows along, and notes the layout of every fused attention."""

    def __init__(self, coordinates: CoordinateTracer):
        super().__init__()
        self.coordinates, self.layouts = coordinates, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs or {})
            self.coordinates.follow(func, args, kwargs, out)
            if plain_name(func) == "scaled_dot_product_attention":
                q, k = (self.coordinates.of(tensor) for tensor in args[:2])
                self.layouts.append((layout(q, k, self.coordinates.size), channel(q, k)))
        return out


def followed(function, image: Tensor):
    """(output, shadows) of a function of an image."""
    coordinates = CoordinateTracer(image)
    with torch.no_grad(), Following(coordinates):
        out = function(image)
    return out, coordinates


def traced(model: nn.Module, *size: int):
    coordinates = CoordinateTracer(image := torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad(), Following(coordinates) as mode:
        model.eval()(image)
    return mode.layouts


def centres(size: tuple[int, int], patch: int) -> Tensor:
    """(rows cols, 2) centres of patches in raster order."""
    y, x = (torch.arange(length // patch).double() * patch + patch / 2 for length in size)
    return torch.cartesian_prod(y, x)


# --- linear calls against their gradients -----------------------------------------------------------------------------

CHANNELS = 2
ONES = torch.ones(3, CHANNELS, 2, 2, dtype=torch.float64)
INDEX = torch.tensor([3, 0, 2])
TOKENS = torch.tensor([[5, 1, 7]])
SELECT = torch.zeros(1, 4, HEIGHT * WIDTH, dtype=torch.float64)  # rows take 1, 3, 2 tokens and none
SELECT[0, [0, 1, 1, 1, 2, 2], [5, 0, 1, 7, 2, 6]] = 1.0


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (1, 48, 2)


def written(x: Tensor) -> Tensor:
    out = torch.zeros(1, HEIGHT * WIDTH, CHANNELS, dtype=x.dtype)
    out[:, 2:5] = tokens(x)[:, 7:10]
    out[:, INDEX + 9] = tokens(x)[:, :3]
    return out


def windows(x: Tensor) -> Tensor:
    x = torch.roll(x, (-1, -2), dims=(2, 3)).permute(0, 2, 3, 1)
    x = x.view(1, HEIGHT // 2, 2, WIDTH // 4, 4, CHANNELS).permute(0, 1, 3, 2, 4, 5).contiguous()
    return x.view(-1, 8, CHANNELS)


def merged(x: Tensor) -> Tensor:
    """Tokens 5 and 1 into 0, 7 into 1, then 2 into 0, which is four tokens in the end."""
    x = tokens(x)
    to = torch.tensor([[0, 0, 1]])[..., None].expand(-1, -1, CHANNELS)
    x = x[:, :6].scatter_add(1, to, x.gather(1, TOKENS[..., None].expand(-1, -1, CHANNELS)))
    return x.index_add(1, torch.tensor([0]), x[:, 2:3])


# Every call is linear with weights that are equal or all positive, so that the gradient of an output says which pixels it
# stands for, and how much.
LINEAR = {
    "patches": lambda x: F.conv2d(x, ONES, stride=2),
    "patches by unfold": lambda x: tokens(x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)).sum(-1),
    "patches by reshape": lambda x: x.reshape(1, 2, 3, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).flatten(3).mean(-1),
    "im2col": lambda x: F.unfold(x, 3, stride=2).mT,
    "im2col and back": lambda x: F.fold(F.unfold(x, 2, stride=1), (HEIGHT, WIDTH), 2),
    "dilated": lambda x: F.conv2d(x, ONES, dilation=2),
    "depthwise": lambda x: F.conv2d(x, ONES[:2, :1], groups=2),
    "groups at other places": lambda x: F.conv2d(F.pixel_unshuffle(x, 2), ONES.new_ones(4, 4, 1, 1), groups=2),
    "channels pooled each": lambda x: F.avg_pool2d(F.pixel_unshuffle(x, 2), 2, stride=1),
    "one axis": lambda x: F.conv1d(x.flatten(2), ONES[:, :, 0], stride=2),
    "pool": lambda x: F.avg_pool2d(x, 2),
    "pool, part of a window": lambda x: F.avg_pool2d(x, 4, ceil_mode=True)[..., :1, :],
    "pool of a sequence": lambda x: F.avg_pool1d(x.flatten(2), 4),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "adaptive pool, one axis": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 5),
    "bilinear": lambda x: F.interpolate(x, (3, 5), mode="bilinear", antialias=False),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "area": lambda x: F.interpolate(x, (2, 2), mode="area"),
    "transposed": lambda x: F.conv_transpose2d(x, ONES[:2, :1].contiguous(), stride=2),
    "roll and windows": windows,
    "flip": lambda x: x.flip(-1).transpose(2, 3),
    "linear": lambda x: F.linear(tokens(x), torch.ones(5, 2, dtype=x.dtype)),
    "product with a parameter": lambda x: torch.ones(4, 2, dtype=x.dtype) @ x.flatten(2),
    "einsum with a parameter": lambda x: torch.einsum("bchw,cd->bhwd", x, torch.ones(2, 3, dtype=x.dtype)),
    "mean of a window": lambda x: x.unflatten(2, (3, 2)).mean((1, 3)),
    "sum of rows": lambda x: x.sum(dim=2, keepdim=True),
    "index": lambda x: tokens(x)[:, INDEX],
    "index with a mask": lambda x: tokens(x)[:, torch.arange(48) % 5 == 0],
    "two indices": lambda x: x[:, :, INDEX, INDEX + 1],
    "index_select": lambda x: torch.index_select(x, 3, INDEX),
    "gather": lambda x: tokens(x).gather(1, TOKENS[..., None].expand(-1, -1, 2)),
    "take_along_dim": lambda x: torch.take_along_dim(x, INDEX.view(1, 1, 3, 1), dim=2),
    "masked_select": lambda x: x.masked_select(torch.arange(WIDTH) > 4),
    "split and stack": lambda x: torch.stack(x.split(4, dim=3), dim=1),
    "chunk and cat": lambda x: torch.cat(x.chunk(3, dim=2)[::-1], dim=3),
    "unbind": lambda x: x.unbind(2)[4],
    "repeat": lambda x: x.repeat(2, 1, 1, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=2),
    "expand": lambda x: x[:, None].expand(1, 5, -1, -1, -1),
    "reflected padding": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 2),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(tokens(x).contiguous()) * 1.0),
    "slices": lambda x: x[..., 1::2, :-1][0].movedim(0, -1),
    "a sum of two places": lambda x: x + x.flip(-1),
    "selected by a matrix": lambda x: SELECT @ tokens(x),
    "selected by a matrix, einsum": lambda x: torch.einsum("bchw,vwb->bchv", x, SELECT[0, :3, :8, None].to(x.dtype)),
    "written": written,
    "scatter": lambda x: torch.zeros(1, 48, 2, dtype=x.dtype).scatter(1, TOKENS[..., None].expand(-1, -1, 2), tokens(x)[:, :3]),
    "merged": merged,
}


@pytest.mark.parametrize("name", LINEAR)
def test_places_are_the_mean_of_the_pixels_in_the_gradient(name):
    """Second oracle of each call: d out / d pixel, by autograd, weighs the coordinates of the pixels."""
    image = torch.ones(1, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    out, coordinates = followed(LINEAR[name], image)
    gradient = torch.autograd.functional.jacobian(LINEAR[name], image).reshape(*out.shape, CHANNELS, HEIGHT, WIDTH).sum(-3)
    total = gradient.sum((-2, -1))  # 0 where nothing of the image is
    y, x = torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5
    mean_y, mean_x = (gradient.sum(-1) * y).sum(-1) / total, (gradient.sum(-2) * x).sum(-1) / total
    moment = (gradient * (y[:, None].square() + x.square())).sum((-2, -1)) / total
    places = coordinates.of(out)
    assert coordinates.reason(out) == ""
    assert places.shape == (*out.shape, 4)
    torch.testing.assert_close(places[..., 0], mean_y, equal_nan=True)
    torch.testing.assert_close(places[..., 1], mean_x, equal_nan=True)
    torch.testing.assert_close(places[..., 2], moment - mean_y.square() - mean_x.square(), equal_nan=True)
    assert math.isclose(float(places[..., 3].nan_to_num(nan=0.0).max()), 4.0 if name == "merged" else 1.0)


def test_merging_weighs_by_what_was_merged_before():
    """Tokens 0, 1 into 2, then 2 (of three) and 3 into one: the mean of four, not the mean of two."""

    def merge(x: Tensor) -> Tensor:
        x = tokens(x)
        x = x[:, 2:].index_add(1, torch.tensor([0, 0]), x[:, :2])
        to = torch.zeros(1, 2, CHANNELS, dtype=torch.long)
        return torch.zeros_like(x[:, :1]).scatter_reduce(1, to, x[:, :2], "mean", include_self=False)

    out, coordinates = followed(merge, torch.ones(1, CHANNELS, HEIGHT, WIDTH))
    place = coordinates.of(out)[0, 0, 0]
    assert place.tolist() == [0.5, 2.0, pytest.approx(1.25), 4.0]


def test_an_extreme_over_an_axis_is_as_the_mean():
    """The winner differs from channel to channel; where a token is does not."""
    image = torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    mean, coordinates = followed(lambda x: x.unflatten(2, (3, 2)).mean(3), image)
    want = coordinates.of(mean)
    for extreme in (
        lambda x: x.unflatten(2, (3, 2)).max(dim=3).values,
        lambda x: torch.min(x.unflatten(2, (3, 2)), 3)[0],
        lambda x: x.unflatten(2, (3, 2)).amax(3),
        lambda x: F.max_pool2d(x, (2, 1)),
        lambda x: F.adaptive_max_pool2d(x, (3, WIDTH)),
    ):
        out, coordinates = followed(extreme, image)
        torch.testing.assert_close(coordinates.of(out), want)


KEEP = {
    "activation": lambda x: F.gelu(x).relu_().sigmoid(),
    "norms": lambda x: F.normalize(F.group_norm(x, 1)),
    "casts": lambda x: x.half().float().to(torch.bfloat16).clone().contiguous().detach(),
    "softmax and dropout": lambda x: F.dropout(x.softmax(-1), 0.5, training=True),
    "a table": lambda x: x + torch.randn(1, 2, 1, 1, generator=torch.Generator().manual_seed(0)),
    "arithmetic": lambda x: (2 - x * x.mean()) / (x + 3) ** 2,
    "residual": lambda x: x + F.conv2d(x, torch.ones(2, 1, 3, 3), padding=1, groups=2),
    "gate": lambda x: x * F.adaptive_avg_pool2d(x, 1).sigmoid(),
    "in place": lambda x: x.clone().add_(1.0).mul_(x),
    "where": lambda x: torch.where(x > 0, x, torch.tensor(-1.0)).masked_fill(x > 1, 0.0),
    "maximum filter": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "padded filters": lambda x: F.conv2d(F.avg_pool2d(x, 3, 1, 1), torch.ones(2, 2, 5, 5), padding="same"),
    "rotation of channels": lambda x: torch.cat([-x[:, 1:], x[:, :1]], 1) * 0.3 + x,
    "fine and coarse": lambda x: x + F.interpolate(F.avg_pool2d(x, 2), scale_factor=2),
    "coarse, brought back by a filter": lambda x: (
        x + F.conv_transpose2d(F.avg_pool2d(x, 2), torch.ones(2, 1, 4, 4), stride=2, padding=1, groups=2)
    ),
    "sum over padding": lambda x: F.pad(x, (2, 0, 0, 1))[:, :, :-1, 2:] + x,
}


@pytest.mark.parametrize("name", KEEP)
def test_what_keeps_places(name):
    out, coordinates = followed(KEEP[name], torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)))
    places = coordinates.of(out)
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    torch.testing.assert_close(places[0, 0, ..., 0], y.double())
    torch.testing.assert_close(places[0, 1, ..., 1], x.double())


def test_parameters_padding_and_unknown_calls_have_no_place():
    image = torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    token = nn.Parameter(torch.zeros(1, 1, CHANNELS))
    out, coordinates = followed(lambda x: torch.cat([token.expand(1, -1, -1), tokens(x)], 1), image)
    assert coordinates.of(out)[0, 0].isnan().all()
    assert coordinates.of(out)[0, 1:].isfinite().all()
    assert coordinates.of(token) is None

    out, coordinates = followed(lambda x: F.pad(x, (1, 2, 0, 1)), image)
    inside = coordinates.of(out)[0, 0, :, :, 0].isfinite()
    assert inside[:HEIGHT, 1 : 1 + WIDTH].all()
    assert inside.sum() == HEIGHT * WIDTH

    out, coordinates = followed(lambda x: torch.fft.rfft(x, dim=-1).abs() + 1, image)
    assert coordinates.of(out) is None
    assert coordinates.reason(out) == "fft_rfft lost the places"
    out, coordinates = followed(lambda x: torch.fft.fft(x).real + x, image)
    assert coordinates.of(out) is not None  # the residual sum finds them again

    for fresh in (torch.zeros_like, lambda x: x.new_ones(3), lambda x: x.argmax(1), lambda x: x > 0):
        out, coordinates = followed(fresh, image)
        assert coordinates.of(out) is None
        assert coordinates.reason(out) == ""


def test_tokens_chosen_by_values_or_by_chance_are_said_to_be():
    def best(x: Tensor) -> Tensor:
        x = tokens(x)
        order = x.sum(-1).argsort(dim=1)[:, :5]
        return x.gather(1, order[..., None].expand(-1, -1, CHANNELS)) * 2

    def drawn(x: Tensor) -> Tensor:
        return tokens(x)[:, torch.rand(48).argsort()[:5]]

    image = torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    for function, name in ((best, "gather"), (drawn, "getitem")):
        out, coordinates = followed(function, image)
        assert coordinates.of(out).shape == (1, 5, CHANNELS, 4)
        assert coordinates.reason(out).startswith(f"{name} chose tokens")
    want = centres((HEIGHT, WIDTH), 1)[image.flatten(2).sum(1).argsort()[0, :5]]
    out, coordinates = followed(best, image)
    torch.testing.assert_close(coordinates.of(out)[0, :, 0, :2], want)
    out, coordinates = followed(lambda x: tokens(x)[:, torch.arange(3)] + 1, image)
    assert coordinates.reason(out) == ""


def test_tables_are_weak_and_thin():
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    coordinates = CoordinateTracer(image)
    with Following(coordinates):
        x = tokens(F.conv2d(image, torch.ones(64, 3, 4, 4), stride=4))
        x = F.linear(F.layer_norm(x, (64,)), torch.ones(192, 64)).reshape(1, 64, 3, 4, 16).permute(2, 0, 3, 1, 4)[0]
    places = coordinates.of(x)  # (1, 4, 64, 16, 4)
    assert places.stride()[1] == 0 == places.stride()[3]
    assert places.untyped_storage().nbytes() == 64 * 4 * 8
    held = len(coordinates.fields)
    del x, places
    assert len(coordinates.fields) < held


# --- attention --------------------------------------------------------------------------------------------------------


def attention(side: str):
    """Attention written out, on either side of the product, its output (1, 2 heads, 48, 1)."""

    def function(image: Tensor) -> Tensor:
        x = torch.cat([torch.zeros(1, 1, CHANNELS), tokens(image)], 1)  # (1, 49, 2), a class token first
        q = k = v = x[:, None].expand(-1, 2, -1, -1)
        if side == "left":
            return (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        if side == "right":
            return (v.mT @ (k @ q.mT).softmax(-2)).mT
        if side == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) + torch.zeros(49, 49)
            return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        if side == "talking heads":
            scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), torch.ones(2, 2)).permute(0, 3, 1, 2).softmax(-1)
            return F.conv2d(scores, torch.ones(2, 2, 1, 1)) @ v
        if side == "batched":
            scores = torch.baddbmm(torch.zeros(1), q[0], k[0].mT)
            return torch.bmm(scores.softmax(-1), v[0])
        return F.scaled_dot_product_attention(q, k, v)

    return function


@pytest.mark.parametrize("side", ["left", "right", "einsum", "talking heads", "batched", "fused"])
def test_attention_is_where_its_query_is(side):
    image = torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    out, coordinates = followed(attention(side), image)
    places = coordinates.of(out).reshape(2, 49, CHANNELS, 4)
    assert places[:, 0].isnan().all()  # the class token's query
    want = centres((HEIGHT, WIDTH), 1)
    for head in range(2):
        torch.testing.assert_close(places[head, 1:, 0, :2], want)


def test_channels_attending_to_channels():
    image = torch.randn(1, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    found = {}

    def function(image: Tensor, fused: bool) -> Tensor:
        q = image.flatten(2).unflatten(1, (2, 2))  # (1, 2, 2 channels, 48)
        found["q"] = q
        return F.scaled_dot_product_attention(q, q, q) if fused else (q @ q.mT).softmax(-1) @ q

    for fused in (True, False):
        out, coordinates = followed(lambda x, fused=fused: function(x, fused), image)
        q = coordinates.of(found["q"])
        assert channel(q, q)
        assert not channel(q.transpose(-3, -2), q.transpose(-3, -2))
        torch.testing.assert_close(coordinates.of(out)[0, 0, 1, :, :2], centres((HEIGHT, WIDTH), 1))


def test_latent_queries_pool_the_image():
    """What a latent query read has no place of its own: beside patches it is told by what it stands for."""
    latent = nn.Parameter(torch.randn(1, 3, CHANNELS, generator=torch.Generator().manual_seed(0)))
    seen = {}

    def function(image: Tensor) -> Tensor:
        seen["k"] = tokens(image)
        return (latent @ seen["k"].mT).softmax(-1) @ seen["k"]

    out, coordinates = followed(function, torch.randn(1, CHANNELS, 9, 9, generator=torch.Generator().manual_seed(0)))
    keys = coordinates.of(seen["k"])
    assert layout(None, keys, (9, 9)).queries.isnan().all()
    found = layout(coordinates.of(out), keys, (9, 9))
    assert found.queries.isnan().all()
    assert (found.prefix, found.grid, found.key_grid) == (3, None, (9, 9))


# --- layouts ----------------------------------------------------------------------------------------------------------


def raw(places: Tensor, *lead: int) -> Tensor:
    """(N, 2) as (*lead, N, 1, 2)."""
    return places.expand(*lead, *places.shape)[..., None, :]


def test_plain_vit_of_a_wide_image():
    found = traced(timm.create_model("test_vit", img_size=(96, 160)), 96, 160)
    assert len(found) == 6
    for place, channels in found:
        assert not channels
        assert (place.grid, place.key_grid, place.prefix, place.windows, place.heads) == ((6, 10), (6, 10), 1, 1, 2)
        assert place.factors == ((), ((2, "H"),))
        assert torch.equal(place.queries[0, 1:], centres((96, 160), 16))  # 0.0 px
        assert place.queries[0, 0].isnan().all()
        values = torch.arange(61.0)[None]
        assert torch.equal(place.picture(values), values[0, 1:].view(6, 10))
        assert torch.equal(place.key_picture(values.expand(2, 3, 1, -1)), values[0, 1:].view(6, 10).expand(2, 3, -1, -1))


def partitioned(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], patch: int) -> Tensor:
    """(W, N, 2): coordinates, as an image, through timm's own shift and partition; padding is NaN."""
    from timm.models.swin_transformer import window_partition

    rows, cols = size[0] // patch, size[1] // patch
    grid = centres(size, patch).view(1, rows, cols, 2).roll((-shift[0], -shift[1]), (1, 2))
    grid = F.pad(grid, (0, 0, 0, -cols % window[1], 0, -rows % window[0]), value=torch.nan)
    return window_partition(grid, window).flatten(1, 2)


@pytest.mark.parametrize("size", [(64, 96), (80, 96)])
def test_shifted_windows_and_their_padding(size):
    timm.layers.set_fused_attn(True, experimental=True)
    try:
        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=size, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)
        )
        found = [place for place, _ in traced(model, *size)]
    finally:
        timm.layers.set_fused_attn(True, experimental=False)
    assert [place.heads for place in found] == [2, 2, 4, 4]
    for place, patch, shift in zip(found, (4, 4, 8, 8), (0, 2, 0, 2), strict=True):
        want = partitioned(size, (4, 4), (shift, shift), patch)
        grid = (size[0] // patch, size[1] // patch)
        torch.testing.assert_close(place.queries, want, equal_nan=True, rtol=0, atol=1e-9)
        assert (place.grid, place.prefix, place.windows) == (grid, 0, len(want))
        y, x = (want / patch).floor().nan_to_num(nan=0.0).long().unbind(-1)
        picture = torch.rand(3, *grid, generator=torch.Generator().manual_seed(0))
        back = place.picture(picture[:, y, x])  # padding holds rubbish, which must not arrive
        assert torch.equal(back, picture)


@pytest.mark.parametrize(
    ("order", "factors"),
    [
        ("windows heads", (((3, "W"), (2, "H")),)),
        ("heads windows", (((2, "H"), (3, "W")),)),
        ("windows", (((6, "W"),),)),
        ("heads", (((6, "H"),),)),
    ],
)
def test_heads_folded_into_an_axis_with_windows(order, factors):
    strips = centres((6, 8), 1).view(3, 16, 2)
    six = centres((6, 8), 1).view(6, 8, 2)
    places = {
        "windows heads": strips.repeat_interleave(2, 0),
        "heads windows": strips.repeat(2, 1, 1),
        "windows": six,
        "heads": strips[:1].expand(6, -1, -1),
    }[order]
    rows = 2 if order == "heads" else 6
    found = layout(places[:, :, None], places[:, :, None], (rows, 8))
    assert found.factors == factors
    assert found.windows == {"windows": 6, "heads": 1}.get(order, 3)
    assert found.heads * found.windows == 6
    assert found.grid == (rows, 8)


def test_a_shared_query_for_all_windows():
    """Global queries: the places of the keys tell the windows."""
    keys = centres((8, 8), 1).view(2, 4, 8, 2).flatten(1, 2)
    found = layout(raw(centres((8, 8), 2), 2, 5), keys[:, None, :, None].expand(2, 5, -1, -1, -1), (8, 8))
    assert found.factors == (((2, "W"),), ((5, "H"),))
    assert (found.grid, found.key_grid) == ((4, 4), (8, 8))


def test_fewer_key_heads():
    places = raw(centres((4, 4), 1), 1, 6)
    assert layout(places, places[:, :2], (4, 4)).heads == 6
    assert layout(places, places[:, :1], (4, 4)).heads == 6


def test_a_pooled_mean_is_not_the_patch_in_the_middle():
    """49 patches and their mean, as the head of a CLIP ResNet has them: the mean lies exactly on the middle patch."""

    def function(image: Tensor) -> Tensor:
        x = tokens(F.avg_pool2d(image, 4))
        return torch.cat([x.mean(1, keepdim=True), x], 1)

    image = torch.randn(1, CHANNELS, 28, 28, generator=torch.Generator().manual_seed(0))
    out, coordinates = followed(function, image)
    places = coordinates.of(out)
    assert torch.equal(places[0, 0, 0, :2], places[0, 25, 0, :2])
    found = layout(places, places, (28, 28))
    assert (found.grid, found.prefix) == ((7, 7), 1)
    one = layout(places[:, :1], places, (28, 28))  # one query for all
    assert (one.grid, one.key_grid, one.prefix) == (None, (7, 7), 1)


def test_dropped_tokens_leave_holes():
    kept = torch.tensor([1, 4, 11, 19, 20, 30])
    found = layout(raw(centres((96, 96), 16)[kept]), None, (96, 96))
    assert found.grid == (6, 6)
    picture = found.picture(kept.double()[None])
    assert torch.equal(picture.flatten()[kept], kept.double())
    assert picture.isnan().sum() == 30
    assert found.key_grid is None
    block = torch.cartesian_prod(torch.arange(3), torch.arange(4)) @ torch.tensor([6, 1])  # 3 x 4 patches of a corner
    found = layout(raw(centres((96, 96), 16)[block]), None, (96, 96))
    assert found.grid == (6, 6)
    assert torch.equal(found.picture(block.double()[None])[:3, :4], block.view(3, 4).double())


def test_merged_and_scattered_tokens_are_on_no_grid():
    places = torch.cat([centres((64, 64), 16), torch.tensor([[0.0, 1.0]]).expand(16, 2)], 1)
    places[3, :2], places[3, 3] = places[2:4, :2].mean(0), 2
    merged = layout(places[:-1, None], None, (64, 64))
    assert merged.grid is None
    scattered = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)).double() * 64
    assert layout(raw(scattered), None, (64, 64)).grid is None
    with pytest.raises(ValueError, match=r"no grid.*Expected.*rows"):
        merged.picture(torch.zeros(1, 15))
    with pytest.raises(ValueError, match=r"\(1, 5\).*Expected \(\.\.\., 1, 16\)"):
        layout(raw(centres((64, 64), 16)), None, (64, 64)).picture(torch.zeros(1, 5))


def test_padding_is_no_prefix_and_inserted_tokens_come_last():
    grid = centres((8, 8), 1).view(4, 16, 2).clone()
    grid[1, :3] = grid[3, 5:] = torch.nan
    found = layout(grid[:, :, None], grid[:, :, None], (8, 8))
    assert found.prefix == 0
    tail = torch.cat([torch.full((2, 2), torch.nan), centres((8, 8), 2), torch.full((3, 2), torch.nan)]).double()
    found = layout(raw(tail), raw(tail), (8, 8))
    assert (found.prefix, found.grid) == (2, (4, 4))
    assert torch.equal(found.picture(torch.arange(21.0)[None]), torch.arange(2.0, 18).view(4, 4))


def test_overlapping_windows_show_their_mean():
    """Two windows of 3 x 2 that share a column: what both have is the mean of both."""
    places = centres((3, 3), 1).view(3, 3, 2)
    windows = torch.stack([places[:, :2].flatten(0, 1), places[:, 1:].flatten(0, 1)])
    found = layout(windows[:, :, None], windows[:, :, None], (3, 3))
    assert (found.windows, found.grid) == (2, (3, 3))
    picture = found.key_picture(torch.stack([torch.zeros(6), torch.ones(6)]))
    assert torch.equal(picture, torch.tensor([0.0, 0.5, 1.0]).expand(3, 3))


def test_no_places_no_layout():
    assert layout(None, None, (8, 8)) is None
    nothing = torch.full((1, 2, 5, 3, 2), torch.nan)
    assert layout(nothing, nothing, (8, 8)) is None
    assert not channel(None, None)


# --- models -----------------------------------------------------------------------------------------------------------


def test_pooled_keys_and_padded_filters():
    """PVT v2: overlapping patches, filters with padding in every block; neither grid nor centres may shrink."""
    model = timm.create_model("pvt_v2_b0", embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    found = [place for place, _ in traced(model, 64, 96)]
    assert [place.grid for place in found] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [place.key_grid for place in found] == [(2, 3)] * 4
    for place, patch in zip(found, (4, 8, 16, 32), strict=True):
        y = place.queries[0, :, 0].unique()
        torch.testing.assert_close(y.diff(), torch.full_like(y[1:], patch))


def test_mask_units():
    """Hiera: units are an axis of their own, queries are pooled inside of them."""
    model = timm.create_model("hiera_tiny_224", embed_dim=16, num_heads=1, stages=(1, 1, 1, 1), img_size=(64, 96))
    found = [place for place, _ in traced(model, 64, 96)]
    assert [(p.grid, p.key_grid, p.windows) for p in found] == [
        ((16, 24), (16, 24), 6), ((8, 12), (16, 24), 6), ((4, 6), (8, 12), 6), ((2, 3), (4, 6), 1),
    ]  # fmt: skip
    for place, patch in zip(found, (4, 8, 16, 32), strict=True):
        values = place.queries[..., 1]
        picture = place.picture(values)
        torch.testing.assert_close(picture, centres((64, 96), patch)[:, 1].view(place.grid), atol=2.0, rtol=0)
