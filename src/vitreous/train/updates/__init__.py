"""Updates, one per file: how a step is made from gradients."""

from vitreous.train.updates._update import UPDATES, Update

__all__ = ["UPDATES", "Update"]
