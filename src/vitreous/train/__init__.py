"""Training: settings, the loop, and models on disk. Names are imported when first used."""

from vitreous.base.after_import import late_names

__all__ = ["TrainSettings", "load", "save", "train"]
__getattr__ = late_names(
    __name__,
    {
        "vitreous.models.model_folder": ("load", "save"),
        "vitreous.train.settings": ("TrainSettings",),
        "vitreous.train.run": ("train",),
    },
)
