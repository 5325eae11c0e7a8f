"""`watch`, `trace`: intercept every attention of any `torch.nn.Module` in a forward pass.

A `torch.overrides.TorchFunctionMode` around one forward pass intercepts every call of a PyTorch
function, without code for any one model. Attention is found by two routes:
`scaled_dot_product_attention`, whose arguments define the map, and a softmax written out, found by
data flow (`softmax.DataFlow`). Nothing is kept: each attention is given to a callback as an
`AttentionCall` and released.

Every map is checked before. Fused route: rows of the map are recomputed from the arguments, and A V
must equal the call's own output, relative to max |V|. Softmax route, where that holds by
construction: entries of the scores are recomputed from the recorded operands as well. What fails is
refused with the reason, and so is what cannot be intercepted: scripted modules, vmap, kernels of
other packages, tensors that no intercepted call made.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitreous.base.errors import DataError, HostError, NotReached
from vitreous.hosts.stream_ends import Opening
from vitreous.lens.coordinates.field import tensors
from vitreous.lens.preserve_state import preserve_state
from vitreous.lens.tap.attention_call import AttentionCall
from vitreous.lens.tap.attention_op import NOT_FINITE, AttentionOp, Receiver, Refusal, fused_attention
from vitreous.lens.tap.capture import Capture
from vitreous.lens.tap.dataflow import WeightedSum
from vitreous.lens.tap.module_stack import ModuleStack, OnOutput
from vitreous.lens.tap.softmax import STARTS, DataFlow
from vitreous.lens.tap.tensor_set import TensorSet
from vitreous.lens.tap.tracer import Layouts, Tracer

NAMESPACES = {"aten", "prim", "prims", "profiler", "torchvision"}  # operators that hide no attention
# Nearly every call of a pass is of one of these; a test of types is cheap.
ORDINARY_CALLS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)
GETTERS = {"T", "mT", "H", "mH", "data", "real", "imag"}  # attributes that are tensors
# Calls without a tensor to follow; most calls of a pass are of these.
WITHOUT_TENSORS = {
    "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "__len__", "__get__", "__set__",
    "item", "tolist", "storage_offset", "element_size", "nelement", "ndimension", "__bool__", "__int__", "__float__",
    "__index__", "__repr__", "__format__", "__hash__", "get_device", "data_ptr", "untyped_storage", "is_same_size", "numpy",
}  # fmt: skip
READS = {"item", "tolist", "numpy", "__int__", "__index__"}  # those that hand values to Python code


@dataclass
class PassResult:
    """The result of `watch`: the model's output, and what gave no map."""

    output: Any
    refused: list[Refusal]


def watch(
    model: nn.Module,
    images: Tensor,
    on_attention: Callable[[AttentionCall], None],
    *,
    layouts: Layouts | None = None,
    on_output: OnOutput | None = None,
    outputs: Container[str] | None = None,
    gradients: bool = False,
    required: bool = True,
) -> PassResult:
    """One forward pass of images (B, C, h, w); every attention goes to `on_attention`.

    images: pixels as the model takes them, normalised.
    layouts: from `trace`, for a caller with several batches of one size; None: traced here.
    on_output(name, call_index, output): called at the end of every module's forward, or of those
        named in `outputs`.
    gradients: build the graph of the pass, from the images on; `AttentionCall.graph_output` is a
        part of it, and so is the output. Callbacks run without.
    required: whether a model without attention is an error.
    The pass runs in eval mode, without gradients unless asked for and, if compiled, eagerly; hooks,
    modes and random state are as before, also after an error.

    Raises HostError for a model that cannot be intercepted, or without attention; NotReached if no
    call arrived at all; DataError for images of another form.
    """
    modules = dict(model.named_modules())
    images = prepare_images(modules, images)
    layouts = trace(model, images, required) if layouts is None else layouts
    # where the batch stands among the axes is seen once, by an image that was traced alone
    comparable = layouts.image is not None and is_first(layouts.image, images)
    if len(images) > 1 and layouts.image is not None and not comparable:
        vars(layouts).update(vars(trace(model, images, required)))
        comparable = True
    capture = Capture(on_attention, layouts, images, comparable)
    output = run_pass(modules, images, capture, layouts.earlier_tensors, on_output, outputs, gradients, required)
    if len(images) > 1:
        layouts.image = None
    return PassResult(output, capture.refused)


def is_first(image: Tensor, images: Tensor) -> bool:
    """True if an image (1, C, h, w) is the first of some."""
    # a tap around this one follows no tensors of ours
    with torch._C.DisableTorchFunction():
        return torch.equal(image, images[:1])


def trace(model: nn.Module, images: Tensor, required: bool = True) -> Layouts:
    """Layouts of every call, from a pass of the first image. Raises as `watch`."""
    modules = dict(model.named_modules())
    images = prepare_images(modules, images)[:1]
    tracer = Tracer(images, dict(model.named_parameters()))
    run_pass(modules, images, tracer, tracer.layouts.earlier_tensors, tracer.on_output, required=required)
    return tracer.layouts


def prepare_images(modules: dict[str, nn.Module], images: Tensor) -> Tensor:
    """Images on the model's device and in its precision. Raises DataError, HostError."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        description = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise DataError(f"Found {description}. Expected at least one image, as (B, C, h, w). Add the batch axis: images[None].")
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise HostError(
                f"{name or 'The model'} is a {type(module).__name__}, scripted or traced code that runs out of sight. Expected "
                "modules that run in Python. Give the model from before torch.jit."
            )
    # the first floating parameter decides; a model without any takes images as they are
    like = next((p for p in registered_tensors(modules, "_parameters") if p.is_floating_point()), None)
    return images if like is None else images.to(like.device, like.dtype)


def registered_tensors(modules: dict[str, nn.Module], registry: str) -> Iterator[Tensor]:
    """All tensors of the modules in "_parameters" or "_buffers".

    The model's own methods walk the tree of modules once for each.
    """
    return (x for module in modules.values() for x in getattr(module, registry).values() if x is not None)


def run_pass(
    modules: dict[str, nn.Module],
    images: Tensor,
    receiver: Receiver,
    visible: TensorSet,
    on_output: OnOutput | None,
    outputs: Container[str] | None = None,
    gradients: bool = False,
    required: bool = True,
) -> Any:
    """One pass of images through the model, modules[""]; its attentions go to the receiver.

    gradients: with the graph of the pass, whose leaf are the images. required: whether it is an
    error that there was no attention.
    Returns the model's output. Raises HostError or NotReached if there was no attention.
    """
    model = modules[""]
    images = images.detach().requires_grad_() if gradients else images
    # tensors in attributes are looked for once, since that walks all attributes of all modules
    if not visible:
        visible.add(attribute_tensors(model))
    visible.add((images, *registered_tensors(modules, "_parameters"), *registered_tensors(modules, "_buffers")))
    stack = ModuleStack(modules, on_output, outputs)
    with (
        torch._C._EnableTorchFunction(),  # a caller inside DisableTorchFunction would otherwise hide the whole pass
        preserve_state(model),
        torch.set_grad_enabled(gradients),
        force_eager(),
        stack,
        Tap(stack, receiver, visible) as tap,
    ):
        output = model(images)
    # `layouts` outlive the pass, and may not grow with every batch
    visible.tidy()
    if receiver.count or (tap.calls and not required):
        return output
    name = type(model).__name__
    if not tap.calls:
        raise NotReached(
            f"No call of {name} arrived. Expected its forward to run in this thread. Give the model without what hands it to "
            "other threads or processes (nn.DataParallel, a server)."
        )
    reasons = "; ".join(f"{refusal.name or name}: {refusal.reason}" for refusal in receiver.refused[:4])
    if any(refusal.reason == NOT_FINITE for refusal in receiver.refused):
        raise HostError(
            f"{name} showed no attention map ({reasons}). Expected numbers, not NaN or infinity. Look at the model with whole "
            "weights, at finite images, and in float32 if half precision overflows."
        )
    raise HostError(
        f"{name} showed no attention map" + (f" ({reasons})" if reasons else ", and no softmax") + ". Expected scaled dot "
        "product attention, or a product, a softmax and a product with V. Use a model with attention between tokens, or name "
        "the modules that mix places, for mixing maps: --modules 'blocks.*' (probes=['all', 'mixing:modules=blocks.*'])."
    )


def attribute_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules keep in plain attributes, lists and dicts.

    Such as tables of positions made in an earlier pass.
    """
    for module in model.modules():
        for key, value in vars(module).items():
            # these are listed by `registered_tensors`
            if key not in ("_parameters", "_buffers", "_modules"):
                yield from tensors(value)


def force_eager() -> AbstractContextManager[Any]:
    """A context in which compiled code runs uncompiled.

    For the whole process, as torch.compiler has it.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class Tap(TorchFunctionMode):
    """The function mode of a pass: runs every call, and finds the attentions among them.

    calls: how many arrived. heads: number of heads that the module now running passed to
    `multi_head_attention_forward`; None outside of it.
    """

    def __init__(self, stack: ModuleStack, receiver: Receiver, visible: TensorSet):
        super().__init__()
        self.stack, self.receiver, self.visible, self.flow = stack, receiver, visible, DataFlow()
        self.calls, self.heads = 0, None

    def __enter__(self) -> Tap:
        # `__torch_function__` lets the calls of other threads pass
        self.thread = threading.get_ident()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Leave the mode, and refuse softmaxes that were never contracted."""
        super().__exit__(*error)
        for record in self.flow.softmaxes:
            # it may have been a gate, or attention in a form that is not known: say so, lest it be
            # missed
            if not record.used:
                self.receiver.refuse(record.path, "a softmax was never contracted along its axis: its weights are no map")
        self.flow.clear()

    def __torch_function__(self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None):
        """Run a call, follow its tensors, and hand on an attention that it completes."""
        kwargs, name = {} if kwargs is None else kwargs, function_name(func)
        # other threads work on other images
        if name in WITHOUT_TENSORS or threading.get_ident() != self.thread:
            if name in READS and threading.get_ident() == self.thread:
                self.receiver.read(name, args[0])
            return func(*args, **kwargs)
        if Opening in types:  # no tensor: what is done with the tokens inside is seen, as the host's own code does it
            with self.reenter():
                return Opening.__torch_function__(func, types, args, kwargs)
        self.calls += 1
        if func is F.multi_head_attention_forward:
            return self.run_body(func, args, kwargs)
        with torch._C.DisableTorchFunction():
            inputs = tensors((*args, *kwargs.values()))
            # before the call, as it may work in place
            self.check_inputs(func, inputs)
        out = func(*args, **kwargs)
        # what is followed is no part of the graph of a pass with gradients
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self.visible.add(tensors(out))
            self.receiver.follow(func, args, kwargs, out)
            if name == "scaled_dot_product_attention":
                result = fused_attention(args, kwargs, out)
            else:
                # most calls of a pass begin no attention, and while no tensor has a role none can
                # go on
                follow = name in STARTS or self.flow.roles
                result = self.flow.follow(name, self.stack, func, args, kwargs, inputs, out) if follow else None
            if isinstance(result, WeightedSum):
                q, k = result.operands() or (None, None)
                result = AttentionOp("softmax", q, k, result.v, result.output, result.output_view, weighted_sum=result)
        if isinstance(result, AttentionOp):
            result.heads = self.heads
            # checks are not intercepted, and run in float32 under the autocast of any caller
            quiet = torch.autocast(result.output.device.type, enabled=False)
            with torch._C.DisableTorchFunction(), torch.no_grad(), quiet:
                self.receiver.attention(self.stack, result)
        elif result is not None:
            self.receiver.refuse(self.stack.path, result)
        return out

    def run_body(self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the body of a function that would hide its calls, with this mode on.

        `multi_head_attention_forward` hands itself to the mode as a whole. A copy of it under other
        globals, in which nothing overrides functions, runs its body and does not ask again.
        """
        names = {**func.__globals__, "has_torch_function": lambda *_: False}
        body = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        body.__kwdefaults__ = func.__kwdefaults__
        # heads are not in the shapes inside: they are merged with the batch into one axis
        outer, self.heads = self.heads, kwargs.get("num_heads", args[4] if len(args) > 4 else None)
        try:
            with self.reenter():
                return body(*args, **kwargs)
        finally:
            self.heads = outer

    @contextmanager
    def reenter(self) -> Iterator[None]:
        """This mode on the stack again, from inside itself."""
        TorchFunctionMode.__enter__(self)
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def check_inputs(self, func: Callable, inputs: Sequence[Tensor]) -> None:
        """Check a call before it is made: opaque kernels, and tensors that came from such.

        inputs: the tensors among its arguments.
        """
        if isinstance(func, ORDINARY_CALLS):
            pass
        elif isinstance(func, (OpOverload, OpOverloadPacket)):
            operator = func._qualified_op_name if isinstance(func, OpOverloadPacket) else func.name()
            # a custom operator may contain an attention that nothing shows
            if operator.split("::")[0] not in NAMESPACES:
                self.receiver.refuse(self.stack.path, f"the kernel {operator} does not show what it computes")
        elif isinstance(func, HigherOrderOperator):
            advice = "; use scaled dot product attention (set_attn_implementation('sdpa'))" if "flex" in func.name() else ""
            self.receiver.refuse(self.stack.path, f"the operator {func.name()} does not show what it computes{advice}")
        for tensor in inputs:
            if tensor in self.visible or not tensor.is_floating_point() or isinstance(tensor, nn.Parameter):
                continue
            # under vmap a tensor hides the axis of images
            if torch._C._functorch.is_batchedtensor(tensor):
                raise HostError(
                    f"{self.stack.path or 'The model'} runs under torch.vmap, where tensors stand for many. Expected plain "
                    "ones. Give the model a batch in place of vmap over images."
                )
            # scalars and single numbers carry no map; the tracing pass only records (see
            # `Receiver`)
            if tensor.ndim and tensor.numel() > 1 and self.receiver.strict:
                raise HostError(
                    f"{self.stack.path or 'The model'} works on a tensor {tuple(tensor.shape)} that no visible call made: it "
                    "came from scripted code, a kernel of another package, numpy or another thread. Expected PyTorch "
                    "functions in one thread. Switch that code off (timm.layers.set_scriptable, "
                    "attn_implementation='sdpa'), or keep such a constant as a buffer."
                )
            self.visible.add([tensor])


def function_name(func: Callable) -> str:
    """The name of a function without its overload; that of an attribute for its getter.

    "softmax" for `torch.ops.aten.softmax.int`, "mT" for the getter of `Tensor.mT`.
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":
        attribute = func.__self__.__name__
        return attribute if attribute in GETTERS else name
    return name.split(".")[0] if isinstance(func, OpOverload) else name
