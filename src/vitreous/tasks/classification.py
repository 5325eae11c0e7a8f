"""Classification: one class per image, by cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.base.metrics import CLASSIFICATION
from vitreous.base.statistics import wilson
from vitreous.data import ClassIndex, Data
from vitreous.tasks._task import Batch, Dice, Objective, Outputs, Task


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """One class per image, by cross-entropy.

    smoothing: of labels, 0 to 1. mixup, cutmix: alpha of each; 0 is off. class_weights: balanced
    weighs an image by the inverse of its class's number of training images.
    """

    target = ClassIndex
    metrics = CLASSIFICATION
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"

    @property
    def pairs_images(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def build(self, model: nn.Module, data: Data | None) -> ClassificationObjective:
        return ClassificationObjective(model, self, data)


class ClassificationObjective(Objective):
    """A classifier, its loss, and the mixing of images."""

    columns = ("label", "predicted", "probability")
    class_columns = ("label", "predicted")
    fixed = ("loss",)  # class weights follow from the data

    def __init__(self, model: nn.Module, task: Classification, data: Data | None):
        super().__init__(model)
        classes = model.num_classes if data is None else len(data.classes)
        labels = np.arange(classes) if data is None else data.train.target.values
        self.loss = classification_loss(task, labels, classes)
        self.mixing = mixing(task, classes)

    def draw(self, images: Tensor, target: Tensor, dice: Dice) -> Batch:
        """Images and labels, mixed if asked for.

        timm's Mixup draws from NumPy's global state, not from `dice`: so runs of older versions
        resume exactly.
        """
        if self.mixing is not None:
            images, target = self.mixing(images.clone(), target)  # it mixes in place
        return {"images": images, "target": target}

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return {"classification": self.loss(self.model(batch["images"]).float(), batch["target"])}

    def predict(self, batch: Batch) -> Outputs:
        """logits (B, classes), target (B)."""
        return {"logits": self.model(batch["images"]).float(), "target": batch["target"]}

    def score(self, outputs: Outputs) -> dict[str, float]:
        """Share of images whose class is found, 0 to 1, and mean cross-entropy in nats."""
        logits, labels = outputs["logits"], outputs["target"]
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        return {"accuracy": accuracy, "loss": F.cross_entropy(logits, labels).item()}

    def rows(self, outputs: Outputs) -> Iterator[tuple]:
        """Label, class that is found, and how probable the model holds that to be."""
        probability, predicted = outputs["logits"].softmax(1).max(1)
        for label, guess, p in zip(outputs["target"].tolist(), predicted.tolist(), probability.tolist(), strict=True):
            yield label, guess, f"{p:.6f}"

    def by_class(self, outputs: Outputs) -> dict[str, Sequence[Any]]:
        """Test images of each class, how many are found, their share and its Wilson interval."""
        logits, labels = outputs["logits"], outputs["target"]
        right = labels[logits.argmax(1) == labels]
        images, correct = (labels.bincount(minlength=logits.shape[1]).tolist() for labels in (labels, right))
        spans = [wilson(k, n) if n else (None, None) for k, n in zip(correct, images, strict=True)]
        low, high = zip(*spans, strict=True)
        accuracy = [k / n if n else None for k, n in zip(correct, images, strict=True)]
        return {"images": images, "correct": correct, "accuracy": accuracy, "low": low, "high": high}


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with class weights: logits (B, C), labels (B) or mixed (B, C) -> nats.

    Mean over images of w_y times the cross-entropy with label y smoothed as timm does, (1 - s)
    one-hot + s / C; of an image mixed from several, the mean of theirs. The weight is that of
    the image's own class for all of its loss: were each term weighed by its own class, the s / C
    of a rare class would outweigh the label of a frequent one. The mean is over images, not over
    weights as in torch, so that batches that happen to hold rare classes are not damped.
    """

    def __init__(self, weights: Tensor, smoothing: float = 0.0):
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("weights", weights)  # (C,)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim == 1:
            labels = F.one_hot(labels, logits.shape[1])
        weighted = self.weights * labels  # (B, C): the weight of each class that an image is mixed from
        target = weighted * (1 - self.smoothing) + weighted.sum(-1, keepdim=True) * (self.smoothing / logits.shape[1])
        return -(target * logits.log_softmax(-1)).sum(-1).mean()


def balanced_weights(labels: np.ndarray, classes: int) -> Tensor:
    """Weights n / (K n_c) of classes c with n_c of n images, K of them not empty. (classes,)

    float32, with mean 1 over images. A class without an image has weight 1. Source: King, Zeng
    2001, "Logistic regression in rare events data", as in scikit-learn's class_weight="balanced".
    """
    counts = np.bincount(labels, minlength=classes)
    weights = np.where(counts > 0, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 1.0)
    return torch.from_numpy(weights).float()


def classification_loss(task: Classification, labels: np.ndarray, classes: int) -> nn.Module:
    """The mean loss in nats of logits (B, classes) and labels (B), or soft ones of `mixing`.

    labels: (n,) int64, of all training images, by which classes are weighed.
    """
    if task.class_weights == "balanced":
        return WeightedCrossEntropy(balanced_weights(labels, classes), task.smoothing)
    if task.pairs_images:
        return SoftTargetCrossEntropy()  # smoothing is in the labels
    return LabelSmoothingCrossEntropy(task.smoothing) if task.smoothing else nn.CrossEntropyLoss()


def mixing(task: Classification, classes: int) -> Mixup | None:
    """timm's mixup and cutmix of an even batch, which makes soft labels; None if both are off.

    Labels are smoothed here, unless classes are weighed: then the loss smooths, behind the weight.
    """
    if not task.pairs_images:
        return None
    smoothing = task.smoothing if task.class_weights == "none" else 0.0
    return Mixup(task.mixup, task.cutmix, label_smoothing=smoothing, num_classes=classes)
