"""Perturb whole patches: whether the answer flips, and whether attention goes there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vitreous.base.errors import HostError, SettingError, VitreousError
from vitreous.grafting import graft, ungraft
from vitreous.lens.batch_pass import BatchPass
from vitreous.lens.formulas.corruptions import CORRUPTIONS
from vitreous.lens.patch_attack import Perturbation, Scale, corners_of, generator, logits_of, patch_pixels, salience_of
from vitreous.lens.probe import BatchInfo, Component, Measure, Probe, Readout, Rows, Source
from vitreous.lens.probes.rollout import Rollout
from vitreous.lens.tap import Layouts, trace, watch
from vitreous.lens.tap.capture_pass import prepare_images

KEY = "patch"
BEFORE, AFTER = "rollout_before", "rollout_after"  # names of the maps


@dataclass(frozen=True, kw_only=True)
class PatchPerturbation(Probe):
    """Whether a perturbed patch flips the answer, and how much attention it draws.

    Patches of the model's own grid get a natural corruption, or an adversarial pattern by steps of
    the gradient's sign, bounded by the range of pixels alone.
    The fooling rate is the mean of `patch_fooled`. Attention is that of rollout (Abnar and Zuidema
    2020), as far as it can be followed; what it gives to the patch is a share of what all patches
    get. The first temperature is drawn: the image as perturbed, and rollout before and after.

    Settings: kind: adversarial, or a corruption of ImageNet-C: noise, shot, impulse, blur,
    contrast, brightness. severity: of those, 1 to 5. steps, step: of the attack, step in pixels of
    [0, 1]. size: patches along each side. place: salient (where the loss has the largest gradient),
    centre, random. at: row and column of its first patch, in place of that. temperatures: attention
    is divided by each in turn, by the mechanism `temperature`; the attack is computed anew for
    each, and that of the first one is tried on the others, too. counted: "all" images, or those
    that are "correct" by their labels before. seed: of random places and corruptions.

    Costs two passes with gradients for each step and temperature, about. Raises HostError for a
    model without classes or a grid of patches, or where it is not known how pixels were normalised;
    SettingError.
    """

    paper: ClassVar[str] = "Gu, Tresp, Qin 2022, arXiv 2111.10659"
    order: ClassVar[int] = 130
    passes: ClassVar[bool] = True
    sources: ClassVar[tuple[Source, ...]] = (
        Source(KEY, "Perturbed patch", "The answer to an image with a perturbed patch beside that to the image as it is."),
    )
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("patch_fooled", "Fooled", "", 0, 1, "lower", short="fooled",
                explains="1 where the perturbed patch flips the answer. The mean is the fooling rate."),
        Measure("patch_fooled_transferred", "By transfer", "", 0, 1, "lower", short="transfer",
                explains="1 where the patch made for the first temperature flips the answer at this one."),
        Measure("patch_lost", "Probability lost", "", -1, 1, "lower", short="lost",
                explains="How much less probable the answer is with the patch perturbed."),
        Measure("patch_before", "Rollout before", "", 0, 1, short="before",
                explains="Share of the rollout over all patches that is on the patch of the image as it is."),
        Measure("patch_after", "Rollout after", "", 0, 1, short="after",
                explains="The same with the patch perturbed. More than before: it draws attention."),
        Measure("patch_unchanged", "Clean answer kept", "", 0, 1, "higher", short="kept",
                explains="1 where the image as it is gets the answer that it gets at the first temperature."),
    )  # fmt: skip
    components: ClassVar[tuple[Component, ...]] = (
        Component(BEFORE, "Rollout before a patch is perturbed", low=0, scored=False, curves=False,
                  explains="Attention followed through the layers, on the image as it is."),
        Component(AFTER, "Rollout with the perturbed patch", low=0, scored=False, curves=False,
                  explains="The same on the image with the perturbed patch, which is the picture below it."),
    )  # fmt: skip

    kind: Literal["adversarial", "noise", "shot", "impulse", "blur", "contrast", "brightness"] = "adversarial"
    severity: int = 5
    steps: int = 10
    step: float = 0.2
    size: int = 1
    place: Literal["salient", "centre", "random"] = "salient"
    at: tuple[int, int] | None = None
    temperatures: tuple[float, ...] = (1.0,)
    counted: Literal["all", "correct"] = "all"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name, low, high in (("severity", 1, 5), ("steps", 0, 10**6), ("size", 1, 10**4), ("seed", 0, 2**32)):
            if not low <= (value := getattr(self, name)) <= high:
                raise SettingError(f"Found {name}={value}. Expected {low} to {high}. Give such a whole number.")
        if not 0 < self.step <= 1:
            raise SettingError(f"Found step={self.step}. Expected above 0 to 1, in pixels of [0, 1]. Give such a step.")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise SettingError(f"Found temperatures={self.temperatures}. Expected each once. Leave the others out.")

    def extra(self, model: nn.Module, batch: BatchInfo, targets: Sequence[int]) -> Readout:
        return Comparison(self, model, batch, targets).run()


@dataclass(frozen=True)
class Clean:
    """What a model says of images as they are.

    classes (B,), probability (B,) of these; counted (B,) bool; rollout (B, rows, columns) or None.
    """

    classes: Tensor
    probability: Tensor
    counted: Tensor
    rollout: Tensor | None


class Comparison:
    """One batch before and after, at every temperature."""

    def __init__(self, probe: PatchPerturbation, model: nn.Module, batch: BatchInfo, targets: Sequence[int]):
        self.probe, self.model, self.batch, self.readout = probe, model, batch, Readout()
        if batch.mean is None or batch.std is None:
            raise HostError(
                "Found images of which it is not known how they were normalised. Expected that, since a patch is perturbed in "
                "pixels of [0, 1]. Give images in [0, 1], or normalised as the model's pretrained_cfg says; or inputs."
            )
        self.scale = Scale(batch.mean, batch.std)
        self.images = prepare_images(dict(model.named_modules()), batch.clean(batch.images))
        self.grid = patch_grid(batch.layouts)
        self.labels = torch.tensor(list(targets), device=self.images.device)
        self.perturb = Perturbation(probe.kind, probe.severity, probe.steps, probe.step, probe.seed)

    def run(self) -> Readout:
        """The readings at all temperatures; a model that takes one of them not gives a note."""
        first: tuple[Clean, Tensor, Tensor] | None = None  # clean, where, and the perturbed images
        for value in self.probe.temperatures:
            try:
                with tempered(self.model, value):
                    self.layouts = trace(self.model, self.images)  # of the model at this temperature
                    clean = self.clean()
                    where = self.where(clean) if first is None else first[1]
                    changed = self.perturb(self.model, self.images, clean.classes, where, self.scale, self.batch.first)
                    values, after = self.values(clean, changed, where, first)
            except VitreousError as error:
                if first is None:
                    raise
                self.readout.notes.append(f"patch_perturbation has no readings at T = {value:g}: {error}")
                continue
            self.readout.rows.append(Rows(-1, KEY, f"T = {value:g}", values, self.batch.first, together=True))
            if first is None:
                first = clean, where, changed
                self.draw(clean, changed, after)
        return self.readout

    def clean(self) -> Clean:
        logits = logits_of(self.model, self.images)
        classes = logits.argmax(-1)
        counted = classes == self.labels if self.probe.counted == "correct" else torch.ones_like(classes, dtype=torch.bool)
        if self.probe.counted == "correct" and bool((self.labels < 0).all()):
            note = "patch_perturbation:counted=correct has no numbers: it is not known what the images show. Leave counted out."
            self.readout.notes.append(note)
        return Clean(classes, of_class(logits, classes), counted, self.rollout(self.images))

    def rollout(self, images: Tensor) -> Tensor | None:
        batch = self.batch
        info = BatchInfo(images, len(images), self.layouts, first=batch.first, block=batch.block, class_token=batch.class_token)
        return rollout(self.model, info)

    def where(self, clean: Clean) -> Tensor:
        """The pixels of the patch of each image, (B, 1, h, w) bool."""
        probe, count = self.probe, len(self.images)
        if probe.at is not None:
            corners = torch.tensor(probe.at).expand(count, 2)
        else:
            salience = salience_of(self.model, self.images, clean.classes, self.grid) if probe.place == "salient" else None
            generators = [generator(probe.seed, self.batch.first + i) for i in range(count)]
            corners = corners_of(probe.place, probe.size, self.grid, salience, generators)
        return patch_pixels(corners, probe.size, self.grid, self.images.shape[-2:]).to(self.images.device)

    def values(
        self, clean: Clean, changed: Tensor, where: Tensor, first: tuple[Clean, Tensor, Tensor] | None
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor | None]]:
        """{measure: (B, 1)}, and the classes and the rollout of the perturbed images."""
        logits, after = logits_of(self.model, changed), self.rollout(changed)
        values = {
            "patch_fooled": logits.argmax(-1) != clean.classes,
            "patch_lost": clean.probability - of_class(logits, clean.classes),
            "patch_before": share_inside(clean.rollout, where),
            "patch_after": share_inside(after, where),
        }
        if first is not None:
            values["patch_fooled_transferred"] = logits_of(self.model, first[2]).argmax(-1) != clean.classes
            values["patch_unchanged"] = clean.classes == first[0].classes
        nothing = torch.full_like(clean.probability, torch.nan)
        counted = {
            name: nothing if value is None else torch.where(clean.counted, value.to(nothing), nothing)
            for name, value in values.items()
        }
        if first is not None:
            counted["patch_unchanged"] = values["patch_unchanged"].to(nothing)
        return {name: value[:, None] for name, value in counted.items()}, (logits.argmax(-1), after)

    def draw(self, clean: Clean, changed: Tensor, after: tuple[Tensor, Tensor | None]) -> None:
        """The maps of the first temperature, the second one over the perturbed picture."""
        classes, rollout_after = after
        self.readout.classes |= {BEFORE: clean.classes.tolist(), AFTER: classes.tolist()}
        if clean.rollout is None or rollout_after is None:
            self.readout.notes.append("patch_perturbation draws nothing: rollout cannot be followed in this model.")
            return
        self.readout.maps |= {f"{BEFORE}/-1": clean.rollout, f"{AFTER}/-1": rollout_after}
        self.readout.pictures[AFTER] = changed
        self.readout.details[f"{AFTER}/-1"] = {"rule": self.words()}

    def words(self) -> str:
        """What was done to the patch."""
        probe = self.probe
        if probe.kind in CORRUPTIONS:
            return f"{probe.kind} of severity {probe.severity}"
        return f"an adversarial patch, {probe.steps} steps of {probe.step:g}"


@contextmanager
def tempered(model: nn.Module, value: float) -> Iterator[None]:
    """The model with attention at a temperature in the body, by the mechanism."""
    if value == 1:
        yield
        return
    graft(model, f"temperature:temperature={value!r}")
    try:
        yield
    finally:
        ungraft(model)


def patch_grid(layouts: Layouts) -> tuple[int, int]:
    """(rows, columns) of the first attention with a grid of keys. Raises HostError for none."""
    for traced in layouts.calls.values():
        grid = traced.layout and traced.layout.key_grid
        if grid is not None and len(grid) == 2:
            return grid
    raise HostError(
        "Found no attention whose tokens lie on a grid of two dimensions. Expected one, whose patches can be perturbed. Look "
        "at such a model, or leave patch_perturbation out."
    )


def rollout(model: nn.Module, batch: BatchInfo) -> Tensor | None:
    """Attention rollout (B, rows, columns) as far as it can be followed; None if not at all."""
    batch_pass = BatchPass(model, [Rollout()], batch)
    watch(model, batch.images, batch_pass.on_attention, layouts=batch.layouts)
    maps = batch_pass.finish()[0].maps
    return maps[max(maps, key=lambda name: int(name.partition("/")[2]))] if maps else None


def share_inside(maps: Tensor | None, where: Tensor) -> Tensor | None:
    """Share (B,) of maps (B, rows, columns) inside `where` (B, 1, h, w) bool; None for None."""
    if maps is None:
        return None
    patches = nn.functional.adaptive_avg_pool2d(where.to(maps), maps.shape[-2:])[:, 0]
    return (maps * patches).sum((1, 2)) / maps.sum((1, 2)).clamp_min(1e-30)


def of_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Probability (B,) of classes (B,)."""
    return logits.softmax(-1).gather(-1, classes[:, None])[:, 0]
