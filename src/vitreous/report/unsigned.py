"""Foreground maps whose sign nothing tells: what they are called, also in older readings."""

from __future__ import annotations

from typing import Any

UNSIGNED_LABEL = "Foreground or background"
UNSIGNED_EXPLAINS = (
    "Which patches belong together. Which side is the subject is not known without a calibrated direction "
    "(`vitreous calibrate`)."
)
WITHOUT_DIRECTION = "without a calibrated direction"


def has_unknown_sign(component: dict[str, Any]) -> bool:
    """Whether the record is of a foreground map without a direction, in formats 1 and 2."""
    return component["name"] == "foreground" and WITHOUT_DIRECTION in str(component.get("rule"))


def with_unknown_signs(components: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, those of foreground maps without a direction as what they are."""
    words = {"label": UNSIGNED_LABEL, "explains": UNSIGNED_EXPLAINS, "signed": True, "rule": None, "sign_known": False}
    return [component | words if has_unknown_sign(component) else component for component in components]
