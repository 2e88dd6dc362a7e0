"""Many clients at once on `foveate serve`: is every answer the offline one, every bad request refused, memory stable?

python -m foveate.lab.load    # starts a server with the demo model, writes results/serve.csv; exit code 1 if not so

Three phases on one server: 1,000 requests of 32 clients with mixed budgets and bad requests; the same questions with
all tokens and with few, by one client and by 32, in turns; and requests that schemathesis makes from the schema.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import csv
import io
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from foveate.lab.clients import BAD, Asked, Outcome, ask
from foveate.lab.environment import environment, load

#: Methods and budgets of the mixed phase; the first, without compression, less often than the others.
MIXED = (
    "grid:keep=1.0",
    "adav:keep=64",
    "adav:keep=0.05",
    "evocut:keep=128",
    "evocut:keep=16",
    "random:keep=32",
    "v2drop:keep=96",
    "evocut:keep=96 + v2drop:keep=60",
)
#: Arms whose speed is compared; the first is the model with all its tokens.
TIMED = ("grid:keep=1.0", "adav:keep=64", "adav:keep=16")


@dataclass
class Row:
    """One line of results: what was asked how, what came of it, how long it took, and what memory it left."""

    phase: str
    arm: str
    clients: int
    requests: int
    right: int
    seconds: float | None = None
    latencies: Sequence[float] = ()
    firsts: Sequence[float] = ()
    per_layer: float | None = None
    more: dict[str, str] = field(default_factory=dict)

    def cells(self) -> dict[str, str]:
        """Return the row's columns."""
        rate = None if self.seconds is None else self.requests / self.seconds
        cells = {
            "phase": self.phase,
            "arm": self.arm,
            "clients": str(self.clients),
            "requests": str(self.requests),
            "as_it_should_be": str(self.right),
            "tokens_per_layer": _number(self.per_layer),
            "seconds": _number(self.seconds),
            "requests_per_second": _number(rate),
        }
        for share in (50, 95, 99):
            cells[f"latency_p{share}_s"] = _number(_percentile(self.latencies, share))
        cells["first_text_p50_s"] = _number(_percentile(self.firsts, 50))
        return cells | {name: "" for name in ("rss_early_mib", "rss_late_mib", "rss_peak_mib")} | self.more


@contextmanager
def server() -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Start a server with the demo model; yields its process, its port and what it says of itself."""
    command = [sys.executable, "-m", "foveate", "serve", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = process.stderr.readline().strip()
        found = re.search(r":(\d+)/v1, (.*)$", said)
        if found is None:
            raise SystemExit(f"error: the server did not start: {said} {process.stderr.read()}")
        yield process, int(found[1]), found[2]
    finally:
        process.terminate()
        _, rest = process.communicate(timeout=60)
        sys.stderr.write(rest)


def questions(n: int) -> tuple[list[Asked], dict[Asked, str]]:
    """Return questions about ``n`` pictures by each method, and what the library answers offline."""
    import foveate
    from foveate import demo
    from foveate.lab.tasks import load_task

    network: Any
    network, processor = demo.load()
    task = load_task("demo", 4 * n)
    items = random.Random(0).sample(task.items, n)
    answers: dict[Asked, str] = {}
    for item in items:
        picture: Any = task.open(item.pictures[0])
        file = io.BytesIO()
        picture.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        inputs = processor(images=picture, text=f"USER: <image>\n{item.question} ASSISTANT:", return_tensors="pt")
        for method in dict.fromkeys((*MIXED, *TIMED)):
            with foveate.compress(network, method):
                output = network.generate(**inputs, max_new_tokens=8, do_sample=False)
            text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers[Asked(url, item.question, method)] = str(text).strip()
    return list(answers), answers


async def mixed(
    port: int, pid: int, asked: Sequence[Asked], answers: dict[Asked, str], requests: int, clients: int
) -> list[Row]:
    """Let many clients send good and bad requests, a fifth of them bad; return a row per kind."""
    rng = random.Random(1)
    plan: list[tuple[Any, Asked]] = []
    good = [one for one in asked if one.method in MIXED]
    weights = [0.4 if one.method == MIXED[0] else 1.0 for one in good]
    for i in range(requests):
        plan.append((BAD[i // 5 % len(BAD)] if i % 5 == 0 else None, rng.choices(good, weights)[0]))
    rng.shuffle(plan)
    outcomes: list[tuple[Outcome, bool]] = []
    memory: list[float] = []

    async with _openai(port) as client:

        async def work(todo: Iterator[tuple[Any, Asked]]) -> None:
            for bad, one in todo:
                if bad is None:
                    outcome = await ask(client, one, stream=rng.random() < 0.5)
                    outcomes.append((outcome, outcome.status == 200 and outcome.text.strip() == answers[one]))
                else:
                    outcome = await bad(client, port, one)
                    outcomes.append((outcome, 400 <= outcome.status < 500 and "\nhint: " in outcome.text))

        async def watch() -> None:
            while True:
                memory.append(_rss(pid))
                await asyncio.sleep(0.5)

        begin, todo, watching = time.perf_counter(), iter(plan), asyncio.ensure_future(watch())
        await asyncio.gather(*(work(todo) for _ in range(clients)))
        seconds = time.perf_counter() - begin
        watching.cancel()
    quarter = len(memory) // 4
    rss = {
        "rss_early_mib": _number(_percentile(memory[quarter : 2 * quarter], 50)),
        "rss_late_mib": _number(_percentile(memory[3 * quarter :], 50)),
        "rss_peak_mib": _number(max(memory)),
    }
    rows = [Row("mixed", "all", clients, len(outcomes), sum(right for _, right in outcomes), seconds, more=rss)]
    for kind in dict.fromkeys(outcome.kind for outcome, _ in outcomes):
        mine = [(outcome, right) for outcome, right in outcomes if outcome.kind == kind]
        statuses = sorted({str(outcome.status) for outcome, _ in mine})
        times = [outcome.seconds for outcome, _ in mine]
        arm = f"{kind}: {' '.join(statuses)}"
        rows.append(Row("mixed", arm, clients, len(mine), sum(right for _, right in mine), latencies=times))
        for outcome, right in mine:
            if not right:
                print(f"wrong: {outcome}", file=sys.stderr)
    return rows


async def timed(
    port: int, asked: Sequence[Asked], answers: dict[Asked, str], rounds: int, clients: int, each: int
) -> list[Row]:
    """Ask the same questions in every arm, by one client and by many, arm after arm in every round."""
    got: dict[tuple[str, int], list[tuple[Outcome, bool]]] = {}
    spent: dict[tuple[str, int], float] = {}
    async with _openai(port) as client:

        async def work(todo: Iterator[Asked], into: list[tuple[Outcome, bool]]) -> None:
            for one in todo:
                outcome = await ask(client, one, stream=True)
                into.append((outcome, outcome.status == 200 and outcome.text.strip() == answers[one]))

        for _ in range(rounds):
            for many, number in ((1, each), (clients, max(clients, 4 * each))):
                for arm in TIMED:
                    mine = [one for one in asked if one.method == arm]
                    todo = iter((mine * (1 + number // len(mine)))[:number])
                    into, begin = got.setdefault((arm, many), []), time.perf_counter()
                    await asyncio.gather(*(work(todo, into) for _ in range(many)))
                    spent[arm, many] = spent.get((arm, many), 0.0) + time.perf_counter() - begin
    return [
        Row(
            "timed",
            arm,
            many,
            len(each_got),
            sum(right for _, right in each_got),
            spent[arm, many],
            [outcome.seconds for outcome, _ in each_got],
            [outcome.first for outcome, _ in each_got],
            sum(outcome.per_layer for outcome, _ in each_got) / len(each_got),
        )
        for (arm, many), each_got in got.items()
    ]


def schema(port: int, examples: int) -> Row:
    """Let schemathesis make requests from the server's own description; a 5xx is what should not be."""
    url = f"http://127.0.0.1:{port}/openapi.json"
    checks = ["--checks", "not_a_server_error", "--max-examples", str(examples), "--seed", "1", "--continue-on-failure"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", url, *checks, "--request-timeout", "60", "--no-color"]
    begin = time.perf_counter()
    with TemporaryDirectory() as folder:  # schemathesis leaves a database where it runs
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    cases = re.search(r"(\d+) generated", done.stdout)
    if done.returncode or cases is None:
        sys.stderr.write(done.stdout + done.stderr)
    number = int(cases[1]) if cases else 0
    return Row("schemathesis", "no 5xx", 1, number, number if not done.returncode else 0, time.perf_counter() - begin)


def main() -> int:
    """Run all phases; return 0 if everything was as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=1000, help="requests of the mixed phase")
    parser.add_argument("--clients", type=int, default=32, help="clients at once")
    parser.add_argument("--pictures", type=int, default=6, help="pictures, one question each")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the timed phase")
    parser.add_argument(
        "--each", type=int, default=8, help="requests of one client in a round; many send four times that"
    )
    parser.add_argument("--examples", type=int, default=40, help="examples for schemathesis; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path("results/serve.csv"))
    options = parser.parse_args()
    asked, answers = questions(options.pictures)
    with server() as (process, port, conditions):
        rows = asyncio.run(mixed(port, process.pid, asked, answers, options.requests, options.clients))
        rows += asyncio.run(timed(port, asked, answers, options.rounds, options.clients, options.each))
        if options.examples:
            rows.append(schema(port, options.examples))
        alive = process.poll() is None
    constant = environment() | {"load": load(), "server": conditions, "exit_code": str(process.returncode)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0].cells(), *constant], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.cells() | constant for row in rows)
    for row in rows:
        print("  ".join(cell for cell in row.cells().values() if cell))
    print(f"wrote {options.out}")
    right = alive and process.returncode == 0 and all(row.requests == row.right for row in rows)
    return 0 if right else 1


def _openai(port: int) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)


def _rss(pid: int) -> float:
    """Return the memory of a process that is in RAM, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def _percentile(values: Sequence[float], share: int) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)] if ordered else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
