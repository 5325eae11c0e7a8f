"""Settings of a bench: one frozen record of all options, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from vitreous.base.environment import torch_device
from vitreous.base.errors import SettingError
from vitreous.bench.arms import Arm, Cell
from vitreous.bench.options import Comparison
from vitreous.bench.timing import ENOUGH
from vitreous.mechanism import parse
from vitreous.models import model_folder
from vitreous.models.create import check_name
from vitreous.train.options import flag
from vitreous.train.settings import key_values

COMPILED = 8  # models at a time


@dataclass(frozen=True)
class BenchSettings(Comparison):
    """All settings of one bench. model: a name of timm's or a model folder; the others are
    described where they stand.

    Raises UnknownName, DataError or SettingError for what can be seen to be wrong without building
    a model.
    """

    model: str

    def __post_init__(self):
        for name, low in (("rounds", ENOUGH), ("batch", 1), ("image_size", 1)):
            values = getattr(self, name)
            for value in (values,) if name == "rounds" else values:
                if not low <= value <= 1_000_000:
                    raise SettingError(f"Found {flag(name)} {value}. Expected {low} to 1,000,000. Give a number in this range.")
        for name in ("mode", "batch"):
            if not getattr(self, name):
                raise SettingError(f"Found {flag(name)} without a value. Expected one at least. Leave it out, or name one.")
        for source in (self.model, *self.against):
            if not model_folder.is_folder(source):
                check_name(source)
        for text in self.graft:
            parse(text, foreign=True)
        if self.compile and len(self.against) > COMPILED - 2:
            raise SettingError(
                f"Found --compile and {len(self.against)} models to compare with. Expected {COMPILED - 2} at most, since torch "
                "stops to compile what it meets in many forms. Compare them in two commands."
            )
        key_values(self.model_kwargs)
        if torch_device(self.device).type not in ("cpu", "cuda"):
            raise SettingError(
                f"Found --device {torch_device(self.device)}. Expected cpu or cuda, whose calls can be timed. Use --device cpu."
            )

    def arms(self) -> list[Arm]:
        """The model first; then the same without grafts, if it has any; then the others.

        Names tell them apart.
        """
        common = {"model_kwargs": self.model_kwargs, "foreign": self.foreign}
        brought = model_folder.read_mechanisms(self.model, self.foreign) if model_folder.is_folder(self.model) else []
        grafted = [*map(str, brought), *self.graft]
        arms = [Arm(" + ".join([self.model, *grafted]), self.model, self.graft, **common)]
        if grafted:
            arms.append(Arm(self.model + " plain" * bool(brought), self.model, plain=True, **common))
        for number, source in enumerate(self.against, 2):
            name = source if source not in [arm.name for arm in arms] else f"{source} ({number})"
            arms.append(Arm(name, source, foreign=self.foreign))
        return arms

    def cells(self, own: int) -> list[Cell]:
        """Every mode, image size and batch; own: the model's own image size."""
        device = str(torch_device(self.device))
        return [
            Cell(mode, batch, size, self.dtype, device, self.compile)
            for mode, size, batch in product(unique(self.mode), unique(self.image_size or (own,)), unique(self.batch))
        ]


def unique(values: Sequence) -> list:
    return list(dict.fromkeys(values))
