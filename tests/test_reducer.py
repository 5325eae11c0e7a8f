"""Budgets of multiply-adds, counts of tokens, and the plan of grafts."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from vitreous import EViT, TokenMerging, graft, parse, plan
from vitreous.base.errors import HostError, SettingError
from vitreous.hosts.token_counts import Count, block_costs, measured_counts, multiply_adds, whole
from vitreous.mechanisms.tokens.token_merging import schedule
from vitreous.reducer import Reducer, between_schedules
from vitreous.testing.hosts import build, images


def deit(name="deit_small_patch16_224"):
    with torch.device("meta"):
        return timm.create_model(name).eval()


# -- multiply-adds -----------------------------------------------------------------------------------------------------


def test_a_whole_host_has_its_published_multiply_adds():
    model = deit()
    ends = 196 * (3 * 16 * 16) * 384 + 384 * 1000  # patch embedding and classifier
    assert multiply_adds(block_costs(model), whole(model)) + ends == 4_598_882_304
    assert whole(model) == (Count(197, 197),) * 12


def test_multiply_adds_are_those_that_torch_counts_from_shapes():
    """With registers, a reducer at work, and a block whose MLP has another width than the others."""
    with torch.device("meta"):
        model = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0, reg_tokens=2
        ).eval()
        model.blocks[1].mlp.fc1, model.blocks[1].mlp.fc2 = torch.nn.Linear(24, 7), torch.nn.Linear(7, 24)
    mechanism = EViT(keep=0.5, layers=(1,))
    expected = multiply_adds(block_costs(model), mechanism.token_counts(model))
    graft(model, mechanism)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32, device="meta"))
    own = 3 * 19 * 8 + 16 * 24  # the row of class attention, and the fused token, which are the reducer's
    assert counter.get_total_flops() // 2 - 16 * (3 * 8 * 8) * 24 - own == expected


def test_each_block_counts_by_its_own_tokens():
    costs = block_costs(build("plain"))
    assert costs[0].of(Count(17, 10)) == 4 * 32**2 * 17 + 2 * 32 * 17**2 + 8 * 32**2 * 10


def test_a_budget_does_not_depend_on_the_order_of_grafts():
    """Neither adapters beside the MLP nor several tokens for each patch change what a budget asks."""
    plain = TokenMerging(macs=0.7).strength(build("plain"))
    for text in ("adaptformer", "channelvit", "lora"):
        assert TokenMerging(macs=0.7).strength(graft(build("plain"), text)) == plain


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["evit", "evit:layers=0+1,fuse=true", "token_merging", "token_merging:inflection=-1.0"])
@pytest.mark.parametrize("macs", [0.95, 0.8, 0.7])
def test_the_weakest_strength_that_fits_is_found(text, macs):
    """Beside all strengths, one by one: those that fit leave no more tokens than the one that was found."""
    model, mechanism = build("dinov2"), parse(f"{text}{',' if ':' in text else ':'}macs={macs}")
    weakest, strongest = mechanism.strengths(model)
    costs = block_costs(model)
    every = [mechanism.counts(model, weakest + (strongest - weakest) * i / 4096) for i in range(4097)]
    fitting = [counts for counts in every if multiply_adds(costs, counts) <= macs * multiply_adds(costs, whole(model))]
    assert multiply_adds(costs, mechanism.token_counts(model)) == max(multiply_adds(costs, counts) for counts in fitting)
    assert mechanism.share(model) <= macs


def test_budgets_on_deit_small():
    model = deit()
    for text in ("evit:macs=0.6", "token_merging:macs=0.6", "token_merging:macs=0.6,inflection=-1.0"):
        assert 0.595 < parse(text).share(model) <= 0.6, text
    assert TokenMerging(macs=1.0).strength(model) == 0
    assert EViT(macs=1.0).strength(model) == 1


def test_a_budget_comes_near_with_two_whole_numbers():
    constant = lambda tokens: schedule(tokens, 0.0, 4)  # noqa: E731
    assert between_schedules(constant, 3) == [3, 3, 3, 3]
    assert between_schedules(constant, 3.5) == [4, 4, 3, 3]
    assert between_schedules(constant, 3.99) == [4, 4, 4, 4]


def test_bad_budgets():
    for macs in (0.0, -0.5, 1.5):
        with pytest.raises(SettingError, match=rf"Found macs={macs}\. Expected a share .* up to 1\. Give"):
            EViT(macs=macs)
    with pytest.raises(SettingError, match=r"Found macs=0\.6 and keep=0\.5\. Expected one of the two.*Leave keep or macs out"):
        EViT(macs=0.6, keep=0.5)
    with pytest.raises(SettingError, match=r"Found macs=0\.1\. Expected a share from 0\.\d+, the least that evit .* to 1"):
        graft(build("plain"), "evit:macs=0.1")
    with pytest.raises(SettingError, match=r"Found macs=0\.2\. Expected a share from"):
        graft(build("plain"), "token_merging:macs=0.2,layers=3")
    model = graft(build("plain"), "spectral_gate:layers=0")
    with pytest.raises(HostError, match=r"blocks\.0\.attn is a .* no formula here\. Expected .*instead of macs"):
        graft(model, "evit:macs=0.7,layers=2")


def test_what_a_reducer_has_to_define():
    for method, arguments in (("strengths", ()), ("counts", (1.0,))):
        with pytest.raises(TypeError, match=rf"define {method}"):
            getattr(Reducer(), method)(build("plain"), *arguments)


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_plan_shows_what_all_grafts_make_together():
    model = graft(build("plain"), "token_merging:tokens=3,layers=0", "evit:keep=0.5,layers=2", "spc:after=3,tokens=2")
    assert plan(model, images(1)).splitlines() == [
        "1. token_merging:tokens=3,layers=0 at blocks.0-3, blocks.0.attn, norm",
        "2. evit:keep=0.5,layers=2 at blocks.2, blocks.2.attn",
        "3. spc:after=3,tokens=2 at blocks.2",
        "tokens in attention: 17, 14 x 2, 11",
        "tokens in mlp: 14 x 2, 9, 11",
        "multiply-adds in the blocks: 0.741 of those with all tokens",
    ]
    counts = measured_counts(model, images(1))
    assert counts[2] == Count(14, 9)


def test_the_plan_of_a_mixer_says_what_is_not_counted():
    text = plan(graft(build("class_avg"), "spectral_gate:layers=0"), images(1))
    assert "tokens in attention: 17 x 4" in text
    assert "multiply-adds: not counted. blocks.0.attn is a " in text
