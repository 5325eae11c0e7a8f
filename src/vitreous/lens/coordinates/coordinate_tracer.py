"""`CoordinateTracer`: where in the image every tensor of a pass is; the table of rules.

Coordinates of the pixels start at the input image, and every call moves them by a rule of
`view_rules` or `mixing_rules`, looked up by the function's name in `RULES`. `layout.layout` turns
the coordinates of an attention's queries and keys into a grid: patches, windows, prefix tokens and
padding, pooled keys.

Parameters (class token, latent queries, position tables) have no place, which is NaN. Calls without
a rule lose the coordinates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vitreous.lens.coordinates import mixing_rules, view_rules
from vitreous.lens.coordinates.field import CoordinateField, Parts, TensorOp, equal_parts, tensors, thin, variance

_NAMES = {
    view_rules.keep: """
        softmax log_softmax softmin special_softmax special_log_softmax safe_softmax gumbel_softmax
        layer_norm native_layer_norm group_norm batch_norm instance_norm rms_norm fused_rms_norm local_response_norm normalize
        dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout native_dropout
        relu relu6 gelu silu sigmoid tanh hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink leaky_relu rrelu
        elu selu celu mish softplus softsign logsigmoid threshold prelu exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square
        abs neg negative positive sin cos tan atan erf erfc erfinv reciprocal ceil floor round trunc frac clamp clip clamp_min
        clamp_max nan_to_num masked_fill index_fill cumsum cumprod logcumsumexp tril triu logit i0 sinc renorm
        to type type_as float double half bfloat16 cuda cpu contiguous clone detach requires_grad data alias to_copy pin_memory
        conj resolve_conj real imag angle expand expand_as broadcast_to""",
    view_rules.view: """
        permute transpose swapaxes swapdims movedim moveaxis t T mT H mH adjoint narrow select slice unbind split
        split_with_sizes unsafe_split chunk unsafe_chunk tensor_split hsplit vsplit dsplit diagonal masked_select take rot90
        pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle""",
    view_rules.fold: """reshape view view_as reshape_as flatten unflatten ravel squeeze unsqueeze unsafe_view atleast_2d
        atleast_3d""",
    view_rules.roll: "roll flip fliplr flipud",
    view_rules.repeat: "repeat tile repeat_interleave",
    view_rules.pick: "getitem",
    view_rules.gather: "gather take_along_dim",
    view_rules.select: "index_select",
    view_rules.sort: "topk sort",
    view_rules.join: "cat concat concatenate stack hstack vstack",
    view_rules.glu: "glu",
    view_rules.complex_view: "view_as_complex view_as_real",
    view_rules.pad: "pad constant_pad_nd",
    view_rules.patches: "unfold",
    view_rules.write: """
        setitem scatter index_copy index_put masked_scatter slice_scatter select_scatter diagonal_scatter""",
    view_rules.copy: "copy",
    mixing_rules.combine: """
        add sub subtract mul multiply div divide true_divide truediv rsub radd rmul rdiv rtruediv iadd isub imul itruediv
        addcmul addcdiv lerp where maximum minimum fmax fmin pow rpow float_power atan2 fmod remainder rmod xlogy hypot
        logaddexp""",
    mixing_rules.extreme: "max min",
    mixing_rules.reduce: "mean nanmean sum nansum amax amin prod logsumexp norm vector_norm std var median mode",
    mixing_rules.convolve: "conv1d conv2d conv3d",
    mixing_rules.transpose_convolve: "conv_transpose1d conv_transpose2d conv_transpose3d",
    mixing_rules.pool: "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d lp_pool1d lp_pool2d lp_pool3d",
    mixing_rules.adapt: """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d""",
    mixing_rules.resize: "interpolate upsample",
    mixing_rules.sample: "grid_sample",
    mixing_rules.fold: "fold",
    mixing_rules.linear: "linear",
    mixing_rules.multiply: "matmul rmatmul mm bmm mv baddbmm addmm addmv einsum",
    mixing_rules.attend: "scaled_dot_product_attention",
    mixing_rules.merge: "scatter_add scatter_reduce index_add index_reduce",
}
_UNRELATED = {  # their values have nothing to do with those of the argument
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones",
    "new_empty", "new_full", "new_tensor", "bernoulli", "zero", "fill", "normal", "uniform", "random", "sign", "heaviside",
    "grad", "base",
}  # fmt: skip
# calls whose results another run would change
_RANDOM = {
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like", "randint_like",
    "uniform", "random", "exponential", "log_normal", "cauchy", "geometric",
}  # fmt: skip
# calls that make a tensor of what Python holds
_FROM_PYTHON = {"tensor", "as_tensor", "asarray", "from_numpy"}
# rules that move values by an index tensor, which may depend on the image
_INDEXED = {view_rules.pick, view_rules.gather, view_rules.select, view_rules.sort, view_rules.write, mixing_rules.merge}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}


def plain_name(func: Any) -> str:
    """Name of a torch function, method, property or operator, less its underscores.

    "add" for `Tensor.__iadd__`'s operator `add_`, "mT" for the getter of `Tensor.mT`.
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = func.__self__.__name__
    return name.split(".")[0].strip("_")


class CoordinateTracer:
    """Coordinates of the tensors of one forward pass of one image.

    Tables are weak, so that no tensor lives longer than in the model.
    """

    def __init__(self, image: Tensor):
        """image: the input (1, C, h, w). The centre of its first pixel is at (0.5, 0.5)."""
        self.size = (image.shape[-2], image.shape[-1])
        self.fields: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.lost_by: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> name of the call that lost its coordinates
        self.varying: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensors that another image, or chance, would change
        self.read_by = ""  # name of the call by which values of the image came to Python
        # tensor -> name of the call that took tokens by such an index
        self.chosen_by: WeakIdKeyDictionary = WeakIdKeyDictionary()
        # float64: second moments of pixel coordinates lose the variance in float32
        y = (torch.arange(self.size[0], dtype=torch.float64, device="cpu") + 0.5)[:, None]
        x = (torch.arange(self.size[1], dtype=torch.float64, device="cpu") + 0.5)[None]
        parts = (y, x, y.square() + x.square(), torch.ones((), dtype=torch.float64, device="cpu"))
        # stride 0 along batch and channels: a field costs h + w numbers here
        self.fields[image] = CoordinateField((tuple(part.expand(image.shape) for part in parts),))

    def follow(self, func: Any, args: tuple, kwargs: dict[str, Any] | None, out: Any) -> None:
        """Give the outputs of a call their coordinates.

        To be called after it, with torch functions switched off.
        """
        name, kwargs = plain_name(func), kwargs or {}
        inputs = tensors((*args, *kwargs.values()))
        # `x[i] = y` returns nothing, and changes its first argument
        results = [args[0]] if name == "setitem" else tensors(out)
        outputs = [tensor for tensor in results if tensor.is_floating_point() or tensor.is_complex()]
        has_place = any(tensor in self.fields for tensor in inputs)
        varying = has_place or name in _RANDOM or (self.read_by and name in _FROM_PYTHON)
        varying = varying or any(tensor in self.varying or tensor in self.lost_by for tensor in inputs)
        # also integers: an index computed from the image makes its choice depend on the image
        if varying and name not in _UNRELATED:
            for tensor in results:
                self.varying[tensor] = None
        if not outputs:
            return
        chosen_by = next((self.chosen_by[tensor] for tensor in inputs if tensor in self.chosen_by), None)
        rule = RULES.get(name)
        # tokens chosen by values of this image: other images have other coordinates
        if rule in _INDEXED and any(tensor in self.varying for tensor in inputs if not tensor.is_floating_point()):
            chosen_by = name
        elif rule is view_rules.pick and self.read_by and view_rules.has_list(args[1]):
            chosen_by = self.read_by
        op = TensorOp(name, func, args, kwargs, args[0] if name == "setitem" else out, self.field)
        fields = self._apply_rule(rule, op) if has_place and rule else None
        reason = next((self.lost_by[tensor] for tensor in inputs if tensor in self.lost_by), None)
        if has_place:
            # the newest loss is named, not the first of the chain
            reason = None if name in _UNRELATED else name
        # a residual sum with the places of the stream does not depend on what attention chose
        inherited = chosen_by is not None and chosen_by not in (name, self.read_by)
        steady = [
            self.fields[tensor] for tensor in inputs if inherited and tensor in self.fields and tensor not in self.chosen_by
        ]
        for tensor, field in zip(outputs, fields or [None] * len(outputs), strict=False):
            self._set(tensor, field)
            if field is None and fields is None and reason is not None:
                self.lost_by[tensor] = reason
            if field is not None and chosen_by is not None and not any(same_places(field, other) for other in steady):
                self.chosen_by[tensor] = chosen_by

    def read(self, name: str, tensor: Tensor) -> None:
        """Note that Python code read a tensor.

        Whole numbers that the image decides may be indices, by which it chooses tokens later.
        """
        if tensor in self.varying and (name == "numpy" or not (tensor.is_floating_point() or tensor.dtype == torch.bool)):
            self.read_by = name

    def _set(self, tensor: Tensor, field: CoordinateField | None) -> None:
        """Store or remove the field of a tensor; fields of another shape are not stored."""
        self.lost_by.pop(tensor, None)
        if field is None:
            self.fields.pop(tensor, None)
        # a wrong shape would be a wrong rule: rather no coordinates than wrong ones
        elif tuple(field.sets[0][0].shape) == tuple(tensor.shape):
            self.fields[tensor] = field

    @staticmethod
    def _apply_rule(rule: Any, op: TensorOp) -> list[CoordinateField | None] | None:
        """Fields of the outputs, or None where the rule does not fit the call."""
        try:
            result = rule(op)
        # a call in a form that its rule does not expect loses coordinates, it does not end the pass
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
            return None
        return result if isinstance(result, list) else None if result is None else [result]

    def field(self, value: Any) -> CoordinateField | None:
        """The field of a tensor; None: no field, or no tensor."""
        return self.fields.get(value) if isinstance(value, Tensor) else None

    def of(self, tensor: Tensor) -> Tensor | None:
        """Coordinates of a tensor: (*tensor.shape, 4) float64, or None if it has no place at all.

        The last axis holds y, x in pixels, the variance of the pixels that an entry stands for, and
        how many tokens were merged into it; NaN: no place. Along axes on which they are constant
        the stride is 0.
        """
        field = self.field(tensor)
        return None if field is None else _stacked(field.sets[0], tuple(tensor.shape))

    def reason(self, *tensors: Tensor) -> str:
        """Why these tensors have no common coordinates, in words; "" if there is no reason.

        Which call lost them, or chose among them.
        """
        lost_by = next((self.lost_by[tensor] for tensor in tensors if tensor in self.lost_by), None)
        if lost_by is not None:
            return f"{lost_by} lost the places"
        return self.choice(*tensors)

    def choice(self, *tensors: Tensor) -> str:
        """Which call chose among the tokens of these tensors, in words; "" if none did."""
        chosen_by = next((self.chosen_by[tensor] for tensor in tensors if tensor in self.chosen_by), None)
        return "" if chosen_by is None else f"{chosen_by} chose tokens by their values or by chance"


def same_places(field: CoordinateField, other: CoordinateField) -> bool:
    """True if elements of two tensors have the same places, as far as they differ at all."""
    return all(equal_parts(thin(p), thin(q)) for p, q in zip(field.sets[0][:2], other.sets[0][:2], strict=True))


def _stacked(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """y, x, variance and mass of the parts as one tensor (*shape, 4), expanded."""
    y, x, moment, mass = (thin(part) for part in parts)
    # from the second moment, which mixing rules average like y and x
    width = variance((y, x, moment, mass))
    return torch.stack(torch.broadcast_tensors(y, x, width, mass), dim=-1).expand(*shape, 4)
