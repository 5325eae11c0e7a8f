"""Whole networks; importing this package makes them known to `timm.create_model`."""

from vitreous.architectures import scratch_vit

__all__ = ["scratch_vit"]
