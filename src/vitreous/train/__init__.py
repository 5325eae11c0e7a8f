"""Training: settings, the loop, and models on disk."""

from vitreous.train.checkpoint import load, save
from vitreous.train.loop import train
from vitreous.train.settings import TrainSettings

__all__ = ["TrainSettings", "load", "save", "train"]
