"""Training tasks, one per file: the target of a sample, the loss and the metrics."""

from vitreous.tasks._task import TASKS, Batch, Dice, Losses, Metric, Objective, Outputs, Task, load_objective, save_objective

__all__ = ["TASKS", "Batch", "Dice", "Losses", "Metric", "Objective", "Outputs", "Task", "load_objective", "save_objective"]
