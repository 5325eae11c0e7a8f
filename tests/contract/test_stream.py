"""Laws of the stream: what a pass knows of its tokens belongs to that pass alone, whatever else runs meanwhile."""

from __future__ import annotations

import threading

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from contract.hosts import SMALL, grafted, images, loss, refuses_sizes
from vitreous import graft

SHAPES = {"other number of tokens": (48, 32), "same number of tokens": (16, 64)}  # beside 32 x 32 pixels: 4 x 4 patches


def of_shape(height: int, width: int) -> torch.Tensor:
    """Images of height x width pixels."""
    return images(size=max(height, width))[:, :, :height, :width]


def gradients(model: nn.Module, *batches: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Of the sum of losses: all passes forward, then one backward."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sum(loss(model, x) for x in batches).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_two_image_shapes_in_one_backward(text, shape):
    """With gradient checkpointing as without, bit for bit: blocks run again long after the other shape was seen."""
    model = grafted(text).train()
    if refuses_sizes(text, model, of_shape(*shape)):
        return
    plain = gradients(model, images(), of_shape(*shape))
    model.zero_grad(set_to_none=True)
    model.set_grad_checkpointing()
    again = gradients(model, images(), of_shape(*shape))
    for name, gradient in plain.items():
        assert (gradient is None) == (again[name] is None), name
        assert gradient is None or torch.equal(gradient, again[name]), name


def test_two_image_shapes_in_two_threads(text):
    model = grafted(text)
    batches = [images(), of_shape(16, 64)]
    if refuses_sizes(text, model, batches[1]):
        return
    wrong: list[int] = []

    def run(i: int) -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(25) if not torch.equal(model(batches[i]), expected[i]))

    with torch.no_grad():
        expected = [model(x) for x in batches]
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("opens", ["gaussian_mask", "channelvit", "local_window:border=zero", "polyline_mask"])
def test_one_compiled_graph_for_all_image_sizes(opens):
    torch.compiler.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = graft(VisionTransformer(**SMALL | {"depth": 1, "dynamic_img_size": True}).eval(), opens)
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="eager")
    with torch.no_grad():
        for shape in ((32, 32), (48, 32), (16, 64)):
            torch.testing.assert_close(compiled(of_shape(*shape)), model(of_shape(*shape)), atol=1e-5, rtol=1e-5)
