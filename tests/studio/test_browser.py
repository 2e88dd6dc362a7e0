"""The studio in a real browser: a picture is brought, a question asked, a budget moved, two methods compared."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

pytest.importorskip("gradio", reason="needs gradio: make test-studio")
pytest.importorskip("playwright", reason="needs playwright: make test-studio")

from tests.studio.browser import CHROMIUM, Served, ask, looking, served, settled, shown

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("studio")) as there:
        yield there


@pytest.fixture
def page(studio: Served) -> Iterator[Any]:
    with looking(studio.url) as open_page:
        yield open_page
        assert open_page.strange == []
        assert open_page.wrong == []
    assert studio.calls == ""


def cells(page: Any, row: str) -> list[str]:
    """Return a row of the table of numbers."""
    for line in page.query_selector_all("#numbers tbody tr"):
        if line.query_selector("th").inner_text().strip() == row:
            return [cell.inner_text().strip() for cell in line.query_selector_all("td")]
    raise AssertionError(f"no row {row!r} in {shown(page, '#numbers')}")


def move(page: Any, place: str, keep: int) -> None:
    """Move a slider by its keys, as a hand does: it passes through other budgets on the way."""
    before = shown(page, "#numbers")
    slider = page.locator(f"#keep-{place} input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    for _ in range(keep - 1):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == str(keep)
    page.wait_for_function("before => document.querySelector('#numbers').innerText !== before", arg=before)
    settled(page)


def test_a_picture_is_brought_and_asked_about(page: Any, tmp_path: Path) -> None:
    picture = Image.new("RGB", (400, 300), (120, 150, 110))
    ImageDraw.Draw(picture).ellipse((140, 90, 260, 210), (220, 20, 20))
    picture.save(tmp_path / "own.png")
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", tmp_path / "own.png")
    page.wait_for_selector("#picture img")
    ask(page, "what colour is the circle?")
    assert "red" in shown(page, "#card-all")
    assert "64 of 576 tokens" in shown(page, "#card-a")
    for place in ("all", "a", "b"):
        width, height = page.eval_on_selector(f"#kept-{place} img", "i => [i.naturalWidth, i.naturalHeight]")
        assert width / height == pytest.approx(4 / 3, abs=0.01)


def test_two_methods_are_compared_and_a_budget_is_moved(page: Any) -> None:
    ask(page)
    assert cells(page, "visual tokens") == ["576", "64", "64"]
    assert all(re.fullmatch(r"[\d.]+ ms", cell) for cell in cells(page, "encode"))
    both, first, second = map(int, re.findall(r": (\d+)\.", shown(page, "#words")))
    assert (both + first, both + second) == (64, 64)
    other = cells(page, "total")[2]
    move(page, "a", 24)
    assert cells(page, "visual tokens") == ["576", "24", "64"]
    assert cells(page, "encode")[1] == "re-used"
    assert cells(page, "total")[2] == other  # only the method whose budget moved is asked again
    assert "24 of 576 tokens" in shown(page, "#card-a")
    assert "evocut:keep=24" in shown(page, "#layers")


def test_another_method_takes_its_place(page: Any) -> None:
    ask(page)
    field = page.locator("#method-b input")
    field.fill("v2drop")
    field.press("Enter")
    page.wait_for_function("document.querySelector('#card-b').innerText.includes('v2drop')")
    settled(page)
    assert cells(page, "visual tokens") == ["576", "64", "576"]
    assert float(cells(page, "mean per layer")[2]) == pytest.approx(64, abs=0.5)


def test_a_picture_is_chosen_and_brings_its_questions(page: Any) -> None:
    page.click("#gallery button >> nth=1")
    page.wait_for_function("document.querySelector('#ideas').innerText.includes('black triangle')")
    page.click("#ideas button >> nth=1")
    page.wait_for_function("document.querySelector('#question textarea').value.includes('middle')")
    ask(page)
    assert "triangle" in shown(page, "#card-all")


def test_what_is_wrong_is_said_where_it_is(page: Any) -> None:
    ask(page)
    field = page.locator("#method-a input")
    field.fill("evcut")
    field.press("Enter")
    page.wait_for_selector("#card-a [role=alert]")
    assert "unknown method: 'evcut'" in shown(page, "#card-a")
    assert "did you mean `evocut`?" in shown(page, "#card-a")
    assert "64 of 576 tokens" in shown(page, "#card-b")
    page.fill("#question textarea", "")
    page.click("#ask")
    page.wait_for_selector("#problem [role=alert]")
    assert "there is no question" in shown(page, "#problem")
    assert "Traceback" not in page.content()


def test_a_broken_picture_is_refused(page: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", tmp_path / "broken.png")
    page.wait_for_timeout(1500)
    page.click("#ask")
    page.wait_for_selector("#problem [role=alert]")
    assert "not a readable picture" in shown(page, "#problem")


def test_it_fits_a_telephone(studio: Served) -> None:
    with looking(studio.url, 420, 900) as page:
        ask(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_ctrl_c_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    with served(tmp_path) as there:
        with looking(there.url) as page:
            page.click("#ask")
            page.wait_for_timeout(300)  # the model is answering
            there.process.send_signal(signal.SIGINT)
            _, said = there.process.communicate(timeout=60)
        assert there.process.returncode == 0
        assert "Traceback" not in said
        assert not list(tmp_path.glob("foveate-studio-*"))
