"""Settings of a training run: one frozen record, which is also its command line.

Words are those of timm's train script. Units stand with each setting.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from timm.optim import list_optimizers
from tyro import conf

from vitreous.base.environment import torch_device
from vitreous.base.errors import SettingError, UnknownName
from vitreous.base.text_form import settings as settings_of
from vitreous.base.text_form import values_of
from vitreous.data.augmentation import check_augmentation
from vitreous.mechanism import parse
from vitreous.tasks import TASKS, Task
from vitreous.train import recipes
from vitreous.train.records.trackers import check_tracker
from vitreous.train.updates import UPDATES

SCHEDULERS = ("cosine", "step", "wsd", "constant", "none")
Repeated = Annotated[tuple[str, ...], conf.UseAppendAction]


@dataclass(frozen=True, kw_only=True)
class Images:
    """What it trains on, beside the positional DATA."""

    image_size: int | None = None
    """Pixels a side (default: the model's; for a new network on a named set, whose images are alike, theirs)."""
    limit: int | None = None
    """At most so many training images, balanced over the classes."""
    download: bool = False
    """Fetch a named data set to its path if it is not there."""
    strict: bool = False
    """Stop if an image cannot be read, instead of going on without it (quarantine.csv in the run folder says which)."""
    outside: bool = False
    """Let a table of images name files outside its own folder."""
    hold_out: float | None = None
    """Part of each class's training images to set aside, chosen by their contents, to see by it when to stop; such as 0.1."""
    aug: str | None = None
    """none | flip | pad (padded crop, flip, rotation by 15 degrees) | crop (random resized crop, flip) | timm's
    auto-augment text, such as rand-m9-mstd0.5-inc1, on top of crop (default: the recipe's, or none)."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network, the mechanisms put into it, and which of its parameters learn."""

    model: str = "vit_tiny_patch16_224"
    """Any timm name, or a folder with config.json and model.safetensors, such as a run of ours."""
    model_kwargs: tuple[str, ...] = ()
    """The network's own arguments: name=value ..., such as patch_size=4 depth=6."""
    pretrained: bool = False
    """Start from timm's published weights of that name (needs a network or timm's cache)."""
    weights: str | None = None
    """Start from the weights in this .safetensors file (or .pth, read without running code)."""
    graft: Repeated = ()
    """A mechanism to put in, such as svda:scale=one,layers=6-11. See `vitreous list`."""
    foreign: bool = False
    """Import mechanisms of other packages, package.module.Class, that a folder names. This runs their code."""
    train: Literal["all", "new", "new+head"] = "all"
    """What learns: everything, what the grafts brought, or that and the classifier."""
    freeze: Repeated = ()
    """Keep what lies under this path fixed, such as patch_embed or blocks.0-9 (both included)."""
    drop_path: float | None = None
    """Chance of leaving out a residual branch in the last block, rising from 0 in the first; 0 to 1 (default: the recipe's, or
    0)."""


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How it is trained."""

    task: str = "classification"
    """What is learned, by what loss: a task with its settings, such as classification:smoothing=0.1."""
    update: str = "plain"
    """How a step is made from gradients: an update with its settings, such as plain."""
    recipe: Literal["none", "auto", "finetune-small", "finetune-large", "scratch"] = "none"
    """Published values for what is not given below; auto chooses by the weights and the number of images, and says what."""
    epochs: int | None = None
    """Passes over the training images (default: the recipe's, or 10)."""
    patience: int | None = None
    """Stop after so many epochs without a better score on the images held out, else on val, else on test; the best
    epoch's weights are kept."""
    batch_size: int = 64
    """Images per step, of all processes together."""
    opt: str = "adamw"
    """Any optimizer of timm's: adam, adamw, sgd, lamb, muon, ..."""
    lr: float | None = None
    """Highest learning rate (default: the recipe's, for the batch size, or 5e-4)."""
    sched: str = "cosine"
    """cosine (down to 0) | step (a tenth after each third) | wsd (constant, then down in the last fifth) | constant or none."""
    warmup_epochs: float | None = None
    """Epochs, or parts of one, in which the learning rate rises, counted in --epochs (default: the recipe's, or 0)."""
    weight_decay: float | None = None
    """Not for biases, norms, and what a model or mechanism exempts (default: 0.05 for adamw and its kin, else 0)."""
    layer_decay: float | None = None
    """Factor on the learning rate for each layer further from the head, such as 0.75 (default: the recipe's, or off)."""
    clip_grad: float | None = None
    """Largest norm of the whole gradient (default: the recipe's, or any)."""
    smoothing: float | None = None
    """Label smoothing, 0 to 1 (default: the recipe's, or 0)."""
    mixup: float | None = None
    """Alpha of mixup; 0 is off (default: the recipe's, or 0)."""
    cutmix: float | None = None
    """Alpha of cutmix; 0 is off (default: the recipe's, or 0)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: an image of a rare class counts more, by the inverse of its class's number of training images."""
    model_ema: float | None = None
    """Decay of averaged weights, such as 0.9998; they are then what is tested and saved (default: the recipe's, or off)."""
    amp: bool = False
    """Forward pass in bfloat16."""
    accumulate: int = 1
    """Parts in which a batch goes through the network, one after another: less memory, the same step."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, the same step, a third slower."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """Where and on what it runs."""

    out: str | None = None
    """Run folder, new or empty (default: the next free runs/NAME)."""
    seed: int = 0
    """Of made data, subsets, weights, order and augmentation."""
    seeds: int = 1
    """Repeat with this many seeds, counted up from --seed, each in its own folder."""
    workers: int = 0
    """Processes that read and augment; images in memory need none."""
    tracker: Repeated = ()
    """Who is told the numbers of every epoch beside metrics.jsonl: tensorboard, or package.module.Class, which is run."""
    save_every: int | None = None
    """Updates after which the state is saved for `vitreous resume` (default: at the end of every epoch alone)."""
    rollbacks: int = 0
    """How often it may go back to the last good state after a step that is not finite, and leave that step out."""
    rollback_lr: float = 1.0
    """Factor on the learning rate after each such return."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 | mps."""
    shard: bool = False
    """Under torchrun: spread weights, gradients and optimizer over the processes, for what does not fit one GPU (FSDP2)."""


@dataclass(frozen=True)
class TrainSettings(Running, Optimisation, Network, Images):  # fields come in the reverse order
    """All settings of one run. data: see `vitreous.data.open_data`.

    The others are described where they stand.

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


def flag(name: str) -> str:
    """The setting as typed on the command line."""
    return "--" + name.replace("_", "-")
