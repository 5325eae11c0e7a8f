"""A value inside a module that probes may read, without being kept anywhere."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from vitreous.base.errors import SettingError

Kind = Literal["map", "pairs", "index", "number"]


class Exposed(nn.Identity):
    """An identity through which a module sends a value, for a forward hook to see.

    name: of the value, such as "sigma". kind: "map" (a value per token), "pairs" (per pair of
    tokens), "index" (tokens that were chosen), "number" (any other, a learned spectrum or a
    temperature). explains: one sentence for the reader of a page. It has no state: `state_dict` and
    exported graphs are as without it.
    """

    def __init__(self, name: str, kind: Kind, explains: str):
        super().__init__()
        if kind not in get_args(Kind):
            raise SettingError(
                f"Found kind={kind!r} for the exposed value {name!r}. Expected one of {', '.join(get_args(Kind))}. Give one of "
                "these."
            )
        self.name, self.kind, self.explains = name, kind, explains

    def extra_repr(self) -> str:
        return f"{self.name}: {self.kind}"
