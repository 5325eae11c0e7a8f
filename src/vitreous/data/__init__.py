"""Images to train and test on: named sets, folders, archives, and made scenes.

Made scenes come with known masks.
"""

from vitreous.data.open import OpenOnce, open_data
from vitreous.data.samples import ArraySamples, Data, Samples, check_target
from vitreous.data.sources.cutouts import Cutouts
from vitreous.data.sources.listing import FileSamples
from vitreous.data.sources.unlabelled import PictureSamples, unlabelled
from vitreous.data.targets import ClassIndex, ClassSet, Mask, NoTarget, Picture, Target

__all__ = [
    "ArraySamples",
    "ClassIndex",
    "ClassSet",
    "Cutouts",
    "Data",
    "FileSamples",
    "Mask",
    "NoTarget",
    "OpenOnce",
    "Picture",
    "PictureSamples",
    "Samples",
    "Target",
    "check_target",
    "open_data",
    "unlabelled",
]
