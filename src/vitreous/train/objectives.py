"""What training lowers: the classification loss, and the penalties that grafted modules name; and what it schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vitreous.train.settings import TrainSettings

if TYPE_CHECKING:
    from vitreous.train.prepare import Job


def classification_loss(settings: TrainSettings) -> nn.Module:
    """Logits (B, classes) and labels (B), or the soft ones (B, classes) of `mixing`, to their mean loss in nats."""
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


def penalties(model: nn.Module) -> dict[str, Tensor]:
    """What the modules' own `penalties()` name, weighted as they say, each name summed over the modules: scalars."""
    total: dict[str, Tensor] = {}
    for module in model.modules():
        if hasattr(module, "penalties"):
            for name, value in module.penalties().items():
                total[name] = total[name] + value if name in total else value
    return total


def step_losses(job: Job, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What one step of training lowers, by name, for a batch as it is loaded: scalars, "classification" first."""
    set_progress(job.model, job.progress)
    if job.mixing is not None:
        images, labels = job.mixing(images.clone(), labels)  # it mixes in place
    with job.autocast():
        logits = job.model(images)
    return {"classification": job.loss(logits.float(), labels)} | penalties(job.model)
