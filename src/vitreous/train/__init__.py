"""Training: settings, the loop, and models on disk."""

from vitreous.models.model_folder import load, save
from vitreous.train.engine.loop import train
from vitreous.train.settings import TrainSettings

__all__ = ["TrainSettings", "load", "save", "train"]
