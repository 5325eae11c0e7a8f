"""A task of another package, with all that an objective may have: own weights, a momentum teacher, a frozen one, draws."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from vitreous.data import NoTarget
from vitreous.tasks import Metric, Objective, Task


@dataclass(frozen=True, kw_only=True)
class Turned(Task):
    """Find by which quarter each image was turned, and stay near a momentum teacher and a frozen one."""

    target = NoTarget
    metrics = (Metric("error", "", "lower", "error"),)
    momentum: float = 0.9

    def build(self, model, data):
        return TurnedObjective(model, self.momentum)


class TurnedObjective(Objective):
    columns = ("error",)
    fixed = ("frozen",)
    shipped = ("head",)

    def __init__(self, model, momentum):
        super().__init__(model)
        self.momentum = momentum
        self.head = nn.Linear(model.num_features, 4)
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.frozen = copy.deepcopy(model).requires_grad_(False)

    def draw(self, images, target, dice):
        quarter = (4 * dice.uniform()).long()
        turned = torch.stack([image.rot90(k, (1, 2)) for image, k in zip(images, quarter.tolist(), strict=True)])
        return {"images": turned, "plain": images, "quarter": quarter}

    def losses(self, batch, progress):
        features = self.features(self.model, batch["images"])
        near = sum((features - self.features(m, batch["images"])).square().mean() for m in (self.teacher, self.frozen))
        return {"turned": F.cross_entropy(self.head(features), batch["quarter"]), "near": 0.1 * near}

    @staticmethod
    def features(model, images):
        return model.forward_head(model.forward_features(images), pre_logits=True).float()

    def after_update(self, updates):
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                mine.lerp_(other, 1 - self.momentum)

    def predict(self, batch):
        logits = torch.stack([self.head(self.features(self.model, batch["images"].rot90(k, (2, 3)))) for k in range(4)], 1)
        return {"error": (logits.argmax(2) != torch.arange(4, device=logits.device)).double().mean(1)}

    def score(self, outputs):
        return {"error": outputs["error"].mean().item()}

    def rows(self, outputs):
        return ((f"{error:.4f}",) for error in outputs["error"].tolist())


@dataclass(frozen=True, kw_only=True)
class TwoViews(Turned):
    """`Turned`, with two crops of each picture that are made near each other."""

    def views(self, prepare):
        return lambda picture: torch.stack([prepare(picture), prepare(picture)])

    def build(self, model, data):
        return TwoViewsObjective(model, self.momentum)


class TwoViewsObjective(TurnedObjective):
    def draw(self, images, target, dice):
        return super().draw(images[:, 0], target, dice) | {"plain": images[:, 1]}
