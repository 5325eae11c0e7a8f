"""Several classes per image: loss and average precision against sums written out here, and what is not known."""

import math

import pytest
import torch
from torch import nn

from vitreous.base.errors import SettingError
from vitreous.tasks import TASKS
from vitreous.tasks.multi_label import average_precision, masked_cross_entropy

NAN = float("nan")


def test_the_loss_is_the_mean_over_known_classes_of_each_image():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=draw)
    target = torch.tensor([[1, 0, NAN, 1], [NAN] * 4, [0, 0, 0, 0], [NAN, NAN, 1, NAN], [1, 1, 1, 1]])
    for i, row in enumerate(masked_cross_entropy(logits, target).tolist()):
        known = [(x, t) for x, t in zip(logits[i].tolist(), target[i].tolist(), strict=True) if not math.isnan(t)]
        each = [-math.log(1 / (1 + math.exp(-x if t else x))) for x, t in known]
        assert row == pytest.approx(sum(each) / max(len(each), 1), rel=1e-5)


def test_what_is_not_known_has_no_gradient():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.tensor([[1, 0, NAN, 1], [NAN] * 4, [0, NAN, 0, 0]])
    masked_cross_entropy(logits, target).mean().backward()
    assert ((logits.grad == 0) == target.isnan()).all()


def by_thresholds(scores, truth):
    """Precision at every threshold, weighted by the recall that it gains, from counts."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [t for s, t in zip(scores, truth, strict=True) if s >= threshold]
        recall = sum(chosen) / sum(truth)
        total += (recall - before) * sum(chosen) / len(chosen)
        before = recall
    return total


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_with_ties(seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (30,), generator=draw).float()
    truth = (torch.rand(30, generator=draw) < 0.3).float()
    truth[0] = 1
    assert average_precision(scores, truth) == pytest.approx(by_thresholds(scores.tolist(), truth.tolist()), rel=1e-9)


def test_known_values():
    assert average_precision(torch.tensor([3.0, 2, 1]), torch.tensor([1.0, 1, 0])) == 1.0
    assert average_precision(torch.tensor([3.0, 2, 1]), torch.tensor([0.0, 0, 1])) == pytest.approx(1 / 3)
    assert average_precision(torch.zeros(4), torch.tensor([1.0, 0, 0, 0])) == pytest.approx(1 / 4)


@pytest.fixture
def objective():
    return TASKS.parse("multi_label:threshold=0.7").build(nn.Flatten(), None)


def test_scores_leave_out_what_is_not_known_and_classes_never_present(objective):
    logits = torch.tensor([[2.0, 0.0, 1.0], [1.0, 3.0, 0.0], [0.0, 1.0, 5.0]])
    target = torch.tensor([[1, 0, 0], [NAN, 1, 0], [1, 0, NAN]])
    score = objective.score({"logits": logits, "target": target})
    assert score["mean_average_precision"] == pytest.approx(1.0)  # classes 0 and 1; class 2 is never present
    assert score["loss"] == pytest.approx(masked_cross_entropy(logits, target).mean().item())


def test_rows_name_the_classes_present_and_found(objective):
    logits = torch.tensor([[2.0, 0.5, 1.0], [-1.0, -1.0, -1.0], [2.0, 2.0, 0.0]])  # a probability of 0.7 is a logit of 0.847
    target = torch.tensor([[1, 0, 1], [NAN, 0, 0], [NAN, 0, 1]])
    rows = list(objective.rows({"logits": logits, "target": target}))
    assert [row[:3] for row in rows] == [("0 2", "0 2", ""), ("", "", ""), ("2", "0 1", "1 2")]  # 0 is not labelled there
    assert [row[3] for row in rows] == pytest.approx(masked_cross_entropy(logits, target).tolist())


def test_bad_input():
    with pytest.raises(SettingError, match=r"Found threshold=1\.5\. Expected a probability"):
        TASKS.parse("multi_label:threshold=1.5")
