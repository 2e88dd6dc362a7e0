"""Regenerates what the docs take from the code and from results/: tables in README.md and docs/ledger.md, whole pages.

python docs/generate.py             # write
python docs/generate.py --check     # exit code 1 if something is stale
python docs/generate.py --pictures  # also draw docs/img/ with the demo model; those of the page need chromium
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.update(COLUMNS="100", TERMINAL_WIDTH="100", NO_COLOR="1")

import accuracy
import advise
import ledger
import papers
import pictures
import speed
from typer.testing import CliRunner

from foveate import registry
from foveate.cli import app
from foveate.cli.tables import family_rows, method_rows

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "src" / "foveate" / "families" / "measured.json"
COMMANDS = ("", "run", "demo", "methods", "families", "verify", "serve", "studio", "advise", "bench")


def main() -> int:
    """Write or check every generated file; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something is stale")
    parser.add_argument("--pictures", action="store_true", help="also draw the pictures of docs/img/")
    options = parser.parse_args()
    readme, figures = ROOT / "README.md", ROOT / "docs" / "ledger.md"
    if not options.check:
        MEASURED.write_text(measured(), encoding="utf-8")  # the tables are made from it
    wanted = {
        MEASURED: measured(),
        readme: filled(readme.read_text(encoding="utf-8")),
        ROOT / "docs" / "methods.md": methods_page(),
        ROOT / "docs" / "papers.md": papers.page(_prose),
        ROOT / "docs" / "command-line.md": command_line_page(),
        figures: ledger.page(figures.read_text(encoding="utf-8")),
        advise.PUBLISHED: advise.published(),
        advise.PAGE: advise.page(advise.PAGE.read_text(encoding="utf-8")),
        speed.PAGE: speed.page(speed.PAGE.read_text(encoding="utf-8")),
        **{path: accuracy.page(path.read_text(encoding="utf-8")) for path in accuracy.PAGES},
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if options.check:
            print(f"error: {path.relative_to(ROOT)} is stale\nhint: make docs", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    if options.pictures:
        for path in pictures.write(ROOT / "docs" / "img"):
            print(f"wrote {path.relative_to(ROOT)}")
    return int(options.check and bool(stale))


def measured() -> str:
    """Return what the contract tests measured of each family, from results/oracle.csv."""
    seen: dict[str, list[dict[str, str]]] = {}
    with (ROOT / "results" / "oracle.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            seen.setdefault(row["model_type"], []).append(row)
    summary = {
        kind: {
            "reads": sorted({row["reads"] for row in rows} - {"both"}),
            "methods": sorted({row["method"] for row in rows}),
            "largest_difference": max((row["largest_difference"] for row in rows), key=float),
            "transformers": [pick({row["transformers"] for row in rows}, key=_version) for pick in (min, max)],
        }
        for kind, rows in sorted(seen.items())
    }
    return json.dumps(summary, indent=1) + "\n"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def filled(text: str) -> str:
    """Return the README with its tables made anew between their markers."""
    methods = [(f"`{spec}`", what, paper, sites, reads) for spec, what, paper, sites, reads in method_rows()]
    families = [(f"`{kind}`", *rest) for kind, *rest in family_rows()]
    tables = {
        "methods": table(("method", "what it does", "paper", "tokens leave before layer", "reads"), methods),
        "families": table(
            ("`config.model_type`", "reads", "methods", "positions", "largest difference", "transformers"), families
        ),
    }
    for name, rows in tables.items():
        pattern = rf"(<!-- {name}: begin.*?-->\n).*?(<!-- {name}: end -->)"
        text, count = re.subn(pattern, lambda m, rows=rows: m[1] + rows + m[2], text, flags=re.DOTALL)
        assert count == 1, f"README.md needs one pair of markers for {name}"
    return text


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def methods_page() -> str:
    """Return the reference of methods: the docstring of each, as the code has it."""
    page = [
        "# Methods\n",
        "Generated from the docstrings by `make docs`; do not edit.",
        "A site is the decoder layer before which tokens leave; site 0 is before the LLM.\n",
    ]
    for spec, *_ in method_rows():
        cls = registry.get(spec.split(":")[0])
        page += [f"## {cls.__name__}\n", f"`foveate.{cls.__name__}`, in specs `{cls.name}`.\n"]
        for paragraph in (inspect.getdoc(cls) or "").split("\n\n"):
            page.append(_paragraph(paragraph))
    return "\n".join(page).rstrip() + "\n"


def _paragraph(text: str) -> str:
    head, *rest = text.splitlines()
    if head == "Args:":
        body = "\n".join([*rest, ""])
        arguments = re.findall(r"^    (\w+): (.*?)(?=^    \w+:|\Z)", body, re.MULTILINE | re.DOTALL)
        return "".join(f"- `{name}`: {_prose(what)}\n" for name, what in arguments)
    if head == "Example:":
        return "```python\n" + "\n".join(line.removeprefix("    ") for line in rest) + "\n```\n"
    sections = re.split(r"^(?=[A-Z][\w ]*:(?: |\n))", text, flags=re.MULTILINE)
    return "\n".join(re.sub(r"^([A-Z][\w ]*):", r"**\1:**", _prose(part)) + "\n" for part in sections if part)


def _prose(text: str) -> str:
    """Return the text on one line, code in single backticks, and signs of formulas safe from Markdown."""
    pieces = re.split(r"``(.+?)``|`(.+?)`", " ".join(text.split()))
    words = []
    for i, piece in enumerate(pieces):
        if piece is not None:
            words.append(f"`{piece}`" if i % 3 else re.sub(r"([*_\\|])", r"\\\1", piece).replace("<", "&lt;"))
    return "".join(words)


def command_line_page() -> str:
    """Return the reference of the command line: the help of each command, as it prints it."""
    page = ["# Command line\n", "Generated from `foveate --help` by `make docs`; do not edit.\n"]
    for command in COMMANDS:
        arguments = [command, "--help"] if command else ["--help"]
        text = CliRunner().invoke(app, arguments, prog_name="foveate", catch_exceptions=False).stdout
        shown = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        page.append(f"## foveate {command}".rstrip() + f"\n\n```text\n{shown.strip()}\n```\n")
    return "\n".join(page).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
