"""Images as a model sees them: timm's own preparation, with picture and mask of the same view."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from lens.explicit import vit
from vitreous.base.errors import DataError, HostError, SettingError
from vitreous.data import Cutouts, PictureSamples
from vitreous.data.sources.unlabelled import unlabelled
from vitreous.data.views import Views


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def mask_of(width: int = 60, height: int = 40) -> np.ndarray:
    """The left third."""
    mask = np.zeros((height, width), bool)
    mask[:, : width // 3] = True
    return mask


def test_pixels_are_those_of_timms_evaluation_transform_at_the_size_the_model_was_built_for():
    model = vit()
    prepared = create_transform(**resolve_model_data_config(model) | {"input_size": (3, 16, 24)}, is_training=False)
    view = Views(model, [picture(0)])[0]
    assert torch.equal(view.pixels, prepared(picture(0)))
    assert (view.width, view.height, view.name, view.label, view.mask) == (60, 40, "image 0", -1, None)
    assert np.array_equal(view.picture, ((view.pixels * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy())
    shown = np.asarray(Image.open(io.BytesIO(view.jpeg().tobytes())))
    assert shown.shape == (16, 24, 3)
    assert np.abs(shown.astype(int) - view.picture).mean() < 20  # random colours are the worst case of a JPEG


def test_a_compiled_model_is_prepared_for_as_the_one_inside():
    assert torch.equal(Views(torch.compile(vit()), [picture(0)])[0].pixels, Views(vit(), [picture(0)])[0].pixels)


def test_the_mask_follows_resizing_and_cropping():
    white = Image.fromarray(np.where(mask_of()[..., None], 255, 0).repeat(3, -1).astype(np.uint8))
    view = Views(vit(), PictureSamples([white], masks=[mask_of()]))[0]
    assert view.mask.shape == (16, 24)
    assert np.array_equal(view.mask, view.picture[..., 0] > 127)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(view.mask_png().tobytes()))), view.mask)


def test_a_model_of_grey_images_sees_grey(tmp_path):
    picture(1).save(tmp_path / "a.png")
    view = Views(vit(in_chans=1), tmp_path)[0]
    assert view.pixels.shape == (1, 16, 24)
    assert (view.picture == view.picture[..., :1]).all()
    colours = Views(vit(), [picture(1).convert("L")])[0].pixels
    assert torch.allclose(colours[:1], view.pixels, atol=0.02)
    with pytest.raises(HostError, match=r"5 channels.*1 or 3.*tensor"):
        Views(vit(in_chans=5), tmp_path)


def test_the_callers_inputs_come_before_the_models():
    inputs = resolve_model_data_config(vit()) | {"input_size": (3, 16, 24), "mean": (0.1,) * 3, "std": (0.2,) * 3}
    views = Views(vit(), [picture(2)], inputs=inputs)
    assert torch.allclose(views[0].pixels, (Views(vit(), [picture(2)])[0].pixels * 0.5 + 0.4) / 0.2, atol=1e-5)
    assert np.array_equal(views[0].picture, Views(vit(), [picture(2)])[0].picture)


@pytest.mark.parametrize(("mean", "std", "known"), [(0.5, 0.5, True), (0.0, 1.0, True), (7.0, 0.1, False)])
def test_tensors_are_taken_as_they_are_and_how_they_were_normalised_is_told_from_their_range(mean, std, known):
    x = (torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) - mean) / std
    x[0, 0, 0, 0], x[0, 0, 0, 1] = (0 - mean) / std, (1 - mean) / std
    views = Views(torch.nn.Sequential(vit()) if mean == 0 else vit(), x)  # one that says nothing may have taken [0, 1]
    assert torch.equal(views[1].pixels, x[1])
    assert [views[i].name for i in range(len(views))] == ["image 0", "image 1"]
    if known:
        assert (views.mean, views.std) == ((mean,) * 3, (std,) * 3)
        assert np.abs(views[0].picture - ((x[0] * std + mean) * 255).permute(1, 2, 0).numpy()).max() <= 0.51
    else:
        assert (views.mean, views.std) == (None, None)
        assert (views[0].picture.min(), views[0].picture.max()) == (0, 255)


def test_masks_of_tensors_have_their_size():
    x, masks = torch.zeros(2, 3, 16, 24), np.zeros((2, 16, 24), bool)
    masks[1, 3:5] = True
    assert Views(vit(), x, masks)[1].mask.sum() == 48
    assert Views(vit(), x, torch.from_numpy(masks))[0].mask.sum() == 0
    with pytest.raises(DataError, match=r"\(2, 8, 8\).*Expected \(2, 16, 24\)"):
        Views(vit(), x, np.zeros((2, 8, 8)))


def test_a_set_of_images_brings_names_labels_and_masks():
    scenes = Cutouts(4, size=24, seed=3)
    view = Views(vit(), scenes)[2]
    assert view.label == scenes.labels[2]
    assert view.mask.any()
    with pytest.raises(DataError, match="which has its own"):
        Views(vit(), scenes, masks="masks/")


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(3, 16, 24), "x\\[None\\]"),
        (torch.zeros(0, 3, 16, 24), "at least one"),
        (torch.zeros(2, 3, 16, 24, dtype=torch.uint8), "torch.uint8.*normalised"),
        ([], "no images"),
        ([torch.zeros(3, 16, 24)], "Tensor.*one normalised tensor"),
    ],
)
def test_what_is_no_batch_of_images_is_said(images, said):
    with pytest.raises(DataError, match=said):
        Views(vit(), images)


def test_a_model_that_does_not_say_how_to_prepare_images_needs_tensors():
    bare = torch.nn.Sequential(vit())
    with pytest.raises(SettingError, match=r"Sequential without a pretrained_cfg.*tensor"):
        Views(bare, [picture(0)])
    assert len(Views(bare, torch.zeros(2, 3, 16, 24))) == 2


def test_images_of_other_contents_have_another_identity(tmp_path):
    def identity(images, masks=None):
        return Views(vit(), images, masks).identity(2)

    for i in range(2):
        picture(i).save(tmp_path / f"{i}.bmp")
    first = identity(tmp_path)
    assert identity(tmp_path) == first
    picture(7).save(tmp_path / "1.bmp")  # of the same name and size
    assert identity(tmp_path) != first
    (tmp_path / "masks").mkdir()
    kept = identity(tmp_path)
    Image.fromarray(mask_of()).save(tmp_path / "masks/1.png")
    assert identity(tmp_path) != kept
    (tmp_path / "1.bmp").unlink()
    assert unlabelled(tmp_path / "0.bmp").names == ["0.bmp"]

    x = torch.zeros(2, 3, 16, 24)
    y = x.clone()
    y[1, 0, 0, 0] = 1e-6
    assert identity(x) == identity(x.clone()) != identity(y)
    assert identity(x, np.ones((2, 16, 24))) != identity(x)
    scenes = [PictureSamples([picture(0), picture(1)], masks=[None, mask]) for mask in (None, mask_of())]
    assert identity(scenes[0]) != identity(scenes[1])
