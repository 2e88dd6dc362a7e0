"""What the speed lab writes: one row per arm, batch and metric, which carries everything that is needed to judge it."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from foveate.lab.paired import Estimate, Spread, ratios

#: Stands where a ratio would: the quartile ranges of the two arms have a point in common, or it may as well be one.
OVERLAP = "overlap"

#: Stands there when the ranges are not known: below so many rounds there are no quartiles to speak of.
FEW, LEAST = "few rounds", 3


@dataclass(frozen=True)
class Bounds:
    """What is promised, upper bounds all.

    Args:
        overhead: Time to first token by the ideal's, for methods that select before the LLM.
        inner: Time to first token by the hand-cut model's, for methods inside the LLM.
        selection: Selection by time to first token.
        decode: Decode step by the ideal's, or by the hand-cut model's.
        memory: Peak memory by the uncompressed model's.
    """

    overhead: float = 1.05
    inner: float = 1.08
    selection: float = 0.02
    decode: float = 1.03
    memory: float = 1.0


BOUNDS = Bounds()


@dataclass(frozen=True)
class Compared:
    """How a metric of one arm compares with that of another: by round, as both ran in each.

    Args:
        against: The other arm (or, for a share, the other metric).
        ratio: This by the other.
        overlap: Whether the quartile ranges of the two have a point in common, or the interval of the ratio holds one.
    """

    against: str
    ratio: Estimate
    overlap: bool = False

    @classmethod
    def of(cls, values: Sequence[float], against: str, others: Sequence[float]) -> Compared:
        """Compare two arms."""
        ratio, apart = Estimate.of(ratios(values, others)), not Spread.of(values).overlaps(Spread.of(others))
        return cls(against, ratio, not apart or ratio.low <= 1.0 <= ratio.high)

    @property
    def text(self) -> str:
        """The ratio, or why there is none."""
        if self.ratio.rounds < LEAST:
            return FEW
        return OVERLAP if self.overlap else f"{self.ratio.value:.4f}"


@dataclass
class Row:
    """One metric of one arm.

    Args:
        arm: Who.
        metric: What.
        unit: In what.
        values: One per round.
        batch: Prompts at once.
        full: How it compares with the uncompressed model.
        compared: How it compares with what it should be near to.
        target: What the second ratio should not exceed.
        met: yes, no, or unresolved.
        note: What else is to be said.
    """

    arm: str
    metric: str
    unit: str
    values: Sequence[float]
    batch: int = 1
    full: Compared | None = None
    compared: Compared | None = None
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> str:
        """Whether the whole interval lies on one side of the target: yes, no, or unresolved; empty without a target."""
        return self.compared.ratio.meets(self.target) if self.target is not None and self.compared is not None else ""

    def cells(self) -> dict[str, str]:
        """Return the row's own columns."""
        spread = Spread.of(self.values) if self.values else None
        full, other = self.full, self.compared
        return {
            "arm": self.arm,
            "batch": str(self.batch),
            "metric": self.metric,
            "unit": self.unit,
            "median": "" if spread is None else f"{spread.median:.6g}",
            "quartile_low": "" if spread is None else f"{spread.low:.6g}",
            "quartile_high": "" if spread is None else f"{spread.high:.6g}",
            "rounds": str(len(self.values)),
            "by_full": "" if full is None else full.text,
            "by_full_low": "" if full is None else f"{full.ratio.low:.4f}",
            "by_full_high": "" if full is None else f"{full.ratio.high:.4f}",
            "against": "" if other is None else other.against,
            "ratio": "" if other is None else other.text,
            "ratio_low": "" if other is None else f"{other.ratio.low:.4f}",
            "ratio_high": "" if other is None else f"{other.ratio.high:.4f}",
            "target": "" if self.target is None else str(self.target),
            "met": self.met,
            "note": self.note,
            "samples": ";".join(f"{value:.6g}" for value in self.values),
        }


def write(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Write the lines; the file is whole at any time, whenever this is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    os.replace(part, path)


def read(path: Path) -> list[dict[str, str]]:
    """Return the lines of a file that `write` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
