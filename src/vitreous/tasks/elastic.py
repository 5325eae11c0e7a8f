"""Elastic classification: sub-networks of all sizes learn together, one for each image."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitreous.base.errors import SettingError
from vitreous.base.metrics import CLASSIFICATION, Metric
from vitreous.data import Data
from vitreous.hosts.subnetwork import Subnetwork, check_plain, masked_logits, whole
from vitreous.tasks._task import Batch, Dice, Outputs
from vitreous.tasks.classification import Classification, ClassificationObjective


@dataclass(frozen=True, kw_only=True)
class Elastic(Classification):
    """One class per image, in sub-networks of all sizes; `vitreous route RUN` cuts one out.

    In each step every image draws a width, an MLP width and a depth of its own, and what lies
    behind these is 0: the first heads with their features, the first features of each MLP, the
    first blocks. LayerNorms take mean and variance of the features that are left. So a sub-network
    is exactly the network of the sliced weights. After Liao, Karaman, Sze 2021, arXiv 2109.00642
    (ViT-ResNAS), whose super-network is trained so. Ours: width and heads go together, since timm's
    ViT ties them; an image, not a group of images, has a sub-network; the first blocks stay; no
    sorting of channels, no search, no growing set of widths.

    widths, mlps, depths: shares that are drawn, each alike. smoothing, mixup, cutmix,
    class_weights: of `classification`. Raises HostError for networks that are no plain ViT.
    """

    stage: ClassVar[str] = "prototype"
    paper = "Liao, Karaman, Sze 2021, arXiv 2109.00642"
    metrics = (*CLASSIFICATION, Metric("smallest", "%", "higher", "accuracy of the smallest sub-network"))
    widths: tuple[float, ...] = (0.5, 0.75, 1.0)
    mlps: tuple[float, ...] = (0.5, 0.75, 1.0)
    depths: tuple[float, ...] = (0.5, 0.75, 1.0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("widths", "mlps", "depths"):
            shares = getattr(self, name)
            if not shares or not all(0 < share <= 1 for share in shares):
                raise SettingError(
                    f"Found {name}={'+'.join(map(str, shares))}. Expected shares above 0, at most 1. Give such as 0.5+1.0."
                )

    def sizes(self, model: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The heads, hidden features and depths there are, ascending; 1 or more each."""
        full = whole(model)
        pairs = (self.widths, full.heads), (self.mlps, full.hidden), (self.depths, full.depth)
        return tuple(tuple(sorted({max(1, round(share * size)) for share in shares})) for shares, size in pairs)

    def subnetworks(self, model: nn.Module) -> list[Subnetwork]:
        """All that are drawn from, the smallest first."""
        return [Subnetwork(*sizes) for sizes in itertools.product(*self.sizes(model))]

    def build(self, model: nn.Module, data: Data | None) -> ElasticObjective:
        check_plain(model)
        return ElasticObjective(model, self, data)


class ElasticObjective(ClassificationObjective):
    """A classifier whose images each meet a sub-network of their own."""

    def __init__(self, model: nn.Module, task: Elastic, data: Data | None):
        super().__init__(model, task, data)
        self.sizes = task.sizes(model)
        self.smallest = task.subnetworks(model)[0]

    def draw(self, images: Tensor, target: Tensor, dice: Dice) -> Batch:
        batch = super().draw(images, target, dice)
        for name, sizes in zip(("heads", "hidden", "depth"), self.sizes, strict=True):
            chosen = (dice.uniform() * len(sizes)).long()
            batch[name] = torch.tensor(sizes, device=chosen.device)[chosen]  # (B,)
        return batch

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        logits = masked_logits(self.model, *(batch[name] for name in ("images", "heads", "hidden", "depth")))
        return {"elastic": self.loss(logits.float(), batch["target"])}

    def predict(self, batch: Batch) -> Outputs:
        """logits of the whole network and of the smallest (B, classes), target (B)."""
        images, part = batch["images"], self.smallest
        counts = (torch.full((images.shape[0],), n, device=images.device) for n in (part.heads, part.hidden, part.depth))
        return super().predict(batch) | {"smallest": masked_logits(self.model, images, *counts).float()}

    def score(self, outputs: Outputs) -> dict[str, float]:
        right = outputs["smallest"].argmax(1) == outputs["target"]
        return super().score(outputs) | {"smallest": right.double().mean().item()}
