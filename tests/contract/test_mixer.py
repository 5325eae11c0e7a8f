"""The slot of mixers, proven with the spectral gate: the stream, and its neighbours in a model."""

from __future__ import annotations

import pytest
import torch

from contract.hosts import build, fit, images
from contract.low_rank import LowRank
from contract.test_stream import SHAPES, gradients, of_shape
from vitreous import SpectralGate, check, graft, grafts, slots, ungraft
from vitreous.base.errors import GraftError, HostError, MaskError, SettingError
from vitreous.mechanisms.mixer.spectral_gate import Gate
from vitreous.models.model_folder import load, save
from vitreous.testing.check import THREE_PARTS

FIRST, ALL = (0, 1), (0, 1, 2, 3)


def test_a_model_folder(tmp_path):
    model = graft(build("test_vit"), SpectralGate(layers=(1, 3), seed=2))
    fit(model, model.parameters())
    save(model, tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(images()), model(images()))
    assert [i for i, attention in enumerate(slots.attentions(again)) if isinstance(attention, Gate)] == [1, 3]
    assert not any("blocks.1.attn.qkv" in name for name in again.state_dict())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_two_image_shapes_in_one_backward(shape):
    """Checkpointed blocks run again with the grid of their own pass."""
    outcomes = []
    for checkpointing in (False, True):
        model = graft(build("dinov2"), SpectralGate(layers=FIRST)).train()
        model.set_grad_checkpointing(checkpointing)
        outcomes.append(gradients(model, images(), of_shape(*shape)))
    for name, gradient in outcomes[0].items():
        assert torch.equal(gradient, outcomes[1][name]), name


BESIDE = [
    *("token_merging:layers=0", "evit:layers=0,keep=0.5", "spc:after=1", "extra_tokens", "channelvit", "adaptformer", "ggem"),
    *("svda:layers=0", "gaussian_mask:layers=3"),
]


@pytest.mark.parametrize("other", BESIDE)
def test_grafts_of_other_places_stack(other):
    """In both orders, with the same answer, and both come out bit for bit."""
    plain, answers, gate = build("dinov2")(images()), [], SpectralGate(layers=(2,))
    for order in ((other, gate), (gate, other)):
        model = check(graft(build("dinov2"), *order), images())
        answers.append(model(images()))
        assert not torch.equal(answers[-1], graft(build("dinov2"), other)(images()))
        assert len(ungraft(model, all=True).mechanisms) == 2
        assert torch.equal(model(images()), plain)
    torch.testing.assert_close(*answers)


def test_dropped_tokens_are_refused_behind_the_drop_alone():
    model = graft(build("dinov2"), "evit:keep=0.5,fuse=false,layers=1", SpectralGate(layers=(0,)))
    assert model(images()).isfinite().all()
    graft(model, SpectralGate(layers=(2,)))
    with pytest.raises(MaskError, match="some places have no token, but Gate mixes whole pictures") as caught:
        model(images())
    assert THREE_PARTS.match(str(caught.value))


TAKES_ATTENTION = [
    "svda:layers=1",
    "gaussian_mask:layers=1",
    "evit:layers=1",
    "token_merging:layers=1",
    SpectralGate(layers=(1,)),
]


@pytest.mark.parametrize("mixed", [FIRST, ALL], ids=["some", "all"])
@pytest.mark.parametrize("other", TAKES_ATTENTION, ids=str)
def test_a_mechanism_of_attention_on_a_block_with_a_mixer_is_refused(other, mixed):
    model = graft(build("class_avg"), SpectralGate(layers=mixed))
    before = model(images())
    with pytest.raises(GraftError, match=r"^blocks\.1\.attn already holds Gate, a mixer") as caught:
        graft(model, other)
    assert THREE_PARTS.match(str(caught.value))
    assert len(grafts(model)) == 1
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize("other", TAKES_ATTENTION, ids=str)
def test_a_mixer_where_a_mechanism_of_attention_stands_is_refused(other):
    model = graft(build("class_avg"), other)
    with pytest.raises(GraftError, match=r"^blocks\.1\.attn (already holds|belongs together with) \w+.*Expected") as caught:
        graft(model, SpectralGate(layers=FIRST))
    assert THREE_PARTS.match(str(caught.value))
    assert len(grafts(model)) == 1


def test_adapters_inside_an_attention_are_not_thrown_out_with_it():
    model = graft(build("dinov2"), LowRank(layers=(1,), linears=("qkv",)))
    with pytest.raises(GraftError, match=r"^blocks\.1\.attn belongs together with blocks\.1\.attn\.qkv of .*LowRank") as caught:
        graft(model, SpectralGate(layers=FIRST))
    assert THREE_PARTS.match(str(caught.value))
    check(graft(model, SpectralGate(layers=(2,))), images())
    with pytest.raises(HostError, match=r"blocks\.2 has no linear layer 'qkv'"):
        graft(model, LowRank(layers=(2,)))
    check(graft(build("dinov2"), LowRank(layers=(1,), linears=("fc1",)), SpectralGate(layers=FIRST)), images())


def test_a_block_without_attention_of_its_own_or_a_layer_that_is_not_there():
    with pytest.raises(HostError, match=r"blocks\.0\.attn does not exist"):
        slots.displaced_attention(build("parallel_things"), 0, "mine")
    with pytest.raises(SettingError, match="this model has 4 blocks"):
        graft(build("plain"), SpectralGate(layers=(4,)))


class SeesAll(Gate):
    """Hands class tokens something, too."""

    def mix_tokens(self, tokens, state):
        return tokens.mean(1, keepdim=True).expand_as(tokens)


def test_class_tokens_have_to_see_the_patches():
    """With mixers alone the class token is the same for all images, so that is refused; a head that pools may have them."""
    with pytest.raises(HostError, match=r"reads class tokens, and with spectral_gate no block .*reset_classifier") as caught:
        graft(build("plain"), SpectralGate(layers=ALL))
    assert THREE_PARTS.match(str(caught.value))
    model = graft(build("plain"), SpectralGate(layers=(0, 3)))
    with pytest.raises(HostError, match="no block would let them see"):
        graft(model, SpectralGate(layers=(1, 2)))
    graft(model, SpectralGate(layers=(1,)))
    assert model(images()).std(0).min() > 1e-3
    model.blocks[2].attn = Gate.instead_of(model.blocks[2].attn)
    model.blocks[2].attn.initialise((4, 4), 32, torch.Generator().manual_seed(0))
    assert model(images()).std(0).max() < 1e-6  # what is refused
    pooled = graft(build("class_avg"), SpectralGate(layers=ALL))
    assert pooled(images()).std(0).min() > 1e-3
    model.blocks[2].attn.__class__ = SeesAll
    slots.check_still_read(model, (0, 1, 3), "mine")
