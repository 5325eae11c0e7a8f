"""Training: settings, the loop, and models on disk."""

from vitreous.models.model_folder import load, save
from vitreous.train.settings import TrainSettings
from vitreous.train.train import train

__all__ = ["TrainSettings", "load", "save", "train"]
