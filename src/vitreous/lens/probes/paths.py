"""What each path through the residual stream adds to the logit of a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitreous.base.errors import HostError
from vitreous.grafting import grafts
from vitreous.hosts.host import embed, finish, walkable
from vitreous.hosts.residual import BOTH, adds_to_its_tokens, branches_of, frozen_norms
from vitreous.layers.stream import PLAIN, Stream, TokenState, opened
from vitreous.lens.class_gradients import ClassProbe, explained_classes
from vitreous.lens.faithfulness import answer
from vitreous.lens.formulas.paths import contributions, fine_share
from vitreous.lens.layer_features import first_tensor
from vitreous.lens.module_calls import Call, record
from vitreous.lens.probe import BatchInfo, Measure, Readout, Rows, Source
from vitreous.lens.tap.capture_pass import prepare_images
from vitreous.models.classes import probabilities

EMBEDDING, OTHER, CONSTANT = "embedding", "other", "constant"
SAME = 1e-3  # of the largest logit: how far the sum may be from it
SAME_IN_HALF = 0.05


@dataclass(frozen=True)
class Path:
    """What one branch adds to the classifier's input. tokens: (1, N, D). layer: or -1."""

    layer: int
    half: str
    tokens: Tensor


def paths_of(model: nn.Module, image: Tensor) -> tuple[list[Path], Any]:
    """The paths of an image (1, C, h, w) in float64, the embedding first, and the output.

    Raises HostError for a model whose blocks do not add to their tokens, one token for each place.
    """
    blocks = {path: model.get_submodule(path) for path in walkable(model).blocks}
    branches = {path: branches_of(block) for path, block in blocks.items()}
    inner = [f"{path}.{name}" for path, names in branches.items() for name in names]
    calls = {call.name: call for call in record(model, image, ["", *blocks, *inner])}
    if missing := [path for path in blocks if path not in calls]:
        raise HostError(
            f"Found that {missing[0]} did not run. Expected every block once. Look at the model without what skips it."
        )
    first, paths = next(iter(blocks)), []
    for number, path in enumerate(blocks):
        own = {name: calls[f"{path}.{name}"] for name in branches[path] if f"{path}.{name}" in calls}
        paths += paths_of_block(model, number, calls[path], {name: call.output for name, call in own.items()}, branches[path])
    return [Path(-1, EMBEDDING, one_per_place(model, calls[first], calls[first].args[0]).double()), *paths], calls[""].output


def paths_of_block(
    model: nn.Module, number: int, call: Call, outputs: Mapping[str, Any], halves: Mapping[str, str]
) -> list[Path]:
    """What a block adds, by halves. outputs: of the branches that ran. Raises HostError."""
    before, after = (one_per_place(model, call, value) for value in (call.args[0], call.output))
    if before.shape != after.shape:
        raise uneven(model, call, f"{before.shape[1]} tokens before {call.name} and {after.shape[1]} behind it")
    added: dict[str, Tensor] = {}
    for name, output in outputs.items():
        half = halves[name] if len(outputs) > 1 else BOTH
        added[half] = added.get(half, 0) + first_tensor(output).double()
    rest = after.double() - before.double() - sum(added.values())
    largest = max(float(x.abs().max()) for x in (before, after, *added.values()))
    rounded = float(rest.abs().max()) <= 8 * torch.finfo(after.dtype).eps * largest
    if not (added and rounded) and adds_to_its_tokens(call.module):
        added[OTHER] = rest
    elif not (added and rounded):
        host = getattr(call.module, "host", type(call.module)).__name__
        raise HostError(
            f"Found that {call.name} ({host}) gives something else than its tokens plus what its branches add (off by "
            f"{float(rest.abs().max()):.2g} of {largest:.2g}), as blocks with norms behind their sums do. Expected residual "
            "blocks, whose output is a sum of paths. Use another host."
        )
    return [Path(number, half, tokens) for half, tokens in added.items()]


def one_per_place(model: nn.Module, call: Call, value: Any) -> Tensor:
    """The tokens (1, N, D) before or behind a block.

    Raises HostError if some were merged, dropped or inserted.
    """
    tokens, state = opened(value)
    if not state.plain:
        raise uneven(model, call, f"merged, dropped or inserted tokens at {call.name}")
    return tokens


def uneven(model: nn.Module, call: Call, found: str) -> HostError:
    """The error of a model whose tokens do not stay."""
    names = ", ".join(str(each.mechanism) for each in grafts(model)) or type(model).__name__
    return HostError(
        f"Found {found} ({names}). Expected one token for each place throughout, since the paths of a place are summed up. "
        "Look at the model without that (vitreous.ungraft)."
    )


@dataclass(frozen=True, kw_only=True)
class Paths(ClassProbe):
    """What each path adds to the logit of a class: the embedding, each attention, each MLP.

    The classifier reads x_0 + sum over blocks of what attention and MLP add. With the scale of the
    last norms frozen, its logits are exactly the sum of what these 2 L + 1 paths contribute, plus a
    constant; that is checked for each image, and a model for which it does not hold is refused.
    Influence is by removal from that last sum alone, with the norms as they are; later blocks see
    the path still.

    Refused by name: blocks that do not add to their tokens (norms behind the sum), merged, dropped
    and inserted tokens, heads that are not linear behind their norm (attention and maximum pool).
    Costs one pass of each image, and its head for each path. target: name or number of a class; "":
    the predicted one.
    """

    paper: ClassVar[str] = "Chang, Wang, Luo, Wang, Shou 2023, arXiv 2308.06548"
    order: ClassVar[int] = 128
    sources: ClassVar[tuple[Source, ...]] = (
        Source("path", "Paths to the answer",
               "The classifier reads a sum: the embedding, and what the attention and the MLP of each layer add. With the "
               "scale of the last norm held fixed, each of them adds a number to the logit of the class; together with the "
               "constant they give the logit exactly. Removal is from that last sum alone: later layers see the path still.",
               form="bars"),
    )  # fmt: skip
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("path_logit", "Contribution to the logit", "logits",
                explains="What a path adds to the logit of the class. Below 0 it speaks against it."),
        Measure("path_share", "Share of all contributions", "", 0, 1,
                explains="Magnitude of a path's contribution over the sum of all magnitudes."),
        Measure("path_drop", "Probability lost without it", "", -1, 1,
                explains="How far the probability of the class falls without the path. Below 0 it rises."),
        Measure("path_agreement", "Prediction stays without it", "", 0, 1,
                explains="1: the model predicts the same class without the path. Over images: how often."),
        Measure("path_fine", "Fine detail", "", 0, 1,
                explains="Share of what differs between patches that repeats within four patches; the rest is coarse."),
        Measure("path_error", "Error of the sum", "relative", 0,
                explains="How far contributions and constant are from the model's logits, of the largest one."),
    )  # fmt: skip

    def extra(self, model: nn.Module, batch: BatchInfo, targets: Sequence[int]) -> Readout:
        images = prepare_images(dict(model.named_modules()), batch.clean(batch.images))
        state = embed(model, images[:1]).state
        measured, classes = [], []
        for image in images.split(1):
            values, index = self.measured(model, image, state)
            measured.append(values)
            classes.append(index)
        rows = []
        for layer, half in dict.fromkeys(key for values in measured for key in values):
            each = [values.get((layer, half), {}) for values in measured]
            names = dict.fromkeys(name for one in each for name in one)
            table = {name: torch.tensor([[one.get(name, torch.nan)] for one in each], dtype=torch.float64) for name in names}
            rows.append(Rows(layer, "path", half, table, batch.first, together=True))
        return Readout(rows=rows, classes={"path": classes})

    def measured(
        self, model: nn.Module, image: Tensor, state: TokenState
    ) -> tuple[dict[tuple[int, str], dict[str, float]], int]:
        """{(layer, half): {measure: value}} of an image (1, C, h, w), and its class."""
        paths, output = paths_of(model, image)
        logits, (index,) = explained_classes(model, output, self.target)
        stacked = torch.cat([path.tokens for path in paths])  # (P, N, D)
        whole = stacked.sum(0, keepdim=True)

        def head(tokens: Tensor) -> Tensor:
            return answer(finish(model, Stream(tokens.to(image.dtype), PLAIN))).double()

        with frozen_norms(model, whole.to(image.dtype)):
            added, constant = contributions(head, stacked)
        error = self.checked(model, constant + added.sum(0), logits[0].double())
        without = head(whole - stacked)
        full, less = (probabilities(model, x) for x in (logits.double(), without))
        values = {
            "path_logit": added[:, index],
            "path_share": added[:, index].abs() / added[:, index].abs().sum().clamp(min=1e-300),
            "path_drop": full[0, index] - less[:, index],
            "path_agreement": (without.argmax(-1) == logits.argmax(-1)).double(),
        }
        if state.grid is not None and len(state.grid) == 2 and state.groups == 1:
            values["path_fine"] = fine_share(stacked[:, state.prefix :].unflatten(1, state.grid))
        columns = {name: value.tolist() for name, value in values.items()}
        table = {(path.layer, path.half): {name: column[i] for name, column in columns.items()} for i, path in enumerate(paths)}
        table[-1, CONSTANT] = {"path_logit": float(constant[index]), "path_error": error}
        return table, index

    def checked(self, model: nn.Module, found: Tensor, logits: Tensor) -> float:
        """How far the sum is from the logits, of the largest. Raises HostError if too far."""
        off, largest = float((found - logits).abs().max()), float(logits.abs().max())
        half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
        if not off <= (SAME_IN_HALF if half else SAME) * largest:
            raise HostError(
                f"Found that contributions and constant are off by {off:.2g} from logits of up to {largest:.2g}. Expected "
                "their sum: a head that is linear behind its norm, as of a class token or a mean over patches. The head of "
                f"this {type(model).__name__} is none, such as an attention pool or a maximum. Use another host."
            )
        return off / max(largest, 1e-300)
