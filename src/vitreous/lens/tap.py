"""See every attention of any `torch.nn.Module` while it happens, without a line for any one model.

A `torch.overrides.TorchFunctionMode` around one forward pass sees every call of a PyTorch function. Attention comes by two
routes: `scaled_dot_product_attention`, whose arguments say all, and a softmax written out, found by data flow
(`lens.softmax`). Nothing is kept: each attention is shown to a callback as a `Call` and forgotten.

What is shown was checked. Fused route: rows of the map are recomputed from the arguments, and A V must equal the call's own
output, relative to max |V|. Softmax route, where that holds by construction: entries of the scores are recomputed from the
recorded operands as well. What fails is refused with the reason, as is what cannot be seen: scripted modules, vmap, kernels
of other packages, tensors that no visible call made.
"""

from __future__ import annotations

import math
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from vitreous.errors import DataError, HostError, NotReached
from vitreous.layers.tokens import Stream
from vitreous.lens.call import Arrangement, Buffers, Call, ComputedMap, StoredMap, is_stochastic, output_error
from vitreous.lens.places import Layout, Shadows, channel, layout
from vitreous.lens.probe import undisturbed
from vitreous.lens.running import Leave, Running
from vitreous.lens.softmax import Flow, Use, tensors

TOLERANCE = 1e-4  # of the largest |V|, or |score|; half precision: four roundings
NAMESPACES = {"aten", "prim", "prims", "profiler", "torchvision"}  # operators that hide no attention
GETTERS = {"T", "mT", "H", "mH", "data", "real", "imag"}  # attributes that are tensors
# They give no tensor that needs following; most calls of a pass are of these.
QUIET = {
    "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "__len__", "__get__", "__set__",
    "item", "tolist", "storage_offset", "element_size", "nelement", "ndimension", "__bool__", "__int__", "__float__",
    "__index__", "__repr__", "__format__", "__hash__", "get_device", "data_ptr", "untyped_storage", "is_same_size", "numpy",
}  # fmt: skip
Key = tuple[str, int]  # name of a call or module, how-manieth
Placed = tuple[Tensor, Callable[[Tensor], Tensor]]  # a tensor of the model, and what gives the view of it that a call is about


@dataclass(frozen=True)
class Refusal:
    """Something in a pass that gave no map: where it was, and why."""

    name: str
    reason: str


@dataclass
class Seen:
    """A pass that was watched: the model's output, and what gave no map."""

    output: Any
    refused: list[Refusal]


@dataclass(frozen=True)
class Traced:
    """One call of a pass with one image: sizes of its leading axes, their factors (see `Arrangement`), kind and layout."""

    lead: tuple[int, ...]
    factors: tuple[tuple[tuple[int, str], ...], ...]
    kind: str = "token"
    layout: Layout | None = None


@dataclass
class Layouts:
    """Where the queries and keys of every call are, from a pass with one image.

    calls: by (call name, number). outputs: layouts of module outputs, by (module name, number).
    """

    calls: dict[Key, Traced] = field(default_factory=dict)
    outputs: dict[Key, Layout] = field(default_factory=dict)
    known: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary, repr=False)  # tensors of earlier passes

    def get(self, key: Key) -> Layout | None:
        """The layout of a call; None: unknown."""
        return self.calls[key].layout if key in self.calls else None


@dataclass
class Raw:
    """An attention as it was found: leading axes are the call's own.

    q, k: each an operand of the product and what brings a tensor with its axes to (..., N, K), (..., M, K); None: unknown.
    v, output: (..., M, Kv), (..., N, Kv).
    """

    route: str
    q: Placed | None
    k: Placed | None
    v: Tensor
    output: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    use: Use | None = None
    heads: int | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.output.shape[:-2])


def watch(
    model: nn.Module,
    images: Tensor,
    see: Callable[[Call], None],
    *,
    layouts: Layouts | None = None,
    leave: Leave | None = None,
) -> Seen:
    """One forward pass of images (B, C, h, w), pixels as the model takes them; `see` gets every attention.

    leave(name, number, output) is called at the end of every module's forward. layouts: from `trace`, for a caller with
    several batches of one size; None: traced here. The pass runs in eval mode, without gradients and, if compiled, eagerly;
    hooks, modes and random state are as before, also after an error.

    Raises HostError for a model that cannot be seen, or without attention; NotReached if no call arrived at all.
    """
    images = fitting(model, images)
    layouts = trace(model, images) if layouts is None else layouts
    capture = Capture(see, layouts, len(images))
    output = through(model, images, capture, layouts.known, leave)
    return Seen(output, capture.refused)


def trace(model: nn.Module, images: Tensor) -> Layouts:
    """A pass of the first image, in which the places of every call are found. Raises as `watch`."""
    images = fitting(model, images)[:1]
    tracer = Tracer(images)
    through(model, images, tracer, tracer.layouts.known, tracer.leave)
    return tracer.layouts


def fitting(model: nn.Module, images: Tensor) -> Tensor:
    """Images on the model's device and in its precision. Raises DataError, HostError."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        found = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise DataError(f"Found {found}. Expected at least one image, as (B, C, h, w). Add the batch axis: images[None].")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise HostError(
                f"{name or 'The model'} is a {type(module).__name__}, scripted or traced code that runs out of sight. Expected "
                "modules that run in Python. Give the model from before torch.jit."
            )
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    return images if like is None else images.to(like.device, like.dtype)


def through(model: nn.Module, images: Tensor, receiver: Receiver, known: WeakIdKeyDictionary, leave: Leave | None) -> Any:
    """One pass of images through the model, its attentions to the receiver. Raises if there was none."""
    if not known:
        known.update((tensor, None) for tensor in attributes(model))
    known.update((tensor, None) for tensor in (images, *model.parameters(), *model.buffers()))
    running = Running(model, leave)
    with torch._C._EnableTorchFunction(), undisturbed(model), eager(), running, Tap(running, receiver, known) as tap:
        output = model(images)
    if receiver.count:
        return output
    name = type(model).__name__
    if not tap.calls:
        raise NotReached(
            f"No call of {name} arrived. Expected its forward to run in this thread. Give the model without what hands it to "
            "other threads or processes (nn.DataParallel, a server)."
        )
    reasons = "; ".join(f"{refusal.name or name}: {refusal.reason}" for refusal in receiver.refused[:4])
    raise HostError(
        f"{name} showed no attention map" + (f" ({reasons})" if reasons else ", and no softmax") + ". Expected scaled dot "
        "product attention, or a product, a softmax and a product with V. Use a model with attention between tokens."
    )


def attributes(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules keep in plain attributes, lists and dicts, such as tables made in an earlier pass."""
    for module in model.modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                yield from tensors(value)


@contextmanager
def eager() -> Iterator[None]:
    """Compiled code runs as it was written, while the body runs; for the whole process, as torch.compiler has it."""
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Calculations of ours: unseen by taps, in the precision they say."""
    with torch._C.DisableTorchFunction(), torch.autocast(device.type, enabled=False):
        yield


class Tap(TorchFunctionMode):
    """The mode that sees the calls of one pass, in one thread."""

    def __init__(self, running: Running, receiver: Receiver, known: WeakIdKeyDictionary):
        super().__init__()
        self.running, self.receiver, self.known, self.flow = running, receiver, known, Flow()
        self.calls, self.heads = 0, None

    def __enter__(self) -> Tap:
        self.thread = threading.get_ident()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for softmax in self.flow.softmaxes:
            if not softmax.used:
                self.receiver.refuse(softmax.path, "a softmax was never contracted along its axis: its weights are no map")
        self.flow.clear()

    def __torch_function__(self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None):
        kwargs, name = kwargs or {}, plain(func)
        if name in QUIET or threading.get_ident() != self.thread:
            return func(*args, **kwargs)
        self.calls += 1
        if func is F.multi_head_attention_forward:
            return self.inside(func, args, kwargs)
        with torch._C.DisableTorchFunction():
            self.arriving(func, args, kwargs)
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            for tensor in tensors(out):
                self.known[tensor] = None
            self.receiver.follow(func, args, kwargs, out)
            if name == "scaled_dot_product_attention":
                found = fused(args, kwargs, out)
            else:
                found = self.flow.follow(name, self.running.path, func, args, kwargs, out)
            if isinstance(found, Use):
                found = Raw("softmax", *(found.operands() or (None, None)), found.v, found.output, use=found)
        if isinstance(found, Raw):
            found.heads = self.heads
            with aside(found.output.device):
                self.receiver.attention(self.running, found)
        elif found is not None:
            self.receiver.refuse(self.running.path, found)
        return out

    def inside(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the body of a function that would hide its calls, with this mode on.

        A copy of it under other globals, in which nothing overrides functions, runs its body and does not ask again.
        """
        names = {**func.__globals__, "has_torch_function": lambda *_: False}
        body = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        body.__kwdefaults__ = func.__kwdefaults__
        outer, self.heads = self.heads, kwargs.get("num_heads", args[4] if len(args) > 4 else None)
        try:
            with self.pushed():
                return body(*args, **kwargs)
        finally:
            self.heads = outer

    @contextmanager
    def pushed(self) -> Iterator[None]:
        """This mode on the stack again, from inside itself."""
        TorchFunctionMode.__enter__(self)
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def arriving(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Look at a call before it is made: kernels that hide what they do, and tensors that came from such."""
        if isinstance(func, (OpOverload, OpOverloadPacket)):
            operator = func._qualified_op_name if isinstance(func, OpOverloadPacket) else func.name()
            if operator.split("::")[0] not in NAMESPACES:
                self.receiver.refuse(self.running.path, f"the kernel {operator} does not show what it computes")
        elif isinstance(func, HigherOrderOperator):
            advice = "; use scaled dot product attention (set_attn_implementation('sdpa'))" if "flex" in func.name() else ""
            self.receiver.refuse(self.running.path, f"the operator {func.name()} does not show what it computes{advice}")
        for tensor in tensors((*args, *kwargs.values())):
            if tensor in self.known or not tensor.is_floating_point() or isinstance(tensor, nn.Parameter):
                continue
            if torch._C._functorch.is_batchedtensor(tensor):
                raise HostError(
                    f"{self.running.path or 'The model'} runs under torch.vmap, where tensors stand for many. Expected plain "
                    "ones. Give the model a batch in place of vmap over images."
                )
            if tensor.ndim and tensor.numel() > 1 and self.receiver.strict:
                raise HostError(
                    f"{self.running.path or 'The model'} works on a tensor {tuple(tensor.shape)} that no visible call made: it "
                    "came from scripted code, a kernel of another package, numpy or another thread. Expected PyTorch "
                    "functions in one thread. Switch that code off (timm.layers.set_scriptable, "
                    "attn_implementation='sdpa'), or keep such a constant as a buffer."
                )
            self.known[tensor] = None


def plain(func: Callable) -> str:
    """The name of a function without what tells its forms apart; that of an attribute for its getter."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        attribute = func.__self__.__name__
        return attribute if attribute in GETTERS else name
    return name.split(".")[0] if isinstance(func, OpOverload) else name


def fused(args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Raw | str:
    """A call of `scaled_dot_product_attention` as it was given, or why it has no map."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None} | dict(zip(names, args, strict=False))
    given |= kwargs
    q, k, v = given["query"], given["key"], given["value"]
    if q.is_nested:
        return "nested tensors have no map of one shape; give images of one size"
    if given["dropout_p"]:
        return f"dropout {given['dropout_p']} is on even in eval mode, so the map is random"
    lead = out.shape[:-2]

    def spread(x: Tensor, axes: int) -> Tensor:
        """x with `axes` axes (and more behind) -> the call's leading axes; fewer key heads serve several query heads."""
        if axes > 2 and lead and x.shape[axes - 3] not in (1, lead[-1]):
            x = x.repeat_interleave(lead[-1] // x.shape[axes - 3], dim=axes - 3)
        return x.expand(*lead, *x.shape[axes - 2 :])

    scale = 1 / math.sqrt(max(1, q.shape[-1])) if given["scale"] is None else given["scale"]
    return Raw(
        route="fused",
        q=(q, partial(spread, axes=q.ndim)),
        k=(k, partial(spread, axes=k.ndim)),
        v=spread(v, v.ndim),
        output=out,
        mask=given["attn_mask"],
        causal=given["is_causal"],
        scale=float(scale),
    )


class Receiver:
    """What becomes of the attentions of one pass. count: how many were taken; refused: what gave no map.

    strict: tensors that no visible call made are an error. In a first pass they are only remembered: what is there again
    in the second is a constant that the model's code keeps, and what is not was computed out of sight.
    """

    strict = False

    def __init__(self):
        self.count, self.refused = 0, []
        self.numbers: Counter[str] = Counter()

    def key(self, running: Running) -> Key:
        name = running.path
        self.numbers[name] += 1
        return name, self.numbers[name] - 1

    def refuse(self, name: str, reason: str) -> None:
        refusal = Refusal(name, reason)
        if refusal not in self.refused:
            self.refused.append(refusal)

    def follow(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Every call of the pass, after it was made."""

    def attention(self, running: Running, raw: Raw) -> None:
        raise NotImplementedError


class Tracer(Receiver):
    """Notes the shapes and places of every attention, and the places of module outputs, in a pass of one image."""

    def __init__(self, image: Tensor):
        super().__init__()
        self.layouts, self.shadows = Layouts(), Shadows(image)
        self.same: dict[bytes, Layout | None] = {}  # most modules leave tokens where they are
        self.tokens: dict[int, Layout] = {}  # the last layout of so many tokens

    def follow(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        self.shadows.follow(func, tuple(args), kwargs, out)

    def attention(self, running: Running, raw: Raw) -> None:
        self.count += 1
        product = raw.use is None or raw.use.product is not None
        kind = "token" if product else "pooling"
        sides = (raw.q, raw.k)
        if raw.q is None:  # the output is where its query is, V where the keys are
            sides = (raw.use.place_output, raw.use.place_v)
        query, key = (self.places(side, x.shape[-2]) for side, x in zip(sides, (raw.output, raw.v), strict=True))
        found = layout(query, key, self.shadows.size, self.shadows.reason(*(side[0] for side in sides)))
        if found is None or len(found.factors) != len(raw.lead):
            found, factors = None, guessed(raw.lead, raw.heads)
        else:
            factors = found.factors
        if raw.q is not None and channel(query, key):
            kind, found = "channel", None  # rows and columns of the map are channels, which are nowhere
        self.layouts.calls[self.key(running)] = Traced(raw.lead, factors, kind, found)

    def places(self, side: Placed, count: int) -> Tensor:
        """Places (..., count, K, 4) of a side, NaN if it has none; axes on which they do not differ have size 1 or stride 0."""
        places = self.shadows.of(side[0])
        return torch.full((count, 1, 4), math.nan) if places is None else side[1](narrowed(places))

    def leave(self, name: str, number: int, output: Any) -> None:
        """The layout of a module's output (1, N, D), (1, D, N), (1, h, w, D) or (1, D, h, w)."""
        if isinstance(output, Stream):  # for its original tokens, as in `Stream.tokens`
            count = output.x.shape[1] - output.state.inserted if output.state.source is None else output.state.source.shape[1]
            found = self.tokens.get(count)
        else:
            found = self.of_output(output) if isinstance(output, Tensor) and output.ndim in (3, 4) else None
            if found is not None:
                self.tokens[found.queries.shape[1]] = found
        if found is not None:
            self.layouts.outputs[name, number] = found

    def of_output(self, output: Tensor) -> Layout | None:
        places = self.shadows.of(output)
        if places is None or len(output) != 1:
            return None
        places = narrowed(places)
        varying = [axis for axis in range(1, output.ndim) if places.shape[axis] > 1]
        if len(varying) != output.ndim - 2 or varying[-1] - varying[0] != len(varying) - 1:
            return None
        constant = next(axis for axis in range(1, output.ndim) if axis not in varying)
        places = places.movedim(constant, -2).flatten(1, -3)  # (1, N, 1, 4)
        key = places.numpy().tobytes()
        if key not in self.same:
            self.same[key] = layout(places, None, self.shadows.size)
        return self.same[key]


def narrowed(places: Tensor) -> Tensor:
    """Places (..., 4) with size 1 in place of axes along which nothing differs."""
    for axis in range(places.ndim - 1):
        if places.stride(axis) == 0:
            places = places.narrow(axis, 0, 1)
    return places


class Capture(Receiver):
    """Brings every attention to one form, checks it, and shows it."""

    strict = True

    def __init__(self, see: Callable[[Call], None], layouts: Layouts, batch: int):
        super().__init__()
        self.see, self.layouts, self.batch, self.buffers = see, layouts, batch, Buffers()

    def attention(self, running: Running, raw: Raw) -> None:
        name, number = self.key(running)
        traced = self.layouts.calls.get((name, number))
        arrangement = arranged_batch(raw, traced, self.batch)
        if arrangement is None:
            shape, batch = tuple(raw.output.shape), self.batch
            self.refuse(name, f"no axis of its output {shape} is the batch of {batch}; look at one image at a time")
            return
        call = self.call(name, number, running, raw, traced, arrangement)
        tolerance = max(TOLERANCE, 4 * torch.finfo(raw.output.dtype).eps)
        if not call.error <= tolerance:
            self.refuse(name, f"its map is off by {call.error:.2g}, more than {tolerance:.2g} ({call.verified})")
            return
        self.count += 1
        try:
            self.see(call)
        finally:
            call.maps = None

    def call(
        self, name: str, number: int, running: Running, raw: Raw, traced: Traced | None, arrangement: Arrangement
    ) -> Call:
        v, output = arrangement.merge(raw.v), arrangement.merge(raw.output)
        q, k = (None if side is None else arrangement.merge(side[1](side[0])) for side in (raw.q, raw.k))
        use, state = raw.use, running.state
        if use is None:
            maps = ComputedMap(q, k, raw.mask, raw.causal, raw.scale, arrangement, self.buffers)
        else:
            maps = StoredMap(use.probabilities, use.effective, arrangement, self.buffers)
        layout = traced.layout if traced is not None else None
        if layout is not None and (layout.queries.shape[1], layout.keys.shape[1]) != (output.shape[3], v.shape[3]):
            layout = None  # another number of tokens than in the traced pass
        call = Call(
            name=name,
            number=number,
            route=raw.route,
            kind=traced.kind if traced is not None else "token",
            q=q,
            k=k,
            v=v,
            output=output,
            scale=raw.scale,
            layout=layout,
            source=state.source,
            inserted=state.inserted,
            mixed=use is not None and use.mixed,
            stochastic=True,
            error=0.0,
            verified="",
            note="" if use is None else use.note,
            maps=maps,
        )
        call.error, call.verified = output_error(call)
        if use is not None and use.product is not None:
            call.error, call.verified = max(call.error, use.product.error()), f"score entries and {call.verified}"
        call.stochastic = not call.mixed or is_stochastic(call)
        return call


def guessed(lead: Sequence[int], heads: int | None) -> tuple[tuple[tuple[int, str], ...], ...]:
    """Factors of leading axes of one image where places do not tell: the last axis is heads, others are windows.

    heads: how many there are, if the module said so; they are inside of windows in one axis with them.
    """
    if not lead:
        return ()
    last = ((lead[-1], "H"),)
    if heads and len(lead) == 1 and lead[0] % heads == 0:
        last = ((lead[0] // heads, "W"), (heads, "H"))
    return (*(((n, "W"),) for n in lead[:-1]), last)


def arranged_batch(raw: Raw, traced: Traced | None, batch: int) -> Arrangement | None:
    """The arrangement of a call in a pass with `batch` images: the axis that grew holds the batch, outermost."""
    lead = raw.lead
    if traced is None or len(traced.lead) != len(lead):
        if not lead or lead[0] % batch:
            return Arrangement(guessed(lead, raw.heads)) if batch == 1 else None
        inner = guessed((lead[0] // batch, *lead[1:]), raw.heads)
        return Arrangement((((batch, "B"), *inner[0]), *inner[1:]))
    grown = [i for i, (n, m) in enumerate(zip(lead, traced.lead, strict=True)) if n != m]
    if batch == 1:
        return Arrangement(guessed(lead, raw.heads) if grown else traced.factors)
    if len(grown) != 1 or lead[grown[0]] != batch * traced.lead[grown[0]]:
        return None
    factors = list(traced.factors)
    factors[grown[0]] = ((batch, "B"), *factors[grown[0]])
    return Arrangement(tuple(factors))


__all__ = ["Call", "Layout", "Layouts", "Refusal", "Seen", "Traced", "trace", "watch"]
