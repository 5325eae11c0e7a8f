"""What training lowers: the classification loss; and what it schedules."""

from __future__ import annotations

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import grafting
from vitreous.train.engine.session import Session
from vitreous.train.settings import TrainSettings


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy in which a class counts by its weight: logits (B, C), labels (B) or soft ones (B, C) -> scalar, in nats.

    - mean over images of sum_c w_c t_c log p_c, with labels t smoothed as timm does, (1 - s) one-hot + s / C. The mean is
    over images, not over weights as in torch, so that batches that happen to hold rare classes are not damped.
    """

    def __init__(self, weights: Tensor, smoothing: float = 0.0):
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("weights", weights)  # (C,)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim == 1:
            labels = F.one_hot(labels, logits.shape[1]) * (1 - self.smoothing) + self.smoothing / logits.shape[1]
        return -(self.weights * labels * logits.log_softmax(-1)).sum(-1).mean()


def balanced_weights(labels: np.ndarray, classes: int) -> Tensor:
    """n / (K n_c) for each class c with n_c of n images, K classes having any: mean 1 over images. -> (classes,) float32.

    A class without an image has weight 1. Source: King, Zeng 2001, "Logistic regression in rare events data", as in
    scikit-learn's class_weight="balanced".
    """
    counts = np.bincount(labels, minlength=classes)
    weights = np.where(counts > 0, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 1.0)
    return torch.from_numpy(weights).float()


def classification_loss(settings: TrainSettings, labels: np.ndarray, classes: int) -> nn.Module:
    """Logits (B, classes) and labels (B), or the soft ones (B, classes) of `mixing`, to their mean loss in nats.

    labels: those of all training images, by which classes are weighed.
    """
    if settings.class_weights == "balanced":
        return WeightedCrossEntropy(balanced_weights(labels, classes), settings.smoothing)
    if settings.mixed:
        return SoftTargetCrossEntropy()  # smoothing is in the labels
    return LabelSmoothingCrossEntropy(settings.smoothing) if settings.smoothing else nn.CrossEntropyLoss()


def mixing(settings: TrainSettings, classes: int) -> Mixup | None:
    """timm's mixup and cutmix: (images, labels) of an even batch to mixed images and soft labels; None if off."""
    if not settings.mixed:
        return None
    return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes)


def set_progress(model: nn.Module, progress: float) -> None:
    """Tell modules that have a `schedule(progress)` of their own how far training is: 0 at its start, 1 at its end."""
    for module in model.modules():
        if hasattr(module, "schedule"):
            module.schedule(progress)


def mixed(session: Session, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A batch as it is loaded, mixed if so told; modules are told how far training is."""
    set_progress(session.model, session.fraction_done)
    return (images, labels) if session.mixing is None else session.mixing(images.clone(), labels)  # it mixes in place


def step_losses(session: Session, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What one step of training lowers, by name, for a batch as it is loaded: scalars, "classification" first."""
    images, labels = mixed(session, images, labels)
    with session.autocast():
        logits = session.model(images)
    return {"classification": session.loss(logits.float(), labels)} | grafting.penalties(session.model)
