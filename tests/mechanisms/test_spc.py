"""SPC against the formula by scipy's SVD, the laws of permutation and rotation, the read-out, and every setting."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch.nn import functional as F

from vitreous import SPC, ExtraTokens, check, graft, ungraft
from vitreous.base.errors import HostError, MaskError, SettingError
from vitreous.layers.foreground import place_bump, towards_centre
from vitreous.layers.geometry import centre_prior
from vitreous.layers.stream import Assignment, TokenState
from vitreous.lens.look import look
from vitreous.mechanisms.tokens.spc import Components, foreground_weights, learned_sketch, mixing

RANDOM = torch.Generator().manual_seed(0)


def vit(**kwargs):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **settings | kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def tokens(batch=2, count=17, width=24):
    """Token matrices with well separated singular values."""
    x = torch.randn(batch, count, width, dtype=torch.float64, generator=RANDOM)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u * (10.0 / 1.7 ** torch.arange(min(count, width))) @ vh


def made(x, **settings):
    return Components(SPC(**settings), x.shape[-1], (0, 1), False).double().spc_tokens(x)


def test_tokens_are_singular_values_times_right_vectors():
    """U^T X = S V^T (A.3), with scipy's SVD as the oracle; signs apart."""
    x = tokens()
    found = made(x)
    for b in range(2):
        _, s, vh = scipy.linalg.svd(x[b].numpy(), full_matrices=False)
        expected = s[:4, None] * vh[:4]
        signs = np.sign((found[b].numpy() * expected).sum(1, keepdims=True))
        assert np.abs(found[b].numpy() - signs * expected).max() < 1e-6


@pytest.mark.parametrize("sign", ["mean", "class", "sum"])
@pytest.mark.parametrize("rows", ["raw", "unit"])
def test_permuted_patches_give_the_same_tokens_and_rotated_features_rotated_ones(sign, rows):
    x = tokens()
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16, generator=RANDOM)])
    rotation = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=RANDOM))[0]
    settings = {"sign": sign, "rows": rows, "sketch": (13, 4, False)}  # a sketch as wide as the tokens: exact
    found = made(x, **settings)
    assert (made(x[:, order], **settings) - found).abs().max() < 1e-9
    assert (made(x @ rotation, **settings) - found @ rotation).abs().max() < 1e-9


def test_signs_do_not_depend_on_the_sketch_or_on_the_sign_of_nothing():
    """Flipping all features flips the tokens with them: the weights of the tokens, U, stay."""
    x = tokens()
    assert (made(-x) + made(x)).abs().max() < 1e-9
    assert (made(x, sketch=(13, 0, False)) - made(x, sketch=(9, 6, False))).abs().max() < 1e-6


def test_after_the_last_block_equals_a_manual_computation():
    model = vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.blocks(model._pos_embed(model.patch_embed(images)))
    spatial = made(x)
    by_hand = model.norm(torch.cat([x[:, :1], spatial], dim=1)).mean(1)
    graft(model, SPC(after=3))
    assert (model(images) - model.head(by_hand)).abs().max() < 1e-9


def test_in_the_middle_equals_a_manual_computation():
    model = vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.blocks[0](model._pos_embed(model.patch_embed(images)))
    x = model.blocks[1:](torch.cat([x, made(x)], dim=1))
    x = model.norm(x)
    by_hand = model.head(torch.cat([x[:, :1], x[:, 17:]], dim=1).mean(1))
    graft(model, SPC(after=1))
    assert (model(images) - by_hand).abs().max() < 1e-9


def test_average_pooled_host_takes_the_mean_over_patches_and_spc_tokens():
    model = vit(global_pool="avg", fc_norm=False)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.blocks(model._pos_embed(model.patch_embed(images)))
    x = model.norm(torch.cat([x, made(x)], dim=1))
    by_hand = model.head(x[:, 1:].mean(1))
    graft(model, SPC(after=3))
    assert (model(images) - by_hand).abs().max() < 1e-9
    assert model.forward_features(images).shape == (2, 17, 24)


def test_distilled_host_reads_into_both_of_its_tokens():
    torch.manual_seed(0)
    model = VisionTransformerDistilled(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    model = model.double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.norm(model.blocks(model._pos_embed(model.patch_embed(images))))
    graft(model, SPC(after=2))
    moved = model.forward_features(images) - x
    assert moved[:, 0].norm() > 0.1
    assert moved[:, 1].norm() > 0.1
    assert moved[:, 2:].abs().max() == 0


@pytest.mark.parametrize("after", [1, 2, 3])
def test_gated_starts_as_the_identity_and_learns(after):
    model = vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model(images)
    graft(model, SPC(after=after, read="gated"))
    check(model, images)
    assert torch.equal(model(images), before)
    model(images).square().sum().backward()
    gate = model.blocks[after - 1].after[0].gate
    assert gate.shape == (4, 24)
    assert (gate.grad.abs().sum(1) > 0).all()
    gate.data.fill_(0.1)
    assert (model(images) - before).abs().max() > 1e-6


@pytest.mark.parametrize(("basis", "columns"), [("svd", slice(0, 4)), ("trailing", slice(-4, None))])
def test_squared_loadings_are_a_weighted_mean_without_a_sign(basis, columns):
    """t_i = sum_j u_ji^2 x_j, with scipy's SVD as the oracle, whose signs are other ones."""
    x = tokens()
    squared = made(x, sign="squared", basis=basis)
    for b in range(2):
        u = scipy.linalg.svd(x[b].numpy(), full_matrices=False)[0][:, columns]
        assert np.abs(squared[b].numpy() - (u**2).T @ x[b].numpy()).max() < 1e-6
    random = [made(values, sign="squared", basis="random") for values in (x, x + 1)]
    assert (random[1] - random[0] - 1).abs().max() < 1e-9  # the weights sum to 1


@pytest.mark.parametrize("sign", ["mean", "squared"])
def test_learned_tokens_start_as_extra_tokens_and_take_in_components_by_a_gate(sign):
    model = vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    graft(model, ExtraTokens(after=2))
    plain = model(images)
    ungraft(model)
    graft(model, SPC(after=2, sign=sign, read="learned"))
    step = model.blocks[1].after[0]
    assert torch.equal(model(images), plain)
    model(images).square().sum().backward()
    assert min(step.gate.grad.abs().max(), step.learned.grad.abs().max()) > 0
    torch.nn.init.normal_(step.gate, generator=torch.Generator().manual_seed(1))
    opened, gate, learned = model(images), step.gate.detach().clone(), step.learned.detach().clone()
    ungraft(model)
    x = model.blocks[:2](model._pos_embed(model.patch_embed(images)))
    content = made(x, sign=sign)
    content = (content - content.mean(-1, keepdim=True)) / (content.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = model.norm(model.blocks[2](torch.cat([x, learned + gate * content], dim=1)))
    by_hand = model.head(torch.cat([x[:, :1], x[:, 17:]], dim=1).mean(1))
    assert (opened - by_hand).abs().max() < 1e-9
    assert (opened - plain).abs().max() > 1e-3


def test_ssva_starts_as_the_leading_components_and_mixes():
    x = tokens()
    step = Components(SPC(ssva=True), 24, (0, 1), False).double()
    plain = made(x, tokens=8)[:, :4]
    assert (step.spc_tokens(x) - plain).abs().max() < 1e-9
    step.mix.data.fill_(0.7)
    weights = mixing(step.choice, step.mix, x[:, 0], 8)
    assert weights.shape == (2, 4, 8)
    assert (weights.sum(-1) - 1).abs().max() < 1e-12
    assert weights.min() >= 0
    logits = F.layer_norm(x[0, 0], (24,)) @ step.choice.weight.T + step.choice.bias
    share = logits.reshape(4, 8).exp() / logits.reshape(4, 8).exp().sum(1, keepdim=True)
    row = 0.3 * torch.eye(4, 8, dtype=torch.float64) + 0.7 * share
    assert (weights[0] - row).abs().max() < 1e-12


@pytest.mark.parametrize("power", [0, 1])
def test_learned_sketch_gets_a_gradient_that_more_power_steps_shrink(power):
    def gradient(steps):
        step = Components(SPC(sketch=(0, min(steps, 1), True)), 24, (0, 1), False).double()
        if steps > 1:
            object.__setattr__(step.settings, "sketch", (0, steps, True))
        x = torch.randn(2, 17, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x = x / (1 + torch.arange(24)) ** 0.5
        step.spc_tokens(x).square().sum().backward()
        return step.sketch.weight.grad.norm()

    assert gradient(power) > 0
    assert gradient(6) < 0.2 * gradient(power)


def test_learned_sketch_is_made_of_the_images_own_tokens():
    x = tokens()
    step = Components(SPC(sketch=(4, 1, True)), 24, (0, 1), False).double()
    sketch = learned_sketch(x, step.sketch)
    assert sketch.shape == (2, 24, 8)
    order = torch.randperm(17, generator=RANDOM)
    assert (learned_sketch(x[:, order], step.sketch) - sketch).abs().max() < 1e-10
    normed = F.layer_norm(x[0], (24,)) @ step.sketch.weight.T
    share = normed.exp() / normed.exp().sum(0)
    assert (sketch[0] - x[0].T @ share).abs().max() < 1e-10


def test_gradient_detach_and_through():
    """detach: dT = U^T dX, exactly; through: what finite differences say."""
    x = tokens(batch=1).requires_grad_()
    weights = torch.randn(4, 24, dtype=torch.float64, generator=RANDOM)
    (made(x) * weights).sum().backward()
    step = Components(SPC(), 24, (0, 1), False)
    u = step.basis(x.detach())
    assert (x.grad - u @ weights).abs().max() < 1e-8

    y = tokens(batch=1).requires_grad_()
    settings = {"gradient": "through", "sketch": (13, 2, False)}
    (made(y, **settings) * weights).sum().backward()
    direction = torch.randn(y.shape, dtype=torch.float64, generator=RANDOM)
    with torch.no_grad():
        h = 1e-5
        ahead, behind = ((made(y + e * h * direction, **settings) * weights).sum() for e in (1, -1))
    assert torch.isclose((y.grad * direction).sum(), (ahead - behind) / (2 * h), rtol=1e-3)


@pytest.mark.parametrize("gradient", ["detach", "through"])
@pytest.mark.parametrize("sketch", [(8, 2, False), (8, 1, True)])
def test_degenerate_images_give_finite_tokens_and_gradients(gradient, sketch):
    step = Components(SPC(gradient=gradient, sketch=sketch), 24, (0, 1), False)
    x = torch.zeros(4, 17, 24)
    x[1] = 3.0  # constant
    x[2, :, :2] = torch.randn(17, 2, generator=RANDOM)  # rank 2
    x[3] = torch.eye(17, 24)  # all singular values alike
    x.requires_grad_()
    out = step.spc_tokens(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert out[0].abs().max() == 0


def test_controls():
    x = tokens()
    mean = made(x, basis="mean", tokens=3)
    assert torch.allclose(mean, x.mean(1, keepdim=True).expand(-1, 3, -1))
    random = Components(SPC(basis="random"), 24, (0, 1), False).basis(x)
    assert (random.transpose(1, 2) @ random - torch.eye(4)).abs().max() < 1e-9
    assert torch.equal(random[0], random[1])
    trailing = Components(SPC(basis="trailing"), 24, (0, 1), False).basis(x)
    last = [np.abs(scipy.linalg.svd(x[b].numpy(), full_matrices=False)[0][:, -4:]) for b in range(2)]
    assert np.abs(trailing.abs().numpy() - np.stack(last)).max() < 1e-2  # s is down to 2e-3 of 10 there
    assert (trailing.transpose(1, 2) @ trailing - torch.eye(4)).abs().max() < 1e-6


# --- basis=calibrated -------------------------------------------------------------------------------------------------

GRID = (3, 4)
CALIBRATED = TokenState(grid=GRID, prefix=1)


def calibrated(**settings) -> Components:
    return Components(SPC(basis="calibrated", **settings), 24, (0, 1), False).double()


def scenes(count: int, seed: int, centre: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, 1 + P, D): two of the patches share a direction, in the middle or in a corner; and which ones (B, P)."""
    generator = torch.Generator().manual_seed(seed)
    subject = torch.zeros(count, 3, 4, dtype=torch.bool)
    subject[:, 1, 1:3] = centre
    subject[:, 2, 2:] |= not centre
    x = torch.randn(count, 13, 24, dtype=torch.float64, generator=generator)
    x[:, 1:, :3] += 4.0  # what all patches share
    x[:, 1:, 5] += 6.0 * subject.flatten(1)
    return x, subject.flatten(1)


def test_calibrated_weights_against_loops():
    """w = mean Z^T c, weights softmax(i z) of z = Zw with mean 0 and variance 1, one number after the other."""
    x = scenes(3, 1, True)[0]
    bump, summed = [], np.zeros(24)
    for row in range(3):
        for column in range(4):
            bump.append(np.exp(-(((row + 0.5) / 3 - 0.5) ** 2 + ((column + 0.5) / 4 - 0.5) ** 2) / (2 * 0.25**2)))
    z = []
    for image in x[:, 1:].numpy():
        unit = np.stack([row / np.sqrt((row**2).sum()) for row in image])
        z.append(unit - unit.mean(0))
        for value, row in zip(bump, z[-1], strict=True):
            summed += value * row / 3
    step = calibrated(tokens=3).train()
    weights = step.basis(x, CALIBRATED)
    made = step.spc_tokens(x, CALIBRATED)
    assert weights.shape == (3, 13, 3)
    assert weights[:, 0].abs().max() == 0  # the class token
    for b in range(3):
        along = z[b] @ summed
        along = (along - along.mean()) / along.std()
        for i in range(3):
            odds = np.exp((i + 1) * along)
            assert np.abs(weights[b, 1:, i].numpy() - odds / odds.sum()).max() < 1e-10
            assert np.abs(made[b, i].numpy() - (odds / odds.sum()) @ x[b, 1:].numpy()).max() < 1e-10


def test_a_planted_direction_is_found_from_central_subjects_and_serves_off_centre():
    """Also where a corner of the image holds the subject, which the bump alone would not find."""
    step = calibrated().train()
    for seed in range(3):
        step.spc_tokens(scenes(16, seed, True)[0], CALIBRATED)
    assert step.direction.argmax() == 5
    before = step.direction.clone()
    x, subject = scenes(50, 9, False)
    weights = step.eval().basis(x, CALIBRATED)[:, 1:]
    share = (weights * subject[..., None]).sum(1).mean(0)
    assert share[0] > 0.5  # of 2 patches of 12
    assert (share.diff() > 0).all()  # sharper from token to token
    assert torch.equal(step.direction, before)  # evaluation does not move it
    assert "direction" in step.state_dict()
    assert "direction" not in Components(SPC(), 24, (0, 1), False).state_dict()


def test_without_a_direction_yet_the_token_is_the_mean_of_the_patches():
    x = tokens(count=13)
    found = calibrated().eval().spc_tokens(x, CALIBRATED)
    assert (found - x[:, 1:].mean(1, keepdim=True)).abs().max() < 1e-12


def test_only_the_direction_of_w_counts_and_even_weights_have_finite_gradients():
    rows = torch.randn(2, 12, 24, dtype=torch.float64, generator=RANDOM)
    rows -= rows.mean(1, keepdim=True)
    w = torch.randn(24, dtype=torch.float64, generator=RANDOM)
    assert (foreground_weights(rows, 1e-3 * w, 4) - foreground_weights(rows, w, 4)).abs().max() < 1e-12
    rows.requires_grad_()
    even = foreground_weights(rows, torch.zeros_like(w), 2)
    even.square().sum().backward()
    assert (even - 1 / 12).abs().max() < 1e-12
    assert rows.grad.isfinite().all()


def test_an_image_that_is_not_finite_does_not_move_the_direction():
    x = scenes(4, 1, True)[0]
    one, other = calibrated().train(), calibrated().train()
    one.spc_tokens(x[:3], CALIBRATED)
    x[3, 5] = torch.nan
    assert other.spc_tokens(x, CALIBRATED)[:3].isfinite().all()
    assert torch.equal(one.direction, other.direction)
    bump = centre_prior(GRID)
    assert towards_centre(torch.full((2, 12, 24), torch.nan, dtype=torch.float64), bump).abs().max() == 0


def test_merged_patches_have_the_mean_bump_of_their_places():
    index = torch.tensor([[0, 1, 1, *range(2, 12)], [0, *range(1, 12), 11]])  # the first, or the last, two patches merged
    state = TokenState(grid=GRID, prefix=1, assignment=Assignment(index=index, tokens=12))
    bump = centre_prior(GRID)
    expected = torch.stack(
        [
            torch.cat([bump[:2].mean()[None], bump[2:]]),
            torch.cat([bump[:-2], bump[-2:].mean()[None]]),
        ]
    )
    rows = torch.zeros(2, 11, 24, dtype=torch.float64)
    assert (place_bump(state, rows, "spc") - expected).abs().max() < 1e-12
    channels = TokenState(grid=GRID, prefix=1, groups=2)
    assert torch.equal(place_bump(channels, torch.zeros(2, 24, 24, dtype=torch.float64), "spc"), bump.repeat(2))


@pytest.mark.parametrize("gradient", ["detach", "through"])
def test_checkpointing_moves_the_direction_once_and_gives_the_same_gradients(gradient):
    """Two image sizes before one backward pass, in which the blocks run again."""
    images = [torch.randn(3, 3, size, 16, dtype=torch.float64, generator=RANDOM) for size in (16, 24)]
    outcomes = []
    for enable in (False, True):
        model = graft(vit(dynamic_img_size=True), SPC(after=1, basis="calibrated", gradient=gradient)).train()
        model.set_grad_checkpointing(enable)
        sum(model(x).square().sum() for x in images).backward()
        assert model.blocks[0].after[0].direction.norm() > 0
        outcomes.append(model.state_dict() | {f"{name}'": p.grad for name, p in model.named_parameters()})
    for name, value in outcomes[0].items():
        assert torch.equal(value, outcomes[1][name]), name


def test_the_running_mean_is_that_of_the_batches():
    step, expected = calibrated().train(), torch.zeros(24, dtype=torch.float64)
    for seed in range(4):
        step.spc_tokens(scenes(5, seed, True)[0], CALIBRATED)
        once = calibrated().train()
        once.spc_tokens(scenes(5, seed, True)[0], CALIBRATED)
        expected = 0.95 * expected + once.direction  # from nothing, a batch leaves its twentieth
    assert (step.direction - expected).abs().max() < 1e-12


def test_patch_dropout_leaves_no_places_to_calibrate_by():
    model = graft(vit(patch_drop_rate=0.5), SPC(basis="calibrated"))
    model(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    with pytest.raises(MaskError, match=r"9 tokens whose places.*patch_drop_rate"):
        model.train()(torch.zeros(1, 3, 16, 16, dtype=torch.float64))


def test_inserted_tokens_are_no_part_of_a_later_decomposition():
    step = Components(SPC(), 24, (0, 1), False).double()
    x = tokens()
    once, state = step(x, TokenState(), None)
    twice, state = step(once, state, None)
    assert state.read_out == (True,) * 8
    assert (twice[:, 17:21] - twice[:, 21:]).abs().max() < 1e-12


@pytest.mark.parametrize("text", ["spc:ssva=true", "spc:sketch=8+1+true", "spc:basis=calibrated", "extra_tokens"])
def test_every_arm_joins_early_late_and_last_of_twelve_blocks(text):
    """Also behind the last block, where nothing but the head sees the tokens; there the patches' features stay."""
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for after in (3, 11, 12):
        model = vit(depth=12)
        plain, features = model(images), model.forward_features(images)
        graft(model, f"{text}{',' if ':' in text else ':'}after={after}")
        logits = model.train()(images)
        assert (logits - plain).abs().max() > 1e-6
        logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        patches = (model.eval().forward_features(images) - features)[:, 1:].abs().max()
        assert (patches < 1e-9) == (after == 12)


def test_registers_join_before_the_first_block_and_are_not_read():
    model, images = vit(depth=12), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    plain = model(images)
    graft(model, "extra_tokens:kind=register")
    assert (model(images) - plain).abs().max() > 1e-6  # blocks see them
    ungraft(model)
    graft(model, "extra_tokens:kind=register,after=12")
    assert torch.equal(model(images), plain)  # the head does not


@pytest.mark.parametrize("settings", ["", ",sign=squared,read=learned", ",basis=random", ",basis=calibrated"])
def test_look_draws_how_much_each_token_has_to_do_with_the_spc_tokens(settings):
    """The mean over components of squared entries of the singular vectors, or of the calibrated weights."""
    model = graft(vit(), f"spc:after=2{settings}")
    step, seen = model.blocks[1].steps("after")[0], []
    step.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    reading = look(model, torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=RANDOM), probes=["exposed"])
    x, state = next(call for call in seen if len(call[0]) == 2)
    weights = step.basis(x, state)
    shares = (weights if "calibrated" in settings else weights.square()).mean(-1)[:, 1:]
    torch.testing.assert_close(
        torch.tensor(reading.maps["exposed_spc_share", 1]).flatten(1).double(), shares, atol=2e-3, rtol=0.02
    )


def test_default_place_is_one_before_the_last_block():
    model = graft(vit(), SPC())
    assert hasattr(model.blocks[1], "after")
    assert not hasattr(model.blocks[2], "after")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in vit().parameters())


def test_bad_input():
    with pytest.raises(SettingError, match=r"tokens=9.*components=8"):
        SPC(ssva=True, tokens=9)
    with pytest.raises(SettingError, match="2 power steps"):
        SPC(sketch=(8, 2, True))
    with pytest.raises(SettingError, match=r"after=4.*1 to 3"):
        graft(vit(), SPC(after=4))
    with pytest.raises(HostError, match=r"no class token, which spc:sign=class reads.*such as .*sign=mean"):
        graft(vit(class_token=False, global_pool="avg"), SPC(sign="class"))
    with pytest.raises(HostError, match="global_pool='max'"):
        graft(vit(global_pool="max"), SPC())
    with pytest.raises(HostError, match="is a timm Eva"):
        graft(timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1), SPC())


def test_real_model_gated_spc_keeps_the_reference_logits(shared_data):
    model = timm.create_model(f"local-dir:{shared_data}/weights/vit_tiny_patch16_224", pretrained=True).eval()
    pixels = np.load(shared_data / "imagenet1k-samples" / "imagenet_50_224px.npz")["images"][:4]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = model(images)
        graft(model, SPC(read="gated"))
        assert torch.equal(model(images), before)
        ungraft(model)
        graft(model, SPC())
        assert not torch.equal(model(images), before)
        ungraft(model)
        assert torch.equal(model(images), before)
