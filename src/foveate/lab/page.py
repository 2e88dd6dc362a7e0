"""What an evaluation writes: ``accuracy.csv``, ``accuracy.md``, and ``accuracy.html``, a page that needs no network."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from foveate.lab import plots, tables
from foveate.lab.answers import Answer
from foveate.lab.compare import Comparison
from foveate.lab.summary import Row, Summary, summarise

#: Width and height of the figure over tokens, on a desk and on a phone.
WIDE, NARROW = (660.0, 400.0), (390.0, 400.0)

#: With more types of questions than this a heat map takes the whole width.
BROAD = 11


def write(answers: Sequence[Answer], header: Mapping[str, Any], out: Path, name: str = "accuracy") -> list[Path]:
    """Write the tables and the page into a folder; a run may be unfinished.

    Args:
        answers: The answers of all arms.
        header: What the log says of the run.
        out: The folder; it is made if need be.
        name: Of the files, without their endings.

    Returns:
        The files.

    Raises:
        TaskError: If there are no answers, or two arms were not asked the same.
    """
    summary = summarise(answers, header.get("first"))
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.{kind}" for kind in ("csv", "md", "html")]
    _write_csv(summary, header, files[0])
    files[1].write_text(markdown(summary, header), encoding="utf-8")
    files[2].write_text(page(summary, header), encoding="utf-8")
    return files


def columns(row: Row, types: Sequence[str]) -> dict[str, str | int | float]:
    """Return a row of the CSV file: shares from 0 to 1, differences in points, what is unknown empty."""
    low, high = row.score.interval
    cells: dict[str, str | int | float] = {
        "arm": row.arm,
        "method": row.method,
        "budget": "" if row.budget is None else row.budget,
        "tokens_per_layer": round(row.mean_alive, 2),
        "n": row.score.n,
        "right": row.score.right,
        "accuracy": round(row.score.accuracy, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "retention_percent": "" if row.retention is None else round(100 * row.retention, 2),
        **_columns("full", row.full),
        **_columns("random", row.random),
        **_columns("plain", row.plain),
        "random_q": "" if row.random is None or row.random.q is None else f"{row.random.q:.3g}",
        "hard_n": "" if row.hard is None else row.hard.n,
        "hard": "" if row.hard is None or not row.hard.n else round(row.hard.accuracy, 4),
    }
    for kind in types:
        score = row.types.get(kind)
        cells[f"type_{kind}"] = "" if score is None else round(score.accuracy, 4)
        cells[f"type_{kind}_n"] = 0 if score is None else score.n
    return cells


def markdown(summary: Summary, header: Mapping[str, Any]) -> str:
    """Return the tables in Markdown."""
    parts = [f"# {_title(header)}", tables.asked(summary, header)]
    if "command" in header:
        parts.append(f"Regenerate: `{header['command']}`")
    parts.append("\n".join(f"- {sentence}" for sentence in tables.verdicts(summary)))
    parts.append(tables.unfinished(summary, header))
    parts += ["## Overall", tables.overall(summary).markdown()]
    if summary.whole:
        parts += ["## All questions", tables.whole(summary).markdown()]
    for budget in summary.budgets:
        parts += [f"## Differences: {tables.tokens(budget)}", tables.differences(summary, budget).markdown()]
    if summary.winners:
        parts += ["## Best methods", "Bold: the interval of the lead leaves out 0.", tables.winners(summary).markdown()]
    if (options := tables.options(summary)).rows:
        parts += ["## Options", options.markdown()]
    if len(summary.types) > 1:
        for budget in summary.budgets:
            parts += [f"## By type: {tables.tokens(budget)}", tables.by_type(summary, budget).markdown()]
    if summary.hard:
        parts += [f"## Hard questions: {summary.hard}", tables.hard(summary).markdown()]
    parts += ["## How to read this", "\n".join(f"- {note}" for note in tables.reading(summary))]
    parts += ["## Conditions", "\n".join(f"- {k}: {v}" for k, v in tables.conditions(header).items() if k != "command")]
    if refused := tables.refused(header):
        parts += ["## Not run", "\n".join(f"- {sentence}" for sentence in refused)]
    return "\n\n".join(part for part in parts if part) + "\n"


def page(summary: Summary, header: Mapping[str, Any]) -> str:
    """Return the page: figures as SVG inside it, colours for light and dark, and a table that sorts."""
    template = resources.files("foveate.lab").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the fonts are the browser's
        figures = _figures(summary)
    shown = plots.coloured(summary)
    return environment.from_string(template).render(
        title=_title(header),
        colours=plots.COLOURS,
        asked=tables.asked(summary, header),
        verdicts=tables.verdicts(summary),
        unfinished=tables.unfinished(summary, header),
        refused=tables.refused(header),
        conditions=tables.conditions(header),
        others=[method for method in summary.methods() if method not in shown],
        winners=tables.winners(summary) if summary.winners else None,
        options=tables.options(summary),
        hard=tables.hard(summary) if summary.hard else None,
        hard_n=summary.hard,
        broad=len(summary.types) > BROAD,
        everything=tables.everything(summary),
        reading=tables.reading(summary),
        **figures,
    )


# -- pieces


def _figures(summary: Summary) -> dict[str, list[tuple[str, str]]]:
    """Return the figures as labels and SVG."""
    forests, heats, curves = [], [], []
    for number, budget in enumerate(summary.budgets):
        label = tables.tokens(budget)
        forest = plots.svg(plots.forest(summary, budget), f"forest{number}", f"Accuracy by method, {label}")
        forests.append((label, forest))
        if len(summary.types) > 1:
            heat = plots.svg(plots.heat(summary, budget), f"heat{number}", f"Accuracy by method and type, {label}")
            heats.append((label, heat))
    for kind, size in (("wide", WIDE), ("narrow", NARROW)):
        if summary.budgets:
            over = plots.svg(plots.curves(summary, *size), kind, "Accuracy over visual tokens per decoder layer")
            curves.append((kind, over))
    return {"forests": forests, "curves": curves, "heats": heats}


def _title(header: Mapping[str, Any]) -> str:
    named = ", ".join(str(header[name]) for name in ("model", "task") if name in header)
    return "Accuracy at equal budgets" + (f": {named}" if named else "")


def _columns(other: str, comparison: Comparison | None) -> dict[str, str | int | float]:
    names = ("n", "points", "points_low", "points_high", "gained", "lost", "p")
    if comparison is None:
        return {f"{other}_{name}": "" for name in names}
    ends = (comparison.difference, comparison.low, comparison.high)
    points = ["" if end is None else round(100 * end, 2) for end in ends]
    values = (comparison.n, *points, comparison.gained, comparison.lost, f"{comparison.p:.3g}")
    return {f"{other}_{name}": value for name, value in zip(names, values, strict=True)}


def _write_csv(summary: Summary, header: Mapping[str, Any], path: Path) -> None:
    where: Mapping[str, str | int | float] = {
        f"run_{name.replace(' ', '_')}": value for name, value in tables.conditions(header).items()
    }
    rows = [{**columns(row, list(summary.types)), **where} for row in summary.rows]
    rows += [{**columns(row, list(summary.types)), **where, "arm": f"{row.arm}, all"} for row in summary.whole]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
