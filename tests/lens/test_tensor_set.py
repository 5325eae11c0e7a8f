"""Tensors that were seen: each itself, none kept alive, none taken for another at its address."""

from __future__ import annotations

import gc
import weakref

import torch

from vitreous.lens.tap.tensor_set import TensorSet


def test_a_tensor_is_itself_and_not_its_equal():
    known, one = TensorSet(), torch.ones(3)
    assert not known
    known.add([one])
    assert known
    assert one in known
    assert one.clone() not in known
    assert one.view(3) not in known


def test_nothing_is_kept_alive_and_what_is_gone_is_forgotten():
    known, stays, goes = TensorSet(), torch.ones(3), torch.ones(3)
    known.add([stays, goes])
    end = weakref.ref(goes)
    del goes
    gc.collect()
    assert end() is None
    known.tidy()
    assert list(known.references) == [id(stays)]
    assert stays in known


def test_another_tensor_at_the_address_of_one_that_is_gone_is_not_known():
    known, gone, other = TensorSet(), torch.ones(3), torch.ones(3)
    known.add([gone])
    known.references[id(other)] = known.references.pop(id(gone))  # as if the allocator had given it that address
    assert other not in known
    del gone
    gc.collect()
    assert other not in known
    known.add([other])
    assert other in known
