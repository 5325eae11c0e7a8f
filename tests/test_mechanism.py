"""Settings, their text form, and the catalogue."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
import typing
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import vitreous
from vitreous import SPC, SVDA, ExtraTokens, Mechanism, catalogue, parse
from vitreous.base.errors import SettingError, UnknownName, VitreousError
from vitreous.base.text_form import settings, summary
from vitreous.mechanism import MECHANISMS, class_by_name, mechanism_class

CLASSES = [mechanism_class(stem) for stem in catalogue()]
MANY_SETTINGS = {"spc": 10}  # more than eight: each is a control or a variant that the paper or its critics ask for


@dataclass(frozen=True, kw_only=True)
class Everything(Mechanism):
    """A mechanism with a setting of every kind."""

    many: tuple[int, ...] | None = None
    mixed: tuple[int, float, bool] = (1, 0.5, False)
    words: tuple[str, ...] = ("a",)
    count: int = 1
    share: float = 0.5
    flag: bool = False
    text_: str = "x"
    choice: Literal["a", "b"] = "a"
    maybe: float | None = None


# -- text form ---------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(allow_nan=False, width=64)
WORDS = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True).filter(lambda word: word != "none")


def values(kind: object) -> st.SearchStrategy:
    """Any value of a setting's type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return st.lists(values(inner[0]), min_size=1, max_size=6).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, inner))
    if inner:  # X | None
        return st.one_of(*(st.none() if k is type(None) else values(k) for k in inner))
    return {int: st.integers(0, 10**6), float: NUMBERS, bool: st.booleans(), str: WORDS}[kind]


@pytest.mark.parametrize("cls", [*CLASSES, Everything], ids=lambda cls: cls.__name__)
def test_text_form_goes_there_and_back(cls):
    @hypothesis_settings(max_examples=200, deadline=None)
    @given(st.fixed_dictionaries({}, optional={name: values(kind) for name, kind in settings(cls).items()}))
    def there_and_back(given_settings):
        try:
            mechanism = cls(**given_settings)
        except SettingError as error:  # a value out of range
            assert " Expected " in str(error)
            return
        again = parse(mechanism.text(), foreign=True)
        assert again == mechanism
        assert again.text() == str(mechanism)
        assert hash(again) == hash(mechanism)

    there_and_back()


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("svda:layers=6-11", (6, 7, 8, 9, 10, 11)),
        ("svda:layers=6+8+10", (6, 8, 10)),
        ("svda:layers=0+3-5", (0, 3, 4, 5)),
        ("svda:layers=7", (7,)),
        ("svda:layers=none", None),
        (" svda : layers = 1 + 2 ", (1, 2)),
    ],
)
def test_lists_and_ranges(text, layers):
    assert parse(text).layers == layers
    assert parse(parse(text).text()).layers == layers


def test_only_what_differs_is_written():
    assert SVDA().text() == "svda"
    assert SVDA(layers=range(6, 12), scale="one").text() == "svda:layers=6-11,scale=one"
    assert SVDA(layers=[1, 2]).text() == "svda:layers=1+2"
    assert SVDA(layers=3, orthogonality=0).text() == "svda:layers=3,orthogonality=0.0"
    assert parse("svda:orthogonality=1e-05").orthogonality == 1e-5
    assert ExtraTokens(kind="register").text() == "extra_tokens:kind=register"
    assert str(SPC(sketch=(4, 1, True), ssva=True)) == "spc:sketch=4+1+true,ssva=true"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("svdaa", UnknownName, "Unknown mechanism 'svdaa'. Did you mean 'svda'"),
        ("zzz", UnknownName, "vitreous list"),
        ("svda:scal=one", UnknownName, "Unknown setting of svda 'scal'. Did you mean 'scale'"),
        ("svda:scale=onne", SettingError, "Expected one of 'paper', 'one', 'sqrt', 'learned'"),
        ("svda:scale=one,scale=one", SettingError, "Found scale twice"),
        ("svda:layers=3,6,9", SettingError, "a list is joined by +"),
        ("svda:layers=9-6", SettingError, "Found the range 9-6"),
        ("svda:layers=a", SettingError, "Found svda:layers='a'"),
        ("svda:layers=", SettingError, "layers"),
        ("svda:entropy=much", SettingError, "Expected a number"),
        ("svda:entropy=nan", SettingError, "Expected a number"),
        ("svda:entropy=-1", SettingError, "Expected 0 (off) or more"),
        ("svda:seed=1.5", SettingError, "Expected a whole number"),
        ("spc:ssva=maybe", SettingError, "Expected true or false"),
        ("spc:sketch=4+1", SettingError, "2 values. Expected 3"),
        ("spc:tokens=0", SettingError, "Expected"),
        ("extra_tokens:tokens=0", SettingError, "Expected 1 or more"),
        ("svda;scale=one", UnknownName, "Unknown mechanism"),
        ("", UnknownName, "Unknown mechanism ''"),
    ],
)
def test_bad_text(text, error, message):
    with pytest.raises(error, match=re.escape(message)):
        parse(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("many", ()),
        ("many", 1.5),
        ("many", "x"),
        ("count", 1.5),
        ("count", True),
        ("count", "1"),
        ("share", float("nan")),
        ("share", None),
        ("flag", 1),
        ("text_", "a,b"),
        ("text_", "a=b"),
        ("choice", "c"),
        ("mixed", (1, 2)),
        ("mixed", (1, "a", True)),
        ("words", (1, 2)),
        ("many", (1, 2.5)),
        ("many", (True,)),
    ],
)
def test_a_value_of_the_wrong_type(name, value):
    with pytest.raises(SettingError, match=rf"Everything\({name}=.* Expected "):
        Everything(**{name: value})


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SVDA().scale = "one"
    with pytest.raises(TypeError):
        SVDA((1, 2))


# -- names from elsewhere ----------------------------------------------------------------------------------------------


def test_a_dotted_name_is_imported_only_when_asked_for(monkeypatch):
    text = "contract.elsewhere.Nothing:count=3"
    with pytest.raises(UnknownName, match="Unknown mechanism"):
        parse(text)
    assert "contract.elsewhere" not in sys.modules
    mechanism = parse(text, foreign=True)
    assert mechanism.text() == text
    assert "contract.elsewhere" in sys.modules


@pytest.mark.parametrize("name", ["no_such_package.X", "contract.hosts.nothing", "contract.hosts.build", "pathlib.Path"])
def test_a_dotted_name_that_is_none(name):
    with pytest.raises(UnknownName):
        parse(name, foreign=True)


def test_a_mechanism_that_says_nothing():
    with pytest.raises(TypeError, match="define changes"):
        Everything().changes(None)


# -- the catalogue -----------------------------------------------------------------------------------------------------


def test_the_catalogue_is_the_folder():
    files = {file.stem: file for file in MECHANISMS.folder.rglob("*.py") if file.stem != "__init__"}
    assert catalogue() == files
    assert list(catalogue()) == sorted(files)
    for stem, cls in zip(catalogue(), CLASSES, strict=True):
        assert cls().name == stem
        assert cls.__name__.lower() == stem.replace("_", "")
        assert class_by_name(cls.__name__) is cls
        assert getattr(vitreous, cls.__name__) is cls
    with pytest.raises(AttributeError, match="no attribute 'Svdb'"):
        _ = vitreous.Svdb
    assert not hasattr(vitreous, "_private")


SECTIONS = ["Paper", "Differs", "At start", "Cost", "Settings", "Raises"]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_mechanism_keeps_the_house_rules(cls):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    assert all(field.default is not dataclasses.MISSING and field.kw_only for field in fields.values())
    assert len(fields) <= MANY_SETTINGS.get(cls().name, 8)
    assert () not in [field.default for field in fields.values()]
    assert cls.__dataclass_params__.frozen
    # An attribute without annotation would silently be no setting.
    for name, value in vars(cls).items():
        assert name.startswith("_") or name in cls.__annotations__ or callable(value) or isinstance(value, property), name
    assert cls.paper
    for text in cls.examples:
        assert type(parse(text)) is cls
        assert parse(parse(text).text()) == parse(text)
    lines = inspect.cleandoc(cls.__doc__).splitlines()
    assert len(lines) <= 25
    assert summary(cls) == lines[0]
    assert lines[0].endswith(".")
    found = [match[1] for line in lines if (match := re.match(rf"({'|'.join(SECTIONS)}): ", line))]
    assert found == [name for name in SECTIONS if name in found]
    assert {"Paper", "At start", "Cost", "Settings", "Raises"} <= set(found)
    said = cls.__doc__.partition("Settings:")[2]
    assert all(re.search(rf"\b{name}\b", said) for name in fields), "every setting is explained"


@pytest.mark.slow
def test_a_built_wheel_holds_the_catalogue(tmp_path):
    """Folders without __init__.py are easily left out of a package, or hidden from pkgutil."""
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=root, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    for part in ("weights/cutouts", "report"):  # what is no code: weights, and the parts of a page
        files = {path.name for path in (root / "src/vitreous" / part).rglob("*") if path.suffix not in ("", ".pyc")}
        assert {path.name for path in (tmp_path / "unpacked/vitreous" / part).rglob("*") if path.is_file()} == files
    code = (
        "import vitreous, pathlib; assert pathlib.Path(vitreous.__file__).is_relative_to(pathlib.Path.cwd());"
        "print(*[vitreous.mechanism.mechanism_class(name)() for name in vitreous.catalogue()])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "unpacked", capture_output=True, text=True, check=True)
    assert out.stdout.split() == list(catalogue())


def test_errors_share_one_base():
    assert issubclass(UnknownName, VitreousError)
    assert issubclass(SettingError, VitreousError)
