"""The site builds without a warning, needs nothing from elsewhere, and no link on it leads nowhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

for package in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """What a page names, links to and loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.names, self.links, self.loads = {""}, list[str](), list[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        had = {name: value or "" for name, value in attrs}
        self.names |= {had[name] for name in ("id", "name") if name in had}
        if "src" in had:
            self.loads.append(had["src"])
        if "href" in had:
            (self.loads if tag == "link" else self.links).append(had["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]  # --quiet hides warnings
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in [folder / "index.html", *folder.rglob("*.html")]}


def test_every_page_is_there(site: dict[Path, Page]) -> None:
    folder, docs = next(iter(site)).parent, ROOT / "docs"
    pages = [path.relative_to(docs).with_suffix(".html") for path in docs.rglob("*.md")]
    assert len(pages) > 20
    more = [Path(name) for name in ("tour.html", "examples.html", "overview.html", "contributing.html")]
    assert not [page for page in (*pages, *more) if folder / page not in site]


def test_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]) -> None:
    for page in site.values():
        for target in page.loads:
            assert not urlsplit(target).netloc, f"{page.path.name} loads {target}"
    for style in next(iter(site)).parent.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_no_link_leads_nowhere(site: dict[Path, Page]) -> None:
    dead = []
    for page in site.values():
        for link in [*page.links, *page.loads] if page.path.name != "404.html" else []:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (target in site and unquote(parts.fragment) not in site[target].names):
                dead.append(f"{page.path.name}: {link}")
    assert not dead
