"""Which factor of a leading axis is the batch: maps of each image in a batch are those of it alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreous import look
from vitreous.base.errors import HostError
from vitreous.lens.tap import trace, watch

HEADS, WIDTH, SIDE = 2, 8, 3  # of 3 x 3 patches


class Attend(nn.Module):
    """Patches -> q, k, v (B, H, N, K) -> `order`, a function that lays them out, attends and lays the result back."""

    def __init__(self, order):
        super().__init__()
        self.embed, self.qkv, self.order = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, 3 * WIDTH), order
        for p in self.parameters():
            p.data.mul_(6)

    def operands(self, images: Tensor) -> list[Tensor]:
        tokens = self.embed(images).flatten(2).mT
        return [x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in self.qkv(tokens).chunk(3, -1)]

    def forward(self, images: Tensor) -> Tensor:
        return self.order(*self.operands(images))


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def written(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def rows_before_batch(attend):
    """Windows are rows of patches, (row, batch) in one axis: axial attention."""
    return lambda *qkv: attend(*(x.unflatten(2, (SIDE, SIDE)).permute(2, 0, 1, 3, 4).flatten(0, 1) for x in qkv))


def batch_before_rows(attend):
    return lambda *qkv: attend(*(x.unflatten(2, (SIDE, SIDE)).permute(0, 2, 1, 3, 4).flatten(0, 1) for x in qkv))


def rows_heads_batch(attend):
    """(row, head, batch) in one axis."""
    return lambda *qkv: attend(*(x.unflatten(2, (SIDE, SIDE)).permute(2, 1, 0, 3, 4).flatten(0, 2) for x in qkv))


def rows_batch_heads(attend):
    """(row, batch, head) in one axis: the batch is between."""
    return lambda *qkv: attend(*(x.unflatten(2, (SIDE, SIDE)).permute(2, 0, 1, 3, 4).flatten(0, 2) for x in qkv))


def heads_before_batch(attend):
    """(head, batch) in one axis, as `torch.cat(q.chunk(heads, -1))` has it."""
    return lambda *qkv: attend(*(x.transpose(0, 1).flatten(0, 1) for x in qkv))


def whole(q, k) -> Tensor:
    """Maps (B, 1, H, N, N) by the formula."""
    return torch.softmax(torch.einsum("bhnk,bhmk->bhnm", q, k) / math.sqrt(q.shape[-1]), -1)[:, None]


def by_rows(q, k) -> Tensor:
    """Maps (B, 3, H, 3, 3): one window per row of patches."""
    q, k = (x.unflatten(2, (SIDE, SIDE)) for x in (q, k))
    return torch.softmax(torch.einsum("bhwnk,bhwmk->bwhnm", q, k) / math.sqrt(q.shape[-1]), -1)


ORDERS = {
    "(row, batch)": (rows_before_batch, by_rows), "(batch, row)": (batch_before_rows, by_rows),
    "(row, head, batch)": (rows_heads_batch, by_rows), "(row, batch, head)": (rows_batch_heads, by_rows),
    "(head, batch)": (heads_before_batch, whole),
}  # fmt: skip


def maps_of(model: nn.Module, images: Tensor, layouts=None) -> tuple[list[Tensor], list]:
    maps = []
    refused = watch(model, images, lambda call: maps.append(call.map()), layouts=layouts).refused
    return maps, refused


@pytest.fixture
def images():
    return torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("attend", [fused, written])
@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_maps_are_those_of_each_image(order, attend, images):
    torch.manual_seed(0)
    layout, formula = ORDERS[order]
    model = Attend(layout(attend)).eval()
    q, k, _ = model.operands(images)
    right, layouts = formula(q, k), trace(model, images)
    for batch in (images, images[1:4], images[:1], images[2:4]):  # the first decides, later ones begin with other images
        (seen,), refused = maps_of(model, batch, layouts)
        assert not refused
        first = next(i for i in range(4) if torch.equal(images[i], batch[0]))
        torch.testing.assert_close(seen, right[first : first + len(batch)], atol=1e-5, rtol=0)
    assert (right[0] - right[1]).abs().max() > 0.1  # maps of another image would be seen


JOINS = {"before": lambda x: torch.cat([x, x.flip(-1)]), "behind": lambda x: torch.stack([x, x.flip(-1)], 1).flatten(0, 1)}


@pytest.mark.parametrize("where", JOINS)
@torch.no_grad()
def test_views_before_or_behind_the_batch(where, images):
    """A model of two views of each image, whatever comes first."""
    torch.manual_seed(0)
    inner = Attend(fused)
    model = nn.Sequential()
    model.inner, model.forward = inner, lambda x: inner(JOINS[where](x))
    for i, both in enumerate(look(model, images, noise=0).maps.heads("attention", 0)):
        alone = look(model, images[i : i + 1], noise=0).maps.heads("attention", 0)[0]
        assert both == pytest.approx(alone, abs=1e-3)
        views = [whole(*inner.operands(x)[:2])[0, 0].mean(-2).unflatten(-1, (3, 3)) for x in sides(images[i : i + 1])]
        assert both == pytest.approx(((views[0] + views[1].flip(-1)) / 2).numpy(), abs=2e-3)


def sides(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.flip(-1)


@torch.no_grad()
def test_layouts_of_another_image_are_traced_again(images):
    """With several possible orders and no image to compare with, the batch's own first image is traced."""
    model = Attend(rows_before_batch(fused)).eval()
    q, k, _ = model.operands(images)
    (seen,), refused = maps_of(model, images[1:], trace(model, images[:1]))
    assert not refused
    torch.testing.assert_close(seen, by_rows(q, k)[1:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_order_that_cannot_be_told_is_refused_or_said(images):
    """Values that change from pass to pass match in no order; blank images match in every one."""
    steps = iter(torch.linspace(1, 90, 8).tolist())

    def shaken(q, k, v):
        return fused(q, k, v * next(steps))

    model = Attend(rows_before_batch(shaken)).eval()
    with pytest.raises(HostError, match="does the first image give what it gives alone"):
        maps_of(model, images)
    notes = []
    watch(Attend(rows_before_batch(fused)).eval(), torch.full_like(images, 0.5), lambda call: notes.append(call.note))
    assert "assumed" in notes[0]


@torch.no_grad()
def test_a_call_of_batches_alone_with_windows_in_its_axis_is_refused(images):
    """What one image never calls cannot be compared; an axis of the batch alone needs no comparison."""

    def second(layout):
        def act(q, k, v):
            first = fused(q, k, v)
            return layout(q, k, v) if len(q) > 1 else first

        return act

    seen, refused = maps_of(Attend(second(rows_before_batch(fused))).eval(), images)
    assert len(seen) == 1
    assert "is the batch" in refused[0].reason
    assert len(maps_of(Attend(second(fused)).eval(), images)[0]) == 2


@torch.no_grad()
def test_the_comparison_is_made_once(images, monkeypatch):
    """No pass more than before: one of one image, then one per batch; later batches compare nothing."""
    model, counts = Attend(rows_before_batch(fused)).eval(), []
    model.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    look(model, torch.cat([images] * 3), noise=0, batch_size=4)
    assert counts == [1, 4, 4, 4]
    layouts = trace(model, images)
    maps_of(model, images, layouts)
    monkeypatch.setattr("vitreous.lens.tap.capture.departures", None)
    assert not maps_of(model, images, layouts)[1]
