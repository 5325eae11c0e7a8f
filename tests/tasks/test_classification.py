"""The loss of classification and the penalties of grafts, against sums written out here."""

import math

import numpy as np
import pytest
import timm
import torch

from vitreous import SVDA, graft
from vitreous.grafting import penalties
from vitreous.tasks.classification import Classification, classification_loss, mixing
from vitreous.train.settings import TrainSettings


def test_penalties_are_the_papers_summed_over_layers():
    model = graft(timm.create_model("test_vit"), SVDA(layers=(0, 2, 5), orthogonality=0.3, entropy=0.7))
    orthogonality = entropy = 0.0
    for i in (0, 2, 5):
        attention = model.blocks[i].attn
        for weight in attention.qkv.weight.double().chunk(3)[:2]:
            orthogonality += (weight @ weight.T - torch.eye(len(weight))).pow(2).mean().item()
        p = attention.sigma.double() ** 2
        p = p / (p.sum(1, keepdim=True) + 1e-8)
        entropy += -(p * (p + 1e-8).log()).sum(1).mean().item() / 3
    found = penalties(model)
    assert set(found) == {"svda_orthogonality", "svda_entropy"}
    assert found["svda_orthogonality"].item() == pytest.approx(0.3 * orthogonality, rel=1e-5)
    assert found["svda_entropy"].item() == pytest.approx(0.7 * entropy, rel=1e-5)


def test_a_plain_model_has_none():
    assert penalties(timm.create_model("test_vit")) == {}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    target = torch.full((7, 5), smoothing / 5)
    target[torch.arange(7), labels] += 1 - smoothing
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    settings = TrainSettings("cutouts", smoothing=smoothing)
    torch.testing.assert_close(classification_loss(settings.parsed_task(), labels.numpy(), 5)(logits, labels), expected)


def test_mixed_images_have_mixed_labels():
    settings = TrainSettings("cutouts", mixup=0.5, cutmix=0.5, smoothing=0.1)
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8).clone(), torch.arange(4)
    mixed, soft = mixing(settings.parsed_task(), 4)(images, labels)
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    kept = (mixed[0] != 3).double().mean() if set(mixed.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0} else 1 - mixed[0].mean() / 3
    assert soft[0, 0].item() == pytest.approx(0.9 * kept.item() + 0.025, abs=1e-5)  # image 0 is paired with image 3
    logits = torch.randn(4, 4)
    loss = classification_loss(settings.parsed_task(), labels.numpy(), 4)
    torch.testing.assert_close(loss(logits, soft), -(soft * logits.log_softmax(1)).sum(1).mean())
    assert mixing(TrainSettings("cutouts").parsed_task(), 4) is None


def by_loops(logits, mixes, labels, smoothing):
    """Mean over images of share * n / (K n_y) * cross-entropy with the smoothed label y, in float64, term by term.

    mixes: of each image, the classes that it is mixed from and the share of each."""
    n, present, classes, total = len(labels), sorted(set(labels)), logits.shape[1], 0.0
    for row, mix in zip(logits.double().tolist(), mixes, strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for y, share in mix:
            weight = n / (len(present) * labels.count(y)) if y in present else 1.0
            for c in range(classes):
                target = smoothing / classes + (1 - smoothing) * (c == y)
                total -= share * weight * target * (row[c] - log_sum)
    return total / len(logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_balanced_weights_are_scikit_learns(smoothing):
    """And the whole loss of an image has the weight of its own class, the smoothed part too."""
    labels = np.array([0] * 12 + [1] * 3 + [3] * 5)  # nothing of class 2
    loss = classification_loss(Classification(class_weights="balanced", smoothing=smoothing), labels, 4)
    assert loss.weights[labels].double().mean().item() == pytest.approx(1.0, rel=1e-6)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    batch = [0, 1, 3, 0, 1, 3]
    expected = by_loops(logits, [[(y, 1.0)] for y in batch], labels.tolist(), smoothing)
    assert loss(logits, torch.tensor(batch)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixed_image_weighs_what_its_parts_weigh(smoothing, kind):
    """Batch and labels go the way of training: mixed by timm, smoothed once."""
    labels = np.array([0] * 12 + [1] * 3 + [3] * 5)
    task = Classification(class_weights="balanced", smoothing=smoothing, **{kind: 0.8})
    np.random.seed(3)
    batch = torch.tensor([0, 1, 3, 3, 1, 2])
    mixed = mixing(task, 4)(torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), batch)[1]
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    mixes = [list(enumerate(shares)) for shares in mixed.double().tolist()]
    assert any(0.01 < share < 0.99 for mix in mixes for _, share in mix)
    assert mixed.sum(1).tolist() == pytest.approx([1.0] * 6)
    assert sum(share > 0 for mix in mixes for _, share in mix) <= 12  # two classes an image: nothing is smoothed yet
    expected = by_loops(logits, mixes, labels.tolist(), smoothing)
    assert classification_loss(task, labels, 4)(logits, mixed).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_what_minimises_the_loss_is_the_smoothed_label_however_rare_its_class(label):
    """96 images to 2 to 2: with each term weighed by its own class, a rare one was the best answer to any image."""
    loss = classification_loss(Classification(class_weights="balanced", smoothing=0.1), np.repeat([0, 1, 2], [96, 2, 2]), 3)
    target = torch.full((1, 3), 0.1 / 3, dtype=torch.float64)
    target[0, label] += 0.9
    logits = target.log().requires_grad_()
    loss(logits, torch.tensor([label])).backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits.grad), atol=1e-5, rtol=0)


def test_equal_classes_weigh_nothing():
    labels = np.arange(40) % 4
    logits, batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    weighted = classification_loss(TrainSettings("cutouts", class_weights="balanced").parsed_task(), labels, 4)
    torch.testing.assert_close(weighted(logits, batch), torch.nn.functional.cross_entropy(logits, batch))
