"""What is timed: a model as named, in one mode, on one batch of random images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timm.models import get_model_input_config
from timm.optim import create_optimizer_v2
from torch import nn

from vitreous.base.errors import SettingError
from vitreous.grafting import graft, grafts, ungraft
from vitreous.mechanism import parse
from vitreous.models import model_folder
from vitreous.models.create import check_patches, create_model
from vitreous.tasks import TASKS
from vitreous.train.engine.distributed import StepModule
from vitreous.train.optimizer import parameter_groups
from vitreous.train.settings import key_values

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Arm:
    """A model folder, or a name of timm's with random weights; grafts are put in or taken out.

    plain: take out the grafts that the folder brings.
    """

    name: str
    source: str
    grafts: tuple[str, ...] = ()
    plain: bool = False
    model_kwargs: tuple[str, ...] = ()
    foreign: bool = False

    def build(self, size: int | None = None) -> nn.Module:
        """The model for square images of `size` pixels (its own size if None), on the CPU.

        Its weights are the same at every call. Raises VitreousError for a name, folder, argument,
        size or graft that does not fit.
        """
        arguments, pixels = key_values(self.model_kwargs), size and (size, size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if model_folder.is_folder(self.source):
                model = model_folder.load(self.source, image_size=pixels, foreign=self.foreign, **arguments)
            else:
                model = create_model(self.source, image_size=pixels, **arguments)
            if self.plain and grafts(model):
                ungraft(model, all=True)
            graft(model, *(parse(text, foreign=True) for text in self.grafts))
        check_patches(model, pixels or own_size(model))
        return model


def own_size(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the images that the model is made for."""
    return get_model_input_config(model)["input_size"][1:]


@dataclass(frozen=True)
class Cell:
    """One comparison: a mode, a batch and an image size.

    mode: "inference", a forward pass, or "training": forward, loss, grafts' penalties, backward,
    AdamW.
    """

    mode: str
    batch: int
    size: int
    dtype: str = "fp32"
    device: str = "cpu"
    compile: bool = False

    def __str__(self) -> str:
        return f"{self.mode}, batch {self.batch}, {self.size} px"

    def act(self, model: nn.Module) -> Callable[[], object]:
        """What is timed of this model, which is moved to the device and mode.

        Compilation happens at the first call. Raises SettingError for training without a
        classifier.
        """
        channels = get_model_input_config(model)["input_size"][0]
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, channels, self.size, self.size, generator=generator).to(self.device)
        model.to(self.device)
        run = torch.compile(model, dynamic=False) if self.compile else model
        half = {"device_type": torch.device(self.device).type, "dtype": torch.bfloat16, "enabled": self.dtype == "bf16"}
        if self.mode == "inference":
            model.eval()

            def infer() -> object:
                with torch.inference_mode(), torch.autocast(**half):
                    return run(images)

            return infer
        if not getattr(model, "num_classes", 0):
            raise SettingError(
                f"Found {type(model).__name__} without a classifier. Expected classes to train on. Give --model-kwargs "
                "num_classes=1000, or --mode inference."
            )
        labels = torch.randint(model.num_classes, (self.batch,), generator=generator).to(self.device)
        step = StepModule(TASKS.parse("classification").build(model, None), partial(torch.autocast, **half))
        step.objective.model = run
        batch = {"images": images, "target": labels}
        model.train()
        optimizer = create_optimizer_v2(parameter_groups(model, 0.05), opt="adamw", lr=1e-5, weight_decay=0.0)

        def train() -> None:
            optimizer.zero_grad()
            losses, terms = step(batch, 0.0, True)
            sum([*losses.values(), *terms.values()]).backward()  # training pays for the grafts' penalties too
            optimizer.step()

        return train
