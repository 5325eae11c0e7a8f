"""Which module of a model runs now, and what became of its tokens, told by temporary hooks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitreous.layers.block import Block, Close
from vitreous.layers.tokens import PLAIN, Stream, TokenState

Leave = Callable[[str, int, Any], None]


class Running:
    """A context in which `path` is the dotted path of the innermost running module; `leave` is called at each end.

    leave(name, number, output): after a module's own hooks; number: how-manieth call of that module in this pass.
    state: the newest `TokenState` of our own token grafts. Hooks see the thread that entered and no other.
    """

    def __init__(self, model: nn.Module, leave: Leave | None = None):
        self.model, self.leave, self.state = model, leave, PLAIN
        self.stack: list[tuple[str, int, nn.Module]] = []  # name, number, module
        self.counts: Counter[nn.Module] = Counter()
        self.handles: list[Any] = []

    def __enter__(self) -> Running:
        self.thread = threading.get_ident()
        try:
            for name, module in self.model.named_modules():
                if "_orig_mod" in module._modules:  # what torch.compile puts around a module has no place of its own
                    continue
                name = ".".join(part for part in name.split(".") if part != "_orig_mod")
                enter, end = partial(self.enter, name), partial(self.end, name)
                self.handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
                self.handles.append(module.register_forward_hook(end, always_call=True))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.stack.clear()

    @property
    def path(self) -> str:
        """Dotted path of the innermost running module; one of class Softmax counts as its parent."""
        named = [name for name, _, module in self.stack if type(module).__name__ != "Softmax"]
        return named[-1] if named else ""

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self.thread:
            return
        self.stack.append((name, self.counts[module], module))
        self.counts[module] += 1
        if isinstance(module, Block) and args and isinstance(args[0], Tensor):
            self.state = PLAIN  # a stream of tokens begins here, or has not begun
        self.state = newest((*args, *kwargs.values()), self.state)

    def end(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook after a module's forward, which runs also when that raised: then without output."""
        if threading.get_ident() != self.thread:
            return
        number = 0
        while self.stack:  # modules that an exception left are still on it
            _, number, popped = self.stack.pop()
            if popped is module:
                break
        self.state = PLAIN if isinstance(module, Close) else newest((output,), self.state)
        if self.leave is not None and output is not None:
            with torch._C.DisableTorchFunction():
                self.leave(name, number, output)


def newest(values: Iterable[Any], state: TokenState) -> TokenState:
    """The last state among values, alone, in a stream or in a tuple; `state` if there is none."""
    for value in values:
        if isinstance(value, Stream):
            state = value.state
        elif isinstance(value, TokenState):
            state = value
        elif isinstance(value, tuple):
            state = newest(value, state)
    return state
