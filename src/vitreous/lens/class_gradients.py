"""A pass with gradients: what each attention of a model adds to the logit of a class.

Of an attention A with values V and output O = A V, the gradient of a logit S is
dS/dA = (dS/dO) V^T. So the gradient of the output is enough: no attention has to be written out,
fused kernels stay as they are, and A itself is the verified map of the tap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from vitreous.base.errors import HostError, SettingError
from vitreous.hosts.mixer import mixers_in
from vitreous.lens.faithfulness import answer, has_classes
from vitreous.lens.probe import BatchInfo, Probe
from vitreous.lens.tap import watch
from vitreous.lens.tap.attention_call import AttentionCall, Map
from vitreous.lens.token_coordinates import Locator, TokenCoordinates
from vitreous.models.classes import class_index, class_names


class ContributionMap(Map):
    """(A * dS/dA)+ in place of the map A of a call; groups and size are those of A."""

    def __init__(self, call: AttentionCall, gradient: Tensor):
        """gradient: dS/dO, (B, W, H, N, Kv)."""
        self.groups, self.size, self.maps = call.maps.groups, call.maps.size, call.maps
        self.gradient, self.v = gradient.float(), call.v.float()

    def block(self, rows: slice, effective: bool = False, fresh: bool = False) -> Tensor:
        """Rows of the product; A is always what multiplied V."""
        attention = self.maps.block(rows, effective=True)
        return (self.gradient[..., rows, :] @ self.v.mT).mul_(attention).clamp_(min=0)


@dataclass(frozen=True, kw_only=True)
class ClassProbe(Probe):
    """A probe of what speaks for a class, by a pass of its own with gradients.

    target: name or number of a class; "": the one that is predicted.
    """

    passes: ClassVar[bool] = True

    target: str = ""

    def for_model(self, model: nn.Module) -> Probe:
        """With the number of the class in place of its name."""
        return replace(self, target=str(class_index(model, self.target))) if self.target else self


@dataclass(frozen=True)
class ExplainedCall:
    """One attention on the way to the logit. call: with a `ContributionMap` as its map.

    reached: (B, N) which queries the logit depends on behind this attention.
    """

    call: AttentionCall
    where: TokenCoordinates
    reached: Tensor


@dataclass(frozen=True)
class ClassGradients:
    """The attentions of a pass, in order, and the class of each image that they are for.

    gaps: modules whose part in the logit is not known, each with the reason.
    """

    calls: list[ExplainedCall]
    classes: list[int]
    gaps: list[str]


def class_gradients(model: nn.Module, batch: BatchInfo, target: str) -> ClassGradients:
    """Those of the images of a batch, computed once for all probes with one target.

    target: the number of a class, or "" for the class that the model predicts. Raises HostError for
    an output that is not of classes.
    """
    key = (ClassGradients, target)
    if key not in batch.objects:
        batch.objects[key] = gradient_pass(model, batch, target)
    return batch.objects[key]


def gradient_pass(model: nn.Module, batch: BatchInfo, target: str) -> ClassGradients:
    """One forward pass with its graph, and one backward pass to the outputs of the attentions."""
    locator, calls, edges = Locator(batch.count, batch.class_token), [], []
    gaps = [f"{name} has no attention" for name in mixers_in(model)]

    def on_attention(call: AttentionCall) -> None:
        where, (output, form) = locator.locate(call), call.graph_output
        if not output.requires_grad:
            gaps.append(f"no gradient reaches {call.name}")
            return
        # a copy, as the tap takes the map from its call; an edge, as the model may go on in place
        calls.append((replace(call, maps=call.maps.lasting()), where, form))
        edges.append(get_gradient_edge(output))

    images = batch.clean(batch.images)
    seen = watch(model, images, on_attention, layouts=batch.layouts, gradients=True)
    # a softmax by which a step of ours ranks tokens is no attention
    modules = model.named_modules()
    steps = {name for name, module in modules if type(module).__module__.startswith("vitreous.mechanisms.tokens.")}
    gaps += [f"{refusal.name}: {refusal.reason}" for refusal in seen.refused if refusal.name not in steps]
    logits, classes = explained_classes(model, seen.output, target)
    with torch.enable_grad():
        score = logits.float().gather(-1, torch.tensor(classes, device=logits.device)[:, None]).sum()
    explained = []
    gradients = torch.autograd.grad(score, edges, allow_unused=True) if edges else ()
    for (call, where, form), gradient in zip(calls, gradients, strict=True):
        if gradient is None:
            continue  # the logit does not depend on this attention
        gradient = form(gradient)
        call = replace(call, maps=ContributionMap(call, gradient), graph_output=None)
        explained.append(ExplainedCall(call, where, gradient.ne(0).any(-1).any(2).any(1)))
    return ClassGradients(explained, classes, gaps)


def explained_classes(model: nn.Module, output: Any, target: str) -> tuple[Tensor, list[int]]:
    """The logits (B, C) of an output, and the class of each image.

    The target, or the predicted one. target: as of `class_gradients`. Raises HostError for an
    output that is not of classes, SettingError for a class that is none of them.
    """
    if not has_classes(model, output):
        raise HostError(
            f"Found an output of {type(model).__name__} that is not of classes. Expected logits (B, classes) for a map of "
            "one class. Look at a model with its classifier, or leave the maps of a class out."
        )
    logits = answer(output)
    count = logits.shape[-1]
    if target and int(target) >= count:
        raise SettingError(f"Found class {target} of {count}. Expected 0 to {count - 1}. Choose one of them.")
    return logits, [int(target)] * len(logits) if target else logits.detach().argmax(-1).tolist()


def rule(model: nn.Module, target: str) -> str:
    """By what maps are made, in words: the gradient of which class."""
    names = class_names(model) or []
    named = f"{names[int(target)]} ({target})" if target and int(target) < len(names) else target
    return f"the gradient of class {named}" if target else "the gradient of the class that the model predicts for each image"
