"""What commands print, and files they are about to write."""

from __future__ import annotations

from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from foveate.cli.ask import UserError

MIB = 2**20


def columns(*headings: str) -> Table:
    """Return a table without rows."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=place == 0)
    return table


def show(table: Table) -> None:
    """Print a table to stdout."""
    Console().print(table)


def note(text: object) -> None:
    """Print to stderr what is no data."""
    typer.echo(text, err=True)


def check_writable(path: Path, formats: tuple[str, ...]) -> None:
    """Refuse a file that could not be written, before any work is done."""
    if path.suffix.lower() not in formats:
        what = "a page" if ".html" in formats else "a picture"
        raise UserError(f"cannot write {what} to {path}", f"let the name end in one of {', '.join(formats)}")
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}", f"create it: mkdir -p {path.parent}")
