"""What the measurement says, as rows of a CSV: medians, quartiles, and ratios paired by round."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foveate.lab.paired import ROUNDS, Estimate, Spread, ratios


@dataclass(frozen=True)
class Arm:
    """One way of answering.

    Args:
        engine: ``openvino``, ``openvino-one-block`` or ``foveate``.
        method: ``full``, or the name of the method.
        prune: Percent of the visual tokens that are to go.
        request: What the worker is asked, but for the picture.
    """

    engine: str
    method: str
    prune: int
    request: dict[str, object] = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.engine} {self.method}" + (f" -{self.prune}%" if self.prune else "")


@dataclass
class Row:
    """One metric of one arm in one dtype; ``reference`` holds the values of the same engine's full run."""

    arm: Arm
    dtype: str
    tokens: int
    metric: str
    values: list[float]
    against: str = ""
    reference: Sequence[float] = ()

    def verdict(self) -> tuple[Estimate | None, str]:
        """Return the ratio to the reference, or why there is none: few rounds, overlap, or rounds that disagree."""
        if not self.reference:
            return None, ""
        if len(self.values) < ROUNDS:
            return None, "too few rounds"
        if Spread.of(self.values).overlaps(Spread.of(self.reference)):
            return None, "overlap"
        ratio = Estimate.of(ratios(self.values, self.reference))
        return (ratio, "") if ratio.resolved else (None, "unresolved")

    def cells(self) -> dict[str, str]:
        """Return the row's own columns."""
        spread, (ratio, why) = Spread.of(self.values), self.verdict()
        return {
            "arm": self.arm.name,
            "engine": self.arm.engine,
            "method": self.arm.method,
            "prune": str(self.arm.prune),
            "dtype": self.dtype,
            "tokens": str(self.tokens),
            "metric": self.metric,
            "unit": "ms",
            "median": f"{spread.median:.6g}",
            "quartile_low": f"{spread.low:.6g}",
            "quartile_high": f"{spread.high:.6g}",
            "rounds": str(len(self.values)),
            "against": self.against,
            "ratio": "" if ratio is None else f"{ratio.value:.4f}",
            "ratio_low": "" if ratio is None else f"{ratio.low:.4f}",
            "ratio_high": "" if ratio is None else f"{ratio.high:.4f}",
            "no_ratio": why,
            "samples": ";".join(f"{value:.6g}" for value in self.values),
        }


#: Measured in each run: until the first token, CPU time of all threads, before the LLM, in it, and what ours takes
#: to make tensors of the picture and to choose; ``idle_cpu`` is what the other workers used meanwhile.
METRICS = ("first_token", "first_token_cpu", "before_llm", "llm", "processor", "select", "idle_cpu")


def rows(dtype: str, samples: Mapping[Arm, Sequence[Mapping[str, float]]]) -> list[Row]:
    """Return the rows of one dtype from the samples, one per round and in the same order for every arm."""
    full = {arm.engine.split("-")[0]: arm for arm in samples if arm.method == "full"}
    made = []
    for arm, runs in samples.items():
        reference = full[arm.engine.split("-")[0]]
        for metric in METRICS:
            values = [float(run[metric]) for run in runs if metric in run]
            if not values:
                continue
            row = Row(arm, dtype, int(runs[0]["tokens"]), metric, values)
            if arm != reference and metric in ("first_token", "first_token_cpu", "llm"):
                row.against, row.reference = reference.name, [float(run[metric]) for run in samples[reference]]
            made.append(row)
    return made


def write(path: Path, made: Sequence[Row], constant: Mapping[str, str]) -> None:
    """Write one line per metric and arm; each carries everything that is needed to judge it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*made[0].cells(), *constant], lineterminator="\n")
        table.writeheader()
        table.writerows({**row.cells(), **constant} for row in made)
