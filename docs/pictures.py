"""The pictures of docs/img/, drawn with the demo model: `make pictures`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate import demo, draw
from foveate.cli import app
from foveate.demo import hd, video
from foveate.lab import chat

QUESTION = demo.QUESTIONS[0][0]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write(folder: Path) -> Iterator[Path]:
    """Write all pictures, and yield the file of each; without a browser, leave those of the page as they are."""
    CliRunner().invoke(app, ["demo", "--out", str(folder)], catch_exceptions=False)
    yield folder / "kept.png"
    model, processor = demo.load()
    picture = Image.open(demo.PICTURE).convert("RGB")
    inputs = chat.prepare(model, processor, [[picture]], [QUESTION])

    def asked(spec: str) -> foveate.Report:
        with foveate.compress(model, spec) as handle:
            model.generate(**inputs, max_new_tokens=1)
        return handle.report

    (evocut, adav, todre, v2drop, fastv) = map(
        asked, ("evocut:keep=96", "adav:keep=64", "todre:keep=64", "v2drop:keep=96", "fastv:keep=96")
    )
    drawn = {
        "scores.png": draw.scores(picture, evocut.images[0], crop=True),
        "stages.png": draw.stages(picture, v2drop.images[0], crop=True),
        "compare.png": draw.compare(picture, adav.images[0], todre.images[0], (adav.method, todre.method), crop=True),
        "alive.png": draw.alive(evocut, v2drop, fastv, size=(760, 260)),
    }
    for name, image in drawn.items():
        image.save(folder / name, optimize=True)
        yield folder / name
    yield from _larger(folder)
    yield from _page(folder)


def _larger(folder: Path) -> Iterator[Path]:
    """What `foveate run --draw` writes about a large picture, a pair and a clip, by the models that read them."""
    large, before, after = (hd.PICTURES / f"{name}.jpg" for name in ("large", "before", "after"))
    options = ("--model", "demo-hd", "--method", "todre:keep=0.22,positions=original")
    yield _drawn(folder / "hd.png", str(large), hd.EXAMPLES[0][1], *options)
    yield _drawn(folder / "pair.png", str(before), str(after), hd.EXAMPLES[-1][1], *options)
    options = ("--model", "demo-video", "--method", "todre:keep=0.25,positions=original")
    yield _drawn(folder / "video.png", str(video.CLIP), video.QUESTIONS[0][0], *options)


def _drawn(path: Path, *asked: str) -> Path:
    CliRunner().invoke(app, ["run", *asked, "--draw", str(path)], catch_exceptions=False)
    with Image.open(path) as made:
        small = made.convert("RGB")
    small.thumbnail((1000, 1200))
    small.save(path, optimize=True)
    return path


def _page(folder: Path) -> Iterator[Path]:
    """The page that `foveate run --html` writes, on a desk in the light and on a phone in the dark."""
    missing = [name for name, found in (("playwright", find_spec("playwright")), ("chromium", CHROMIUM)) if not found]
    if missing:
        print(f"hint: without {' and '.join(missing)} the pictures of the page stay as they are", file=sys.stderr)
        return
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as place, sync_playwright() as driver:
        path = Path(place) / "out.html"
        asked = ["run", str(demo.PICTURE), QUESTION, "--method", "todre:keep=64", "--html", str(path)]
        CliRunner().invoke(app, asked, catch_exceptions=False)
        browser: Any = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, width, height, scheme in (("page", 1200, 1060, "light"), ("page-phone", 420, 1000, "dark")):
            shown = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            shown.goto(path.as_uri())
            shown.wait_for_selector("html[data-ready=yes]")
            canvas = shown.locator("#panels canvas")
            box = canvas.bounding_box()
            canvas.hover(position={"x": 0.56 * box["width"], "y": 0.8 * box["height"]})
            shown.screenshot(path=folder / f"{name}.png")
            yield folder / f"{name}.png"
        browser.close()
