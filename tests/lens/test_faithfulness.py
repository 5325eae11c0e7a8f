"""Insertion and deletion against plain loops, planted models whose answer is known, and explainers known to be bad."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from vitreous.base.errors import DataError, SettingError
from vitreous.base.statistics import bootstrap
from vitreous.layers.geometry import centre_prior
from vitreous.lens import faithfulness as lens
from vitreous.lens.formulas import scores
from vitreous.models.model_folder import load

GRID = (3, 4)


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    """Logits of 5 classes from 9 x 14 images, in a form of output that is asked for; notes the batches that it is given."""

    def __init__(self, form=lambda x: x, width=5):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(672, width)
        )
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.form, self.sizes = form, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.form(self.layers(x))


@pytest.fixture
def images():
    return drawn(4, 3, 9, 14, seed=1)


@pytest.fixture
def maps():
    return drawn(4, 2, 12, seed=2)


# -- against plain loops -----------------------------------------------------------------------------------------------


def slowly(model, image, values, count, insert):
    """Probability of the predicted class with `count` patches put in or taken away, pixel by pixel."""
    rows, cols = GRID
    away = image.mean((1, 2))
    chosen = sorted(range(len(values)), key=lambda p: -values[p])[:count]
    changed = image.clone()
    for y in range(9):
        for x in range(14):
            patch = (y * rows // 9) * cols + x * cols // 14
            if (patch in chosen) != insert:
                changed[:, y, x] = away
    with torch.no_grad():
        predicted = model(image[None])[0].argmax()
        return model(changed[None])[0].double().softmax(-1)[predicted].item()


def test_curves_equal_loops(images, maps):
    model = Small().eval()
    found = lens.curves(model, images, maps, GRID, fractions=(0, 0.2, 0.55, 1))
    torch.testing.assert_close(found.fractions, torch.tensor([0, 2 / 12, 7 / 12, 1], dtype=torch.float64))
    for image in range(4):
        for number in range(2):
            for step, count in enumerate([0, 2, 7, 12]):
                of = model, images[image], maps[image, number].tolist(), count
                assert found.insertion[image, number, step].item() == pytest.approx(slowly(*of, True), abs=1e-5)
                assert found.deletion[image, number, step].item() == pytest.approx(slowly(*of, False), abs=1e-5)
    area = np.trapezoid(found.insertion[1, 1], found.fractions)
    assert found.insertion_area[1, 1].item() == pytest.approx(area)
    alone = lens.curves(model, images, maps[:, 1], GRID, fractions=(0, 0.2, 0.55, 1))
    torch.testing.assert_close(alone.deletion, found.of(1).deletion)
    assert alone.deletion.shape == (4, 4)


class Cliff(nn.Module):
    """Sure of its class as long as less than a share of the image is black, and sure of another one beyond."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        logit = 1000 * ((x == 0).double().mean((1, 2, 3)) - self.share)
        return torch.stack([torch.zeros_like(logit), logit], dim=-1)


@pytest.mark.parametrize("share", [0.02, 0.13, 0.28, 0.68])
def test_points_are_put_where_a_curve_moves(share):
    """Against all numbers of patches: the area is as good with 20 points as with 401, where five alone are far off."""
    images, maps, grid = 1 + drawn(2, 1, 40, 40), drawn(2, 1, 400, seed=3), (20, 20)
    options = {"fill": "black", "black": [0.0]}
    whole = lens.curves(Cliff(share), images, maps, grid, fractions=np.linspace(0, 1, 401), **options)
    few = lens.curves(Cliff(share), images, maps, grid, fractions=lens.FRACTIONS, **options)
    found = lens.curves(Cliff(share), images, maps, grid, **options)
    assert found.fractions.tolist() == whole.fractions.tolist()
    for name in ("insertion_area", "deletion_area"):
        here, there, coarse = (getattr(curves, name) for curves in (found, whole, few))
        assert (here - there).abs().max() < lens.TOLERANCE
        assert (coarse - there).abs().min() > 0.02
    assert (found.passes > few.passes).all()
    assert (found.passes <= 2 * lens.MOST).all()
    assert (few.passes == 6).all()


def test_a_curve_that_stands_still_costs_no_more(images):
    found = lens.curves(Cliff(2.0), images, drawn(4, 12), GRID)
    assert (found.passes == 6).all()
    assert torch.equal(found.deletion, torch.ones(4, 13, dtype=torch.float64))


def test_a_blurred_image_keeps_its_brightness_and_loses_its_detail(images):
    flat = torch.ones(1, 3, 9, 14)
    torch.testing.assert_close(lens.filled(flat, "blur"), flat)
    found = lens.filled(images, "blur")
    assert found.var((-2, -1)).max() < 0.3 * images.var((-2, -1)).min()
    side, place = 14, np.arange(14)
    weights = np.exp(-((place - 5) ** 2) / (2 * (0.1 * side) ** 2))
    line = drawn(1, 1, 1, side)  # one row: the blur runs across alone
    expected = (weights / weights.sum() * line[0, 0, 0].numpy()).sum()
    assert lens.filled(line, "blur")[0, 0, 0, 5].item() == pytest.approx(expected, rel=1e-5)


def test_batches_and_chunks_make_no_difference(images, maps):
    model = Small()
    whole = lens.curves(model, images, maps.round(decimals=1), GRID, batch_size=64)
    model.sizes.clear()
    again = lens.curves(model, images, maps.round(decimals=1), GRID, batch_size=3)
    assert max(model.sizes) == 3
    parts = [lens.curves(model, images[part], maps[part].round(decimals=1), GRID, numbers=part) for part in ([0], [1, 2, 3])]
    for other in (again, lens.Curves.joined(parts)):
        torch.testing.assert_close(other.insertion, whole.insertion, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.deletion, whole.deletion, atol=1e-5, rtol=0)


def test_equal_values_come_in_random_order():
    maps = torch.zeros(300, 1, 12)
    maps[:, :, 7] = 1
    maps[:, :, 2] = -1
    turns = lens.order(maps, range(300))[:, 0]
    assert (turns.sort(dim=-1).values == torch.arange(12)).all()
    assert (turns[:, 7] == 0).all()
    assert (turns[:, 2] == 11).all()
    middle = turns[:, [p for p in range(12) if p not in (2, 7)]].double().mean(0)
    assert (middle - 5.5).abs().max() < 4 * (99 / 12) ** 0.5 / 300**0.5  # standard errors of a uniform draw of ten
    assert torch.equal(turns[[5]], lens.order(maps[:1], [5])[:, 0])


def test_random_maps_follow_from_the_image_alone():
    whole = lens.random_maps(GRID, range(5), orders=3, seed=1)
    assert whole.shape == (5, 3, 12)
    assert torch.equal(lens.random_maps(GRID, [4, 2], orders=3, seed=1), whole[[4, 2]])
    assert whole.unique().numel() == whole.numel()


# -- outputs of every kind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda x: (x, x.sum()),
        lambda x: SimpleNamespace(features=3 * x, logits=x),
        lambda x: {"loss": x.sum(), "logits": x},
    ],
    ids=["tuple", "record", "dictionary"],
)
def test_logits_are_found(form, images, maps):
    expected, found = (lens.curves(model, images, maps, GRID) for model in (Small(), Small(form)))
    assert found.followed == expected.followed == "probability of the predicted class"
    assert torch.equal(found.insertion, expected.insertion)


@pytest.mark.parametrize(
    "form",
    [lambda x: x.view(-1, 2, 3), lambda x: {"hidden": x}, lambda x: x],
    ids=["tokens", "dictionary without logits", "a model of no classes"],
)
def test_without_classes_the_cosine_is_followed(form, images, maps):
    model = Small(form, width=6).eval()
    model.num_classes = 0
    found = lens.curves(model, images, maps, GRID)
    assert "cosine" in found.followed
    with torch.no_grad():
        clean, empty = model.layers(images), model.layers(images.mean((-2, -1), keepdim=True).expand_as(images))
    expected = torch.cosine_similarity(clean.double(), empty.double(), dim=-1)
    torch.testing.assert_close(found.deletion[:, 0, -1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.insertion[:, 1, -1], torch.ones(4, dtype=torch.float64))
    model.form = lambda x: x
    assert "probability" in lens.curves(model, images, maps, GRID, classes=True).followed


def test_one_logit_is_yes_or_no(images, maps):
    model = Small(width=1).eval()
    found = lens.curves(model, images, maps, GRID)
    with torch.no_grad():
        logit = model(images)[:, 0].double()
    torch.testing.assert_close(found.deletion[:, 0, 0], logit.abs().sigmoid(), atol=1e-5, rtol=0)


# -- the model is left as it was found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails, images, maps):
    model = Small().train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    if fails:
        model.form = lambda x: None
        with pytest.raises(DataError, match=r"Found an output of type NoneType; expected a tensor"):
            lens.curves(model, images, maps, GRID)
    else:
        found = lens.curves(model, images, maps, GRID)
        assert not found.insertion.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"grid": (3, 3)}, DataError),
        ({"maps": drawn(3, 12)}, DataError),
        ({"images": drawn(3, 9, 14)}, DataError),
        ({"numbers": [1, 2]}, DataError),
        ({"fractions": (0, 0.5)}, SettingError),
        ({"fractions": (0, 0.7, 0.5, 1)}, SettingError),
        ({"fill": "black"}, SettingError),
    ],
)
def test_what_does_not_fit_is_refused(change, error, images, maps):
    given = {"images": images, "maps": maps, "grid": GRID} | change
    with pytest.raises(error, match=r"Found .*[Ee]xpected"):
        lens.curves(Small(), **given)


# -- planted models ----------------------------------------------------------------------------------------------------


class Planted(nn.Module):
    """The class is the colour channel in which anything is brighter than 0.6, wherever it is; nothing else counts."""

    def forward(self, x):
        return 400 * (x - 0.6).clamp_min(0).mean((-2, -1))


def patches(values):
    """(B, C, 24, 32) -> (B, 48, C * 16): the pixels of each of 6 x 8 patches."""
    return values.unflatten(2, (6, 4)).unflatten(4, (8, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def planted(count=60):
    """Images (B, 3, 24, 32): noise of a contrast that is drawn for each patch, and somewhere 2 x 3 patches made brighter
    in one channel, around the edges too, so that no place is favoured. Returns them and the map of the object (B, 48)."""
    contrast = drawn(count, 1, 6, 8, seed=1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images, cover = 0.3 + 0.3 * contrast * (drawn(count, 3, 24, 32) - 0.5), torch.zeros(count, 6, 8)
    cover[:, :2, :3] = 1
    for i in range(count):
        cover[i] = cover[i].roll((i % 6, 3 * i % 8), (0, 1))
        images[i, i % 3] += 0.5 * cover[i].repeat_interleave(4, 0).repeat_interleave(4, 1)
    return images, cover.flatten(1)


@pytest.mark.parametrize("fill", ["mean", "blur"])
def test_the_known_region_beats_random_orders_and_bad_explainers_do_not(fill):
    images, cover = planted()
    bad = {
        "random": scores.baselines((6, 8), range(60), seed=7)["random"],
        "centre": centre_prior((6, 8)).expand(60, -1),
        "edges": patches(images).unflatten(2, (3, 16)).var(-1).mean(-1),
        "area": torch.ones(60, 48),
    }
    found = lens.curves(Planted(), images, torch.stack([cover, -cover, *bad.values()], 1), (6, 8), fill=fill)
    random = lens.curves(Planted(), images, lens.random_maps((6, 8), range(60), orders=8), (6, 8), fill=fill)
    good = lens.compare(found.of(0), random)
    assert good["difference"][1] > {"mean": 0.4, "blur": 0.1}[fill]  # a blurred object is an object still
    assert min(good["insertion"][1], good["deletion"][1]) > 0
    assert lens.compare(found.of(1), random)["difference"][2] < -0.1
    for number, name in enumerate(bad, 2):
        mean, low, high = lens.compare(found.of(number), random)["difference"]
        assert low < 0 < high, name
        assert abs(mean) < 0.1 * good["difference"][0], name


def test_intervals_of_random_explainers_hold_zero_as_often_as_they_should():
    """40 explainers against 40 other orders: 95 % of the intervals should hold 0, fewer than 34 in 0.3 % of all cases."""
    images, _ = planted()
    both = lens.curves(Planted(), images, lens.random_maps((6, 8), range(60), orders=80), (6, 8), fractions=lens.FRACTIONS)
    held = 0
    for number in range(40):
        base = replace(both, insertion=both.insertion[:, number, None], deletion=both.deletion[:, number, None])
        _, low, high = lens.compare(both.of(number + 40), base)["difference"]
        held += low < 0 < high
    assert held >= 34


def test_a_record_is_plain_and_leaves_out_what_is_missing(images, maps):
    maps[2, 0, 3] = torch.nan
    found = lens.curves(Small(), images, maps, GRID)
    random = lens.curves(Small(), images, lens.random_maps(GRID, range(4)), GRID)
    assert found.insertion[2, 0].isnan().all()
    assert found.insertion[2, 1].isfinite().all()
    entry = json.loads(json.dumps(lens.record(found.of(0), random, found.of(1)), allow_nan=False))
    assert entry["images"] == 3
    assert len(entry["insertion"]) == len(entry["random_deletion"]) == len(entry["fractions"]) == 13  # of 12 patches
    assert entry["passes"] == pytest.approx(found.passes[:, 0].double().mean().item())
    others = [0, 1, 3]
    assert entry["insertion"] == pytest.approx(found.insertion[others, 0].mean(0).tolist())
    gain = found.insertion_area[:, 0] - random.insertion_area.mean(1) + random.deletion_area.mean(1) - found.deletion_area[:, 0]
    assert entry["difference"][1:] == [None, None]  # of three images
    assert lens.with_interval(bootstrap(gain), 16) == list(bootstrap(gain))
    assert entry["difference"][0] == pytest.approx(gain[others].mean().item())
    assert entry["difference"][0] == pytest.approx(entry["insertion_difference"][0] + entry["deletion_difference"][0])
    gain = found.insertion_area[:, 0] - found.insertion_area[:, 1] + found.deletion_area[:, 1] - found.deletion_area[:, 0]
    assert entry["difference_to_centre"] == [pytest.approx(bootstrap(gain)[0]), None, None]
    assert "difference_to_centre" not in lens.record(found.of(0), random)


# -- randomised weights ------------------------------------------------------------------------------------------------


def test_weights_are_shuffled_each_by_itself():
    model = Small()
    model.tied = model.layers[5]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    shuffled = lens.randomised(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert shuffled.tied is shuffled.layers[5]
    for (name, old), (_, new) in zip(model.named_parameters(), shuffled.named_parameters(), strict=True):
        assert torch.equal(old, before[name]), name
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values), name
        if old.numel() > 8:
            assert (old == new).float().mean() < 0.3, name
    assert torch.equal(shuffled.layers[1].running_var, model.layers[1].running_var)
    again, other = lens.randomised(model, seed=1), lens.randomised(model, seed=2)
    assert torch.equal(again.layers[5].weight, shuffled.layers[5].weight)
    assert not torch.equal(other.layers[5].weight, shuffled.layers[5].weight)


def test_rank_correlation_equals_scipy():
    first, second = drawn(3, 4, 30), drawn(3, 4, 30, seed=1)
    second[1] = (5 * second[1]).round()
    first[2] = (3 * first[2]).round() - 1
    second[2] += first[2]
    found = lens.rank_correlation(first, second)
    for at in np.ndindex(3, 4):
        assert found[at].item() == pytest.approx(stats.spearmanr(first[at], second[at]).statistic, abs=1e-12)
    assert lens.rank_correlation(first, first.exp()).numpy() == pytest.approx(1)
    assert lens.rank_correlation(first, -first).numpy() == pytest.approx(-1)
    first[0, 0], second[0, 1, 3] = 1, torch.inf
    assert lens.rank_correlation(first, second).isnan().flatten().tolist() == [True, True] + [False] * 10


# -- a real model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def class_attention(model, images, layer):
    """Attention of the class token to the patches, mean over heads, by hand (B, P)."""
    block, x = model.blocks[layer], model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    x = block.norm1(model.blocks[:layer](x))
    q, k, _ = block.attn.qkv(x).reshape(*x.shape[:2], 3, 3, 64).permute(2, 0, 3, 1, 4)
    return (q[:, :, :1] @ k.mT / 8).softmax(-1)[:, :, 0, 1:].mean(1)


@pytest.mark.slow
def test_on_a_real_vit_attention_beats_random_orders_and_a_random_explainer_does_not(shared_data):
    """Also: the attention changes with the weights, and a map that ignores the model does not."""
    model = load(shared_data / "weights" / "vit_tiny_patch16_224")
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:16]
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    attention = class_attention(model, images, 8)
    bad = scores.baselines((14, 14), range(16), seed=5)
    maps = torch.stack([attention, bad["random"], *lens.random_maps((14, 14), range(16), orders=1).unbind(1)], 1)
    found = lens.curves(model, images, maps, (14, 14), fractions=(0, 0.3, 0.7, 1))
    random = replace(found, insertion=found.insertion[:, 2:], deletion=found.deletion[:, 2:])
    good = lens.compare(found.of(0), random)
    assert good["difference"][1] > 0.15
    assert min(good["insertion"][1], good["deletion"][1]) > 0.05
    chance = lens.compare(found.of(1), random)
    assert all(low < 0 < high for _, low, high in chance.values())
    again = class_attention(lens.randomised(model), images, 8)
    assert lens.rank_correlation(attention, again).mean().abs() < 0.2
    centre = bad["centre"]  # the same whatever the weights
    assert lens.rank_correlation(centre, centre).numpy() == pytest.approx(1)


def test_black_is_black_as_the_model_takes_it(images, maps):
    black = [-2.0, -1.0, 0.5]
    assert lens.filled(images, "black", black)[1, :, 3, 4].tolist() == black
    found = lens.curves(Small(), images, maps, GRID, fill="black", black=black, fractions=(0, 0.5, 1))
    with torch.no_grad():
        empty = Small().eval()(torch.tensor(black).view(1, 3, 1, 1).expand_as(images)).double().softmax(-1)
        target = Small().eval()(images).argmax(-1)
    torch.testing.assert_close(found.insertion[:, 0, 0], empty.gather(-1, target[:, None])[:, 0], rtol=1e-5, atol=1e-6)
    with pytest.raises(SettingError, match="value of black"):
        lens.curves(Small(), images, maps, GRID, fill="black")
