"""Every block of Python on the pages is run as it stands, or the page says why not."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from foveate import demo
from tests.docs.snippets import ELSEWHERE, ROOT, SERVER, blocks, pages, run, serving

SHOWN = [page for page in pages() if any(block.why is None for block in blocks(page))]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return demo.load()


@pytest.mark.parametrize("page", SHOWN)
def test_page(page: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address: Any = contextlib.nullcontext(SERVER)
    if SERVER in (ROOT / page).read_text(encoding="utf-8"):
        for package in ("fastapi", "uvicorn", "prometheus_client", "openai"):
            pytest.importorskip(package)
        address = serving(*loaded)
    with address as place:
        assert run(page, *loaded, place) == sum(block.why is None for block in blocks(page))


@pytest.mark.parametrize("page", pages())
def test_no_block_is_overlooked(page: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    fences = sum(line.lstrip("> \t").startswith(("```python", "```py", "~~~python")) for line in lines)
    assert fences == len(blocks(page)), "a fence that is indented, or that says more than `python`, is not found"


def test_what_is_not_run_says_why() -> None:
    assert all(block.why != "" for page in pages() for block in blocks(page))
    assert set(ELSEWHERE) <= set(pages())
    assert all(blocks(page) for page in ELSEWHERE)
    for why in ELSEWHERE.values():
        if why.startswith("run in "):
            assert (ROOT / why.removeprefix("run in ")).is_file()


def test_a_wrong_block_is_found(loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "a page.md"
    codes = ("x = 1", "no GPU", "x.keep")
    first, second, third = (f"```python\n{code}\n```\n" for code in codes)
    text = f"# A page\n\n{first}\n<!-- not run: needs a GPU -->\n{second}\n{third}"
    (tmp_path / page).write_text(text, encoding="utf-8")
    monkeypatch.setattr("tests.docs.snippets.ROOT", tmp_path)
    assert [(block.line, block.why) for block in blocks(page)] == [(3, None), (8, "needs a GPU"), (12, None)]
    with pytest.raises(AttributeError, match="keep") as caught:
        run(page, *loaded)
    assert caught.traceback[-1].lineno == 12
