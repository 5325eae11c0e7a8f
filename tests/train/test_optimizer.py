"""What learns, in which groups, at which rate: counted, and compared with formulas written here."""

import math

import pytest
import timm
import torch

from vitreous import SVDA, graft
from vitreous.base.errors import SettingError, UnknownName
from vitreous.tasks import TASKS
from vitreous.train.optimizer import choose_trainable, frozen, make_optimizer, make_scheduler, parameter_groups
from vitreous.train.settings import TrainSettings


@pytest.fixture(scope="module")
def host():
    return timm.create_model("vit_tiny_patch16_224", num_classes=100)


@pytest.fixture
def small():
    return graft(timm.create_model("test_vit", num_classes=5), SVDA(layers=(1, 3)))


@pytest.mark.parametrize(("mechanisms", "learning"), [((), 1_095_076), (("svda:layers=10-11",), 1_095_460)])
def test_late_block_protocol_leaves_the_papers_counts(host, mechanisms, learning):
    model = graft(timm.create_model("vit_tiny_patch16_224", num_classes=100), *mechanisms)
    assert choose_trainable(model, freeze=("blocks.0-9",)) == learning
    assert not any(p.requires_grad for i in range(10) for p in model.blocks[i].parameters())


def test_new_parameters_alone_or_with_the_head(small):
    assert choose_trainable(small, "new") == 2 * 64  # sigma of two blocks
    names = {name for name, p in small.named_parameters() if p.requires_grad}
    assert names == {"blocks.1.attn.sigma", "blocks.3.attn.sigma"}
    choose_trainable(small, "new+head", freeze=("blocks.3",))
    names = {name for name, p in small.named_parameters() if p.requires_grad}
    assert names == {"blocks.1.attn.sigma", "head.weight", "head.bias"}


def test_both_heads_of_a_distilled_host_learn():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=12, num_classes=3)
    choose_trainable(model, "new+head")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_a_frozen_prefix_ends_at_a_dot(host):
    assert {name.split(".")[1] for name in frozen(host, ("blocks.1",))} == {"1"}  # neither 10 nor 11
    assert frozen(host, ("pos_embed", "head.bias")) == {"pos_embed", "head.bias"}


def test_what_cannot_be_frozen_or_trained_is_said(small):
    with pytest.raises(UnknownName, match=r"'blocks\.6'"):
        choose_trainable(small, freeze=("blocks.4-6",))
    with pytest.raises(UnknownName, match="'patch_embed'"):
        choose_trainable(small, freeze=("patch_embd",))
    with pytest.raises(SettingError, match="no parameter to learn"):
        choose_trainable(timm.create_model("test_vit"), "new")


def groups_by_name(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_weight_decay_spares_biases_norms_and_what_grafts_exempt(small, layer_decay):
    found = groups_by_name(small, parameter_groups(small, 0.05, layer_decay))
    assert set(found) == {name for name, _ in small.named_parameters()}
    for name, parameter in small.named_parameters():
        spared = parameter.ndim <= 1 or name in ("pos_embed", "cls_token", "reg_token") or name.endswith(".sigma")
        assert found[name]["weight_decay"] == (0.0 if spared else 0.05), name


def test_layer_decay_counts_layers_from_the_head(small):
    depth = len(small.blocks)
    found = groups_by_name(small, parameter_groups(small, 0.05, 0.5))
    for name in found:
        below = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
        if name.startswith("norm."):
            below = depth  # timm counts the last norm to the last block
        elif name.startswith("head."):
            below = depth + 1
        assert found[name]["lr_scale"] == 0.5 ** (depth + 1 - below), name


def test_frozen_parameters_are_in_no_group(small):
    choose_trainable(small, freeze=("blocks.0-2",))
    found = groups_by_name(small, parameter_groups(small, 0.05, 0.5))
    assert set(found) == {name for name, p in small.named_parameters() if p.requires_grad}


def objective(model):
    model.num_classes = 2
    return TASKS.parse("classification").build(model, None)


def rates(steps: int, **changes) -> list[float]:
    """Learning rate with which each update of a run is taken."""
    settings = TrainSettings("cutouts", lr=1.0, **changes)
    optimizer = make_optimizer(objective(torch.nn.Linear(2, 2)), settings)
    scheduler = make_scheduler(optimizer, settings, steps)
    found = []
    for update in range(1, settings.epochs * steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step_update(update)
    return found


def test_cosine_after_a_linear_warm_up():
    total, warm = 40, 10
    fall = [0.5 * (1 + math.cos(math.pi * i / (total - warm))) for i in range(total - warm)]
    expected = [0.01 + 0.99 * i / warm for i in range(warm)] + fall
    assert rates(10, epochs=4, warmup_epochs=1) == pytest.approx(expected)


def test_none_is_constant():
    assert rates(5, epochs=2, sched="none") == [1.0] * 10
    assert rates(5, epochs=2, sched="constant") == [1.0] * 10
    assert rates(2, epochs=6, sched="step") == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 4)


def test_layer_decay_holds_without_a_schedule(small):
    settings = TrainSettings("cutouts", lr=1.0, sched="none", layer_decay=0.5)
    optimizer = make_optimizer(objective(small), settings)
    make_scheduler(optimizer, settings, 5)
    assert {group["lr"] for group in optimizer.param_groups} == {group["lr_scale"] for group in optimizer.param_groups}
    assert min(group["lr"] for group in optimizer.param_groups) < 0.1
