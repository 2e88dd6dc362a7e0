"""The page `docs/add-a-method.md` is run as it stands."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from foveate import registry
from foveate.selection import select_all
from tests.methods.helpers import array, make_evidence, top

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text(encoding="utf-8")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the page's code on a registry of its own, and return what it defines."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    module = ModuleType("a_method_of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        assert len(block.splitlines()) < 40
        exec(compile(block, "docs/add-a-method.md", "exec", dont_inherit=True), vars(module))
    return vars(module)


def test_the_example_is_a_method(names: dict[str, Any]) -> None:
    evidences = [make_evidence(seed=seed) for seed in range(3)]
    method = registry.from_spec("fastervlm:keep=5")
    assert isinstance(method, names["FasterVLM"])
    for evidence, answer in zip(evidences, select_all(method, evidences, 0), strict=True):
        assert answer.keep.tolist() == top(array(evidence.encoder_saliency), 5)


def test_the_example_inside_the_llm_is_a_method(names: dict[str, Any]) -> None:
    evidences = [make_evidence(seed=seed) for seed in range(3)]
    method = names["Vote"]()
    assert method.sites(32) == (16,)
    for evidence, answer in zip(evidences, select_all(method, evidences, 16), strict=True):
        assert answer.keep.tolist() == top(array(evidence.relevance).sum(0), 6)
    assert names["Vote"](keep=384).expected(576, 576, 16, 32) == 192
    assert registry.from_spec("v2drop:stages=8@0.5/16@12").stages == names["Vote"](stages=((8, 0.5), (16, 12))).stages


def test_a_plug_in_is_found_by_its_entry_point(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="vote", value="my_package.vote:Vote", group="foveate.methods")
    monkeypatch.setattr(EntryPoint, "load", lambda self: names["Vote"])
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    registry._load.cache_clear()
    assert registry.from_spec("vote:keep=0.75") == names["Vote"](keep=0.75)
    assert registry.names()[-1] == "vote"
    registry._load.cache_clear()


def test_every_file_and_evidence_that_the_page_names_exists() -> None:
    root = Path(__file__).parents[2]
    for name in re.findall(r"`(methods/\w+\.py)`", PAGE):
        assert (root / "src" / "foveate" / name).is_file()
    evidence = make_evidence()
    for names in re.findall(r"^\| (`[^|]*) \|", PAGE, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(evidence, name)
