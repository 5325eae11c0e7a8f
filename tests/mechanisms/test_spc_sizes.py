"""SPC at the sizes it is timed at: the formula by a float64 SVD, ID-RSVD by a textbook's algorithm, bad input, export."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layers.planted import SPECTRA, noise, planted, values
from vitreous import graft, ungraft
from vitreous.mechanism import parse
from vitreous.mechanisms.tokens.spc import Components

# batch, tokens, width: ViT-Ti and ViT-B as they are timed, and as many tokens as small images have
SIZES = [(16, 197, 192), (4, 197, 768), (16, 50, 192), (4, 50, 768)]
at_every_size = pytest.mark.parametrize(("batch", "tokens", "width"), SIZES)


def given(batch: int, tokens: int, width: int, decay: str = "fast") -> Tensor:
    """Token matrices (B, M, D) in float32 with known spectra, no two of the same vectors."""
    s = values(decay, min(tokens, width))
    x = planted(tokens, width, 30 * s)[0]
    return torch.stack([x.roll((b, 3 * b), (0, 1)) * (1 + 0.1 * b) for b in range(batch)]).float()


def step_of(width: int, text: str) -> Components:
    step = Components(parse(text), width, (0, 1), False)
    with torch.no_grad():
        if step.mix is not None:  # a mix that is no longer the identity, and a choice that depends on the class token
            step.mix.copy_(torch.tensor([0.7, 0.2, 0.5, 1.0]))
            step.choice.weight.copy_(0.05 * noise(*step.choice.weight.shape))
    return step


def settled(u: Tensor, x: Tensor) -> Tensor:
    """u (M, n) with the signs of the rules: first the likeness to the mean token, then the sum, then that of the cubes."""
    towards = x @ x.mean(0)
    towards = F.normalize(towards - towards.mean(), dim=0, eps=1e-9)
    factors = []
    for one in u.detach().T:
        rules = (one @ towards, one.sum() / len(one) ** 0.5, one.pow(3).sum())
        factors.append(next((rule for rule in rules if rule.abs() >= 0.01), rules[-1]).sign())
    return u * torch.stack(factors)


def formula(x: Tensor, weights: dict[str, Tensor], n: int, through: bool) -> Tensor:
    """The component tokens of one image x (M, D) in float64: T = U_n^T X, U by SVD or by ID-RSVD, mixed by SSVA."""
    rows = x if through else x.detach()
    if "sketch.weight" in weights:
        odds = (F.layer_norm(rows, rows.shape[-1:]) @ weights["sketch.weight"].T).exp()
        sketch = rows.T @ (odds / odds.sum(0))
        y, _ = torch.linalg.qr(rows @ (rows.T @ (rows @ sketch)))  # one power step
        inner, _, _ = torch.linalg.svd(y.T @ rows, full_matrices=False)
        u = y @ inner[:, :n]
    else:
        u = torch.linalg.svd(rows, full_matrices=False)[0][:, :n]
    made = settled(u, rows.detach()).T @ x
    return mixed(x, weights, made) if "mix" in weights else made


def mixed(x: Tensor, weights: dict[str, Tensor], made: Tensor) -> Tensor:
    """SSVA: components (n, D) to tokens, by what the class token x[0] chooses."""
    n = len(made)
    logits = F.layer_norm(x[0], x.shape[-1:]) @ weights["choice.weight"].T + weights["choice.bias"]
    odds = logits.view(-1, n).exp()
    g = weights["mix"][:, None]
    return ((1 - g) * torch.eye(len(g), n) + g * odds / odds.sum(1, keepdim=True)) @ made


def both(step: Components, x: Tensor, push: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens, then the gradients of <tokens, push> to x and to the weights: of the step in float32, and of the formula."""
    weights = {name: w.detach().double().requires_grad_() for name, w in step.named_parameters()}
    exact = x.double().requires_grad_()
    expected = torch.stack([formula(image, weights, step.taken, step.settings.gradient == "through") for image in exact])
    (expected * push).sum().backward()
    x = x.clone().requires_grad_()
    found = step.spc_tokens(x)
    (found * push).sum().backward()
    return (
        [found, x.grad, *(p.grad for p in step.parameters())],
        [expected, exact.grad, *(w.grad for w in weights.values())],
    )


def near(found: Tensor, expected: Tensor, share: float, floor: float = 0.0) -> None:
    assert (found.double() - expected).norm() <= share * expected.norm() + floor


@pytest.mark.parametrize("text", ["spc", "spc:ssva=true"])
@at_every_size
def test_equals_the_formula(batch, tokens, width, text):
    x, step = given(batch, tokens, width), step_of(width, text)
    found, expected = both(step, x, noise(batch, 4, width, seed=5))
    for one, other in zip(found, expected, strict=True):
        near(one, other, 2e-5)  # measured: 6e-6, in gradients
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(step.spc_tokens(x), found[0])
    assert torch.equal(step.spc_tokens(x.bfloat16()), step.spc_tokens(x.bfloat16().float()))


@pytest.mark.parametrize("decay", SPECTRA)
@pytest.mark.parametrize("text", ["spc:sketch=8+1+true", "spc:sketch=8+1+true,ssva=true,gradient=through"])
@at_every_size
def test_learned_sketch_equals_the_textbook(batch, tokens, width, text, decay):
    """One answer for a given sketch, also where that is far from the leading vectors."""
    x, step = given(batch, tokens, width, decay), step_of(width, text)
    push = noise(batch, 4, width, seed=5)
    found, expected = both(step, x, push)
    names = ["tokens", "x", *dict(step.named_parameters())]
    for name, one, other in zip(names, found, expected, strict=True):
        if name == "sketch.weight":  # far smaller than the others where vectors hardly depend on the sketch: mostly rounding
            near(one, other, 1e-3, 2e-6 * push.norm())
        else:
            near(one, other, 2e-5)


# --- degenerate input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["spc", "spc:ssva=true", "spc:sketch=8+1+true", "spc:sketch=8+1+true,gradient=through"])
@at_every_size
def test_degenerate_images_in_one_batch(batch, tokens, width, text):
    """Zero, constant, two directions only, and NaN beside sound ones; tokens of no length stand for vectors there are not."""
    step, x = step_of(width, text), given(8, tokens, width)
    x[1], x[2], x[4, 3, 5] = 0, 2.5, float("nan")
    x[3] = (noise(tokens, 2, seed=7) @ noise(2, width, seed=8)).float()
    x.requires_grad_()
    made = step.spc_tokens(x)
    others = [0, 1, 2, 3, 5, 6, 7]
    assert made[others].isfinite().all()
    weights = {name: w.detach().double() for name, w in step.named_parameters()}
    weights.pop("sketch.weight", None)  # a sketch of the image itself loses nothing of so few directions
    for image, rank in ((1, 0), (2, 1), (3, 2)):
        exact = x[image].detach().double()
        if image == 2:  # every token is alike, so the vector is a constant one, and its sign makes the sum positive
            lone = torch.zeros(step.taken, width, dtype=torch.float64)
            lone[0] = tokens**0.5 * 2.5
        else:
            lone = formula(exact, {}, step.taken, False)
            lone[rank:] = 0
        if step.mix is not None:
            lone = mixed(exact, weights, lone)
        near(made[image], lone, 2e-5, 1e-6)
    alone = step.spc_tokens(x.detach()[[0, 5, 6, 7]])
    near(made[[0, 5, 6, 7]], alone.double(), 2e-6)  # products of other batch sizes round otherwise
    made[others].square().sum().backward()
    assert x.grad[others].isfinite().all()
    step.zero_grad()
    step.spc_tokens(x[others]).square().sum().backward()  # a weight's gradient is a sum over images: without the NaN
    assert all(p.grad.isfinite().all() for p in step.parameters())


# --- whole models -----------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, images: Tensor, after: int) -> Tensor:
    """Logits of a plain host with component tokens by a float64 SVD behind `after` blocks, read with the class token."""
    x = model.blocks[:after](model._pos_embed(model.patch_embed(images)))
    made = torch.stack([formula(image, {}, 4, False) for image in x.double()])
    x = model.norm(model.blocks[after:](torch.cat([x, made.to(x)], dim=1)))
    return model.head(torch.cat([x[:, :1], x[:, -4:]], dim=1).mean(1))


def difference(model: nn.Module, images: Tensor, after: int, sketch: str) -> float:
    """The largest relative error of an image's logits."""
    with torch.no_grad():
        expected = by_hand(model, images, after)
        found = graft(model, f"spc:after={after},sketch={sketch}")(images)
    ungraft(model)
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize(("after", "near_enough"), [(6, 0.03), (11, 0.006)])
def test_vit_tiny_on_photographs(shared_data, after, near_enough):
    """Real tokens, whose values fall slowly behind the first few: near the SVD by default, equal with a wide sketch."""
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:6]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    images[4], images[5] = 0, 1  # and two without content
    assert difference(model, images, after, "8+2+false") < near_enough  # measured: half
    assert difference(model, images, after, "24+6+false") < 1e-5  # measured: 2e-6


@pytest.mark.parametrize("after", [6, 11])
def test_vit_base(after):
    """Weights are random here, so that values fall as slowly as those of noise: more columns and steps for the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_base_patch16_224").eval()
    images = noise(2, 3, 224, 224).float()
    assert difference(model, images, after, "64+8+false") < 1e-5  # measured: 2e-6


@pytest.mark.parametrize("text", ["spc:after=11,ssva=true", "spc:after=6,sketch=8+1+true"])
def test_exported_equals_eager(text):
    """ViT-Ti at full size and depth, in batches of which none is the one it was exported with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = graft(timm.create_model("vit_tiny_patch16_224"), text).eval()
    images = noise(5, 3, 224, 224).float()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (images[:2],), dynamic_shapes=(batch,)).module()
    with torch.no_grad():
        for count in (3, 5):
            torch.testing.assert_close(program(images[:count]), model(images[:count]), atol=1e-4, rtol=0)
