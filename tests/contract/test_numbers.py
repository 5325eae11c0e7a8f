"""Laws about numbers, beside the contract: ONNX, and the random state."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from contract.hosts import PRIMARY, build, grafted, images, stem
from vitreous import check, graft, parse

pytestmark = pytest.mark.usefixtures("random_state_untouched")


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
def test_onnx(text, request):
    """Of every mechanism as it comes, of its examples too with --full. The contract has torch.export for them."""
    if not parse(text).onnx or not (text == stem(text) or request.config.getoption("full")):
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
