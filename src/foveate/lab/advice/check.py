"""Predictions against measurements: ``python -m foveate.lab.advice.check``, or `make advise-check`.

For each model a profile is made and all predictions are written down; then calls that the profile has not seen are
measured (other questions, answers, batches, budgets), through the compressed stock ``generate``, in rounds, each in a
new random order. One call of the profile is repeated before and after, to show whether the machine is still the same.
Nothing is corrected by it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate import demo
from foveate.lab.advice.costs import Cost, Costs, Work
from foveate.lab.advice.measure import Plan, Profiler
from foveate.lab.advice.prompt import Prompt, of_inputs, of_shape
from foveate.lab.advice.timing import exactly, peak, timed
from foveate.lab.chat import prepare
from foveate.lab.contest import with_keep
from foveate.lab.environment import environment, load
from foveate.lab.paired import Spread
from foveate.lab.shapes import SHAPES, build

#: What is wanted of every prediction.
TARGET = 0.10

Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """A call that the profile has not seen.

    Args:
        method: Its spec without the budget; None: all tokens.
        share: Budget, as a share of the picture's tokens.
        question: Tokens of the question.
        output: Tokens of the answer.
        batch: Prompts read together.
    """

    method: str | None
    share: float
    question: int
    output: int
    batch: int = 1


POINTS = (
    Point(None, 1.0, question=80, output=12),
    Point(None, 1.0, question=30, output=40),
    Point(None, 1.0, question=30, output=8, batch=3),
    Point("random", 0.7, question=15, output=6),
    Point("evocut", 0.25, question=30, output=24),
    Point("evocut", 0.05, question=90, output=8),
    Point("adav", 0.33, question=60, output=16),
    Point("adav", 0.1, question=30, output=12, batch=3),
    Point("divprune", 0.2, question=30, output=8, batch=2),
    Point("fastv", 0.3, question=50, output=20),
    Point("fastv", 0.6, question=30, output=8, batch=2),
    Point("v2drop", 0.35, question=30, output=32),
)


@dataclass
class Result:
    """What came of a point.

    Args:
        point: The call.
        keep: Its budget in tokens.
        predicted: What was predicted.
        first: Time to the first token, one value per round.
        total: Time to the last token.
        memory: The most that tensors took.
    """

    point: Point
    keep: int
    predicted: Cost
    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    memory: float = 0.0

    @property
    def name(self) -> str:
        """The way of answering."""
        return "full" if self.point.method is None else f"{self.point.method}:keep={self.keep}"

    def rows(self) -> Iterator[dict[str, str]]:
        """Yield one row per quantity."""
        cost = self.predicted
        yield self._row("first_token", "ms", cost.first, cost.first_error, self.first)
        yield self._row("answer", "ms", cost.total, cost.total_error, self.total)
        yield self._row("memory", "MiB", cost.memory / 2**20, 0.0, [self.memory / 2**20])

    def _row(self, metric: str, unit: str, predicted: float, error: float, values: Sequence[float]) -> dict[str, str]:
        spread, point = Spread.of(values), self.point
        off = predicted / spread.median - 1.0
        return {
            "kind": "point",
            "arm": self.name,
            "question": str(point.question),
            "output": str(point.output),
            "batch": str(point.batch),
            "metric": metric,
            "unit": unit,
            "predicted": f"{predicted:.6g}",
            "uncertainty": f"{error:.4g}",
            "measured": f"{spread.median:.6g}",
            "quartile_low": f"{spread.low:.6g}",
            "quartile_high": f"{spread.high:.6g}",
            "rounds": str(len(values)),
            "error": f"{off:+.4f}",
            "within_target": "yes" if abs(off) <= TARGET else "no",
            "samples": ";".join(f"{value:.6g}" for value in values),
        }


class Check:
    """Profiles one model, predicts, measures.

    Args:
        model: The model.
        name: What it is called.
        prompt: One prompt with one picture.
        seconds: Begin no round of the profile after so long.
        rounds: Rounds of the points.
        points: What is predicted and measured.
        say: Gets a line now and then.
    """

    def __init__(
        self, model: Any, name: str, prompt: Prompt, seconds: float, rounds: int, points: Sequence[Point], say: Say
    ) -> None:
        methods = list(dict.fromkeys(point.method for point in points if point.method is not None))
        plan = Plan(output=max(point.output for point in points), methods=methods, seconds=seconds)
        self.model, self.name, self.prompt, self.rounds, self.say = model, name, prompt, rounds, say
        self.profiler = Profiler(model, name, prompt, plan, say)
        self.points = points

    def run(self) -> list[dict[str, str]]:
        """Return the rows."""
        before = load()
        profile = self.profiler.run()
        costs, pixels = Costs(profile), self.prompt.pixels(self.profiler.family)
        results = []
        for point in self.points:
            keep = max(1, round(point.share * profile.tokens))
            work = Work(
                tokens=profile.tokens,
                pictures=profile.pictures,
                pixels=pixels,
                question=point.question,
                output=point.output,
                batch=point.batch,
            )
            results.append(Result(point, keep, costs.predict(work, point.method, keep)))
        anchors = [self._anchor("before")]
        self._measure(results)
        anchors.append(self._anchor("after"))
        for result in results:
            self._call(result, partial(self._memory, result))
        seen = next(p for p in profile.at("first") if p.batch == 1)
        rows = [self._anchor_row(when, values, seen.median, profile.rounds) for when, values in anchors]
        rows += [row for result in results for row in result.rows()]
        where = profile.setting | {
            "layers": str(profile.layers),
            "visual_tokens": str(profile.tokens),
            "profile_rounds": str(profile.rounds),
            "profile_seconds": f"{profile.seconds:.0f}",
            "load_before": before,
            "load_after": load(),
        }
        return [row | where for row in rows]

    def _measure(self, results: list[Result]) -> None:
        order, shuffle = list(results), random.Random(1)
        for turn in range(self.rounds):
            shuffle.shuffle(order)
            for result in order:
                gc.collect()
                self._call(result, partial(self._time, result))
            self.say(f"{self.name}: points, round {turn + 1} of {self.rounds}, load {load()}")

    def _call(self, result: Result, work: Callable[[dict[str, Any]], None]) -> None:
        point = result.point
        spec = None if point.method is None else with_keep(point.method, result.keep)
        with nullcontext() if spec is None else foveate.compress(self.model, spec):
            work(self.prompt.inputs(point.question, point.batch))

    def _time(self, result: Result, inputs: dict[str, Any]) -> None:
        call = timed(self.model, self.profiler.family, inputs, result.point.output)
        result.first.append(call.first)
        result.total.append(call.total)

    def _memory(self, result: Result, inputs: dict[str, Any]) -> None:
        weights = sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers()))
        result.memory = weights + peak(self.model, partial(self.model.generate, **inputs, **exactly(2)))

    def _anchor(self, when: str) -> tuple[str, list[float]]:
        """Repeat a call of the profile: all tokens, its question, one prompt."""
        inputs = self.prompt.inputs(self.profiler.plan.question)
        return when, [timed(self.model, self.profiler.family, inputs, 2).first for _ in range(max(3, self.rounds))]

    def _anchor_row(self, when: str, values: list[float], seen: float, rounds: int) -> dict[str, str]:
        point = Point(None, 1.0, self.profiler.plan.question, 2)
        cost = dataclasses.replace(_NOTHING, encode=seen)
        row = Result(point, 0, cost)._row("first_token", "ms", seen, 0.0, values)
        return row | {"kind": f"anchor {when}", "within_target": ""}


_NOTHING = Cost(
    method=None, keep=0, batch=1, alive=(), encode=0.0, rest=0.0, prefill=0.0, decode=0.0, memory=0.0, kv=0.0
)


def subjects(options: argparse.Namespace) -> Iterator[tuple[Any, str, Prompt]]:
    """Yield the models: a random one of a known shape, then the demo model."""
    if "shape" in options.models:
        shape = dataclasses.replace(SHAPES[options.shape], layers=options.layers)
        model = build(shape, getattr(torch, options.dtype), "sdpa", 0)
        yield model, f"{options.shape}, {shape.layers} layers", of_shape(shape, model)
    if "demo" in options.models:
        from PIL import Image

        torch.set_num_threads(1)  # its matrices are so small that a second thread waits longer than it works
        small, processor = demo.load()
        picture = Image.open(demo.PICTURE).convert("RGB")
        inputs = prepare(small, processor, [[picture]], ["?"])
        yield (
            small,
            "demo",
            of_inputs(small, inputs, processor.tokenizer("a", add_special_tokens=False)["input_ids"][-1]),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile, predict, measure, write a CSV."""
    parser = argparse.ArgumentParser(
        "python -m foveate.lab.advice.check", description="Predictions against measurements."
    )
    parser.add_argument("--models", nargs="+", choices=("shape", "demo"), default=("shape", "demo"))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the shape")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the shape")
    parser.add_argument("--seconds", type=float, default=100.0, help="begin no round of a profile after so long")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the points")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("results/advise.csv"))
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, str]] = []
    for model, name, prompt in subjects(options):
        check = Check(model, name, prompt, options.seconds, options.rounds, POINTS, _say)
        rows += [row | environment() for row in check.run()]
        write(options.out, rows)
    for row in rows:
        sys.stdout.write(" ".join(row[key].rjust(9) for key in _SHOWN) + "\n")


_SHOWN = ("model", "kind", "arm", "question", "output", "batch", "metric", "predicted", "measured", "error")


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write the rows so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
