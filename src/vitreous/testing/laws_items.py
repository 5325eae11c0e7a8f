"""Laws of what is no mechanism: tasks and probes, each held against one small host."""

from __future__ import annotations

import numpy as np
import torch

from vitreous.data import ClassIndex, ClassSet, Mask, NoTarget, Picture, Target
from vitreous.lens.look import look
from vitreous.lens.probe import Probe, chosen
from vitreous.tasks import Batch, Dice, Objective, Task
from vitreous.testing.check import close, holds
from vitreous.testing.hosts import CLASSES, HOSTS, SIZE, anatomy, build, images

FIRST = next(iter(HOSTS))
COUNT = 4  # images of a batch
TARGETS = {
    ClassIndex: lambda: ClassIndex(np.arange(COUNT) % CLASSES),
    ClassSet: lambda: ClassSet(np.eye(COUNT, CLASSES, dtype=np.float32)),
    Mask: lambda: Mask([np.full((SIZE, SIZE), i % CLASSES) for i in range(COUNT)]),
    Picture: lambda: Picture([np.full((SIZE, SIZE, 3), 60 * i, np.uint8) for i in range(COUNT)]),
    NoTarget: lambda: NoTarget(COUNT),
}


def drawn(task: Task) -> tuple[Objective, Batch]:
    """The task's objective around the first small host, and a batch with made targets."""
    target: Target = TARGETS[task.target]()
    dice = Dice((0,), COUNT, np.arange(COUNT), torch.device("cpu"))
    objective = task.build(build(FIRST), None).eval()
    return objective, objective.draw(images(COUNT), target.take(range(COUNT)), dice)


def losses_have_gradients(task: Task) -> None:
    """All losses are finite scalars, and their sum gives finite gradients in the model."""
    objective, batch = drawn(task)
    losses = objective.losses(batch, 0.5)
    wrong = [name for name, value in losses.items() if value.ndim or not value.isfinite()]
    holds(bool(losses) and not wrong, f"losses that are no finite scalars: {', '.join(wrong) or 'none at all'}")
    sum(losses.values()).backward()
    gradients = [p.grad for p in objective.model.parameters() if p.grad is not None]
    holds(any(g.any() for g in gradients), "no gradient in the model")
    holds(all(g.isfinite().all() for g in gradients), "a gradient that is not finite")


def parts_add_up(task: Task) -> None:
    """The loss of a batch is the mean of its parts' losses, weighted by their images."""
    objective, batch = drawn(task)
    parts = [objective.losses({k: v[s] for k, v in batch.items()}, 0.5) for s in (slice(0, 1), slice(1, COUNT))]
    for name, value in objective.losses(batch, 0.5).items():
        mean = (parts[0][name] + (COUNT - 1) * parts[1][name]) / COUNT
        close(value, mean, f"{name} of the batch beside the mean of its parts", 1e-5)


def scores_are_declared(task: Task) -> None:
    """A test gives declared metrics, the first one always, and a row for each image."""
    objective, _ = drawn(task)
    target = TARGETS[task.target]().take(range(COUNT))
    with torch.no_grad():
        outputs = objective.predict({"images": images(COUNT), "target": target})
    scores, names = objective.score(outputs), [metric.name for metric in task.metrics]
    some = task.target is NoTarget and names[0] in scores  # without labels others cannot be had
    declared = scores.keys() <= set(names) if some else scores.keys() == set(names)
    holds(declared, f"metrics {', '.join(scores)} where {', '.join(names)} are declared")
    rows = list(objective.rows(outputs))
    expected = [len(objective.columns)] * (COUNT if objective.columns else 0)
    holds([len(row) for row in rows] == expected, f"rows of {[len(row) for row in rows]} cells")


def readings_are_declared(probe: Probe) -> None:
    """What it reads is among its measures and components, and within their bounds."""
    model = build(FIRST)
    before = anatomy(model)
    reading = look(model, images(2), probes=[probe], noise=0)
    holds(anatomy(model) == before, "the model changed")
    maps, components = {component for component, _ in reading.maps}, {c.name for c in probe.components}
    holds(maps <= components, f"maps that are not declared: {', '.join(maps - components)}")
    table = reading.table()
    for measure in probe.measures:
        values = table[measure.name]
        # comparing with NaN is false: no bound
        low, high = (np.nan if bound is None else bound for bound in (measure.low, measure.high))
        holds(not ((values < low - 1e-5) | (values > high + 1e-5)).any(), f"{measure.name} beyond its bounds")


def alone_as_among_others(probe: Probe) -> None:
    """Alone and among all probes it reads the same numbers and maps, bit for bit."""
    others = [other for other in chosen(None) if type(other) is not type(probe)]
    alone, among = (look(build(FIRST), images(2), probes=probes) for probes in ([probe], [*others, probe]))
    for name in (measure.name for measure in probe.measures):
        here, there = (values[name][~np.isnan(values[name])] for values in (alone.table(), among.table()))
        holds(np.array_equal(here, there), f"other values of {name}")
    for name in alone.maps:
        holds(np.array_equal(alone.maps[name], among.maps[name], equal_nan=True), f"another map {name}")


OF_TASKS = (losses_have_gradients, parts_add_up, scores_are_declared)
OF_PROBES = (readings_are_declared, alone_as_among_others)
