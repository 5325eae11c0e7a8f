"""Training tasks, one per file: what each sample must carry, what is lowered, and how it is scored."""

from vitreous.tasks._task import (
    TASKS,
    Batch,
    Dice,
    Losses,
    Metric,
    Objective,
    Outputs,
    Task,
    load_objective,
    save_objective,
)

__all__ = [
    "TASKS",
    "Batch",
    "Dice",
    "Losses",
    "Metric",
    "Objective",
    "Outputs",
    "Task",
    "load_objective",
    "save_objective",
]
