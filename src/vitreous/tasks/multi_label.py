"""Several classes per image, each present, absent or not known, by binary cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous.base.errors import SettingError
from vitreous.base.metrics import Metric
from vitreous.data import ClassSet, Data
from vitreous.tasks._task import Batch, Objective, Outputs, Task


@dataclass(frozen=True, kw_only=True)
class MultiLabel(Task):
    """Any number of classes per image, by binary cross-entropy.

    The loss of an image is the mean over its labelled classes (not NaN).

    threshold: probability from which a class counts as found in predictions.csv.
    """

    target = ClassSet
    metrics = (
        Metric("mean_average_precision", "%", "higher", "mean average precision"),
        Metric("loss", "nats", "lower", "loss"),
    )
    threshold: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise SettingError(f"Found threshold={self.threshold}. Expected a probability, 0 to 1. Give for example 0.5.")

    def build(self, model: nn.Module, data: Data | None) -> MultiLabelObjective:
        return MultiLabelObjective(model, self.threshold)


class MultiLabelObjective(Objective):
    """A network with one logit per class.

    target: (B, classes) float, 1 present, 0 absent, NaN unlabelled.
    """

    columns = ("present", "predicted", "wrong", "loss")
    class_columns = columns[:3]

    def __init__(self, model: nn.Module, threshold: float):
        super().__init__(model)
        self.threshold = threshold

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return {"multi_label": masked_cross_entropy(self.model(batch["images"]).float(), batch["target"]).mean()}

    def predict(self, batch: Batch) -> Outputs:
        """logits, target (B, classes)."""
        return {"logits": self.model(batch["images"]).float(), "target": batch["target"]}

    def score(self, outputs: Outputs) -> dict[str, float]:
        """Mean over classes of the average precision, 0 to 1, and mean cross-entropy in nats."""
        precisions = [value for value in self.by_class(outputs)["average_precision"] if value is not None]
        return {
            "mean_average_precision": sum(precisions) / max(len(precisions), 1),
            "loss": masked_cross_entropy(outputs["logits"], outputs["target"]).mean().item(),
        }

    def rows(self, outputs: Outputs) -> Iterator[tuple]:
        """The numbers of classes present, found, and wrong where they are labelled; the loss."""
        target, found = outputs["target"], outputs["logits"].sigmoid() >= self.threshold
        present = target == 1
        wrong, losses = (present != found) & ~target.isnan(), masked_cross_entropy(outputs["logits"], target)
        for *rows, loss in zip(present, found, wrong, losses.tolist(), strict=True):
            yield *(" ".join(map(str, classes.nonzero().flatten().tolist())) for classes in rows), loss

    def by_class(self, outputs: Outputs) -> dict[str, Sequence[Any]]:
        """Test images where a class is labelled, those that show it, and its average precision."""
        logits, target = outputs["logits"], outputs["target"]
        labelled = ~target.isnan()
        pairs = [(logits[labelled[:, c], c], target[labelled[:, c], c]) for c in range(target.shape[1])]
        return {
            "images": labelled.sum(0).tolist(),
            "present": [int(truth.sum()) for _, truth in pairs],
            "average_precision": [average_precision(scores, truth) if truth.any() else None for scores, truth in pairs],
        }


def masked_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy in nats, the mean over labelled classes: (B, K) twice -> (B,).

    A class whose target is NaN has no part in it; 0 for an image without a labelled class.
    """
    labelled = ~target.isnan()
    each = F.binary_cross_entropy_with_logits(logits, target.nan_to_num(), reduction="none") * labelled
    return each.sum(1) / labelled.sum(1).clamp(min=1)


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Mean precision over the steps of recall, sum_k (R_k - R_k-1) P_k, of n scores.

    Equal scores are one step. truth: (n,) of 1 or 0, at least one 1. As scikit-learn's
    `average_precision_score`.
    """
    order = scores.argsort(descending=True)
    scores, hits = scores[order], truth[order].double().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])  # of each group of equal scores
    ranks = torch.arange(1, len(scores) + 1, dtype=torch.float64)[last]
    steps = hits[last].diff(prepend=torch.zeros(1, dtype=torch.float64)) / hits[-1]
    return (steps * hits[last] / ranks).sum().item()
