from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate.methods  # noqa: F401 - registers the built-in methods
from foveate import registry
from foveate.core import Chain, Evidence, PromptMethod, Selection
from foveate.errors import BudgetError, FoveateError, UnknownMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class First(PromptMethod):
    """Keep the first tokens."""

    name: ClassVar[str] = "first"

    def select(self, evidence: Evidence, site: int) -> Selection:
        return Selection(keep=torch.arange(self.count(evidence.n)))


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry._load.cache_clear()
    yield
    registry._load.cache_clear()


@pytest.mark.parametrize(
    "spec",
    [
        "evocut:keep=64",
        "evocut:keep=0.25,start=6",
        "todre:keep=0.1",
        "todre:keep=0.1,exit=0.5",
        "todre:keep=64,exit=none",
        "adav:keep=64,compat=true",
        "v2drop",
        "v2drop:keep=128",
        "v2drop:stages=3@0.5/17@0.3/22@0",
        "random:keep=64,seed=7",
        "grid:keep=64",
        "pool:keep=64",
        "evocut:keep=128 + v2drop:keep=64",
    ],
)
def test_specs_round_trip(spec: str) -> None:
    method = registry.from_spec(spec)
    assert registry.to_spec(method) == spec
    assert registry.from_spec(registry.to_spec(method)) == method
    assert registry.from_spec(method) is method


@given(keep=st.integers(1, 10**6) | st.floats(0, 1, exclude_min=True), alpha=st.floats(0, 1, exclude_max=True))
def test_numbers_in_specs_are_exact(keep: float | int, alpha: float) -> None:
    cls = registry.get("evocut")
    method = cls(keep=keep, alpha=alpha)  # type: ignore[call-arg]
    again = registry.from_spec(registry.to_spec(method))
    assert again == method
    assert type(again.keep) is type(keep)  # type: ignore[attr-defined]


def test_spaces_do_not_matter_and_a_plus_makes_a_chain() -> None:
    assert registry.from_spec(" evocut : keep = 64 ".replace(" = ", "=")) == registry.from_spec("evocut:keep=64")
    chain = registry.from_spec("evocut:keep=128+v2drop:keep=64")
    assert isinstance(chain, Chain)
    assert [part.name for part in chain.methods] == ["evocut", "v2drop"]


@pytest.mark.parametrize(
    ("spec", "error", "complaint", "hint"),
    [
        ("evocat:keep=64", UnknownMethod, "unknown method: 'evocat'", "did you mean `evocut`?"),
        ("", UnknownMethod, "unknown method: ''", "known: "),
        ("zebra", UnknownMethod, "unknown method: 'zebra'", "`evocut`"),
        ("evocut", BudgetError, "`evocut` needs keep", "type `evocut:keep=64`"),
        ("evocut:64", BudgetError, "an option is written key=value, got '64'", "type `evocut:keep=64`"),
        ("evocut:keep=64,alhpa=0.9", BudgetError, "`evocut` has no option 'alhpa'", "did you mean `alpha`?"),
        ("evocut:keep=0", BudgetError, "keep must be at least 1 token, got 0", "keep=64"),
        ("evocut:keep=-1", BudgetError, "keep must be at least 1 token, got -1", "keep=64"),
        ("evocut:keep=64.0", BudgetError, "a float keep is a fraction", "keep=64"),
        ("evocut:keep=many", BudgetError, "keep must be an int or a float, got 'many'", "keep=64"),
        ("evocut:keep=4,keep=5", BudgetError, "option 'keep' is given twice", "once"),
        ("evocut:keep=64,alpha=x", BudgetError, "alpha must be a number, got 'x'", "help(foveate.EvoCut)"),
        ("evocut:keep=64,directions=2.5", BudgetError, "directions must be a whole number", "help(foveate.EvoCut)"),
        ("evocut:keep=64,share=both", BudgetError, "share must be crop or global, got 'both'", "help(foveate.EvoCut)"),
        ("adav:keep=64,compat=maybe", BudgetError, "compat must be true or false", "help(foveate.AdaV)"),
        ("todre:keep=64,exit=abc", BudgetError, "exit must be a number or none", "help(foveate.ToDRE)"),
        ("v2drop:stages=3", BudgetError, "stages must be 3@0.5/17@0.3 or none, got '3'", "help(foveate.V2Drop)"),
        ("v2drop:stages=a@0.5", BudgetError, "stages must be 3@0.5/17@0.3 or none", "help(foveate.V2Drop)"),
        ("evocut:keep=", BudgetError, "keep must be an int or a float, got ''", "keep=64"),
    ],
)
def test_a_wrong_spec_is_a_named_error_with_a_hint(
    spec: str, error: type[FoveateError], complaint: str, hint: str
) -> None:
    with pytest.raises(error) as caught:
        registry.from_spec(spec)
    assert complaint in caught.value.message
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_every_method_is_frozen_documented_and_found_by_its_name() -> None:
    for name in registry.names():
        cls = registry.get(name)
        assert cls.name == name
        assert dataclasses.is_dataclass(cls)
        with pytest.raises(dataclasses.FrozenInstanceError):
            registry.from_spec(f"{name}:keep=64").positions = "packed"  # type: ignore[misc]
        for section in (
            "Paper:",
            "Idea:",
            "Sites:",
            "Keeps:",
            "Differs from the paper:",
            "Args:",
            "Raises:",
            "Example:",
        ):
            assert section in (cls.__doc__ or ""), f"{name} lacks {section}"


@pytest.mark.usefixtures("clean_registry")
def test_an_outsider_registers_through_the_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="first", value=f"{__name__}:First", group="foveate.methods")
    monkeypatch.setattr(EntryPoint, "load", lambda self: First)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "foveate.methods" else [])
    assert "first" in registry.names()
    assert registry.from_spec("first:keep=3") == First(keep=3)
    assert registry.to_spec(First(keep=3)) == "first:keep=3"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuples(First):
    """Options of all kinds."""

    name: ClassVar[str] = "tuples"

    layers: tuple[int, ...] = ()
    window: tuple[float, float] | None = None
    words: tuple[str, ...] = ("a",)
    stages: tuple[tuple[int, float], ...] = ()
    label: str = ""


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({}, "tuples:keep=4"),
        ({"layers": (2, 5, 9)}, "tuples:keep=4,layers=2/5/9"),
        ({"layers": (2,)}, "tuples:keep=4,layers=2/"),
        ({"words": ()}, "tuples:keep=4,words=/"),
        ({"words": ("b", "c")}, "tuples:keep=4,words=b/c"),
        ({"window": (0.25, 0.5)}, "tuples:keep=4,window=0.25/0.5"),
        ({"stages": ((2, 0.5),)}, "tuples:keep=4,stages=2@0.5"),
        ({"stages": ((2, 0.5), (4, 0.25))}, "tuples:keep=4,stages=2@0.5/4@0.25"),
        ({"label": "a/b@c"}, "tuples:keep=4,label=a/b@c"),
    ],
)
def test_tuples_of_an_outsider_round_trip(options: dict[str, Any], spec: str) -> None:
    registry.register(Tuples)
    method = Tuples(keep=4, **options)
    assert registry.to_spec(method) == spec
    assert registry.from_spec(spec) == method


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    ("option", "kind"), [("layers=a/b", "3/17"), ("window=1/2/3", "3/17"), ("stages=3/4", "3@0.5")]
)
def test_a_wrong_tuple_is_a_named_error(option: str, kind: str) -> None:
    registry.register(Tuples)
    with pytest.raises(BudgetError, match=kind):
        registry.from_spec(f"tuples:keep=4,{option}")


@pytest.mark.usefixtures("clean_registry")
def test_a_name_is_taken_once_and_well_formed() -> None:
    assert registry.register(First) is First
    assert registry.register(First) is First

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(First):
        """Another of the same name."""

    with pytest.raises(ValueError, match="the name 'first' is taken by First"):
        registry.register(Other)
    Other.name = "Not A Name"
    with pytest.raises(ValueError, match="lower-case letters"):
        registry.register(Other)
