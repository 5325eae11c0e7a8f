"""Every kind of mechanism in every host, in some precision and some mode of running: a covering array of the four."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from contract.covering import covering_rows
from contract.hosts import HOSTS, TEXTS, build, images, loss, refused, stand_ins
from vitreous import graft, new_parameters, ungraft

PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "autocast": torch.float32}
MODES = ("eval", "train", "checkpointing", "inference")
Row = tuple[str, str, str, str]  # mechanism, host, precision, mode


def fits(row: Row) -> bool:
    return row[1] not in refused(row[0])


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        full = metafunc.config.getoption("full")
        factors = (TEXTS if full else stand_ins(), list(HOSTS), list(PRECISIONS), MODES)
        metafunc.parametrize("row", covering_rows(factors, fits), ids="-".join)


def test_runs_learns_and_comes_out(row):
    """Finite outputs of the precision's type, a finite gradient in every new parameter, and the host as it was."""
    text, host, precision, mode = row
    dtype = PRECISIONS[precision]
    model, x = graft(build(host).to(dtype), text).train(mode in ("train", "checkpointing")), images(2).to(dtype)
    model.set_grad_checkpointing(mode == "checkpointing")
    low = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()
    with torch.random.fork_rng(), low, torch.inference_mode(mode == "inference"):
        value = loss(model, x)
    assert value.isfinite()
    if mode != "inference":
        value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in new_parameters(model).values())
    with torch.no_grad(), low:
        out = model.eval()(x)
    assert out.dtype == (torch.bfloat16 if precision == "autocast" else dtype)
    assert out.isfinite().all()
    assert ungraft(model).changed == ()
    assert torch.equal(model(x), build(host).to(dtype)(x))
