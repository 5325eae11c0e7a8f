"""Laws about what else is done with a model: copies, files, averages, functional calls, several processes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from contract.hosts import CLASSES, PRIMARY, TEXTS, build, fit, grafted, images
from vitreous import check, collect_terms, graft, grafts, new_parameters, parse, ungraft
from vitreous.base.errors import HostError
from vitreous.models.model_folder import load, save


def assert_whole(model: nn.Module, text: str, like: nn.Module) -> None:
    """`model` computes what `like` does, and its graft comes out with the plain host left."""
    assert torch.equal(model(images()), like(images()))
    check(model, images())
    assert [record.mechanism for record in grafts(model)] == [parse(text)]
    ungraft(model)
    assert set(model.state_dict()) == set(build(PRIMARY).state_dict())


def test_saving_the_whole_model(text):
    model, file = grafted(text), io.BytesIO()
    torch.save(model, file)
    plain = io.BytesIO()
    torch.save(build(PRIMARY), plain)
    buffers = [tensor for name, tensor in model.named_buffers() if name not in build(PRIMARY).state_dict()]
    added = 4 * sum(tensor.numel() for tensor in (*new_parameters(model).values(), *buffers))
    assert file.tell() - added < 1.2 * plain.tell()  # displaced modules share their weights, in the file as well
    file.seek(0)
    assert_whole(torch.load(file, weights_only=False), text, model)


def test_saving_a_folder(text, tmp_path):
    """The three files of a run say which network, which grafts and which weights."""
    model = grafted(text, "test_vit")
    fit(model, model.parameters())
    save(model, tmp_path)
    again = load(tmp_path)
    check(again, images())
    assert [record.mechanism for record in grafts(again)] == [parse(text)]
    assert torch.equal(again(images()), model(images()))


def test_functional_call(text):
    model = grafted(text)
    other = {name: 1.01 * p.detach() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, other, (images(),))
    model.load_state_dict(other, strict=False)
    assert torch.equal(out, model(images()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_image(text):
    """vmap over images gives each image's own gradient."""
    model = grafted(text)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values, image, label):
        logits = torch.func.functional_call(model, values, (image[None],))
        return F.cross_entropy(logits, label[None])

    x, labels = images(2), torch.tensor([1, 3])
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)
    for i in range(2):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]).backward()
        for name, p in model.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(each[name][i], expected, atol=1e-4, rtol=1e-4)


# -- two processes ---------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor | None]:
    module = model.module if isinstance(model, DistributedDataParallel) else model
    with collect_terms(module) as terms:
        logits = model(x)
    (F.cross_entropy(logits, labels) + sum(terms.values())).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def one_process(rank: int, folder: str) -> None:
    """Half of the batch; the gradients that rank 0 then has go into a file per mechanism."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for i, text in enumerate(TEXTS):
        model = DistributedDataParallel(grafted(text))
        with pytest.raises(HostError, match="DistributedDataParallel"):
            graft(model, text)
        half = slice(2 * rank, 2 * rank + 2)
        mine = gradients(model, images(4)[half], (torch.arange(4) % CLASSES)[half])
        if rank == 0:
            torch.save(mine, f"{folder}/{i}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(one_process, (str(folder),), nprocs=2)
    return folder


@pytest.mark.slow
def test_gradients_over_two_processes(text, two_processes):
    alone = gradients(grafted(text), images(4), torch.arange(4) % CLASSES)
    together = torch.load(two_processes / f"{TEXTS.index(text)}.pt")
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, atol=1e-6, rtol=1e-5)
