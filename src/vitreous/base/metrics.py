"""Metrics: name, unit and direction of a number of a test, as run.json records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vitreous.base.errors import DataError


@dataclass(frozen=True)
class Metric:
    """A number of a test.

    name: in metrics.jsonl. unit: % for parts of 1, else as it is shown. label: for people.
    """

    name: str
    unit: str
    better: Literal["higher", "lower"]
    label: str

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return 1 if self.better == "higher" else -1

    @property
    def scale(self) -> int:
        """What a value is multiplied by where it is shown."""
        return 100 if self.unit == "%" else 1

    def number(self, value: float, sign: str = "") -> str:
        """A value as it is shown, without its unit; sign: "+" for differences."""
        return f"{self.scale * value:{sign}.{2 if self.unit == '%' else 4}f}"

    def text(self, value: float) -> str:
        """A value with its unit, such as "83.25 %"."""
        return f"{self.number(value)} {self.unit}".rstrip()


CLASSIFICATION = (Metric("accuracy", "%", "higher", "accuracy"), Metric("loss", "nats", "lower", "loss"))


def metrics_of(record: Mapping[str, Any]) -> tuple[Metric, ...]:
    """The metrics in a run.json, the first of which chooses the epoch.

    Older ones name none, and are of classification.

    Raises DataError for a record that cannot be read.
    """
    if "task" not in record or record["task"] is None:
        return CLASSIFICATION
    try:
        first, *others = (Metric(**entry) for entry in record["task"]["metrics"])
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"Found the metrics of a run.json in another form ({error}). Expected a list of name, unit, better and label. Use "
            "the version that wrote it."
        ) from error
    return first, *others
