"""Measures both engines in one run: `python -m benchmarks.openvino_peer.measure --help`.

Workers, one process per engine, stay alive and are asked in turn, one at a time; the order is new in each round. All
arms of one budget see the same picture in a round, and no worker sees a picture twice at one budget.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.console import Console

import foveate
from benchmarks.openvino_peer.rows import Arm, Row, rows, write
from benchmarks.openvino_peer.work import VISUAL, Line
from foveate.lab.environment import environment, load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

#: ToDRE's second stage is left out: all layers then hold equally many tokens, as in all other arms.
OPTIONS = {"todre": ",exit=none"}

#: How far the log-probabilities of the two full models may lie apart.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class Mismatch(RuntimeError):
    """The two engines do not run the same thing, so that their times must not be compared."""


class Worker:
    """A process that answers lines of JSON.

    Args:
        command: How to start it.
        environment: What it finds in its environment besides ours.
        log: Gets its standard error.
    """

    def __init__(self, command: Sequence[str | Path], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
                cwd=ROOT,
            )
        self.hello = self._read()

    def ask(self, request: Line) -> Line:
        """Send a request and wait for its reply."""
        _pipe(self._process.stdin).write(json.dumps(request) + "\n")
        _pipe(self._process.stdin).flush()
        return self._read()

    def cpu_ms(self) -> float:
        """Return the CPU time that the process has used so far (Linux counts it in ticks of 10 ms)."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) * 1e3 / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Let it end."""
        with self._process:  # closes the pipes and waits
            pass

    def _read(self) -> Line:
        line = _pipe(self._process.stdout).readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-5:])
            raise RuntimeError(f"a worker ended; the last lines of {self._log}:\n{tail}")
        answer: Line = json.loads(line)
        return answer


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def start(options: argparse.Namespace, dtype: str) -> dict[str, Worker]:
    """Start one process per engine; a variable of its environment gives the peer's one-block variant."""
    threads = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    theirs = [options.peer, "-m", "benchmarks.openvino_peer.theirs", options.model / "openvino", dtype, options.threads]
    ours = [sys.executable, "-m", "benchmarks.openvino_peer.ours", options.model / "torch", dtype, options.threads]
    peer = threads | {"PYTHONPATH": f"{ROOT}:{HERE / 'shim'}"}
    one_block = peer | {"CDPRUNER_SPLIT_THRESHOLD": "0"}
    own = threads | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return {
        "openvino": Worker([*theirs, "0.5"], peer, options.model / "openvino.log"),
        "openvino-one-block": Worker([*theirs, "1.0"], one_block, options.model / "openvino-one-block.log"),
        "foveate": Worker(ours, own, options.model / "foveate.log"),
    }


def plan(workers: dict[str, Worker], options: argparse.Namespace, dtype: str) -> list[Arm]:
    """Return the arms, after checking that both engines run the same model; the peer's counts become our budgets."""
    theirs = workers["openvino"].ask({"picture": 0, "prune": 0})
    ours = workers["foveate"].ask({"picture": 0, "method": None})
    apart = abs(theirs["logprob"] - ours["logprob"])
    other = dtype == "float32" and theirs["word"] != ours["word"]  # rounding to bfloat16 may part words that are close
    if theirs["tokens"] != ours["tokens"] or other or apart > TOLERANCE[dtype]:
        raise Mismatch(f"the full models differ: {theirs} and {ours}\nhint: make the checkpoint and its export anew")
    arms = [Arm("openvino", "full", 0, {"prune": 0}), Arm("foveate", "full", 0, {"method": None})]
    text = theirs["tokens"] - VISUAL
    for number, prune in enumerate(options.prune, 1):
        request = {"prune": prune}
        keep = workers["openvino"].ask({"picture": number, **request})["tokens"] - text
        arms.append(Arm("openvino", "cdpruner", prune, request))
        arms.append(Arm("openvino-one-block", "cdpruner", prune, request))
        for name in options.methods:
            spec = foveate.to_spec(foveate.from_spec(f"{name}:keep={keep}{OPTIONS.get(name, '')}"))
            arms.append(Arm("foveate", name, prune, {"method": spec}))
    return arms


def measure(dtype: str, options: argparse.Namespace, console: Console) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of one dtype, and what the workers said of themselves."""
    workers = start(options, dtype)
    try:
        arms = plan(workers, options, dtype)
        console.log(f"{dtype}: the workers are up and run the same model, {len(arms)} arms")
        samples: dict[Arm, list[Line]] = {arm: [] for arm in arms}
        shuffle, begun, done = random.Random(options.seed), time.monotonic(), 0
        with options.out.with_suffix(".jsonl").open("a") as log:
            for turn in range(options.warmup + options.rounds):
                if turn == options.warmup:
                    begun = time.monotonic()
                if done >= 5 and time.monotonic() - begun > options.seconds:
                    break
                round_ = {}
                for arm in shuffle.sample(arms, len(arms)):
                    round_[arm] = _ask(workers, arm, 100 + 100 * turn + arm.prune)
                    line = {"dtype": dtype, "turn": turn, "arm": arm.name, "load": load(), **round_[arm]}
                    log.write(json.dumps(line) + "\n")
                _check(round_, dtype)
                if turn >= options.warmup:
                    done += 1
                    for arm, reply in round_.items():
                        samples[arm].append(reply)
                console.log(f"{dtype}: round {done} of {options.rounds}, load {load()}")
        versions = workers["openvino"].hello["versions"]
        return rows(dtype, samples), {**versions, "attention": workers["foveate"].hello["attention"]}
    finally:
        for worker in workers.values():
            worker.close()


def _ask(workers: dict[str, Worker], arm: Arm, number: int) -> Line:
    """Ask one worker; what the others use meanwhile is noted."""
    others = [worker for name, worker in workers.items() if name != arm.engine]
    time.sleep(0.1)  # threads of the worker before spin for a moment after their work
    before = sum(worker.cpu_ms() for worker in others)
    reply = workers[arm.engine].ask({**arm.request, "picture": number})
    return reply | {"idle_cpu": sum(worker.cpu_ms() for worker in others) - before}


def _check(round_: dict[Arm, Line], dtype: str) -> None:
    """Raise if arms of one budget differ in tokens, or the full runs in what they say."""
    for prune in {arm.prune for arm in round_}:
        counts = {arm.name: reply["tokens"] for arm, reply in round_.items() if arm.prune == prune}
        if len(set(counts.values())) != 1:
            raise Mismatch(f"unequal numbers of input tokens: {counts}")
    full = [reply["logprob"] for arm, reply in round_.items() if arm.method == "full"]
    if max(full) - min(full) > TOLERANCE[dtype]:
        raise Mismatch(f"the full models give the first token log-probabilities {full}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the CSV; a dtype that is done is written before the next begins."""
    options = _parser().parse_args(arguments)
    options.peer, options.model, options.out = (path.absolute() for path in (options.peer, options.model, options.out))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # the workers inherit it
    console, made, before = Console(stderr=True), [], load()
    for dtype in options.dtypes:
        found, about = measure(dtype, options, console)
        made += found
        constant = environment() | about | {"threads": str(options.threads), "seed": str(options.seed)}
        write(options.out, made, constant | {"load_before": before, "load_after": load()})
    console.log(f"wrote {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.openvino_peer.measure", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("build/openvino_peer"), help="folder that checkpoint made")
    parser.add_argument("--peer", type=Path, default=Path(".venv-openvino/bin/python"), help="Python of the peer")
    parser.add_argument("--out", type=Path, default=Path("results/peers.csv"))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCE), default=tuple(TOLERANCE))
    parser.add_argument("--prune", nargs="+", type=int, default=(50, 75, 90), help="percent of visual tokens that go")
    parser.add_argument("--methods", nargs="+", default=("cdpruner", "divprune", "evocut", "todre"), help="ours")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--seconds", type=float, default=200.0, help="begin no round after so long (but do five)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the arms")
    return parser


if __name__ == "__main__":
    main()
