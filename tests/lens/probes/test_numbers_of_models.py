"""Numbers of whole models, through the tap, against what the models themselves compute."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from lens import whole_maps
from lens.passes import seen as seen_by_probes
from vitreous import SPC, SVDA, EViT, TokenMerging, graft
from vitreous.base.errors import DataError
from vitreous.lens.batch_pass import perturbed
from vitreous.lens.formulas import indicators
from vitreous.lens.tap import trace, watch

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
HOSTS = {
    "plain": lambda: VisionTransformer(**SMALL),
    "registers, qk norm": lambda: VisionTransformer(**SMALL, reg_tokens=2, qk_norm=True, init_values=0.1),
    "average pool": lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"),
    "rope": lambda: Eva(**SMALL, use_rot_pos_emb=True, use_abs_pos_emb=False, attn_type="rope"),
    "grouped": lambda: Eva(**SMALL, use_rot_pos_emb=True, attn_type="rope", num_kv_heads=1, qkv_fused=False),
    "eva": lambda: Eva(**SMALL, use_rot_pos_emb=True, scale_attn_inner=True),
}


def build(host="plain"):
    """A host with sharp attention, so that heads and images differ."""
    torch.manual_seed(0)
    model = HOSTS[host]().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and any(part in name for part in ("qkv", "q_proj", "k_proj")):
                weight.mul_(20)
    return model


def pictures(count=3, seed=1):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def both(images, seed=0, noise=0.01):
    """Images, and the same with noise, made here by hand."""
    generator = torch.Generator().manual_seed(seed)
    noisy = [(x + noise * torch.randn(x.shape, generator=generator)).clamp(0, 1) for x in images.float()]
    return torch.cat([images, torch.stack(noisy).to(images)])


def measured(model, batch, noisy=True, **settings):
    """The table, and what all probes read."""
    return seen_by_probes(model, batch, noisy=noisy, **settings)


def column(table, name, layer, source="attention", together=False):
    """(images, heads) of one layer."""
    rows = (table["layer"] == layer) & (table["source"] == source) & ((table["head"] < 0) == together)
    heads = len(set(table["head"][rows].tolist()))
    return torch.from_numpy(table[name][rows]).unflatten(0, (-1, heads))


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected.double(), rtol=tolerance, atol=tolerance)


def places(prefix):
    """Centres of 4 x 4 patches of 8 pixels, after tokens that have none."""
    axis = torch.arange(4.0) * 8 + 4
    return torch.cat([torch.full((prefix, 2), torch.nan), torch.cartesian_prod(axis, axis)])


def compare(table, layer, q, k, maps, prefix):
    """One layer of the table with q, k, maps (6, H, N, ..) of three images and their noisy versions."""
    clean, noisy, far = maps[:3], maps[3:], whole_maps.distances(places(prefix), places(prefix))
    wanted = {
        "attention_entropy": whole_maps.attention_entropy(clean),
        "effective_tokens": whole_maps.effective_tokens(clean),
        "selectivity": whole_maps.selectivity(clean),
        "mean_distance": whole_maps.mean_distance(clean, far),
        "attention_width": whole_maps.attention_width(clean, far),
        "head_redundancy": indicators.head_redundancy(whole_maps.head_gram(clean)),
        "angular_alignment": indicators.angular_alignment(q, k)[:3],
        "angular_alignment_paper": indicators.angular_alignment(q, k)[3:],
        "perturbation_robustness": whole_maps.relative_change(clean, noisy),
    }
    for name, value in wanted.items():
        close(column(table, name, layer), value, 1e-3)
    close(column(table, "selectivity_paper", layer, together=True)[:, 0], wanted["selectivity"].mean(dim=1))
    paper = whole_maps.perturbation_robustness(clean, noisy)
    torch.testing.assert_close(
        column(table, "perturbation_robustness_paper", layer, together=True)[:, 0], paper.double(), rtol=1e-3, atol=1e-7
    )


@pytest.mark.parametrize("host", HOSTS)
def test_equals_what_the_unfused_host_computes(host):
    """The peer is timm's own unfused attention, whose dropout receives the map and whose q and k norms give q and k."""
    model, images = build(host), both(pictures())
    peer, seen = copy.deepcopy(model), {}
    for i, block in enumerate(peer.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda m, args, i=i: seen.update({(i, "map"): args[0]}))
        for name in ("q_norm", "k_norm"):
            getattr(block.attn, name).register_forward_hook(lambda m, a, out, at=(i, name): seen.update({at: out}))
    with torch.no_grad():
        peer(images)
    table, readout = measured(model, images)
    prefix = seen[0, "map"].shape[-1] - 16
    for i in range(2):
        q, k = seen[i, "q_norm"], seen[i, "k_norm"]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        compare(table, i, q, k, seen[i, "map"], prefix)
        if host in ("plain", "registers, qk norm", "average pool"):  # nothing turns q and k after their norms
            spectrum = torch.linalg.svdvals((q[:3] @ k[:3].mT).double())[..., :16] / 4
            close(column(table, "effective_rank", i, "score"), indicators.effective_rank(spectrum, eps=0))
            close(column(table, "spectral_entropy_paper", i, "score"), indicators.spectral_entropy(spectrum))
    notes = {"plain": "", "average pool": "", "registers, qk norm": "normalised", "rope": "rotary", "grouped": "rotary"}
    assert notes.get(host, "not seen") in "".join(readout.notes)
    assert bool(readout.notes) == bool(notes.get(host, "not seen"))


@pytest.mark.parametrize("host", ["rope", "eva"])
def test_the_spectrum_of_scores_has_rotary_embedding_in_it(host, monkeypatch):
    """Scores of timm's rotary attention, caught as the argument of its softmax."""
    model, images = build(host), pictures(2)
    peer, scores, softmax = copy.deepcopy(model), [], torch.Tensor.softmax
    for block in peer.blocks:
        block.attn.fused_attn = False
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", lambda x, dim: scores.append(x) or softmax(x, dim=dim))
        peer(images)
    table, _ = measured(model, images, noisy=False)
    for i in range(2):
        spectrum = torch.linalg.svdvals(scores[i].double())[..., :16]
        close(column(table, "effective_rank", i, "score"), indicators.effective_rank(spectrum, eps=0))
        close(column(table, "effective_rank_l1", i, "score"), indicators.effective_rank_l1(spectrum))
        close(column(table, "spectral_entropy_paper", i, "score"), indicators.spectral_entropy(spectrum))
        w_q, w_k, _ = model.blocks[i].attn.qkv.weight.detach().double().unflatten(0, (3, 2, 16))
        weight = indicators.effective_rank(torch.linalg.svdvals(w_q.mT @ w_k)[:, :16], eps=0)  # biases start as 0
        close(column(table, "effective_rank", i, "weight")[0], weight)


@pytest.mark.parametrize("scale", ["paper", "learned"])
def test_equals_the_formula_of_svda(scale):
    model = graft(build(), SVDA(scale=scale))
    images, raw = both(pictures()), {}
    for i, block in enumerate(model.blocks):
        block.attn.qkv.register_forward_hook(lambda m, a, out, i=i: raw.update({i: out}))
    with torch.no_grad():
        model(images)
    raw = dict(raw)
    table, readout = measured(model, images)
    for i, block in enumerate(model.blocks):
        q, k, _ = raw[i].reshape(6, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        sigma = block.attn.sigma.detach()
        factor = {"paper": 16**-0.5, "learned": math.sqrt(16)}[scale]
        maps = (factor * torch.einsum("bhik,hk,bhjk->bhij", q, sigma, k)).softmax(dim=-1)
        compare(table, i, q, k, maps, prefix=1)  # alignment too is that of q before sigma
        p = sigma.double() ** 2 / (sigma.double() ** 2).sum(dim=-1, keepdim=True)
        entropy = -(p * p.log()).sum(dim=-1)
        close(column(table, "spectral_entropy", i, "learned")[0], entropy)
        close(column(table, "effective_rank", i, "learned")[0], entropy.exp())
        close(column(table, "effective_rank_paper", i, "learned")[0], indicators.effective_rank(sigma))
        close(column(table, "spectral_sparsity_paper", i, "learned")[0], torch.zeros(2))
    assert ["normalised" in note for note in readout.notes] == [True]


def test_alignment_before_a_spectrum_that_was_turned_is_not_made_up():
    model = graft(build("rope"), SVDA())
    table, readout = measured(model, both(pictures()))
    assert np.isnan(table["angular_alignment"]).all()
    assert np.isnan(table["angular_alignment_paper"]).all()
    assert any(note.startswith("blocks.0.attn to blocks.1.attn (2): alignment") for note in readout.notes)


class Blurring(torch.nn.Module):
    """One attention over 24 x 40 patches of 4 pixels whose heads fall off as Gaussians, by an additive mask."""

    def __init__(self, widths):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 2 * len(widths), 4, 4)
        axes = torch.arange(24.0), torch.arange(40.0)
        places = 4 * torch.cartesian_prod(*axes)
        fall = -torch.cdist(places, places).square() / 2
        self.register_buffer("mask", fall / torch.tensor(widths)[:, None, None] ** 2)

    def forward(self, x):
        v = self.embed(x).flatten(2).mT.unflatten(-1, (len(self.mask), 2)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(0 * v, v, v, attn_mask=self.mask)


def test_planted_gaussian_heads_return_their_widths():
    """Places come from the tracing of the convolution; near the border a Gaussian is cut off, hence a few per cent less."""
    widths = [4.0, 6.0, 8.0]
    images = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    table, _ = measured(Blurring(widths), images, noisy=False)
    share = column(table, "attention_width", 0) / torch.tensor(widths)
    assert 0.93 < share.min() < share.max() < 1.0
    share = column(table, "mean_distance", 0) / torch.tensor(widths) / math.sqrt(math.pi / 2)
    assert 0.92 < share.min() < share.max() < 1.0


class Channels(torch.nn.Module):
    """One attention whose projection is a filter of one token over (B, C, N)."""

    def __init__(self):
        super().__init__()
        self.embed, self.to_qkv = torch.nn.Conv2d(3, 12, 8, 8), torch.nn.Conv1d(12, 36, 1)

    def forward(self, x):
        q, k, v = (t.unflatten(1, (2, 6)).mT for t in self.to_qkv(self.embed(x).flatten(2)).chunk(3, 1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def test_a_projection_with_channels_first_is_measured_by_its_channels():
    model = Channels()
    table, readout = measured(model, pictures(), noisy=False)
    assert readout.notes == []
    assert (table["source"] == "weight").sum() == 2


def test_batches_make_no_difference():
    model, images = build(), pictures(5)
    whole, _ = measured(model, images, noisy=False)
    layouts = trace(model, images)
    parts = [measured(model, images[i : i + 2], noisy=False, layouts=layouts, first=i)[0] for i in (0, 2, 4)]
    split = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    assert list(parts[0]) == list(whole)
    sources = {name: i for i, name in enumerate(dict.fromkeys(whole["source"].tolist()))}
    source = [sources[name] for name in split["source"].tolist()]
    order = np.lexsort([split["head"], split["image"], source, split["layer"]])
    for name, values in whole.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(split[name][order], values, rtol=1e-4, atol=1e-6)
        else:
            np.testing.assert_array_equal(split[name][order], values)


def test_rows_of_the_model_come_with_the_first_image_alone():
    table, readout = measured(build("eva"), pictures(2), noisy=False, first=16)
    assert set(table["source"]) == {"attention", "score"}
    assert set(table["image"]) == {16, 17}
    assert readout.notes == []


def test_without_noise_nothing_changes():
    table, _ = measured(build(), torch.cat([pictures(), pictures()]))
    for name in ("perturbation_robustness", "perturbation_robustness_paper"):
        values = table[name][np.isfinite(table[name])]
        assert len(values)
        assert (values < 1e-6).all()


def test_noise_is_added_to_pixels_and_clamped():
    images, mean, std = pictures().round(), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    m, s = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    found = perturbed((images - m) / s, 0.01, torch.Generator().manual_seed(0), mean, std) * s + m
    torch.testing.assert_close(found, both(images)[3:], rtol=0, atol=1e-6)
    assert (found - images).abs().max() < 0.06
    with pytest.raises(DataError, match=r"pixels from -2\.5 to .*Give the mean and std"):
        perturbed((images - m) / s, 0.01, torch.Generator(), (0.0,), (1.0,))


def test_inserted_tokens_are_among_those_attended_to():
    model = build()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:64] = 0  # no queries, no keys: uniform attention over all tokens there are
    table, _ = measured(graft(model, SPC(after=1, tokens=4)), pictures(), noisy=False)
    close(column(table, "effective_tokens", 0), torch.full((3, 2), 17.0))
    close(column(table, "effective_tokens", 1), torch.full((3, 2), 21.0))


@pytest.mark.parametrize("mechanism", [TokenMerging(tokens=3), EViT(keep=0.5, layers=(0,))], ids=["merging", "evit"])
def over_places(maps, index, last=0):
    """A map of present tokens (H, n, n) as that of the original ones, entry by entry: places share what their token gets."""
    index = torch.cat([index, torch.arange(maps.shape[-1] - last, maps.shape[-1])])
    whole = torch.zeros(len(maps), len(index), len(index), dtype=maps.dtype)
    for i, query in enumerate(index):
        for j, key in enumerate(index):
            if query >= 0 and key >= 0:
                whole[:, i, j] = maps[:, query, key] / (index == key).sum()
    return whole, index >= 0


@pytest.mark.parametrize(
    "mechanisms",
    [
        (TokenMerging(tokens=3),),
        (TokenMerging(tokens=3), SPC(after=1, tokens=2)),
        (EViT(keep=0.5, layers=(0,)),),
        (EViT(keep=0.5, layers=(0,), fuse=False),),
    ],
    ids=["merging", "merging and inserted", "fused", "dropped"],
)
def test_a_merged_token_is_measured_as_the_places_that_it_stands_for(mechanisms):
    """Image by image: which tokens are merged depends on the image, also on its noise, and the traced one is none of them."""
    model, images, calls = graft(build(), *mechanisms), pictures(4), []
    noisy = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    both_, layouts = torch.cat([images, noisy]), trace(model, pictures(1, seed=9))

    def see(call):
        calls.append((call.map(), call.assignment, call.inserted, call.q.double(), call.k.double(), call.scale))

    watch(model, both_, see, layouts=layouts)
    table, readout = measured(model, both_, noisy=True, layouts=layouts)
    maps, assignment, inserted, q, k, scale = calls[1]
    assert len({tuple(row.tolist()) for row in assignment.index}) == 8
    far = whole_maps.distances(*[torch.cat([places(1), torch.full((inserted, 2), torch.nan)])] * 2)
    wholes = [over_places(maps[i, 0].double(), assignment.index[i], inserted) for i in range(8)]
    for image in range(4):
        whole, there = wholes[image]
        rows, close_to = whole[None, :, there], lambda name, value: close(column(table, name, 1)[image], value)  # noqa: B023
        close_to("mean_distance", whole_maps.mean_distance(rows, far[there])[0])
        close_to("attention_entropy", whole_maps.attention_entropy(rows)[0])
        close_to("effective_tokens", whole_maps.effective_tokens(rows)[0])
        close_to("head_redundancy", indicators.head_redundancy(whole_maps.head_gram(rows))[0])
        change = (wholes[4 + image][0] - whole).norm(dim=(1, 2)) / whole.norm(dim=(1, 2))
        close_to("perturbation_robustness", change)
        picture = readout.maps["attention/1"][image].double().flatten(1)
        close(picture, whole[:, 0, 1:17])
        index = torch.cat([assignment.index[image], torch.arange(q.shape[3] - inserted, q.shape[3])])
        of_places = [x[image, 0][:, index[index >= 0]] for x in (q, k)]  # (H, places, K)
        close_to("angular_alignment", torch.nn.functional.cosine_similarity(*of_places, dim=-1).mean(-1))
        values = torch.linalg.svdvals(of_places[0] @ of_places[1].mT * scale)[:, : min(q.shape[3:])]
        close(column(table, "effective_rank", 1, source="score")[image], indicators.effective_rank(values))


def test_without_a_class_token_a_merged_query_counts_as_the_places_that_it_stands_for():
    model, images, calls = graft(build("average pool"), TokenMerging(tokens=3)), pictures(4), []
    watch(model, images, lambda call: calls.append((call.map(), call.assignment)))
    _, readout = measured(model, images, noisy=False)
    maps, assignment = calls[1]
    for image in range(4):
        whole, there = over_places(maps[image, 0].double(), assignment.index[image])
        assert there.all()
        close(readout.maps["attention/1"][image].double().flatten(1), whole.mean(1))
        close(readout.maps["attention/1"][image].double().sum(dim=(1, 2)), torch.ones(2))


@pytest.mark.parametrize("mechanisms", [(), (SVDA(),)], ids=["plain", "svda"])
def test_bfloat16_and_autocast_come_near_float32(mechanisms):
    model, images = graft(build(), *mechanisms), pictures()
    wide, _ = measured(model, images, noisy=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = measured(model, images, noisy=False)
    half, notes = measured(copy.deepcopy(model).bfloat16(), images.bfloat16(), noisy=False)
    for name in ("selectivity", "angular_alignment", "spectral_entropy", "head_redundancy"):
        np.testing.assert_allclose(mixed[name], wide[name], rtol=0.02, atol=0.02)
        np.testing.assert_allclose(half[name], wide[name], rtol=0.02, atol=0.02)
    assert bool(notes.notes) == bool(mechanisms)  # rounding is not taken for a norm between weights and scores


def test_rank_collapse_of_the_residual_stream():
    """Of all tokens after a block, of the clean images."""
    model, images, outputs = build(), both(pictures()), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: outputs.__setitem__(i, out.clone()))
    table, _ = measured(model, images, probes="rank_collapse")
    for i in range(2):
        x = outputs[i][:3].double()
        wanted = (x - x.mean(1, keepdim=True)).norm(dim=(1, 2)) / x.norm(dim=(1, 2))
        close(column(table, "rank_collapse", i, together=True)[:, 0], wanted)


def test_a_trained_model(shared_data):
    """ImageNet ViT-Tiny on two photographs: sharp heads beside wide ones, little changed by 1 % of noise."""
    file = shared_data / "weights" / "vit_tiny_patch16_224" / "model.safetensors"
    model = timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    photographs = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:2]
    images = (torch.from_numpy(photographs).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    noisy = perturbed(images, 0.01, torch.Generator().manual_seed(0), (0.5,), (0.5,))
    table, readout = measured(model, torch.cat([images, noisy]))
    assert readout.notes == []

    def heads(name, source="attention"):
        return torch.stack([column(table, name, i, source).mean(0) for i in range(12)])

    assert heads("mean_distance").shape == (12, 3)
    assert 1 <= heads("effective_tokens").min() < 5 < 50 < heads("effective_tokens").max() <= 197
    assert 0 < heads("perturbation_robustness").min() < heads("perturbation_robustness").max() < 0.5
    assert 0 < heads("mean_distance").min() < 40 < 80 < heads("mean_distance").max() < 200
    for source in ("weight", "score"):
        assert 1 < heads("effective_rank", source).min() < 3 < 8 < heads("effective_rank", source).max() < 64
