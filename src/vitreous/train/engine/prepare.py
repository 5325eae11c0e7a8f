"""From settings to a session: data, model with its grafts, optimizer, loaders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from timm.models import get_model_input_config
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn

from vitreous.base.errors import HostError, NotReached, SettingError
from vitreous.base.processes import ALONE, Team
from vitreous.data import ArraySamples, ClassIndex, ClassSet, Data, NoTarget, Samples, check_target, open_data
from vitreous.data.holdout import hold_out
from vitreous.data.preprocess import Preprocess
from vitreous.data.problems import shown
from vitreous.grafting import check, graft, grafts, plan
from vitreous.lens.tap import trace
from vitreous.mechanism import parse
from vitreous.models import model_folder
from vitreous.models.classes import set_multi_label
from vitreous.models.create import adapt, check_patches, create_model, own_size, tells_apart
from vitreous.models.weights import check_file_options
from vitreous.reducer import Reducer
from vitreous.tasks import Objective, Task
from vitreous.train import recipes
from vitreous.train.engine.distributed import check_team, join_processes
from vitreous.train.engine.loader import loader
from vitreous.train.engine.session import Session
from vitreous.train.engine.sharding import check_optimizer, check_sharding, shard
from vitreous.train.engine.state import digest, seed_apart, tensors_of
from vitreous.train.engine.step import draw_batch
from vitreous.train.optimizer import choose_trainable, make_optimizer, make_scheduler
from vitreous.train.records.trackers import Trackers
from vitreous.train.settings import TrainSettings
from vitreous.train.updates import UPDATES

SAMPLE = 64  # images on which grafts are checked and calibrated
READING = 16  # test images that are looked at after every epoch
CALIBRATION = 16  # training images from which the foreground direction is found; more do little better


def prepare(
    settings: TrainSettings, console: Console | None = None, team: Team = ALONE, opening: Callable[..., Data] = open_data
) -> Session:
    """Open the data, build the model, graft, choose what learns.

    console: where the progress of reading files is shown. opening: `open_data`, or an `OpenOnce`
    for several runs. Raises VitreousError if data, model and settings do not fit together.
    """
    device = team.device(settings.torch_device())
    trackers = Trackers(settings.tracker if team.first else ())
    data, inputs, model, remarks = data_and_model(settings, console, opening)
    settings, recipe = settings.with_recipe(from_weights(settings), len(data.train))
    task = settings.parsed_task()
    check_team(settings, task, team.size)
    remarks += recipes.remarks(recipe) if recipe else []
    there = len(grafts(model))  # those of a model folder were calibrated before they were trained
    graft(model, *(parse(text, foreign=True) for text in settings.graft))

    batches = partial(loader, inputs=inputs, seed=settings.seed, workers=settings.workers, strict=settings.strict)

    def first_batch(images: Samples, **options: Any) -> tuple[Tensor, Tensor]:
        return next(iter(batches(spaced(images, SAMPLE), batch_size=SAMPLE, **options)))

    options = {"aug": settings.aug, "views": None if type(task).views is Task.views else task.views}
    train = batches(data.train, batch_size=settings.batch_size, shuffle=True, even=task.pairs_images, team=team, **options)
    tests = {name: batches(images, batch_size=2 * settings.batch_size, team=team) for name, images in data.tests.items()}
    sample, target = (part.to(device) for part in first_batch(data.tests["test"]))
    images = sample
    if options["views"]:  # a task's own crops have another shape, which processes must agree on
        images, target = (part.to(device) for part in first_batch(data.train, **options))
    if task.target in (ClassIndex, ClassSet):
        set_multi_label(model, task.target is ClassSet)
    model.to(device)
    for record in grafts(model)[there:]:
        record.mechanism.calibrate(model, first_batch(data.train)[0].to(device))
    if any(isinstance(record.mechanism, Reducer) for record in grafts(model)):
        remarks.append(f"Plan: {plan(model.eval(), sample[:1])}".replace("\n", "; ") + ".")
    set_checkpointing(model, settings)
    objective = task.build(model, data).to(device)
    # from here on parameters keep their identity, save that `shard` replaces them
    learning = choose_trainable(model, settings.train, settings.freeze, objective.learns())
    remarks.append(f"Learning: {learning:,} of {sum(p.numel() for p in model.parameters()):,} parameters.")
    ema = None if settings.model_ema is None else ModelEmaV3(objective, settings.model_ema, use_warmup=True)
    whole = copy.deepcopy(objective) if settings.shard else None
    if settings.shard:  # before the optimizer, which then steps on spread weights
        check_sharding(objective, settings.task)
        check_optimizer(settings.opt, device, team.size)
        for spreading in (objective, ema.module) if ema else (objective,):
            shard(spreading.model, device, team.size)
    optimizer = make_optimizer(objective, settings)
    session = Session(
        settings=settings,
        device=device,
        data=data,
        inputs=inputs,
        task=task,
        objective=objective,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, settings, steps=len(train)),
        update=UPDATES.parse(settings.update, foreign=True),
        ema=ema,
        train=train,
        tests=tests,
        calibration=batches(spaced(data.train, CALIBRATION), batch_size=CALIBRATION, workers=0),
        sample=spaced(data.tests["test"], READING) if readable((whole or objective).model, sample, remarks) else None,
        remarks=remarks,
        trackers=trackers,
        view_shape=tuple(images.shape[1:]),
        recipe=recipe,
        team=team,
        whole=whole,
    )
    if grafts(model):
        with session.autocast():
            check(model.train(), sample)  # on the path that will run
    # two images, so that a task that pairs them can draw
    drawn = draw_batch(session, images[:2], target[:2], 2 * team.size) if team.size > 1 else {}
    session.step_module = join_processes(session, drawn)
    random_seed(settings.seed)  # dropout, mixup and augmentation draw alike in every arm
    seed_apart(session)
    return session


def fetch(settings: TrainSettings, team: Team) -> None:
    """Let the first of several processes download named data, before the others open them."""
    if settings.download and team.size > 1:
        team.first_does(lambda: open_data(settings.data, download=True).name)


def data_and_model(
    settings: TrainSettings, console: Console | None = None, opening: Callable[..., Data] = open_data
) -> tuple[Data, Preprocess, nn.Module, list[str]]:
    """Data, preparation, a model that fits in classes, channels and size, and remarks."""
    check_file_options(settings.weights, settings.weights_table, settings.partial_weights)
    folder = model_folder.is_folder(settings.model)
    if folder and (settings.weights or settings.pretrained):
        raise SettingError(
            f"Found the folder {settings.model}, which has its weights, and --weights or --pretrained. Expected one source. "
            "Leave the other out."
        )
    loaded, rate = from_weights(settings), recipes.drop_path(settings.drop_path)
    target = settings.parsed_task().target
    arguments = settings.network_arguments() | ({"drop_path_rate": rate} if rate else {})
    opening_lines: list[str] = []
    if folder:
        start = partial(model_folder.load, settings.model, foreign=settings.foreign, **arguments)
    else:
        sources = {"pretrained": settings.pretrained, "weights": settings.weights}
        file = {"table": settings.weights_table, "partial": settings.partial_weights, "say": opening_lines.append}
        sources |= file if settings.weights else {}
        start = partial(create_model, settings.model, **sources, **arguments)
    random_seed(settings.seed)
    model = start() if loaded else None  # before the data: weights that do not fit are soon found
    own = get_model_input_config(model)["input_size"][1:] if loaded else own_size(settings.model)
    with reading_files(console) as progress:
        data = opening(
            settings.data,
            image_size=settings.image_size or (max(own) if loaded else None),
            seed=settings.seed,
            limit=settings.limit,
            download=settings.download,
            strict=settings.strict,
            outside=settings.outside,
            labels=target is not NoTarget,
            progress=progress,
        )
        check_target(data, target, settings.task)
        data = hold_out(data, settings.hold_out, progress) if settings.hold_out else data
    in_memory = isinstance(data.train, ArraySamples)  # all of one size, which a new network can take
    size = data.image_size if settings.image_size or loaded or in_memory else own
    # a classifier that fits the classes by name was trained, and stays
    quiet = loaded and settings.recipe != "none" and not tells_apart(model, data.classes)
    nameless = loaded and not model.pretrained_cfg.get("label_names") and tells_apart(model, data.classes)
    if loaded and get_model_input_config(model)["input_size"][0] == data.channels:
        adapt(model, data.classes, size)
    else:  # a new network, or loaded weights for another number of channels, which timm adapts as it builds
        model = start(classes=data.classes, channels=data.channels, image_size=size)
    if target is NoTarget:
        model.reset_classifier(0)  # nothing would train it, and it would be shipped as it is
    elif quiet:
        recipes.quiet_classifier(model)
    check_patches(model, size)
    inputs = inputs_of(model, data, loaded).changed(settings.mean, settings.std, settings.interpolation)
    source = settings.model if folder else settings.weights or ("timm" if settings.pretrained else None)
    height, width = inputs.input_size[1:]
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)  # networks in stages have no such number
    tests = ", ".join(f"{len(images):,} {name}" for name, images in data.tests.items())
    remarks = [
        f"Data: {data.name}, {len(data.classes)} classes; images: {len(data.train):,} train, {tests}.",
        *data.remarks,
        f"Model: {settings.model}, " + (f"weights from {source}" if source else "from scratch") + f"; {width} x {height} px"
        + (f" in {patches} patches" if patches else "")
        + f", {normalisation(settings, inputs, data)} normalisation"
        + (", a new classifier that starts near 0 (MAE)." if quiet else "."),
        *dict.fromkeys(opening_lines),
        *([f"Images: {inputs}."] if settings.weights or settings.mean or settings.std or settings.interpolation else []),
        *([nameless_classifier(data.classes)] if nameless else []),
    ]  # fmt: skip
    return data, inputs, model, remarks


def check_start(session: Session) -> None:
    """Raise SettingError for what would stop a new run later, or be passed over in it.

    Arguments of the network that contradict the data, and batches of one image that batch norm
    cannot take.
    """
    config, arguments = session.inputs.config(), session.settings.network_arguments()
    actual = {
        "in_chans": config["input_size"][0],
        "img_size": config["input_size"][1:],
        "num_classes": session.model.num_classes,
    }
    for name, value in actual.items():
        if name not in arguments or (name == "img_size" and session.settings.weights):  # it says the size of these weights
            continue
        asked = arguments[name]
        if name == "img_size":
            asked = (asked, asked) if isinstance(asked, int) else tuple(asked) if isinstance(asked, list) else asked
        if asked != value:
            raise SettingError(
                f"Found --model-kwargs {name}={arguments[name]} for a run with {value}. Expected none, since channels and "
                "classes follow from the data, and the size from --image-size. Leave it out."
            )
    sizes = [len(rows) for _, rows in session.train.order if len(rows)]
    # one of several processes may have no image at all, where batches are smaller than their number
    smallest = min((size // min(session.settings.accumulate, size) for size in sizes), default=0)
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in session.model.modules())
    if smallest != 1 or not norms or session.settings.shard:
        return
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            copy.deepcopy(session.model).train()(torch.zeros(1, *session.view_shape, device=session.device))
    except ValueError as error:
        raise SettingError(
            f"Found a batch of one image ({len(session.data.train)} images, --batch-size {session.settings.batch_size}), which "
            f"batch norm cannot take ({error}). Expected two at least. Choose another --batch-size, or leave one image out "
            "with --limit."
        ) from error


def normalisation(settings: TrainSettings, inputs: Preprocess, data: Data) -> str:
    """Whose mean and std images are normalised by."""
    return "the given" if settings.mean or settings.std else "the data's" if inputs.mean == tuple(data.mean) else "the model's"


def nameless_classifier(classes: Sequence[str]) -> str:
    """The remark on weights whose classifier has the right size and does not name its classes."""
    order = ", ".join(f"{i} {shown(name)}" for i, name in enumerate(classes[:4])) + (", ..." if len(classes) > 4 else "")
    return (
        f"Classifier: the one of the weights, which has {len(classes)} classes and does not name them. They are taken to be in "
        f"this order: {order}. If they were trained in another, it learns that anew."
    )


def from_weights(settings: TrainSettings) -> bool:
    """True if the network starts with trained weights."""
    return settings.pretrained or settings.weights is not None or model_folder.is_folder(settings.model)


@contextmanager
def reading_files(console: Console | None) -> Iterator[Callable[[int, int], None]]:
    """Shows on a terminal how many files have been read."""
    quiet = console is None or not console.is_terminal
    with Progress(console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("reading files", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def set_checkpointing(model: nn.Module, settings: TrainSettings) -> None:
    """Turn on gradient checkpointing if the settings ask for it.

    Raises SettingError for a network that has none.
    """
    if not settings.checkpointing:
        return
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise SettingError(
            f"Found --checkpointing for {settings.model}, which has none. Expected a network of timm's that can compute its "
            "activations again. Leave it out; --accumulate saves memory too."
        ) from error


def spaced(images: Samples, most: int) -> Samples:
    """At most so many of the images, evenly spaced, always the same."""
    return images.subset(np.linspace(0, len(images) - 1, min(most, len(images))).astype(int))


def inputs_of(model: nn.Module, data: Data, loaded: bool) -> Preprocess:
    """Preparation of images: that of loaded weights, else with mean and std of the data.

    A network that is made for pixels of [0, 1] as they are (mean 0, std 1) gets them so.
    """
    own, config = Preprocess.of_model(model).of_channels(data.channels), model.pretrained_cfg
    mean, std = own.mean, own.std
    if not loaded and (set(mean), set(std)) != ({0.0}, {1.0}):
        mean, std = tuple(data.mean), tuple(data.std)
    # images in memory of the very size are not cropped, so that they need no transform
    size = own.input_size[1:] if config.get("fixed_input_size") else data.image_size
    whole = isinstance(data.train, ArraySamples) and data.train.images.shape[1:3] == tuple(size)
    return replace(own, input_size=(data.channels, *size), mean=mean, std=std, crop_pct=1.0 if whole else own.crop_pct)


def readable(model: nn.Module, sample: Tensor, remarks: list[str]) -> bool:
    """Whether the attention of this model can be read; if not, the reason joins the remarks."""
    try:
        trace(model, sample)
    except (HostError, NotReached) as error:
        remarks.append(f"No readings: {error}")
        return False
    return True


def run_metadata(session: Session) -> dict[str, Any]:
    """What run.json says of data and model."""
    data, model = session.data, session.model
    parameters = list(model.parameters())
    return {
        "seed": session.settings.seed,
        "data": {
            "name": data.name,
            "classes": list(data.classes),
            "images": {"train": len(data.train)} | {name: len(images) for name, images in data.tests.items()},
            "inputs": session.inputs.config(),
        },
        "task": {
            "text": session.task.full_text(),
            "metrics": [asdict(metric) for metric in session.task.metrics],
            "fixed": fixed_digests(session.objective),
        },
        "model": {
            "architecture": model.pretrained_cfg["architecture"],
            "mechanisms": [str(record.mechanism) for record in grafts(model)],
            "grafts": [record.mechanism.full_text() for record in grafts(model)],
            "parameters": sum(p.numel() for p in parameters),
            "learning": sum(p.numel() for p in parameters if p.requires_grad),
            "classes": model.num_classes,
        },
        "device": str(session.device),
        "processes": session.team.size,
        "remarks": session.remarks,
    } | ({"recipe": session.recipe} if session.recipe else {})


def fixed_digests(objective: Objective) -> dict[str, str]:
    """{child: SHA-256 of its tensors} of what no state holds, such as a frozen teacher.

    It follows from the settings, and a resumed run is refused if it has changed.
    """
    parts = {
        name: {key: tensor.detach().cpu().contiguous() for key, tensor in tensors_of(objective.get_submodule(name)).items()}
        for name in objective.fixed
    }
    return {name: digest("", tensors) for name, tensors in parts.items() if tensors}
