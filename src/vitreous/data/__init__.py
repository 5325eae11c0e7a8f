"""Images to train and test on: named sets, folders and archives, and made scenes with known masks."""

from vitreous.data.open import OpenOnce, open_data
from vitreous.data.samples import ArraySet, Data, ImageSet
from vitreous.data.sources.cutouts import Cutouts
from vitreous.data.sources.listing import FileSet
from vitreous.data.sources.unlabelled import Pictures, unlabelled

__all__ = ["ArraySet", "Cutouts", "Data", "FileSet", "ImageSet", "OpenOnce", "Pictures", "open_data", "unlabelled"]
