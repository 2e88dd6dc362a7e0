"""Speed and memory: `python -m foveate.lab.speed --dtype bfloat16 --keep 64 --out results/speed.csv`.

A model of LLaVA-1.5's shape with random weights answers one prompt in several ways ("arms"), which take turns in a new
random order each round, so that whatever else the machine does falls on all of them. What is compared is compared
within a round. See docs/speed.md for what each number means.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

import foveate
from foveate.lab.arms import Bench, Sample
from foveate.lab.environment import environment, load
from foveate.lab.paired import Estimate, ratios
from foveate.lab.rows import BOUNDS, CUT, Row, table, write
from foveate.lab.shapes import SHAPES, build

METHODS = ("evocut", "todre:exit=none", "todre", "adav", "random", "grid", "pool", "v2drop")


@dataclass
class Plan:
    """Which arms there are.

    Args:
        specs: The methods.
        tapped: By method, the attention modules it listens to.
        cuts: By method inside the LLM, what a model cut by hand to its schedule leaves out where.
        alive: By method, the mean of visual tokens per decoder layer.
        even: By method, whether all layers hold equally many tokens.
    """

    specs: list[str]
    tapped: dict[str, list[str]] = field(default_factory=dict)
    cuts: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    alive: dict[str, float] = field(default_factory=dict)
    even: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def make(cls, bench: Bench, specs: Sequence[str]) -> Plan:
        """Run each method once, check that it is compared with its like, and note what the arms need."""
        plan = cls(list(specs))
        for spec in specs:
            modules = bench.tapped(spec)
            plan.tapped[spec] = list(modules)
            bench.watched |= modules
        steps, bench.steps = bench.steps, 0
        for spec in specs:
            sample, report = bench.method(spec)
            plan.alive[spec] = float(report.mean_alive)
            plan.even[spec] = len(set(report.images[0].alive)) == 1
            if report.images[0].alive[0] == bench.shape.tokens:
                plan.cuts[spec] = bench.columns(report)
                if bench.hand_cut(plan.cuts[spec]).token != sample.token:
                    raise RuntimeError(f"the model cut by hand to the schedule of {spec} answers otherwise")
            elif report.images[0].alive[0] != bench.keep:
                raise RuntimeError(f"{spec} keeps {report.images[0].alive[0]} tokens, the ideal {bench.keep}")
        bench.steps = steps
        return plan

    def reference(self, spec: str) -> str:
        """The arm that a method is compared with."""
        return CUT + spec if spec in self.cuts else "ideal"


def measure(
    bench: Bench, plan: Plan, options: argparse.Namespace, say: Callable[[str], None]
) -> dict[str, list[Sample]]:
    """Return the samples of each arm, one per round; every round has every arm, in a random order.

    Ctrl-C after three rounds ends the rounds; what is complete counts.
    """
    repeats, warmup = options.repeats, options.warmup
    arms: dict[str, Callable[[], Sample]] = {"full": bench.full, "ideal": bench.ideal}
    for spec in plan.specs:
        arms[spec] = lambda spec=spec: bench.method(spec)[0]  # type: ignore[misc]  # a default binds the loop's value
        if spec in plan.cuts:
            arms[CUT + spec] = lambda spec=spec: bench.hand_cut(plan.cuts[spec])  # type: ignore[misc]
    samples: dict[str, list[Sample]] = {name: [] for name in arms}
    order, shuffle = list(arms), random.Random(options.seed)
    start = time.monotonic()
    done = 0
    try:
        for turn in range(warmup + repeats):
            if turn == warmup:
                start = time.monotonic()
            if done >= 3 and time.monotonic() - start > options.seconds:
                break
            shuffle.shuffle(order)
            for name in order:
                gc.collect()
                sample = arms[name]()
                if turn >= warmup:
                    samples[name].append(sample)
            done = max(0, turn + 1 - warmup)
            say(f"round {done} of {repeats}, load {load()}" if done else "warm-up round done")
    except KeyboardInterrupt:
        if done < 3:
            raise
        say(f"interrupted after {done} rounds")
    return {name: runs[:done] for name, runs in samples.items()}


def compare(plan: Plan, samples: dict[str, list[Sample]]) -> list[Row]:
    """Return what the samples say, arm by arm."""
    rows: list[Row] = []
    for arm, runs in samples.items():
        series = {(arm, metric): Row(arm, metric, "ms", values) for metric, values in _series(runs).items()}
        if arm in plan.specs:
            reference, inner = plan.reference(arm), arm in plan.cuts
            like = _series(samples[reference])
            judged = dict.fromkeys(("first_token", "first_token_cpu"), BOUNDS.inner if inner else BOUNDS.overhead)
            if inner:
                judged["prefill"] = BOUNDS.inner
            if inner or plan.even[arm]:
                judged |= dict.fromkeys(("decode_step", "decode_step_cpu"), BOUNDS.decode)
            for metric, target in judged.items():
                if (arm, metric) in series:
                    _judge(series[arm, metric], reference, like[metric], target)
            rows += _selection(plan, arm, runs, samples["ideal"])
        rows += series.values()
    return rows


def _series(runs: list[Sample]) -> dict[str, list[float]]:
    """Return the values per round of what was measured directly."""
    values = {
        "first_token": [run.first for run in runs],
        "first_token_cpu": [run.cpu for run in runs],
        "encode": [run.encode for run in runs if run.encode is not None],
        "prefill": [run.prefill for run in runs if run.prefill is not None],
        "decode_step": [statistics.median(run.steps) for run in runs if run.steps],
        "decode_step_cpu": [statistics.median(run.steps_cpu) for run in runs if run.steps_cpu],
    }
    return {name: each for name, each in values.items() if each}


def _judge(row: Row, against: str, reference: list[float], target: float) -> None:
    row.against, row.target, row.ratio = against, target, Estimate.of(ratios(row.values, reference))
    row.met = row.ratio.meets(target)
    if row.ratio.high < 0.98:
        row.met = "unresolved"  # nothing is faster than what it is made of: this is the machine's noise


def _selection(plan: Plan, arm: str, runs: list[Sample], ideal: list[Sample]) -> list[Row]:
    """Selection by the clock, plus what it adds to the encoder: folds, and attention modules that are listened to."""
    select = [run.select or 0.0 for run in runs]
    fold = [run.fold or 0.0 for run in runs]
    taps = [
        math.fsum(run.attention[name] - other.attention[name] for name in plan.tapped[arm])
        for run, other in zip(runs, ideal, strict=True)
    ]
    whole = [math.fsum(parts) for parts in zip(select, fold, taps, strict=True)]
    row = Row(arm, "selection", "ms", whole, "first_token", target=BOUNDS.selection)
    extra: list[Row] = []
    alone = torch.get_num_threads() == 1
    row.ratio = Estimate.of(ratios(whole, [run.cpu if alone else run.first for run in runs]))
    row.met = row.ratio.meets(BOUNDS.selection)
    if arm not in plan.cuts:
        rest, free = (Estimate.of(_rest(each)).value for each in (runs, ideal))
        base = statistics.median(run.cpu if alone else run.first for run in ideal)
        ratio = [1.0 + (part + rest - free) / base for part in whole]
        extra.append(Row(arm, "accounted", "ratio", ratio, "ideal", Estimate.of(ratio)))
    return [*extra, Row(arm, "select", "ms", select), Row(arm, "fold", "ms", fold), Row(arm, "tap", "ms", taps), row]


def _rest(runs: list[Sample]) -> list[float]:
    """What is neither encoder nor selection nor decoder layers: cutting the prompt, logits, ``generate`` itself."""
    return [run.first - (run.encode or 0.0) - (run.select or 0.0) - (run.prefill or 0.0) for run in runs]


# -- memory


def peak(bench: Bench, arm: str) -> dict[str, float]:
    """Return the process's resident MiB before an arm runs and its peak while it runs."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        before = _high_water()
    except OSError:
        before = 0.0
    bench.full() if arm == "full" else bench.ideal() if arm == "ideal" else bench.method(arm)
    return {"before": before, "peak": _high_water()}


def _high_water() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(arms: Sequence[str], command: Sequence[str], say: Callable[[str], None]) -> list[Row]:
    """Return each arm's peak, measured in a process of its own."""
    rows: list[Row] = []
    for arm in arms:
        child = subprocess.run(
            [sys.executable, "-m", "foveate.lab.speed", *command, "--memory-of", arm],
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(child.stdout.splitlines()[-1])
        rows.append(Row(arm, "peak_memory", "MiB", [found["peak"]]))
        rows.append(Row(arm, "memory_before", "MiB", [found["before"]]))
        say(f"memory of {arm}: {found['before']:.0f} -> {found['peak']:.0f} MiB")
    full = next(row for row in rows if (row.arm, row.metric) == ("full", "peak_memory")).values[0]
    for row in rows:
        if row.metric == "peak_memory" and row.arm != "full":
            ratio = row.values[0] / full
            row.against, row.target, row.ratio = "full", BOUNDS.memory, Estimate(ratio, ratio, ratio)
            row.met = "yes" if ratio <= BOUNDS.memory else "no"
    return rows


# -- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write a CSV."""
    options = _parser().parse_args(arguments)
    shape = SHAPES[options.shape]
    shape = dataclasses.replace(shape, layers=options.layers or shape.layers, width=options.width or shape.width)
    specs = [_with_keep(spec, options.keep) for spec in options.methods]
    console = Console(stderr=True)

    def say(line: str) -> None:
        if not options.quiet:
            console.log(line, _stack_offset=2)

    if options.threads:
        torch.set_num_threads(options.threads)
    model = build(shape, getattr(torch, options.dtype), "sdpa", options.seed)
    bench = Bench(model, shape, options.keep, options.steps, options.seed)
    if options.memory_of is not None:
        bench.steps = min(bench.steps, 2)
        sys.stdout.write(json.dumps(peak(bench, options.memory_of)) + "\n")
        return
    before, plan = load(), Plan.make(bench, specs)
    say("every method ran once; the rounds begin")
    rows = compare(plan, measure(bench, plan, options, say))
    say("the rounds are over")
    constant = environment() | {
        "shape": options.shape,
        "layers": str(shape.layers),
        "width": str(shape.width),
        "visual_tokens": str(shape.tokens),
        "text_tokens": str(shape.text),
        "keep": str(options.keep),
        "steps": str(options.steps),
        "dtype": options.dtype,
        "attention": model.config._attn_implementation,
        "seed": str(options.seed),
        "load_before": before,
        "load_after": load(),
    }
    del model, bench.model
    gc.collect()
    if options.memory:
        command = ["--shape", options.shape, "--layers", shape.layers, "--width", shape.width, "--keep", options.keep]
        command += ["--dtype", options.dtype, "--seed", options.seed, "--steps", options.steps]
        command += ["--threads", torch.get_num_threads()]
        rows += memory(["full", "ideal", *specs], list(map(str, command)), say)
    if options.out is not None:
        write(options.out, rows, constant)
    wide = Console(width=200)
    wide.print(table(rows, shape, plan.alive, BOUNDS))
    wide.print(f"{' '.join(f'{name}={value}' for name, value in constant.items())}", highlight=False, soft_wrap=True)


def _with_keep(spec: str, keep: int) -> str:
    name, _, rest = spec.partition(":")
    pieces = [piece for piece in rest.split(",") if piece]
    if not any(piece.startswith(("keep=", "stages=")) for piece in pieces):
        pieces.insert(0, f"keep={keep}")
    return foveate.to_spec(foveate.from_spec(f"{name}:{','.join(pieces)}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m foveate.lab.speed", description="Measure speed and memory on this CPU.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, help="decoder layers; the default is the shape's (12: a shrunk decoder)")
    parser.add_argument("--width", type=int, help="decoder width; the default is the shape's (2048)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--keep", type=int, default=64, help="visual tokens that stay (for v2drop: mean per layer)")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="specs; keep is added where it is left out")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no round after so long (but do three)")
    parser.add_argument("--steps", type=int, default=8, help="decode steps after the first token")
    parser.add_argument("--threads", type=int, help="threads of torch; on a busy machine take 1 and read CPU times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory of each arm")
    parser.add_argument("--out", type=Path, default=Path("results/speed.csv"))
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
