"""The report page in a browser: sliders, the fate of a token, sorting, and kept cells found back in the pixels."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate import page
from foveate.report import ImageReport, Report, StageReport

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

RED = (200, 30, 30)
TOKENS = 24  # six columns, four rows


def run(name: str, answer: str, *stages: StageReport) -> page.Run:
    alive = tuple(
        min([len(stage.kept) for stage in stages if stage.site <= layer], default=TOKENS) for layer in range(4)
    )
    image = ImageReport(row=0, index=0, modality="image", grid=(1, 4, 6), tokens=TOKENS, stages=stages, alive=alive)
    return page.Run(report=Report(method=name, model="Llava", layers=4, images=(image,)), answer=answer)


SCORES = tuple(float(7 * token % TOKENS) for token in range(TOKENS))
FEW = run("few", "a cat", StageReport(site=0, method="m", kept=(3, 20), scores=SCORES))
MANY = run("many", "a dog", StageReport(site=0, method="m", kept=(3, 4, 5, 11, 20), scores=SCORES))
INSIDE = run(
    "inside",
    "a cow",
    StageReport(site=1, method="m", kept=(0, 1, 2, 7), scores=SCORES),
    StageReport(site=3, method="m", kept=(7,)),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page with three runs, opened from the disk without a network; what goes wrong in it fails the test."""
    path = tmp_path / "out.html"
    picture = Image.new("RGB", (600, 400), RED)
    page.save(path, [picture], [FEW, MANY, INSIDE], question="what is it?", plain=page.Plain(answer="a dog"))
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    opened, wrong = context.new_page(), []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(asked.url))
    opened.goto(path.as_uri())
    opened.wait_for_selector("html[data-ready=yes]")
    yield opened
    context.close()
    assert wrong == []


def slide(opened: Any, name: str, value: int) -> None:
    opened.locator(f"#{name}").fill(str(value))


def lit(opened: Any) -> set[int]:
    """Return the cells of the picture that are not dimmed, from its pixels."""
    pixels = opened.evaluate(
        """() => {
            const canvas = document.querySelector("#panels canvas"), pen = canvas.getContext("2d");
            return [...Array(24).keys()].map(cell => [...pen.getImageData(
                canvas.width * (cell % 6 + .5) / 6, canvas.height * (Math.floor(cell / 6) + .5) / 4, 1, 1).data]);
        }"""
    )
    return {cell for cell, (red, green, blue, _) in enumerate(pixels) if max(red, green, blue) > 150}


def test_the_budget_slider_changes_cells_answer_and_table(shown: Any) -> None:
    assert shown.inner_text("h1") == "what is it?"
    assert shown.inner_text("#full") == "a dog"
    assert lit(shown) == {3, 20}
    assert shown.inner_text("#answer") == "a cat"
    slide(shown, "run", 1)
    assert lit(shown) == {3, 4, 5, 11, 20}
    assert shown.inner_text("#answer") == "a dog"
    assert shown.inner_text("#answered-by") == shown.inner_text("#run-name") == "many"
    assert shown.inner_text("#runs tr.here th") == "many"
    assert "24 → 5" in shown.inner_text(".stages:not([hidden])")


def test_the_layer_slider_shows_what_each_layer_reads(shown: Any) -> None:
    slide(shown, "run", 2)
    for layer, cells in enumerate((set(range(24)), {0, 1, 2, 7}, {0, 1, 2, 7}, {7})):
        slide(shown, "layer", layer)
        assert lit(shown) == cells
        assert shown.inner_text("#layer-name") == f"layer {layer} of 4 reads {len(cells)} tokens"


def test_a_cell_tells_its_token_score_and_fate(shown: Any) -> None:
    slide(shown, "run", 2)
    canvas = shown.locator("#panels canvas")
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] * 2.5 / 6, "y": box["height"] * 0.5 / 4})
    assert shown.inner_text("#token").split("\n") == [*("Token 2", "row 0, column 2", "score 14; left before layer 3")]
    assert shown.inner_text("#trace tr.here").split("\t") == ["2", "0", "2", "14", "before layer 3"]
    canvas.focus()
    shown.keyboard.press("ArrowDown")
    assert shown.inner_text("#token").startswith("Token 8")
    shown.keyboard.press("ArrowLeft")
    assert "Token 7" in shown.inner_text("#token")
    assert "stays to the end" in shown.inner_text("#token")


def test_the_trace_sorts_by_every_heading(shown: Any) -> None:
    def column(place: int) -> list[str]:
        return shown.locator(f"#trace tbody td:nth-child({place + 1})").all_inner_texts()

    assert column(0) == [str(token) for token in range(24)]
    shown.click("#trace th:nth-child(4) button")
    assert [float(score) for score in column(3)] == sorted(SCORES, reverse=True)
    assert shown.get_attribute("#trace th:nth-child(4)", "aria-sort") == "descending"
    shown.click("#trace th:nth-child(4) button")
    assert [float(score) for score in column(3)] == sorted(SCORES)
    shown.click("#trace th:nth-child(5) button")
    assert column(4) == ["before the LLM"] * 22 + ["stays"] * 2


def test_beside_another_budget_what_only_one_keeps_is_counted(shown: Any) -> None:
    shown.select_option("#beside", "1")
    key = shown.inner_text("#key")
    assert "0 only few" in key
    assert "3 only many" in key
    assert "2 both" in key
    assert lit(shown) == {3, 4, 5, 11, 20}


def test_scores_are_shown_as_a_map(shown: Any) -> None:
    shown.check("input[value=scores]")
    assert "higher stays" in shown.inner_text("#key")
    assert shown.inner_text("#key").startswith("0")
    assert len(lit(shown)) > 2


def test_a_method_inside_the_llm_is_first_shown_after_its_first_stage(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    page.save(path, [Image.new("RGB", (600, 400), RED)], [FEW, INSIDE], start=1)
    opened = browser.new_page()
    opened.goto(path.as_uri())
    opened.wait_for_selector("html[data-ready=yes]")
    assert opened.input_value("#layer") == "1"
    assert lit(opened) == {0, 1, 2, 7}
    opened.close()


@pytest.mark.parametrize("width", [1200, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "out.html"
    long = dataclasses.replace(FEW, answer="word " * 60 + "x" * 80)
    page.save(path, [Image.new("RGB", (600, 400), RED)], [long, MANY], question="why? " * 30)
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened.goto(path.as_uri())
    opened.wait_for_selector("html[data-ready=yes]")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = (opened.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    assert (brightness(ink) < brightness(paper)) == (scheme == "light")
    opened.close()


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
