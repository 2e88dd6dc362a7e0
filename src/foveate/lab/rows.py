"""What the speed benchmark writes: one row per arm and metric, as a CSV and as a table with targets."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from foveate.lab.paired import Estimate, Spread
from foveate.lab.shapes import Shape

#: Prefix of the arm that is cut by hand to the schedule of a method inside the LLM.
CUT = "hand-cut "


@dataclass(frozen=True)
class Bounds:
    """The targets, upper bounds all.

    Args:
        overhead: Time to first token by the ideal's, for methods that select before the LLM.
        inner: Time to first token by the hand-cut model's, for methods inside the LLM.
        selection: Selection by time to first token.
        decode: Decode step by the reference's.
        memory: Peak memory by the uncompressed model's.
    """

    overhead: float = 1.05
    inner: float = 1.08
    selection: float = 0.02
    decode: float = 1.03
    memory: float = 1.0


BOUNDS = Bounds()


@dataclass
class Row:
    """One metric of one arm: what was measured, and how it compares."""

    arm: str
    metric: str
    unit: str
    values: list[float]
    against: str = ""
    ratio: Estimate | None = None
    target: float | None = None
    met: str = ""

    def cells(self) -> dict[str, str]:
        """Return the row's own columns; a ratio that means nothing is left out."""
        spread = Spread.of(self.values)
        ratio = self.ratio if self.ratio is not None and self.ratio.resolved else None
        return {
            "arm": self.arm,
            "metric": self.metric,
            "unit": self.unit,
            "median": f"{spread.median:.6g}",
            "quartile_low": f"{spread.low:.6g}",
            "quartile_high": f"{spread.high:.6g}",
            "rounds": str(len(self.values)),
            "against": self.against,
            "ratio": "" if ratio is None else f"{ratio.value:.4f}",
            "ratio_low": "" if ratio is None else f"{ratio.low:.4f}",
            "ratio_high": "" if ratio is None else f"{ratio.high:.4f}",
            "target": "" if self.target is None else str(self.target),
            "met": self.met,
            "samples": ";".join(f"{value:.6g}" for value in self.values),
        }


def write(path: Path, rows: Sequence[Row], constant: dict[str, str]) -> None:
    """Write one line per metric and arm; each carries everything that is needed to judge it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0].cells(), *constant], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row.cells(), **constant} for row in rows)


def table(rows: Sequence[Row], shape: Shape, alive_of: Mapping[str, float], bounds: Bounds) -> Table:
    """Return the figures and targets, one line per arm."""
    by = {(row.arm, row.metric): row for row in rows}
    arms = list(dict.fromkeys(row.arm for row in rows))
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("arm", no_wrap=True, min_width=max(map(len, arms)))
    for heading in (
        "first token, ms (quartiles)",
        "full / it\n(by FLOP)",
        f"it / reference\n<= {bounds.overhead}, inside the LLM {bounds.inner}",
        f"selection\n<= {bounds.selection:.0%} of first token",
        f"decode step / reference's\n<= {bounds.decode}",
        "peak MiB\n<= full",
    ):
        out.add_column(heading, justify="right", no_wrap=True)
    full = Spread.of(by["full", "first_token"].values)
    for arm in arms:
        first = Spread.of(by[arm, "first_token"].values)
        alive = alive_of.get(arm.removeprefix(CUT), float(shape.tokens))
        alive = min(alive_of.values(), default=alive) if arm == "ideal" else alive
        flop = shape.first_token_gflop(shape.tokens) / shape.first_token_gflop(alive)
        gain = "overlap" if first.overlaps(full) else f"{full.median / first.median:.2f}"
        memory_row = by.get((arm, "peak_memory"))
        out.add_row(
            arm,
            f"{first.median:.0f} ({first.low:.0f}-{first.high:.0f})",
            "" if arm == "full" else f"{gain} ({flop:.2f})",
            _cell(by.get((arm, "first_token")), by.get((arm, "first_token_cpu")), by.get((arm, "accounted"))),
            _share(by.get((arm, "selection"))),
            _cell(by.get((arm, "decode_step")), by.get((arm, "decode_step_cpu"))),
            "" if memory_row is None else f"{memory_row.values[0]:.0f} {memory_row.met}",
        )
    return out


def _cell(wall: Row | None, cpu: Row | None, accounted: Row | None = None) -> str:
    """Show a ratio of times; where only one thread makes that fair, of CPU times too; and the sum of known parts."""
    lines = [_ratio(wall)]
    if torch.get_num_threads() == 1 and cpu is not None and cpu.ratio is not None:
        lines.append(f"CPU time: {_ratio(cpu)}")
    if accounted is not None:
        lines.append(f"accounted for: {_ratio(accounted)}")
    return "\n".join(lines)


def _ratio(row: Row | None) -> str:
    if row is None or row.ratio is None:
        return ""
    low, high = f"{row.ratio.low:.3f}", f"{row.ratio.high:.3f}"
    return f"{row.ratio.value:.3f} [{low}, {high}] {row.met}" if row.ratio.resolved else "unresolved"


def _share(row: Row | None) -> str:
    if row is None or row.ratio is None:
        return ""
    return f"{row.ratio.value:.2%} [{row.ratio.low:.2%}, {row.ratio.high:.2%}] {row.met}"
