"""`TokenNames`: which parameter each token comes from that has no place in the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from vitreous.lens.coordinates.field import tensors

Names = tuple[str, ...]  # of the tokens along the last axis but one; "": of no parameter
# calls behind which tokens are the same, in order, where they are as many
SAME_TOKENS = {
    "add", "iadd", "radd", "mul", "expand", "expand_as", "repeat", "view", "reshape", "unsqueeze", "to", "type_as", "clone",
    "contiguous", "dropout", "layer_norm", "embedding",
}  # fmt: skip


class TokenNames:
    """Follows parameters (class token, registers, prompts) to where tokens are joined.

    parameters: by name. joined: {number of tokens: names of them}, of the latest join of so many.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = {id(parameter): name for name, parameter in parameters.items()}
        self.names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.joined: dict[int, Names] = {}

    def of(self, tensor: Tensor) -> Names:
        """Names of the tokens of a tensor; empty if nothing is known of them."""
        if tensor in self.names:
            return self.names[tensor]
        name = self.parameters.get(id(tensor))
        return () if name is None else (name,) * (tensor.shape[-2] if tensor.ndim > 1 else 1)

    def follow(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Name the tokens of the output of a call. name: without underscores around it."""
        names: Names = ()
        if not isinstance(out, Tensor) or not out.ndim:
            return
        if name in SAME_TOKENS:
            inputs = tensors((*args, *kwargs.values()))
            inputs = inputs[:1] if name == "layer_norm" else inputs
            names = self.likeliest(inputs, out.shape[-2] if out.ndim > 1 else 1)
        elif name in ("cat", "concat", "concatenate"):
            names = self.join(args, kwargs, out)
        elif name == "getitem":
            names = self.cut(args[0], args[1], out)
        if names:
            self.names[out] = names

    def likeliest(self, inputs: Sequence[Tensor], count: int) -> Names:
        """Names of `count` tokens that were added up.

        Tokens that were joined come before those of one parameter, and position tables come last.
        A vector beside another tensor is a bias or a scale.
        """
        inputs = [x for x in inputs if x.ndim > 1 or len(inputs) == 1]
        options = [names for x in inputs if (names := self.of(x)) and len(names) == count]
        return min(options, key=lambda names: ("" not in names, "pos" in names[0]), default=())

    def join(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> Names:
        """Names of tokens that were joined along the last axis but one."""
        pieces, dim = args[0] if args else kwargs["tensors"], kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if dim % out.ndim != out.ndim - 2 or not any(self.of(piece) for piece in pieces):
            return ()
        names = tuple(name for piece in pieces for name in self.of(piece) or ("",) * piece.shape[-2])
        if len(names) not in self.joined or "pos" not in names[0]:  # tables of positions are joined, too
            self.joined[len(names)] = names
        return names

    def cut(self, x: Tensor, index: Any, out: Tensor) -> Names:
        """Names of tokens of which slices were taken."""
        items = [item for item in (index if isinstance(index, tuple) else (index,)) if item is not None]
        if Ellipsis in items:
            return ()
        names = self.of(x) if all(isinstance(item, slice) for item in items) else ()
        names = names[items[x.ndim - 2]] if names and len(items) > x.ndim - 2 else names
        return names if out.ndim > 1 and len(names) == out.shape[-2] else ()  # a new axis may be in the place of theirs
