"""Images to train and test on: named sets, folders and archives, and made scenes with known masks."""

from vitreous.data.cutouts import Cutouts
from vitreous.data.listing import FileSet
from vitreous.data.opening import OpenOnce, open_data
from vitreous.data.photographs import Pictures, photographs
from vitreous.data.sets import ArraySet, Data, ImageSet

__all__ = ["ArraySet", "Cutouts", "Data", "FileSet", "ImageSet", "OpenOnce", "Pictures", "open_data", "photographs"]
