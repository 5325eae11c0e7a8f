"""Sparsifiner's masks against loops, the phases of its training, and its limits."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from vitreous import Sparsifiner, check, collect_terms, graft, load_weights, new_parameters
from vitreous.base.errors import GraftError, HostError, MaskError, SettingError
from vitreous.layers.stream import Assignment, TokenState
from vitreous.lens.look import look
from vitreous.mechanisms.attn.sparsifiner import connectivity_scores, largest

SMALL = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**SMALL | {"reg_tokens": 1} | options).double().eval()


def pictures(height=12, width=20):
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def state(**fields):
    return TokenState(grid=(3, 5), prefix=2, **fields)


def tokens(count=17):
    return torch.randn(2, count, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def queries_and_keys(attention, x):
    q, k, _ = attention.project(x)
    return q, k


def coefficients_by_hand(attention, x):
    """c (B, H, N, n) of all tokens, one number after the other."""
    q, k = queries_and_keys(attention, x)
    rank = attention.down.shape[1]
    out = torch.zeros(*q.shape[:3], rank, dtype=torch.float64)
    for b in range(len(x)):
        for h in range(3):
            low_q = [attention.reduce_q @ row + attention.bias_q for row in q[b, h]]
            low_k = [attention.reduce_k @ row + attention.bias_k for row in k[b, h]]
            centres = [sum(attention.down[n, r] * low_k[n] for n in range(len(low_k))) for r in range(rank)]
            for n, row in enumerate(low_q):
                out[b, h, n] = torch.stack([row @ centre for centre in centres]).div(3**0.5).softmax(0)  # 3 heads
    return out


def chosen_by_hand(attention, x, keep, most, threshold):
    """{(image, head, token): its keys}: those of the largest connectivity.

    All keys for the two tokens of the prefix.
    """
    coefficients, up, keys = coefficients_by_hand(attention, x), attention.up, {}
    count = x.shape[1]
    for b in range(len(x)):
        for h in range(3):
            for i in range(count):
                c = coefficients[b, h, i].tolist()
                used = sorted(range(len(c)), key=lambda r: -c[r])[:most]
                scores = [sum(c[r] * abs(up[j, r].item()) for r in used if abs(up[j, r]) > threshold) for j in range(count)]
                budget = math.ceil(keep * count)
                keys[b, h, i] = set(range(count)) if i < 2 else set(sorted(range(count), key=lambda j: -scores[j])[:budget])
    return keys


@torch.no_grad()
@pytest.mark.parametrize(("keep", "reduce", "most", "threshold"), [(0.25, 2, 3, 0.005), (0.5, 4, 8, 0.0)])
def test_attention_over_the_chosen_keys(keep, reduce, most, threshold):
    """Mask and output, entry by entry."""
    settings = Sparsifiner(keep=keep, reduce=reduce, coefficients=most, threshold=threshold)
    attention, x = graft(vit(), settings).blocks[0].attn, tokens()
    keys = chosen_by_hand(attention, x, keep, most, threshold)
    q, k = queries_and_keys(attention, x)
    (bias,) = attention.biases(x, q, k, state())
    out = torch.zeros(2, 17, 3, 8, dtype=torch.float64)
    values = attention.project(x)[2]
    for (b, h, i), seen in keys.items():
        assert set((bias[b, h, i] == 0).nonzero().flatten().tolist()) == seen
        seen = sorted(seen)
        weights = torch.stack([q[b, h, i] @ k[b, h, j] / 8**0.5 for j in seen]).softmax(0)
        out[b, i, h] = sum(w * values[b, h, j] for w, j in zip(weights, seen, strict=True))
    result = attention(x, state=state())
    torch.testing.assert_close(result, attention.proj(out.flatten(2)), atol=1e-13, rtol=1e-13)
    assert (result - attention.host.forward(attention, x)).abs().max() > 1e-3


@torch.no_grad()
def test_published_masks_and_parameters():
    """DeiT-S: 16,768 more numbers per block, 50 of 197 keys per patch.

    All for the class token: a share of 0.2576.
    """
    model = graft(timm.create_model("deit_small_patch16_224", depth=1).eval(), Sparsifiner())
    assert sum(p.numel() for p in new_parameters(model).values()) == 16_768
    x = torch.randn(1, 197, 384, generator=torch.Generator().manual_seed(0))
    attention = model.blocks[0].attn
    (bias,) = attention.biases(x, *queries_and_keys(attention, x), TokenState(grid=(14, 14), prefix=1))
    seen = bias == 0
    assert (seen[:, :, 1:].sum(-1) == 50).all()
    assert seen[:, :, 0].all()
    assert seen.double().mean().item() == pytest.approx(0.2576, abs=1e-4)
    assert attention.down.shape == (197, 32)


def test_what_is_largest():
    assert largest(torch.tensor([[1.0, 4, 3, 2]]), 2).tolist() == [[False, True, True, False]]
    coefficients, basis = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[-0.5, 0.01, 1.0], [0.1, 0.4, 0.0]])
    assert connectivity_scores(coefficients, basis, 2, 0.02).tolist() == [pytest.approx([0.25, 0.17])]
    assert connectivity_scores(coefficients, basis, 9, 0.0).tolist() == [pytest.approx([0.453, 0.17])]


@pytest.mark.parametrize("settings", [Sparsifiner(keep=1.0), Sparsifiner(phase="reconstruct")])
def test_all_keys_are_the_host_bit_for_bit(settings):
    model = vit().float()
    expected = model(pictures().float())
    assert torch.equal(graft(model, settings)(pictures().float()), expected)
    assert not torch.equal(graft(vit().float(), Sparsifiner(keep=0.9))(pictures().float()), expected)


def test_penalty_is_the_error_of_reconstruction():
    """Of the rows of patches, with all coefficients and the basis with its signs.

    Mean over layers and images.
    """
    model = graft(vit(), Sparsifiner(phase="reconstruct", reconstruction=0.3, reduce=3))
    inputs = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0].detach())))
    with collect_terms(model) as terms:
        model(pictures())
    expected = 0.0
    with torch.no_grad():
        for attention, x in inputs:
            q, k = queries_and_keys(attention, x)
            weights = (q @ k.mT / 8**0.5).softmax(-1)
            error = coefficients_by_hand(attention, x) @ attention.up.T - weights
            expected += 0.3 / 2 * error[:, :, 2:].square().sum() / 2
    assert terms["sparsifiner_reconstruction"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("phase", ["reconstruct", "sparse"])
def test_the_predictor_learns_from_the_penalty_alone(phase):
    """The choice of keys has no gradient.

    As released, nothing of the predictor learns in the second phase.
    """
    model = graft(vit(), Sparsifiner(phase=phase, reduce=3))
    with collect_terms(model) as terms:
        loss = model(pictures()).square().sum()
    loss.backward(retain_graph=True)
    assert all(p.grad is None for p in new_parameters(model).values())
    terms["sparsifiner_reconstruction"].backward()
    assert len(new_parameters(model)) == 12
    assert all(p.grad.abs().max() > 0 for p in new_parameters(model).values())
    released = graft(vit(), Sparsifiner(phase=phase, reconstruction=0.0))
    with collect_terms(released) as none:
        released(pictures())
    assert none == {}
    assert not any(p.requires_grad for p in new_parameters(released).values())


def test_a_run_begins_with_reconstruction():
    """All keys in the first tenth of a run; an untrained or loaded model is sparse."""
    model = vit().float()
    expected = model(pictures().float())
    graft(model, "sparsifiner:phase=schedule")
    outputs = [model(pictures().float())]
    for progress in (0.0, 0.09, 0.1, 1.0):
        for block in model.blocks:
            block.attn.schedule(progress)
        outputs.append(model(pictures().float()))
    assert [torch.equal(out, expected) for out in outputs] == [False, True, True, False, False]
    assert torch.equal(outputs[0], outputs[-1])
    always = graft(vit().float(), "sparsifiner:phase=reconstruct")
    always.blocks[0].attn.schedule(1.0)
    assert torch.equal(always(pictures().float()), expected)


def test_reconstruction_falls_when_the_predictor_is_trained():
    model = graft(vit(), Sparsifiner(phase="reconstruct", reduce=2))
    optimizer, errors = torch.optim.Adam(new_parameters(model).values(), lr=0.02), []
    for _ in range(30):
        with collect_terms(model) as terms:
            model(pictures())
        optimizer.zero_grad()
        terms["sparsifiner_reconstruction"].backward()
        optimizer.step()
        errors.append(terms["sparsifiner_reconstruction"].item())
    assert errors[-1] < 0.7 * errors[0]


@torch.no_grad()
def test_inserted_and_merged_tokens():
    attention = graft(vit(), Sparsifiner(reduce=2, threshold=0.0)).blocks[0].attn
    x = tokens(19)
    (bias,) = attention.biases(x, *queries_and_keys(attention, x), state(read_out=(False, True)))
    assert (bias[:, :, [0, 1, 17, 18]] == 0).all()
    assert (bias[..., 17:] == 0).all()
    (without,) = attention.biases(x, *queries_and_keys(attention, x[:, :17]), state())
    assert torch.equal(bias[:, :, :17, :17], without)
    index = torch.tensor([[0, 1, 2, 2, *range(3, 16)]]).expand(2, -1)  # the first two places are one
    merged = state(assignment=Assignment(index, tokens=16))
    (bias,) = attention.biases(x, *queries_and_keys(attention, x[:, :16]), merged)
    assert bias.shape == (2, 3, 16, 16)
    assert ((bias[:, :, 2:] == 0).sum(-1) == 4).all()  # a quarter of 16


def test_another_image_size_is_refused():
    model = graft(vit(dynamic_img_size=True), "sparsifiner")
    check(model, pictures())
    for size in ((20, 12), (24, 24)):
        with pytest.raises(MaskError, match=r"Found images of . x . patches\. Expected 3 x 5, as when sparsifiner was grafted"):
            model(pictures(*size))


def test_look_verifies_sparse_maps():
    """And the predictor's coefficients beside them, attention to the 2 rows of its basis."""
    reading = look(graft(vit(), "sparsifiner").float(), pictures().float().clamp(0, 1))
    layers = [(layer["name"], layer["keys"]) for layer in reading.layers]
    assert layers == [(f"blocks.{i}.attn", keys) for i in range(2) for keys in (2, 17)]
    assert all(layer["error"] < 1e-5 for layer in reading.layers)


def test_the_authors_names_load(tmp_path):
    def small():
        return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()

    model, names = graft(small(), Sparsifiner(seed=3, reduce=2)), {}
    theirs = {
        "reduce_q": "proj_c_q.weight",
        "reduce_k": "proj_c_k.weight",
        "bias_q": "proj_c_q.bias",
        "bias_k": "proj_c_k.bias",
    }
    for name, value in model.state_dict().items():
        head, _, last = name.rpartition(".")
        last = (theirs | {"down": "proj_n", "up": "proj_back_n"}).get(last)
        names[f"{head}.mask_predictor.{last}" if last else name] = value
    torch.save(names, tmp_path / "theirs.pth")
    other, images = graft(small(), Sparsifiner(reduce=2)), torch.randn(2, 3, 32, 32)
    assert not torch.equal(other(images), model(images))
    load_weights(other, tmp_path / "theirs.pth")
    assert torch.equal(other(images), model(images))


def test_bad_input():
    for text, match in (
        ("keep=0", r"keep=0\.0\. Expected above 0 and at most 1"),
        ("reduce=0", r"reduce=0\. Expected 1 or more"),
        ("coefficients=0", r"coefficients=0\. Expected 1 or more"),
        ("threshold=-1", r"threshold=-1\.0\. Expected 0 or more"),
    ):
        with pytest.raises(SettingError, match=match):
            graft(vit(), f"sparsifiner:{text}")
    with pytest.raises(HostError, match=r"Found 17 tokens and heads of 8 numbers at blocks\.0\.attn\. Expected 18 tokens"):
        graft(vit(), "sparsifiner:reduce=18")
    with pytest.raises(GraftError, match="already holds"):
        graft(vit(), "svda", "sparsifiner")
    dropping = graft(vit(patch_drop_rate=0.5), "sparsifiner").train()
    with pytest.raises(MaskError, match=r"tokens whose places .* not known\..*patch_drop_rate.*sparsifiner"):
        dropping(pictures())
