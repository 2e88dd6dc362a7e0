"""The studio in a process of its own, and a headless Chromium that looks at it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Where the studio connects to, if not to this machine: python imports `sitecustomize` before all else.
_WATCH = """
import os, socket

_connect = socket.socket.connect

def connect(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        with open(os.environ["FOVEATE_CALLS"], "a") as file:
            file.write(f"{address}\\n")
        raise OSError("no network here")
    return _connect(self, address)

socket.socket.connect = connect
"""


class Served:
    """A studio that is there to be asked.

    Args:
        process: Its process.
        url: Its page.
        folder: Where it leaves files, and where `calls` are written down.
    """

    def __init__(self, process: subprocess.Popen[str], url: str, folder: Path) -> None:
        self.process, self.url, self.folder = process, url, folder

    @property
    def calls(self) -> str:
        """Addresses of other machines that it asked for."""
        log = self.folder / "calls"
        return log.read_text(encoding="utf-8") if log.exists() else ""


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Served]:
    """Start ``foveate studio`` on a free port; kill it at the end if it is still there."""
    (folder / "sitecustomize.py").write_text(_WATCH, encoding="utf-8")
    env = os.environ | {
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT / 'src'}",
        "FOVEATE_CALLS": str(folder / "calls"),
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-m", "foveate", "studio", "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"at (http://\S+)", line):
                yield Served(process, found[1], folder)
                return
        raise AssertionError("".join(said))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextmanager
def looking(url: str, width: int = 1200, height: int = 900, *, dark: bool = False) -> Iterator[Any]:
    """Open a page in Chromium; every request to another place than the page's is kept in ``page.strange``."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        page.set_default_timeout(60_000)
        page.strange, page.wrong = [], []
        local = (url, "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(local) or page.strange.append(request.url))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#ask")
        yield page
        browser.close()


def ask(page: Any, question: str | None = None) -> None:
    """Type a question, press the button, and wait until all three have answered."""
    before = shown(page, "#numbers")
    if question is not None:
        page.fill("#question textarea", question)
    page.click("#ask")
    page.wait_for_function("before => document.querySelector('#layers svg') && "
                           "document.querySelector('#numbers').innerText !== before", arg=before)  # fmt: skip
    settled(page)


def shown(page: Any, place: str) -> str:
    """Return the text of a part of the page."""
    text: str = page.inner_text(place)
    return text


def settled(page: Any) -> None:
    """Wait until no answer is under way: the numbers have not changed for a while."""
    last, same = "", 0
    while same < 6:
        page.wait_for_timeout(250)
        text = shown(page, "#numbers") + shown(page, "#card-b")
        last, same = text, same + 1 if text == last else 0
