"""One preparation of images: training, looking, predicting and the file that is shipped give the same tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from lens.explicit import vit
from vitreous.data import ArraySamples, FileSamples, NoTarget
from vitreous.data.augmentation import training_transform
from vitreous.data.preprocess import Preprocess
from vitreous.data.views import Views
from vitreous.deploy.export import metadata_of
from vitreous.models import model_folder
from vitreous.models.create import create_model
from vitreous.models.load import open_images, prepared
from vitreous.train.engine.loader import Batches, in_memory, loader

MEAN, STD = (0.45, 0.4, 0.35), (0.2, 0.25, 0.3)
NETWORK = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}


def pixels(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize(
    "own",
    [
        Preprocess((3, 16, 24), MEAN, STD),
        Preprocess((3, 24, 24), MEAN, STD, "bilinear", 0.875, "center"),
        Preprocess((3, 24, 16), MEAN, STD, "bicubic", 0.9, "squash"),
        Preprocess((3, 24, 24), (0.0,) * 3, (1.0,) * 3, "lanczos", 0.75, "border"),
        Preprocess((1, 16, 16), (0.3,), (0.25,), "bilinear", 0.9, "center"),
    ],
    ids=str,
)
def test_training_looking_predicting_and_the_shipped_file_give_the_same_tensor_for_the_same_file(own, tmp_path):
    """Bit for bit, from the preparation of a run to its model folder, and from there to each of its users."""
    channels, height, width = own.input_size
    photos, files = tmp_path / "photos", []
    photos.mkdir()
    for i, size in enumerate([(31, 47), (60, 20), (height, width)]):
        files.append(photos / f"{i}.png")
        Image.fromarray(pixels(i, *size)).save(files[-1])
    names = [file.name for file in files]

    samples = FileSamples(names, files, NoTarget(3), channels)
    trained, _ = next(iter(loader(samples, own, 3)))

    model = create_model("vit_tiny_patch16_224", classes="ab", channels=channels, image_size=(height, width), **NETWORK)
    model_folder.save(model, tmp_path / "run", classes=["a", "b"], inputs=own.config())
    model = model_folder.load(tmp_path / "run")
    assert Preprocess.of_model(model) == own

    views = Views(model, photos)
    looked_at = torch.stack([views[i].pixels for i in range(3)])
    predicted = torch.stack([image.pixels for image in next(prepared(open_images(model, [photos]), 3))])
    facts = metadata_of(model)  # what an exported file says of its input, for those who have timm alone
    recipe = create_transform(**{word: facts[word] for word in own.config()}, is_training=False)
    shipped = torch.stack([recipe(Image.open(file).convert(own.mode)) for file in files])
    for other in (looked_at, predicted, shipped):
        assert torch.equal(trained, other)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_memory_of_the_models_size_are_prepared_as_files_are(channels, mode):
    own = Preprocess((channels, 16, 24), MEAN[:channels], STD[:channels], crop_mode=mode)
    samples = ArraySamples(np.stack([pixels(i, 16, 24, channels) for i in range(3)]), [0, 1, 0])
    batches = loader(samples, own, 3)
    assert in_memory(samples, own)
    assert isinstance(batches.batches, Batches)
    assert torch.equal(next(iter(batches))[0], torch.stack([own(samples.image(i)) for i in range(3)]))


def test_training_without_augmentation_is_the_preparation_itself():
    own = Preprocess((3, 16, 16), MEAN, STD)
    assert training_transform(own, "none") is own
    assert training_transform(own) is own


def test_back_from_the_tensor_to_the_picture():
    own = Preprocess((3, 16, 24), MEAN, STD)
    image = pixels(0, 16, 24)
    assert np.array_equal(own.picture(own(Image.fromarray(image))), image)
    grey = Preprocess((1, 16, 24), (0.3,), (0.25,))
    assert np.array_equal(grey.picture(grey(Image.fromarray(image[..., 0]))), image[..., :1].repeat(3, -1))


def test_a_mask_takes_the_view_of_its_image():
    own = Preprocess((3, 16, 24), (0.0,) * 3, (1.0,) * 3, "bilinear", 0.8)
    mask = np.zeros((40, 60), bool)
    mask[5:30, 20:45] = True
    white = Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")
    assert np.array_equal(own.mask(mask), own(white)[0].numpy() > 0.5)


def test_statistics_of_colour_become_those_of_grey_and_back():
    grey = Preprocess((3, 16, 16), MEAN, STD).of_channels(1)
    assert (grey.input_size, grey.mean, grey.std) == ((1, 16, 16), (sum(MEAN) / 3,), (sum(STD) / 3,))
    assert grey.of_channels(3).mean == (sum(MEAN) / 3,) * 3
    assert Preprocess.of_model(vit(in_chans=1)).mean == (0.5,)
    assert len(Preprocess.of_model(vit(in_chans=5)).mean) == 3  # what they are for other channels, nobody knows


def test_a_model_without_a_record_says_nothing_of_its_images():
    assert Preprocess.of_model(torch.nn.Linear(2, 2)) is None
