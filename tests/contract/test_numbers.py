"""Laws about numbers: what an output may depend on, lower and higher precision, and compiled or exported models."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from contract.hosts import PRIMARY, TEXTS, build, folder, grafted, images
from vitreous import check, graft, parse

pytestmark = pytest.mark.usefixtures("random_state_untouched")

TO_COMPILE = {"attn": (PRIMARY, "eva02", "dinov3")}
COMPILED = [
    pytest.param((text, host), id=f"{text}-{host}")
    for text in TEXTS
    if parse(text).static_shapes
    for host in TO_COMPILE.get(folder(text), (PRIMARY,))
]


def test_an_image_does_not_depend_on_its_batch_mates(text, host):
    """Whatever they are: other pictures, one grey, black, far too bright, or not a number."""
    model, x = grafted(text, host), images(4)
    alone = model(x)[:1]
    mates = torch.stack([torch.full_like(x[0], value) for value in (0.5, 1e4, torch.nan)])
    for others in (images(3, seed=2), torch.zeros_like(x[1:]), mates):
        assert torch.equal(model(torch.cat([x[:1], others]))[:1], alone)
    torch.testing.assert_close(model(x[:1]), alone, atol=1e-4, rtol=1e-4)


def test_two_calls_agree(text, host):
    model = grafted(text, host)
    first = model(images())
    model(images(seed=5))
    assert torch.equal(model(images()), first)


def test_unusual_images_give_finite_outputs_and_gradients(text):
    model = grafted(text)
    x = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), 1e-6 * images(1)[0], 1e3 * images(1)[0]])
    x.requires_grad_()
    out = model(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_double_precision_confirms_single(text, host):
    single, double = grafted(text, host), grafted(text, host).double()
    out = double(images().double())
    assert out.dtype == torch.float64
    torch.testing.assert_close(single(images()).double(), out, atol=1e-4, rtol=1e-4)


def test_autocast(text, host):
    """Close to full precision for all but single images, where a singular vector's sign may hang on a rounding."""
    model = grafted(text, host)
    full = model(images(8))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images(8)).float()
    assert low.isfinite().all()
    assert ((low - full).norm(dim=1) / full.norm(dim=1)).median() < 0.05


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_in_one_graph(case):
    model = grafted(*case)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images()), model(images()))


@pytest.mark.parametrize("case", COMPILED)
def test_exported(case):
    model = grafted(*case)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (images(3),), dynamic_shapes=(batch,)).module()
    for count in (3, 5):
        torch.testing.assert_close(program(images(count)), model(images(count)), atol=1e-5, rtol=1e-5)


def onnx_output(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False).save(file)  # optimizing takes longest
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.mark.slow
def test_onnx(text):
    if not parse(text).onnx:
        return
    model = grafted(text)
    with torch.no_grad():
        np.testing.assert_allclose(onnx_output(model, images()), model(images()).numpy(), atol=1e-4, rtol=1e-4)


def test_check_leaves_the_random_state_alone(text):
    """Also where the pass itself draws: in train mode with dropout and stochastic depth."""
    model = graft(build(PRIMARY), text).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    check(model, images())
    assert model.training
