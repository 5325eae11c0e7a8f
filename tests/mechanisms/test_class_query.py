"""Class query: the host's logits, from a last block without patches, counted, and what reads patches is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch.utils.flop_counter import FlopCounterMode

from vitreous import ClassQuery, check, graft, ungraft
from vitreous.base.errors import GraftError, HostError, MaskError
from vitreous.hosts.host import embed, run


def vit(cls=None, **kwargs):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5} | kwargs
    model = cls(**settings) if cls else timm.create_model("vit_tiny_patch16_224", **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def images(count=2, size=16):
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def operations(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


HOSTS = [
    {},
    {"reg_tokens": 2},
    {"cls": VisionTransformerDistilled},
    {"qkv_bias": False},
    {"qk_norm": True},
    {"init_values": 0.5},
]


@pytest.mark.parametrize("host", HOSTS)
def test_the_logits_are_the_hosts(host):
    """Also where keys are normed, so that they have to be made; and the last block matters at all."""
    model, plain = check(graft(vit(**host), ClassQuery()), images()), vit(**host)
    torch.testing.assert_close(model(images()), plain(images()), atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        plain.blocks[-1].attn.proj.weight.zero_()
    assert (model(images()) - plain(images())).abs().max() > 1e-3
    ungraft(model)
    assert torch.equal(model(images()), vit(**host)(images()))


def test_a_hook_sees_the_keys_and_the_logits_stay():
    model, seen = graft(vit(), ClassQuery()), []
    expected = model(images())
    model.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    torch.testing.assert_close(model(images()), expected, atol=1e-12, rtol=1e-12)
    assert seen == [(2, 17, 3 * 48)]


def test_by_hand():
    """One image, head after head, token after token."""
    model = vit().requires_grad_(False)
    x = run(model, embed(model, images(1)), 0, 2).x
    block = model.blocks[2]
    y, expected = block.norm1(x)[0], []
    w, b = block.attn.qkv.weight.unflatten(0, (3, 3, 16)), block.attn.qkv.bias.unflatten(0, (3, 3, 16))
    for head in range(3):
        q = w[0, head] @ y[0] + b[0, head]
        weights = torch.stack([(q @ (w[1, head] @ token + b[1, head]) / 4).exp() for token in y])
        values = [w[2, head] @ token + b[2, head] for token in y]
        expected.append(sum(a * v for a, v in zip(weights / weights.sum(), values, strict=True)))
    grafted = graft(model, ClassQuery()).blocks[2].attn
    torch.testing.assert_close(grafted(block.norm1(x))[0, 0], block.attn.proj(torch.cat(expected)))
    assert grafted(block.norm1(x))[0, 1:].eq(0).all()


def test_operations_are_those_of_the_formula():
    """On ViT-Ti/16 a last block of 0.8 M multiply-adds in the place of 102 M, 8 % of all."""
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224").eval()
        x = torch.empty(1, 3, 224, 224)
        host = operations(model, x)
        saving = host - operations(graft(model, ClassQuery()), x)
    n, d, heads = 197, 192, 3
    assert saving == (12 * n * d * d + 2 * n * n * d) - (2 * heads * n * d + 12 * d * d)
    assert round(saving / host, 3) == 0.081


@pytest.mark.parametrize("others", [["token_merging:tokens=3,layers=0-1"], ["evit:keep=0.5,layers=0"], ["spc:after=1"]])
def test_behind_other_grafts(others):
    """Sizes count in the softmax, and inserted tokens ask too."""
    plain = graft(vit(), *others)
    model = check(graft(vit(), *others, ClassQuery()), images())
    torch.testing.assert_close(model(images()), plain(images()), atol=1e-12, rtol=1e-12)
    assert (plain(images()) - vit()(images())).abs().max() > 1e-3


def test_patches_have_no_token_behind_it():
    model = graft(vit(reg_tokens=2), ClassQuery())
    stream = run(model, embed(model, images()))
    assert stream.x.shape[1] == 3
    assert stream.state.dropped
    assert stream.tokens()[:, 3:].eq(0).all()


def test_gradients_are_the_hosts():
    model, plain = graft(vit(), ClassQuery()), vit()
    for one in (model, plain):
        one(images()).square().sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-10, rtol=1e-8)


def test_refusals():
    with pytest.raises(HostError, match="head of this model pools over the patches"):
        graft(vit(global_pool="avg"), ClassQuery())
    with pytest.raises(GraftError, match="Choose other layers"):
        graft(vit(), "token_merging", ClassQuery())
    with pytest.raises(MaskError, match=r"Found attn_mask of shape .*only 1 of 17 tokens ask here\. Expected none\. Call"):
        graft(vit(), ClassQuery()).forward_features(images(), attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_dropout_of_attention_is_the_hosts():
    """With all weights dropped the host's attention is its last bias: weights do not sum to one, so values are not folded."""
    host = vit()
    for block in host.blocks:
        block.attn.attn_drop.p = 1.0
    expected = host.train()(images())
    torch.testing.assert_close(graft(host, "class_query")(images()), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_hook_on_the_layer_still_runs(register):
    model, calls = graft(vit(), "class_query"), []
    getattr(model.blocks[-1].attn.qkv, register)(lambda *_: calls.append(1))
    model(images())
    assert calls


def test_steps_that_would_work_on_no_patches_are_refused():
    for first, second in (("class_query", "spc:after=3"), ("spc:after=3", "class_query")):
        with pytest.raises(GraftError, match=r"^Found a step behind a block in which the patches end"):
            graft(graft(vit(), first), second)
    graft(graft(vit(), "class_query"), "spc:after=2")
