from __future__ import annotations

import ast
import builtins
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate import errors
from foveate.errors import FoveateError, did_you_mean

CLASSES = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, FoveateError)}


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+)\((\w+)\)", errors.__doc__ or ""))
    assert set(drawn) == set(CLASSES) - {"FoveateError"}
    for name, base in drawn.items():
        assert CLASSES[name].__bases__ == (FoveateError, getattr(builtins, base))
        assert CLASSES[name].__doc__


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES.keys())
def test_an_error_says_what_is_wrong_and_what_to_type(cls: type[FoveateError]) -> None:
    error = cls("keep must be at least 1 token, got 0", "keep=64 keeps 64 tokens")
    assert str(error) == "keep must be at least 1 token, got 0\nhint: keep=64 keeps 64 tokens"
    assert (error.message, error.hint) == ("keep must be at least 1 token, got 0", "keep=64 keeps 64 tokens")
    assert str(cls("no hint")) == "no hint"
    assert cls("no hint").hint is None


def _raised() -> Iterator[tuple[str, ast.Call]]:
    source = Path(inspect.getfile(errors)).parent
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in CLASSES:
                yield f"{path.relative_to(source)}:{node.lineno}", call


def test_every_error_raised_has_a_hint() -> None:
    raised = list(_raised())
    assert len(raised) > 50
    assert [where for where, call in raised if len(call.args) + len(call.keywords) < 2] == []


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(errors.BudgetError("what", "do this")))
    assert type(error) is errors.BudgetError
    assert str(error) == "what\nhint: do this"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("evocat", "did you mean `evocut`?"),
        ("evocut2", "did you mean `evocut`?"),
        ("zzz", "known: `adav`, `evocut`, `todre`"),
        ("", "known: `adav`, `evocut`, `todre`"),
    ],
)
def test_the_nearest_name_is_offered(name: str, hint: str) -> None:
    assert did_you_mean(name, ["todre", "evocut", "adav"]) == hint
