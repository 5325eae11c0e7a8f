"""The state of a run on disk: what goes in comes out, bit by bit, and what is damaged or not finite is refused."""

import random

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.utils import random_seed

from vitreous.base.errors import DataError, SettingError
from vitreous.train.engine.prepare import prepare
from vitreous.train.engine.state import (
    Means,
    NotFinite,
    States,
    capture,
    packed,
    random_states,
    read_state,
    restore,
    set_random_states,
    write_state,
)

CPU = torch.device("cpu")


def test_structures_come_back_as_they_were(tmp_path):
    given = {
        "numbers": [1, -0.1, 1e-320, float("inf"), 2**70, True, None, "text ü"],
        "tuple": (1, (2.5, [])),
        3: {(0, "a"): torch.arange(6).reshape(2, 3).T},
        "types": [torch.zeros(2, dtype=t) for t in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64)],
        "scalar": torch.tensor(float("nan")),
        "none": torch.empty(0, 4),
        "dtype": torch.bfloat16,
    }
    shared = torch.ones(3)
    given["shared"] = [shared, shared, shared[1:]]
    write_state(tmp_path / "a.safetensors", given)
    found = read_state(tmp_path / "a.safetensors")
    assert list(found) == list(given)
    assert found["numbers"] == given["numbers"]
    assert [type(item) for item in found["numbers"]] == [type(item) for item in given["numbers"]]
    assert found["tuple"] == given["tuple"]
    assert isinstance(found["tuple"], tuple)
    assert torch.equal(found[3][0, "a"], given[3][0, "a"])
    assert [item.dtype for item in found["types"]] == [item.dtype for item in given["types"]]
    assert found["scalar"].isnan()
    assert found["none"].shape == (0, 4)
    assert found["dtype"] is torch.bfloat16
    assert [item.tolist() for item in found["shared"]] == [[1, 1, 1], [1, 1, 1], [1, 1]]


def test_what_cannot_be_kept_exactly_is_refused(tmp_path):
    with pytest.raises(SettingError, match="Generator in the state"):
        write_state(tmp_path / "a.safetensors", {"state": [torch.Generator()]})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_cut_or_has_another_bit_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    write_state(path, {"weights": torch.randn(50), "steps": [1, 2, 3], "none": torch.empty(0)})
    whole, draw = path.read_bytes(), random.Random(0)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="damaged"):
            read_state(path)
    for place in draw.sample(range(len(whole)), 200):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            found = read_state(path)
        except DataError:
            continue
        path.write_bytes(whole)  # spaces that pad the header, say
        assert packed(found)[0] == packed(read_state(path))[0]
        assert torch.equal(found["weights"], read_state(path)["weights"])


def test_random_states_go_on_where_they_were(tmp_path):
    def draws():
        return torch.randn(3).tolist(), np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)]

    random_seed(3)
    draws()  # one normal number is left over in NumPy and in Python
    write_state(tmp_path / "a.safetensors", random_states(CPU))
    first = draws()
    random_seed(4)
    set_random_states(read_state(tmp_path / "a.safetensors"), CPU)
    assert draws() == first


OPTIMIZERS = ["adamw", "sgd", "adam", "nadamw", "radam", "lamb", "lars", "lion", "muon", "adafactor", "adafactorbv", "adopt"]


@pytest.mark.parametrize("name", [*OPTIMIZERS, "lookahead_adamw"])
def test_every_kind_of_optimizer_goes_on_exactly(settings, tmp_path, name):
    def steps(session, numbers):
        for number in numbers:
            x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(number))
            session.optimizer.zero_grad()
            session.model(x).square().mean().backward()
            session.optimizer.step()

    recipe = settings(opt=name)
    session = prepare(recipe)
    if name.startswith("lookahead"):
        session.optimizer = create_optimizer_v2(session.model, opt=name, lr=1e-3)
    steps(session, range(7))
    write_state(tmp_path / "a.safetensors", capture(session))
    steps(session, range(7, 14))
    again = prepare(recipe)
    if name.startswith("lookahead"):
        again.optimizer = create_optimizer_v2(again.model, opt=name, lr=1e-3)
    restore(again, read_state(tmp_path / "a.safetensors"))
    steps(again, range(7, 14))
    for key, value in session.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key


def test_a_state_of_another_model_is_refused(settings):
    found = capture(prepare(settings(graft=("svda",))))
    with pytest.raises(DataError, match=r"differs in 2 tensors, the first blocks.0.attn.sigma"):
        restore(prepare(settings()), found)
    found = capture(prepare(settings(opt="sgd")))
    with pytest.raises(DataError, match="optimizer"):
        restore(prepare(settings(opt="adamw", weight_decay=0.05)), found)


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_that_are_not_finite_are_not_kept(settings, tmp_path, averaged):
    session = prepare(settings(model_ema=0.9 if averaged else None))
    (session.tested if averaged else session.objective).model.head.bias.data[2] = float("nan")
    states = States(tmp_path)
    with pytest.raises(NotFinite, match=r"the first head.bias"):
        states.save(session)
    assert states.paths() == []


def test_the_newest_and_the_one_before_are_kept(settings, tmp_path):
    session, states = prepare(settings()), States(tmp_path)
    for session.progress.updates in (0, 3, 12, 12, 1000000):
        states.save(session)
    assert [path.name for path in states.paths()] == ["001000000.safetensors", "000000012.safetensors"]
    assert states.load(print)["progress"]["updates"] == 1000000
    states.clear()
    assert list(tmp_path.iterdir()) == []
    assert states.load(print) is None


def test_means_go_on(settings, tmp_path):
    session, again = prepare(settings()), prepare(settings())
    values = torch.rand(6, dtype=torch.float64).tolist()
    for value in values[:3]:
        session.progress.losses.add({"total": torch.tensor(value)}, 7)
    write_state(tmp_path / "a.safetensors", capture(session))
    restore(again, read_state(tmp_path / "a.safetensors"))
    whole = Means()
    for value in values:
        whole.add({"total": torch.tensor(value)}, 7)
    for value in values[3:]:
        again.progress.losses.add({"total": torch.tensor(value)}, 7)
    assert again.progress.losses.values() == whole.values()
