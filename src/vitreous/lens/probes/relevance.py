"""Which patches speak for a class, by attention and its gradients through all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitreous.lens.class_gradients import ClassGradients, ClassProbe, ExplainedCall, class_gradients, rule
from vitreous.lens.formulas.maps import TOKENS, relevance_step
from vitreous.lens.probe import BatchInfo, Component, Readout
from vitreous.lens.token_coordinates import one_sequence

UNREACHED = "the logit depends on no attention: its gradient is 0"


@dataclass(frozen=True, kw_only=True)
class Relevance(ClassProbe):
    """R + mean over heads of (A * dS/dA)+ R, layer by layer, of the logit S of a class.

    Chefer et al. 2021, arXiv 2103.15679 (and 2012.09838, without its relevance of A itself).

    The map is what R gives from the patches to the tokens that the logit is read from, without what
    they have of themselves. Queries that read from all tokens at the end are followed; there is no
    map, but a reason, where tokens attend in windows, change in number unrecorded, are more than
    1100, or are mixed in another way. target: name or number of a class; "": the predicted one.
    """

    order: ClassVar[int] = 76
    components: ClassVar[tuple[Component, ...]] = (
        Component("relevance", "Relevance for a class", low=0,
                  explains="What speaks for a class, followed through all layers by attention and its gradient (Chefer et "
                           "al. 2021). The class is named with the map."),
    )  # fmt: skip

    def extra(self, model: nn.Module, batch: BatchInfo, targets: Sequence[int]) -> Readout:
        gradients = class_gradients(model, batch, self.target)
        values = followed(gradients)
        if isinstance(values, str):
            return Readout(notes=[f"No relevance map: {values}"])
        picture = gradients.calls[0].where.layout.key_picture(values[:, None]).nan_to_num()
        details = {"relevance/-1": {"rule": rule(model, self.target)}}
        return Readout(maps={"relevance/-1": picture}, details=details, classes={"relevance": gradients.classes})


def followed(gradients: ClassGradients) -> Tensor | str:
    """Relevance (B, N) of the tokens that the first attention sees, or why there is none."""
    if gradients.gaps or not gradients.calls:
        return "; ".join(gradients.gaps[:4]) or UNREACHED
    joint, read_out = None, False
    for each in gradients.calls:
        if reason := obstacle(each, joint, read_out):
            return f"{each.call.name}: {reason}"
        call, where = each.call, each.where
        tokens = where.assignment.places if where.assignment is not None else call.v.shape[3] - where.inserted
        rows, joint = tokens + where.inserted, call.v.new_zeros(len(call.v), 0, tokens).float() if joint is None else joint
        # what is new has nothing of the patches yet
        joint = torch.cat([joint[:, :rows], joint.new_zeros(len(joint), max(0, rows - joint.shape[1]), tokens)], dim=1)
        read_out = call.output.shape[3] != call.v.shape[3]
        blocks = ((part, block[:, 0]) for part, block in where.map_rows(call, 256))
        joint = relevance_step(joint, blocks, own=not read_out)
    reached = rows_reached(each)
    if not reached.any():
        return UNREACHED
    share = reached / reached.sum(1, keepdim=True).clamp(min=1)  # (B, rows)
    return (share[:, None] @ joint)[:, 0]


def obstacle(each: ExplainedCall, joint: Tensor | None, read_out: bool) -> str:
    """Why relevance is not followed through an attention, or "".

    joint: the relevance so far. read_out: queries have read from all tokens before.
    """
    call, where = each.call, each.where
    tokens = call.v.shape[3] - where.inserted if where.assignment is None else where.assignment.places
    if call.kind == "channel":
        return "channels attend to channels"
    if call.output.shape[1] > 1:
        return "tokens attend in windows"
    if where.chosen or (where.recorded and not one_sequence(call)):
        return "which tokens it sees differs from image to image, by the model's own choice"
    if where.layout is None or where.grid is None:
        return "where its tokens are is not known"
    if tokens > TOKENS:
        return f"it has {tokens} tokens, and relevance is followed up to {TOKENS}"
    if read_out or (joint is not None and tokens != joint.shape[2]):
        return "its tokens are not those of the attention before"
    return ""


def rows_reached(each: ExplainedCall) -> Tensor:
    """(B, rows) float: 1 for original tokens that the logit depends on behind an attention."""
    call, where = each.call, each.where
    reached = each.reached.float()
    if where.assignment is None:
        return reached
    tokens = call.v.shape[3] - where.inserted
    return where.assignment.extended(tokens, where.inserted).restore(reached[..., None])[..., 0].gt(0).float()
