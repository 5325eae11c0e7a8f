"""The checks of one item, for this suite and for the suites of third parties."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import ModuleType

from vitreous.base.errors import HostError, SettingError, UnknownName
from vitreous.base.text_form import Settings, values_of
from vitreous.grafting import graft
from vitreous.lens.probe import PROBES, Probe
from vitreous.mechanism import MECHANISMS, Mechanism
from vitreous.reducer import Reducer
from vitreous.tasks import TASKS, Task
from vitreous.testing import laws_everywhere, laws_items, laws_once, laws_reducers
from vitreous.testing.check import THREE_PARTS, Check, close, holds
from vitreous.testing.hosts import HOSTS, anatomy, build, lacks
from vitreous.train.updates import UPDATES, Update


def contract_checks(item: Settings | str, *, hosts: Iterable[str] | None = None) -> list[Check]:
    """The checks of a mechanism, task, update or probe, or of its text form.

    Each has a `name` and a `run()`, which raises ContractError. The item is checked as it is set;
    the settings of a mechanism have to fit the small hosts (`small_hosts`). hosts: names of those
    that a mechanism is checked in; default all. A text is "svda" or, from another package,
    "package.module.Class:setting=value". No pytest is needed to run them:

        @pytest.mark.parametrize("check", contract_checks(Mine()), ids=lambda check: check.name)
        def test_contract(check):
            check.run()

    Raises SettingError for anything else, UnknownName for a text that names none.
    """
    if isinstance(item, str):
        item = parsed(item)
    if isinstance(item, Task | Probe | Update):
        laws_of = {Task: laws_items.OF_TASKS, Probe: laws_items.OF_PROBES, Update: ()}
        own = next(own for kind, own in laws_of.items() if isinstance(item, kind))
        dropped = laws_items.parts_add_up if getattr(item, "couples_images", False) else None
        return [Check(law, item) for law in (is_described, *own) if law is not dropped]
    if not isinstance(item, Mechanism):
        raise SettingError(f"Found {item!r}. Expected a mechanism, task, update or probe. Give for example svda.")
    names = list(HOSTS if hosts is None else hosts)
    taking = [name for name in names if not lacks(name, item)]
    checks = [Check(is_described, item), *(Check(refusal, item, name) for name in names if name not in taking)]
    once = (laws_once, *([laws_reducers] if isinstance(item, Reducer) else []))
    for module, where in ((laws_everywhere, taking), *((module, taking[:1]) for module in once)):
        held = [law for law in laws(module) if getattr(item, UNLESS.get(law.__name__, "name"))]
        checks += [Check(law, item, name) for law in held for name in where]
    return checks


CATALOGUES = (MECHANISMS, TASKS, UPDATES, PROBES)
# A law is not checked unless the mechanism claims this.
UNLESS = {"plain_checkpoint_loads": "keeps_weights", "compiles": "static_shapes", "exports": "static_shapes"}


def parsed(text: str) -> Settings:
    """The item of any catalogue, or of another package. Raises UnknownName, SettingError."""
    stem = text.partition(":")[0].strip()
    for catalogue in (catalogue for catalogue in CATALOGUES if stem in catalogue.files):
        return catalogue.parse(text)
    for catalogue in CATALOGUES:
        with suppress(UnknownName):
            return catalogue.parse(text, foreign=True)
    return MECHANISMS.parse(text, foreign=True)


def laws(module: ModuleType, arguments: Sequence[str] = ("mechanism", "host")) -> list[Callable[..., None]]:
    """The laws of a file, in its order: its functions of a mechanism and the name of a host.

    arguments: other names of what they are functions of.
    """
    own = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    return [f for f in own if list(inspect.signature(f).parameters) == list(arguments)]


def is_described(item: Settings) -> None:
    """An item has a docstring and names its paper, and its text forms give it back."""
    # where there is none, dataclass writes "Name(setting: type = default)"
    words, generated = (type(item).__doc__ or "").strip(), f"{type(item).__name__}("
    holds(bool(words) and not words.startswith(generated), "no docstring")
    holds(not isinstance(item, Mechanism) or bool(item.paper.strip()), "no paper: name one, or say that it is your own")
    for text in (item.text(), item.full_text()):
        name, _, settings = text.partition(":")
        again = type(item)(**values_of(type(item), name, settings))
        holds(again == item, f"{text} is read as {again!r}")


def refusal(mechanism: Mechanism, host: str) -> None:
    """A host that lacks what is required is refused in three parts, and left untouched."""
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
