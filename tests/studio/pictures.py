"""Writes docs/img/studio*.png: the page in a headless Chromium. `make studio-pictures`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.studio.browser import ask, looking, served

VIEWS = {"studio": (1200, False), "studio-narrow": (420, False), "studio-dark": (1200, True)}


def main(folder: Path) -> None:
    """Ask the first question by two methods, and write what the page looks like."""
    with tempfile.TemporaryDirectory() as place, served(Path(place)) as studio:
        for name, (width, dark) in VIEWS.items():
            with looking(studio.url, width, dark=dark) as page:
                ask(page)
                page.evaluate("document.activeElement.blur()")
                page.screenshot(path=folder / f"{name}.png", full_page=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
