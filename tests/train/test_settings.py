"""One record of settings: the command line gives the same as Python, and mistakes are found before anything is read."""

import pytest

from vitreous.base.errors import SettingError, UnknownName, VitreousError
from vitreous.commands.train import Train
from vitreous.train import TrainSettings


def test_command_line_and_python_give_the_same():
    words = (
        "cutouts --graft svda:scale=one --graft spc:after=9 --freeze blocks.0-3 --lr 1e-4 --batch-size 32 --amp "
        "--layer-decay 0.75 --model-ema 0.99 --model-kwargs depth=3 act_layer=relu --train new+head --image-size 48"
    )
    assert Train.read(words.split()).settings() == TrainSettings(
        "cutouts",
        graft=("svda:scale=one", "spc:after=9"),
        freeze=("blocks.0-3",),
        lr=1e-4,
        batch_size=32,
        amp=True,
        layer_decay=0.75,
        model_ema=0.99,
        model_kwargs=("depth=3", "act_layer=relu"),
        train="new+head",
        image_size=48,
    )


def test_model_arguments_become_python_values():
    settings = TrainSettings("cutouts", model_kwargs=("depth=3", "mlp_ratio=2.5", "class_token=False", "global_pool=avg"))
    assert settings.network_arguments() == {"depth": 3, "mlp_ratio": 2.5, "class_token": False, "global_pool": "avg"}


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"opt": "adamm"}, UnknownName, "Did you mean 'adam'"),
        ({"sched": "cosin"}, UnknownName, "Did you mean 'cosine'"),
        ({"graft": ("svdaa",)}, UnknownName, "Did you mean 'svda'"),
        ({"graft": ("svda:scal=one",)}, UnknownName, "Did you mean 'scale'"),
        ({"graft": ("svda:scale=tow",)}, SettingError, "'learned'"),
        ({"aug": "random"}, SettingError, "rand-m9"),
        ({"lr": -1.0}, SettingError, "--lr -1.0"),
        ({"lr": float("nan")}, SettingError, "--lr nan"),
        ({"epochs": 0}, SettingError, "--epochs 0"),
        ({"batch_size": 15, "mixup": 0.2}, SettingError, "even"),
        ({"warmup_epochs": 5, "epochs": 5}, SettingError, "--warmup-epochs 5"),
        ({"pretrained": True, "weights": "x.safetensors"}, SettingError, "one source"),
        ({"model_kwargs": ("depth",)}, SettingError, "name=value"),
        ({"device": "cuda:99"}, SettingError, "--device cuda:99"),
        ({"device": "toaster"}, SettingError, "--device toaster"),
    ],
)
def test_mistakes_are_named(changes, kind, said):
    with pytest.raises(kind, match=said) as error:
        TrainSettings("cutouts", **changes)
    assert isinstance(error.value, VitreousError)
