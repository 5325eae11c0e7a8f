"""The checks of one item, for this suite and for the suites of third parties."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType

from vitreous.base.errors import HostError, SettingError
from vitreous.base.text_form import Settings
from vitreous.grafting import graft
from vitreous.mechanism import Mechanism, parse
from vitreous.testing import laws_everywhere, laws_once
from vitreous.testing.check import THREE_PARTS, Check, close, holds
from vitreous.testing.hosts import HOSTS, anatomy, build, lacks


def contract_checks(item: Mechanism | str, *, hosts: Iterable[str] | None = None) -> list[Check]:
    """The checks of a mechanism, or of its text form ("svda", "package.module.Class:setting=value").

    Each has a `name` and a `run()`, which raises ContractError. The mechanism is checked as it is set; its settings have to
    fit the small hosts (`small_hosts`). hosts: names of those to check in; default all. Needs no pytest:

        @pytest.mark.parametrize("check", contract_checks(MyMechanism()), ids=lambda check: check.name)
        def test_contract(check):
            check.run()

    Raises SettingError for anything but a mechanism.
    """
    if isinstance(item, str):
        item = parse(item, foreign=True)
    if not isinstance(item, Mechanism):
        raise SettingError(f"Found {item!r}. Expected a mechanism, or its text form. Give for example svda.")
    names = list(HOSTS if hosts is None else hosts)
    taking = [name for name in names if not lacks(name, item)]
    checks = [Check(is_described, item), *(Check(refusal, item, name) for name in names if name not in taking)]
    for module, where in ((laws_everywhere, taking), (laws_once, taking[:1])):
        held = [law for law in laws(module) if getattr(item, UNLESS.get(law.__name__, "name"))]
        checks += [Check(law, item, name) for law in held for name in where]
    return checks


UNLESS = {"plain_checkpoint_loads": "keeps_weights", "compiles": "static_shapes", "exports": "static_shapes"}  # claims


def laws(module: ModuleType) -> list[Callable[[Mechanism, str], None]]:
    """The laws of a file, in its order: its functions of a mechanism and the name of a host."""
    own = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    return [f for f in own if list(inspect.signature(f).parameters) == ["mechanism", "host"]]


def is_described(item: Settings) -> None:
    """An item has a docstring and a paper, and its text forms give it back."""
    words, generated = (type(item).__doc__ or "").strip(), f"{type(item).__name__}("  # by dataclass, where there is none
    holds(bool(words) and not words.startswith(generated), "no docstring")
    holds(bool(item.paper.strip()), "no paper: name the source, or say that it is your own")
    for text in (item.text(), item.full_text()):
        again = parse(text, foreign=True)
        holds(again == item, f"{text} is read as {again!r}")


def refusal(mechanism: Mechanism, host: str) -> None:
    """A host that lacks what the mechanism requires is refused in three parts, and left untouched."""
    model = build(host)
    before, values = anatomy(model, records=True), copy.deepcopy(model.state_dict())
    try:
        graft(model, mechanism)
    except (HostError, SettingError) as error:
        holds(bool(THREE_PARTS.match(str(error))), f"a message that is not 'found. Expected ... What to do.': {error}")
    else:
        holds(False, "the host takes it")
    holds(anatomy(model, records=True) == before, "the model changed")
    for name, value in model.state_dict().items():
        close(value, values[name], name)
