"""The settings of training, in groups, as the command line shows them.

Words are those of timm's train script. Units stand with each setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro import conf

Interpolation = Literal["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest"]
Repeated = Annotated[tuple[str, ...], conf.UseAppendAction]


@dataclass(frozen=True, kw_only=True)
class Usual:
    """What most people set."""

    model: str = "vit_tiny_patch16_224"
    """Any timm name, or a folder with config.json and model.safetensors, such as a run of ours."""
    pretrained: bool = False
    """Start from timm's published weights of that name (needs a network or timm's cache)."""
    graft: Repeated = ()
    """A mechanism to put in, such as svda:scale=one,layers=6-11. See `vitreous list`."""
    train: Literal["all", "new", "new+head"] = "all"
    """What learns: everything, what the grafts brought, or that and the classifier."""
    recipe: Literal["none", "auto", "finetune-small", "finetune-large", "scratch"] = "none"
    """Published values for what is not given below.
    Auto chooses by the weights and the number of images, and says what."""
    epochs: int | None = None
    """Passes over the training images (default: the recipe's, or 10)."""
    batch_size: int = 64
    """Images per step, of all processes together."""
    lr: float | None = None
    """Highest learning rate (default: the recipe's, for the batch size, or 5e-4)."""
    image_size: int | None = None
    """Pixels a side
    (default: the model's; for a new network on a named set, whose images are alike, theirs)."""
    out: str | None = None
    """Run folder, new or empty (default: the next free runs/NAME)."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """What it trains on, beside the positional DATA."""

    limit: int | None = None
    """At most so many training images, balanced over the classes."""
    download: bool = False
    """Fetch a named data set to its path if it is not there."""
    strict: bool = False
    """Stop if an image cannot be read, instead of going on without it
    (quarantine.csv in the run folder says which)."""
    outside: bool = False
    """Let a table of images name files outside its own folder."""
    hold_out: float | None = None
    """Part of each class's training images to set aside, to see by it when to stop; such as 0.1.
    It is chosen by their contents."""
    aug: str | None = None
    """none | flip | pad (padded crop, flip, rotation by 15 degrees)
    | crop (random resized crop, flip)
    | timm's auto-augment text, such as rand-m9-mstd0.5-inc1, on top of crop
    (default: the recipe's, or none)."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network, the mechanisms put into it, and which of its parameters learn."""

    model_kwargs: tuple[str, ...] = ()
    """The network's own arguments: name=value ..., such as patch_size=4 depth=6."""
    weights: str | None = None
    """Start from the weights in this .safetensors file (or .pth, read without running code)."""
    weights_table: str | None = None
    """The key of the table to read in it, such as teacher
    (default: averaged weights if there are some, as in timm)."""
    partial_weights: bool = False
    """Load what fits of the weights, and list what does not."""
    mean: tuple[float, ...] = ()
    """Of each channel, subtracted from pixels of 0 to 1
    (default: the weights', or of a new network the data's)."""
    std: tuple[float, ...] = ()
    """Of each channel, by which pixels are divided (default: as for --mean)."""
    interpolation: Interpolation | None = None
    """How images are resized (default: the model's)."""
    foreign: bool = False
    """Import mechanisms of other packages, package.module.Class, that a folder names.
    This runs their code."""
    freeze: Repeated = ()
    """Keep what lies under this path fixed, such as patch_embed or blocks.0-9 (both included)."""
    drop_path: float | None = None
    """Chance of leaving out a residual branch in the last block, rising from 0 in the first; 0 to 1
    (default: the recipe's, or 0)."""


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How it is trained."""

    task: str = "classification"
    """What is learned, by what loss: a task with its settings,
    such as classification:smoothing=0.1."""
    update: str = "plain"
    """How a step is made from gradients: an update with its settings, such as plain."""
    patience: int | None = None
    """Stop after so many epochs without a better score on the images held out, else on val or test.
    The best epoch's weights are kept."""
    opt: str = "adamw"
    """Any optimizer of timm's: adam, adamw, sgd, lamb, muon, ..."""
    sched: str = "cosine"
    """cosine (down to 0) | step (a tenth after each third)
    | wsd (constant, then down in the last fifth) | constant or none."""
    warmup_epochs: float | None = None
    """Epochs, or parts of one, in which the learning rate rises, counted in --epochs
    (default: the recipe's, or 0)."""
    weight_decay: float | None = None
    """Not for biases, norms, and what a model or mechanism exempts
    (default: 0.05 for adamw and its kin, else 0)."""
    layer_decay: float | None = None
    """Factor on the learning rate for each layer further from the head, such as 0.75
    (default: the recipe's, or off)."""
    clip_grad: float | None = None
    """Largest norm of the whole gradient (default: the recipe's, or any)."""
    smoothing: float | None = None
    """Label smoothing, 0 to 1 (default: the recipe's, or 0)."""
    mixup: float | None = None
    """Alpha of mixup; 0 is off (default: the recipe's, or 0)."""
    cutmix: float | None = None
    """Alpha of cutmix; 0 is off (default: the recipe's, or 0)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: an image of a rare class counts more,
    by the inverse of its class's number of training images."""
    model_ema: float | None = None
    """Decay of averaged weights, such as 0.9998; they are then what is tested and saved
    (default: the recipe's, or off)."""
    amp: bool = False
    """Forward pass in bfloat16."""
    accumulate: int = 1
    """Parts in which a batch goes through the network, one after another:
    less memory, the same step."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them:
    less memory, the same step, a third slower."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """Where and on what it runs."""

    seed: int = 0
    """Of made data, subsets, weights, order and augmentation."""
    seeds: int = 1
    """Repeat with this many seeds, counted up from --seed, each in its own folder."""
    workers: int = 0
    """Processes that read and augment; images in memory need none."""
    tracker: Repeated = ()
    """Who gets the numbers of every epoch beside metrics.jsonl:
    tensorboard, or package.module.Class, whose code is run."""
    save_every: int | None = None
    """Updates after which the state is saved for `vitreous resume`
    (default: at the end of every epoch alone)."""
    rollbacks: int = 0
    """How often it may go back to the last good state after a step that is not finite,
    and leave that step out."""
    rollback_lr: float = 1.0
    """Factor on the learning rate after each such return."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 | mps."""
    shard: bool = False
    """Under torchrun: spread weights, gradients and optimizer over the processes (FSDP2),
    for what does not fit one GPU."""


def flag(name: str) -> str:
    """The setting as typed on the command line."""
    return "--" + name.replace("_", "-")
