"""What is known of the accuracy that a method keeps: measured on this very model, else published for one of its type.

Nothing is estimated between budgets: a budget has the evidence of the nearest one below it, which is a lower bound as
far as more tokens never hurt.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import foveate
from foveate.budget import Keep
from foveate.errors import FoveateError

#: Answers of the demo model, in a checkout.
MEASURED = Path(foveate.__file__).parents[2] / "results" / "accuracy.csv"

#: Types of the demo world's questions that ask to read.
READING = ("word", "number")


class EvidenceError(FoveateError):
    """A table of accuracy cannot be used."""


@dataclass(frozen=True)
class Retention:
    """The share of the uncompressed model's accuracy that a method keeps at a budget.

    Args:
        method: Its spec, without the budget.
        keep: Its budget: int = tokens of a picture, float = a share of them.
        share: Accuracy by that of the uncompressed model.
        reading: The same for questions about text in the picture; None if there are none.
        source: Where that was found, in words.
        measured: Whether on the model itself.
    """

    method: str
    keep: Keep
    share: float
    reading: float | None
    source: str
    measured: bool

    def fraction(self, tokens: int) -> float:
        """The budget as a share of a picture's tokens."""
        return self.keep / tokens if isinstance(self.keep, int) else self.keep


@dataclass(frozen=True)
class Evidence:
    """All that is known for one model."""

    known: tuple[Retention, ...] = ()

    def of(self, method: str, keep: int, tokens: int) -> Retention | None:
        """Return what is known of a method at a budget of ``keep`` of ``tokens``; of several figures the lowest."""
        mine = [one for one in self.known if one.method == method]
        below = [one for one in mine if one.fraction(tokens) <= keep / tokens * 1.02]  # a share may be rounded
        if not below:
            return None
        nearest = max(one.fraction(tokens) for one in below)
        return min((one for one in below if one.fraction(tokens) > 0.98 * nearest), key=lambda one: one.share)

    @property
    def sources(self) -> list[str]:
        """Where all that comes from."""
        return list(dict.fromkeys(one.source for one in self.known))


def measured(path: Path, model: str) -> Evidence:
    """Return what a table of answers says of a model; nothing where the table is of another model.

    Args:
        path: What `foveate eval` wrote: a CSV with a row per arm, in which the uncompressed model is called ``full``.
        model: Its name.

    Raises:
        EvidenceError: If it is no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if _cell(row, "model", "run_model") == model]
        full = next((row for row in rows if row["method"] == "full"), None)
        if full is None:
            return Evidence()
        source = f"{full.get('n', 'all')} questions that were asked of this model, {path.name}"
        kept = [row for row in rows if row["method"] not in ("full", "blind", "downscale")]
        return Evidence(
            tuple(
                Retention(
                    method=row["method"],
                    keep=float(row["budget"]) if "." in row["budget"] else int(row["budget"]),
                    share=float(row["accuracy"]) / float(full["accuracy"]),
                    reading=_reading(row, full),
                    source=source,
                    measured=True,
                )
                for row in kept
            )
        )
    except (OSError, KeyError, ValueError, StopIteration, ZeroDivisionError) as error:
        raise EvidenceError(
            f"no table of accuracy: {path} ({error!r})", "pass the accuracy.csv that `foveate eval` wrote"
        ) from error


def _cell(row: dict[str, str], *names: str) -> str:
    """The cell under the first of these headings that the table has."""
    return next(row[name] for name in names if name in row)


def _reading(row: dict[str, str], full: dict[str, str]) -> float | None:
    kinds = [name for kind in READING for name in (kind, f"type_{kind}") if row.get(name) and full.get(name)]
    return sum(float(row[kind]) / float(full[kind]) for kind in kinds) / len(kinds) if kinds else None


def published(model_type: str) -> Evidence:
    """Return what papers print for models of this type."""
    text = (resources.files("foveate.lab.advice") / "published.json").read_text(encoding="utf-8")
    return Evidence(tuple(_published(row) for row in json.loads(text) if row["model_type"] == model_type))


def _published(row: dict[str, object]) -> Retention:
    share, reading = (None if row[key] is None else float(str(row[key])) for key in ("share", "reading"))
    assert share is not None
    source = f"{row['benchmarks']} benchmarks on {row['model']}, published by {row['paper']}"
    return Retention(str(row["method"]), float(str(row["keep"])), share, reading, source, measured=False)


def gather(model: str, model_type: str, tables: Sequence[Path] = ()) -> Evidence:
    """Return what is known of a model: from tables of answers, else what papers print for its type.

    Args:
        model: Its name.
        model_type: Its type.
        tables: Tables that the user gave; none: that of the demo model, where there is one.
    """
    tables = tables or [path for path in (MEASURED,) if path.exists()]
    known = [one for path in tables for one in measured(path, model).known]
    return Evidence(tuple(known)) if known else published(model_type)
