"""Writes docs/img/studio*.png: the page in a headless Chromium. `make pictures`."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.studio.browser import ask, looking, served

VIEWS = {"studio": (1200, False), "studio-narrow": (420, False), "studio-dark": (1200, True)}


def main(folder: Path) -> None:
    """Ask the first question by two methods, and write what the page looks like."""
    with tempfile.TemporaryDirectory() as place, served(Path(place)) as studio:
        for name, (width, dark) in VIEWS.items():
            with looking(studio.url, width, dark=dark) as page:
                ask(page)
                page.evaluate("document.activeElement.blur()")
                shot = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
                shot.quantize(256).save(folder / f"{name}.png", optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
