"""Settings of a training run: one frozen record of all options, checked."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.optim import list_optimizers

from vitreous.base.environment import torch_device
from vitreous.base.errors import SettingError, UnknownName
from vitreous.base.text_form import settings as settings_of
from vitreous.base.text_form import values_of
from vitreous.data.augmentation import check_augmentation
from vitreous.mechanism import parse
from vitreous.tasks import TASKS, Task
from vitreous.train import recipes
from vitreous.train.options import Images, Network, Optimisation, Running, Usual, flag
from vitreous.train.records.trackers import check_tracker
from vitreous.train.updates import UPDATES

SCHEDULERS = ("cosine", "step", "wsd", "constant", "none")


@dataclass(frozen=True)
class TrainSettings(Running, Optimisation, Network, Images, Usual):  # fields come in the reverse order
    """All settings of one run. data: see `vitreous.data.open_data`.

    The others are described in `vitreous.train.options`.

    Raises UnknownName or SettingError for what can be seen to be wrong without data or model.
    """

    data: str

    def __post_init__(self):
        optimizers = list_optimizers()
        if self.opt.lower().removeprefix("lookahead_") not in optimizers:
            raise UnknownName(self.opt, "optimizer", optimizers, hint="Any of timm's will do.")
        if self.weight_decay is None:  # 0.05 suits a decay apart from the gradient (names in w), not a penalty in it
            object.__setattr__(self, "weight_decay", 0.05 if self.opt.lower().endswith("w") else 0.0)
        if self.recipe not in recipes.NAMES:
            raise UnknownName(self.recipe, "recipe", recipes.NAMES)
        if self.recipe == "none":
            for name, (value, _) in recipes.resolve(vars(self), "none").items():
                object.__setattr__(self, name, value)
        if self.lr is None and not recipes.scaled_by_root(self.opt):
            raise SettingError(
                f"Found --recipe {self.recipe} with --opt {self.opt} and no --lr. Expected one, since the recipes' "
                "learning rates are for AdamW and its kin. Give --lr, or leave --opt out."
            )
        if self.sched not in SCHEDULERS:
            raise UnknownName(self.sched, "scheduler", SCHEDULERS)
        if self.aug is not None:
            check_augmentation(self.aug)
        for text in self.graft:
            parse(text, foreign=True)
        for name in self.tracker:
            check_tracker(name)
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise SettingError(f"Found {flag(name)} {value}. Expected {low} to {high}. Give a value in this range.")
        UPDATES.parse(self.update, foreign=True)
        self.check_task()
        if self.warmup_epochs and self.epochs and self.warmup_epochs >= self.epochs:
            raise SettingError(
                f"Found --warmup-epochs {self.warmup_epochs} of --epochs {self.epochs}. Expected fewer, since the warm-up "
                "counts among the epochs. Lower it or train longer."
            )
        if self.pretrained and self.weights:
            raise SettingError("Found both --pretrained and --weights. Expected one source of weights. Leave one out.")
        self.network_arguments()
        self.torch_device()

    def parsed_task(self) -> Task:
        """The task. Those of its settings that its text does not have, and that are `SHARED`, are
        taken from this record.

        Raises UnknownName, and SettingError for a value that does not fit.
        """
        task = TASKS.parse(self.task, foreign=True)
        values = {name: getattr(self, name) for name in self.shared_settings()}
        return replace(task, **{name: value for name, value in values.items() if value is not None})

    def shared_settings(self) -> set[str]:
        """The settings of this record that are those of its task: in `SHARED`, known to the task,
        and not in its text.
        """
        task = type(TASKS.parse(self.task, foreign=True))
        name, _, words = self.task.partition(":")
        return SHARED.keys() & settings_of(task).keys() - values_of(task, name, words).keys()

    def check_task(self) -> None:
        """Raise SettingError for a task that does not fit the other settings."""
        for name in sorted(SHARED.keys() - self.shared_settings()):
            if getattr(self, name) not in (None, SHARED[name]):
                raise SettingError(
                    f"Found {flag(name)} {getattr(self, name)} with --task {self.task}. Expected it for a task that has the "
                    f"setting {name} and does not name it itself. Leave one of them out."
                )
        if self.parsed_task().pairs_images and self.batch_size % 2:
            raise SettingError(
                f"Found --batch-size {self.batch_size} with mixup or cutmix, which pair images. Expected an even number. "
                "Change one of them."
            )

    def with_recipe(self, loaded: bool, images: int) -> tuple[TrainSettings, dict[str, Any] | None]:
        """Settings without gaps, and the record for run.json: the recipe, why it, each value and
        its source.

        loaded: whether the network starts from trained weights. images: in training. Without a
        recipe there is no record.
        """
        if self.recipe == "none":
            return self, None
        name, why = recipes.choose(loaded, images) if self.recipe == "auto" else (self.recipe, "as asked")
        others = {setting: off for setting, off in SHARED.items() if setting not in self.shared_settings()}
        values = recipes.resolve(vars(self) | others, name)
        record = {"asked": self.recipe, "used": name, "why": why}
        record["values"] = {setting: {"value": value, "from": source} for setting, (value, source) in values.items()}
        return replace(self, recipe=name, **{setting: value for setting, (value, _) in values.items()}), record

    def network_arguments(self) -> dict[str, Any]:
        """`model_kwargs` as keyword arguments of `timm.create_model`."""
        return key_values(self.model_kwargs)

    def torch_device(self) -> torch.device:
        """The device that `device` names. Raises SettingError if this machine does not have it."""
        return torch_device(self.device)


def key_values(words: Sequence[str]) -> dict[str, Any]:
    """Words name=value of --model-kwargs as keyword arguments.

    With Python values where the text is one.
    """
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name.isidentifier() and equals):
            raise SettingError(f"Found --model-kwargs {word}. Expected name=value. Write for example depth=6.")
        if name in ("pretrained", "weights", "classes", "channels", "image_size"):  # ours, not the network's
            raise SettingError(f"Found --model-kwargs {word}. Expected the network's own arguments. Leave it out; see --help.")
        try:
            values[name] = literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


SHARED = {"smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "class_weights": "none"}  # may be of the task; where off
RANGES = {
    "image_size": (1, 10_000),
    "limit": (1, 10**9),
    "hold_out": (0.001, 0.9),
    "drop_path": (0, 1),
    "epochs": (1, 100_000),
    "patience": (1, 100_000),
    "batch_size": (1, 100_000),
    "accumulate": (1, 100_000),
    "lr": (0, 1e3),
    "warmup_epochs": (0, 100_000),
    "weight_decay": (0, 10),
    "layer_decay": (0.01, 1),
    "clip_grad": (1e-9, 1e9),
    "smoothing": (0, 1),
    "mixup": (0, 100),
    "cutmix": (0, 100),
    "model_ema": (0, 1),
    "seed": (0, 2**31),
    "seeds": (1, 1000),
    "workers": (0, 1000),
    "save_every": (1, 10**9),
    "rollbacks": (0, 1000),
    "rollback_lr": (1e-9, 1),
}
