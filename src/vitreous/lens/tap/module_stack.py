"""`ModuleStack`: the module that runs now, and the state of its tokens, by hooks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitreous.hosts.block import Block
from vitreous.hosts.stream_ends import Opening, StreamEnd
from vitreous.layers.stream import PLAIN, Stream, TokenState

OnOutput = Callable[[str, int, Any], None]


class ModuleStack:
    """A context in which `path` is the dotted path of the innermost running module.

    modules: all modules of a model, by name.
    on_output(name, call_index, output): called after the module's own hooks; call_index: 0 for its
        first call in this pass, 1 for the second.
    outputs: names of the modules that `on_output` is called for; None: all. Leaves of PyTorch
        itself that are not among them get no hooks, since most modules are such; what runs in them
        counts as their parent's.
    state: the newest `TokenState` of our own token grafts.
    Hooks act in the thread that entered and in no other.
    """

    def __init__(self, modules: dict[str, nn.Module], on_output: OnOutput | None = None, outputs: Container[str] | None = None):
        self.modules, self.on_output, self.state = modules, on_output, PLAIN
        self.outputs = () if on_output is None else outputs
        self.stack: list[tuple[str, int, nn.Module]] = []  # name, number, module
        self.counts: Counter[nn.Module] = Counter()
        self.handles: list[Any] = []

    def __enter__(self) -> ModuleStack:
        self.thread = threading.get_ident()
        try:
            for name, module in self.modules.items():
                # torch.compile wraps a module in one of the same path, whose child is "_orig_mod"
                if "_orig_mod" in module._modules:
                    continue
                if "_orig_mod" in name:
                    name = ".".join(part for part in name.split(".") if part != "_orig_mod")
                if is_leaf(module) and self.outputs is not None and name not in self.outputs:
                    continue
                enter, exit = partial(self.enter, name), partial(self.exit, name)
                self.handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
                self.handles.append(module.register_forward_hook(exit, always_call=True))
        except BaseException:
            # some hooks are registered already, and `with` calls __exit__ only after __enter__ has
            # returned
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
        """Dotted path of the innermost running module.

        PyTorch's own leaves, and any module of class Softmax, count as their parents.
        """
        own = (name for name, _, module in reversed(self.stack) if type(module).__name__ != "Softmax" and not is_leaf(module))
        return next(own, "")

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-hook: push the module, and take the token state from its arguments."""
        if threading.get_ident() != self.thread:
            return
        # the call index counts calls of the module object, which may stand under several names
        self.stack.append((name, self.counts[module], module))
        self.counts[module] += 1
        if isinstance(module, Block) and args and isinstance(args[0], Tensor):
            self.state = PLAIN  # a block that takes a plain tensor starts a new stream, or comes before one
        self.state = newest_state((*args, *kwargs.values()), self.state)

    def exit(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook after a forward, which runs also when that raised: then without output."""
        if threading.get_ident() != self.thread:
            return
        call_index = 0
        # an exception skips the hooks of inner modules, whose entries are then still on the stack
        while self.stack:
            _, call_index, popped = self.stack.pop()
            if popped is module:
                break
        self.state = PLAIN if isinstance(module, StreamEnd) else newest_state((output,), self.state)
        if self.on_output is not None and output is not None and (self.outputs is None or name in self.outputs):
            # our own calls must not be intercepted by the tap
            with torch._C.DisableTorchFunction():
                self.on_output(name, call_index, output)


def is_leaf(module: nn.Module) -> bool:
    """True for PyTorch's own modules without children: none of them is an attention."""
    return not module._modules and type(module).__module__.startswith("torch.nn.modules.")


def newest_state(values: Iterable[Any], state: TokenState) -> TokenState:
    """The last state among values, alone, in a stream or a tuple; else `state`."""
    for value in values:
        if isinstance(value, (Stream, Opening)):
            state = value.state
        elif isinstance(value, TokenState):
            state = value
        elif isinstance(value, tuple):
            state = newest_state(value, state)
    return state
