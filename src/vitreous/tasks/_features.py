"""What tasks without labels are judged by: whether neighbours are of one class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEIGHBOURS = 20
ROWS = 512  # images compared with all others at a time


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the classifier would get: images (B, C, H, W) -> (B, D) float32."""
    return model.forward_head(model.forward_features(images), pre_logits=True).float()


def neighbour_accuracy(features: Tensor, target: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """{"knn": share of images, 0 to 1, whose nearest others vote for their class}.

    Empty where images have no class each.

    features (n, D), compared by cosine; target (n,) classes. The neighbours are at most half of a
    class's mean number of images, since among all others an image's own class is the rarest. Each
    has one vote, and of classes with as many votes the lower number wins.
    """
    if target.ndim != 1 or target.is_floating_point() or len(target) < 2:
        return {}
    rows, right = F.normalize(features.float(), dim=1), 0
    classes = int(target.max()) + 1
    neighbours = min(neighbours, max(1, len(rows) // (2 * classes)))
    for start in range(0, len(rows), ROWS):
        near = rows[start : start + ROWS] @ rows.T
        near[torch.arange(len(near)), torch.arange(start, start + len(near))] = -torch.inf  # an image is no other one
        votes = F.one_hot(target[near.topk(neighbours).indices], classes).sum(1)
        right += int((votes.argmax(1) == target[start : start + ROWS]).sum())
    return {"knn": right / len(rows)}
