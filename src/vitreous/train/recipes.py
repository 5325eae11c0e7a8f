"""Recipes: published values for the settings that are not set, and their sources.

    finetune-small    trained weights, fewer than 10,000 training images: the gentler values
    finetune-large    trained weights, more images: mixup, cutmix, RandAugment, averaged weights
    scratch           no trained weights: DeiT's
    auto              one of the three, by trained weights or not and the number of training images
    none              the plain defaults

A setting of the user's always wins. Sources:

    MAE       He et al. 2022, arXiv 2111.06377, table 9, and FINETUNE.md of its code: AdamW, 5e-4
              per 256 images with layer decay 0.65 (ViT-B), 1e-3 with 0.75 (ViT-L), weight decay
              0.05, drop path 0.1, smoothing 0.1, mixup 0.8, cutmix 1.0, RandAugment 9 and 0.5,
              cosine with a warm-up
    BEiT      Bao et al. 2022, arXiv 2106.08254, and its code: layer decay 0.65 (base) and 0.75
              (large), weight decay 0.05
    DeiT      Touvron et al. 2021, arXiv 2012.12877, table 9: 5e-4 per 512 images, 5 of 300 epochs
              of warm-up, drop path 0.1, smoothing 0.1, mixup 0.8, cutmix 1.0, RandAugment 9 and 0.5
    DeiT III  Touvron et al. 2022, arXiv 2204.07118, and its commands: fine-tuning for 20 epochs,
              mixup and cutmix as above
    ViT       Dosovitskiy et al. 2021, arXiv 2010.11929, appendix B: gradients clipped at norm 1
    transfer  Kornblith et al. 2019, arXiv 1805.08974: small sets with random crops and flips alone
    RSB       Wightman et al. 2021, arXiv 2110.00476: a schedule of 100 epochs (A3)
    timm      its train script: a rate for 256 images, times sqrt(batch / 256) for Adam and its kin;
              averages of decay 0.9998

Ours are the border of 10,000 images (most sets of the transfer literature lie below it, CIFAR-10
and ImageNet above), 30 epochs for small sets, and a warm-up over a tenth of the epochs. The
optimizer (AdamW), the cosine and weight decay (0.05) are the plain defaults already, and the
resolution stays the network's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

SMALL = 10_000  # training images, below which a set counts as small
BASE = 256  # images for which a recipe's learning rate is meant
HEAD = 2e-5  # deviation of the weights of a new classifier on trained features: MAE
STRONG = "rand-m9-mstd0.5-inc1"
PLAIN = {
    "epochs": 10, "lr": 5e-4, "warmup_epochs": 0.0, "layer_decay": None, "drop_path": 0.0, "clip_grad": None,
    "smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "model_ema": None, "aug": "none",
}  # fmt: skip
# {setting: (value, its source)}; in a recipe lr is for BASE images, warmup_epochs a part of the
# epochs
Values = dict[str, tuple[Any, str]]
COMMON: Values = {
    "warmup_epochs": (0.1, "a tenth of the epochs"),
    "drop_path": (0.1, "MAE, DeiT"),
    "clip_grad": (1.0, "ViT"),
    "smoothing": (0.1, "MAE, DeiT"),
}
MIXED: Values = {"mixup": (0.8, "MAE, DeiT"), "cutmix": (1.0, "MAE, DeiT"), "aug": (STRONG, "MAE, DeiT")}
RECIPES: dict[str, Values] = {
    "finetune-small": COMMON
    | {
        "epochs": (30, "between 20 and 50 of DeiT III"),
        "lr": (5e-4, "MAE"),
        "layer_decay": (0.65, "BEiT, MAE"),
        "aug": ("crop", "transfer"),
    },
    "finetune-large": COMMON
    | MIXED
    | {
        "epochs": (20, "DeiT III"),
        "lr": (1e-3, "MAE"),
        "layer_decay": (0.75, "BEiT, MAE"),
        "model_ema": (0.9998, "timm"),
    },
    "scratch": COMMON | MIXED | {"epochs": (100, "RSB"), "lr": (3.5e-4, "DeiT, 5e-4 for 512"), "model_ema": (0.9998, "timm")},
}
NAMES = ("none", "auto", *RECIPES)


def scaled_by_root(opt: str) -> bool:
    """True for optimizers whose rate timm scales by the root of the batch size."""
    return any(kin in opt.lower() for kin in ("ada", "lamb"))


def choose(loaded: bool, images: int) -> tuple[str, str]:
    """The recipe for a run, and why, in words.

    loaded: whether the network has trained weights. images: in training.
    """
    if not loaded:
        return "scratch", "no trained weights"
    small = images < SMALL
    return f"finetune-{'small' if small else 'large'}", (
        f"trained weights and {images:,} training images, {'fewer than' if small else 'at least'} {SMALL:,}"
    )


def resolve(mapping: Mapping[str, Any], name: str) -> Values:
    """{setting: (value, its source)}: the user's, else the recipe's, else the plain default.

    mapping: settings by name, None where the user has none, batch_size among them.
    """
    recipe, values = RECIPES.get(name, {}), {}
    for setting, plain in PLAIN.items():  # epochs come first, on which the warm-up depends
        if mapping[setting] is not None:
            values[setting] = mapping[setting], "given"
        elif setting in recipe:
            values[setting] = scaled(setting, *recipe[setting], mapping["batch_size"], values)
        else:
            values[setting] = plain, "plain default"
    return values


def scaled(setting: str, value: Any, source: str, batch_size: int, values: Values) -> tuple[Any, str]:
    """A recipe's value for this run: the rate by timm's rule for its batch, warm-up in epochs."""
    if setting == "lr":
        rate = float(f"{value * (batch_size / BASE) ** 0.5:.3g}")
        return rate, f"{source}, {value:g} x sqrt({batch_size} / {BASE})"
    if setting == "warmup_epochs":
        return round(value * values["epochs"][0], 3), source
    return value, source


def quiet_classifier(model: nn.Module) -> None:
    """Start a new classifier on trained features near 0, as MAE's code does.

    Features of trained networks are large; torch's own start makes of them a loss far above that of
    a guess.
    """
    heads = model.get_classifier()
    for layer in heads if isinstance(heads, tuple) else (heads,):
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=HEAD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def drop_path(rate: float | None) -> float:
    """The rate of drop path: as set, or that of all recipes.

    A network is built with it before images are counted.
    """
    return COMMON["drop_path"][0] if rate is None else rate


def remarks(record: dict[str, Any]) -> list[str]:
    """Lines on the recipe in run.json: its name, why it, its values and their sources."""
    by = {True: [], False: []}
    for name, entry in record["values"].items():
        if entry["from"] != "plain default":
            text = f"{name} {entry['value']}" + ("" if entry["from"] == "given" else f" ({entry['from']})")
            by[entry["from"] == "given"].append(text)
    lines = [f"Recipe: {record['used']} ({record['why']}): {', '.join(by[False])}."]
    return lines + ([f"Given, over the recipe: {', '.join(by[True])}."] if by[True] else [])
