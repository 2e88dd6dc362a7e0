"""Accuracy of methods at equal budgets on the demo world's held-out set: `python -m foveate.lab.accuracy`.

Answers are written as they come, one JSON line each, so that a killed run goes on where it stopped. The tables are
made from the answers alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import foveate
from foveate import demo
from foveate.demo.evaluate import Score, answer
from foveate.demo.questions import TYPES
from foveate.demo.world import SIDE, held_out, scene
from foveate.errors import BudgetError

BUDGETS = (192, 128, 64, 32)
METHODS = ("evocut", "todre", "adav", "v2drop", "random", "grid", "pool")


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Args:
        method: Spec, ``full`` or ``blind``.
        budget: Visual tokens: per image for methods that select before the LLM, mean per layer for the others.
    """

    method: str
    budget: int

    @property
    def name(self) -> str:
        return self.method if self.method in ("full", "blind") else f"{self.method}:keep={self.budget}"


@dataclass(frozen=True)
class Answer:
    """One line of the log."""

    arm: str
    question: int
    type: str
    given: str
    right: bool
    mean_alive: float


def arms(methods: Sequence[str], budgets: Sequence[int], layers: int) -> list[Arm]:
    """Return the arms that this decoder can run; a mean that is out of reach is left out (the table says so)."""
    chosen = [Arm("full", 576), Arm("blind", 576)]
    for name in methods:
        for budget in budgets:
            arm = Arm(name, budget)
            try:
                method = foveate.from_spec(arm.name)
                alive = 576
                for site in method.sites(layers):
                    expected = method.expected(alive, 576, site, layers)
                    alive = alive if expected is None else expected
            except BudgetError:
                continue
            chosen.append(arm)
    return chosen


def run(log: Path, chosen: Sequence[Arm], n: int, batch: int, dtype: str) -> None:
    """Answer the first ``n`` held-out questions in every arm, batch by batch; lines already in the log are skipped."""
    import torch
    from PIL import Image
    from rich.progress import track

    model, processor = demo.load(dtype=getattr(torch, dtype))
    done = {(line["arm"], line["question"]) for line in read(log)}
    asked = list(enumerate(held_out(n)))
    parts = [asked[start : start + batch] for start in range(0, n, batch)]
    grey = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    with log.open("a") as out:
        for part in track(parts, description=f"{len(chosen)} arms"):
            pictures = {seed: scene(seed).image for _, (seed, _) in part}
            for arm in chosen:
                todo = [(i, seed, question) for i, (seed, question) in part if (arm.name, i) not in done]
                if not todo:
                    continue
                images = [grey if arm.method == "blind" else pictures[seed] for _, seed, _ in todo]
                attached = nullcontext() if arm.budget == 576 else foveate.compress(model, arm.name)
                with attached as handle:
                    given = answer(model, processor, images, [question.text for _, _, question in todo])
                alive = 576.0 if handle is None else handle.report.mean_alive / len(todo)
                for (i, _, question), text in zip(todo, given, strict=True):
                    line = Answer(arm.name, i, question.type, text, text == question.answer, alive)
                    out.write(json.dumps(asdict(line)) + "\n")
                out.flush()


def read(log: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log; a last line cut short by a kill is dropped."""
    if log.exists():
        for text in log.read_text().splitlines():
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                continue


def summarise(log: Path, chosen: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return one row per arm: accuracy with Wilson's 95 % interval, mean tokens per layer, accuracy by type."""
    lines: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in read(log):
        lines[line["arm"]][line["question"]] = line
    rows = []
    for arm in chosen:
        mine = list(lines[arm.name].values())
        if not mine:
            continue
        score = Score(sum(line["right"] for line in mine), len(mine))
        low, high = score.interval
        row: dict[str, Any] = {
            "method": arm.method,
            "budget": arm.budget,
            "mean_tokens_per_layer": round(sum(line["mean_alive"] for line in mine) / len(mine), 1),
            "n": score.n,
            "accuracy": round(score.accuracy, 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
        for kind in TYPES:
            of_kind = [line["right"] for line in mine if line["type"] == kind]
            row[kind] = round(sum(of_kind) / len(of_kind), 4) if of_kind else ""
        rows.append(row)
    return rows


def write(rows: Sequence[dict[str, Any]], out: Path, dtype: str) -> None:
    """Write the rows as ``accuracy.csv`` and two Markdown tables, overall and by type."""
    import torch
    import transformers

    where = {
        "model": "demo",
        "dtype": dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": foveate.__version__,
        "machine": platform.machine(),
    }
    with (out / "accuracy.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
        table.writeheader()
        table.writerows(row | where for row in rows)
    (out / "accuracy.md").write_text(_markdown(rows, where))


def _markdown(rows: Sequence[dict[str, Any]], where: dict[str, str]) -> str:
    budgets = sorted({row["budget"] for row in rows if row["budget"] != 576}, reverse=True)
    cells = {(row["method"], row["budget"]): row for row in rows}
    full, blind = cells[("full", 576)], cells[("blind", 576)]
    text = [
        "# Accuracy on the demo world",
        "",
        f"{full['n']} held-out questions, {where['dtype']}, torch {where['torch']}, transformers "
        f"{where['transformers']}.",
        f"Regenerate: `python -m foveate.lab.accuracy --n {full['n']}`; `make accuracy` asks all 2,000.",
        "Percent right, with Wilson's 95 % interval. A budget is the mean of visual tokens per decoder layer for",
        "`v2drop`, and the tokens that enter the LLM for the others; the last table gives the measured means.",
        "",
        f"- full tokens (576): **{_percent(full)}**",
        f"- blind (a grey picture): **{_percent(blind)}**",
        "",
        "| method | " + " | ".join(f"{budget} tokens" for budget in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for method in dict.fromkeys(row["method"] for row in rows if row["budget"] != 576):
        line = [_percent(cells[(method, b)]) if (method, b) in cells else "out of reach" for b in budgets]
        text.append(f"| `{method}` | " + " | ".join(line) + " |")
    text += [
        "",
        "`out of reach`: the layers that run before the method's first site already cost more than this mean.",
        "",
        "## By type of question",
        "",
        "| method | tokens | mean per layer | " + " | ".join(TYPES) + " |",
        "|---|---|---|" + "---|" * len(TYPES),
    ]
    for row in rows:
        by_type = " | ".join("" if row[kind] == "" else f"{100 * row[kind]:.0f}" for kind in TYPES)
        text.append(f"| `{row['method']}` | {row['budget']} | {row['mean_tokens_per_layer']:.1f} | {by_type} |")
    return "\n".join(text) + "\n"


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f} .. {100 * row['high']:.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m foveate.lab.accuracy", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the tables and the log")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="specs without their budget")
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--n", type=int, default=2000, help="held-out questions")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "accuracy.jsonl"
    layers = json.loads((demo.MODEL / "config.json").read_text())["text_config"]["num_hidden_layers"]
    chosen = arms(options.methods, options.budgets, layers)
    run(log, chosen, options.n, options.batch, options.dtype)
    write(summarise(log, chosen), options.out, options.dtype)


if __name__ == "__main__":
    main()
