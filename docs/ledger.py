"""Makes the tables of docs/ledger.md: what papers print (published.toml), and what was measured here (results/)."""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "docs" / "published.toml"
RESULTS = ROOT / "results"

#: Points by which an average may differ from what its row gives: the scores in the row are rounded as well.
_ROUNDING = 0.1


def page(text: str) -> str:
    """Return the page with every block between markers made anew: ``<!-- name key: begin ... -->``."""
    data = published()
    makers = {
        "tasks": lambda _: tasks_table(data["tasks"]),
        "again": lambda _: again(data),
        "published": lambda key: published_table(_find(data, key)),
        "commands": lambda key: commands(data["tasks"], _find(data, key)),
        "averages": lambda _: averages(data),
        "accuracy": lambda _: accuracy(),
        "speed": lambda _: speed(),
    }

    def made(match: re.Match[str]) -> str:
        name, _, key = match["what"].partition(" ")
        return match["begin"] + makers[name](key) + match["end"]

    pattern = r"(?P<begin><!-- (?P<what>[\w. -]+): begin.*?-->\n).*?(?P<end><!-- (?P=what): end -->)"
    return re.sub(pattern, made, text, flags=re.DOTALL)


def published() -> dict[str, Any]:
    """Return what papers print."""
    return tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))


def retention(values: Sequence[float], vanilla: Sequence[float]) -> float:
    """Return the mean over benchmarks of value / uncompressed value, in percent.

    Example:
        >>> retention([45.0, 90.0], [90.0, 90.0])
        75.0
    """
    return 100 * sum(value / full for value, full in zip(values, vanilla, strict=True)) / len(vanilla)


def again(data: dict[str, Any]) -> str:
    """Return how many printed averages are what their own rows give."""
    rows = [(row, one) for one in data["table"] for row in one["rows"] if "values" in row and not one.get("partial")]
    wrong = [(row, one) for row, one in rows if off(row, one)]
    papers = ", ".join(dict.fromkeys(one["paper"] for _, one in wrong))
    most = max(abs(retention(row["values"], one["vanilla"]) - row["average"]) for row, one in wrong)
    return (
        f"- **The papers' averages hold**: of {len(rows)} that can be recomputed from their own rows, "
        f"{len(rows) - len(wrong)} come out as printed.\n"
        f"  The other {len(wrong)}, in the tables of {papers}, are off by {most:.1f} points at most.\n"
    )


def tasks_table(tasks: dict[str, list[str]]) -> str:
    """Return where each benchmark is in lmms-eval."""
    rows = [(name, f"`{task}`", f"`{metric}`", note) for name, (task, metric, note) in tasks.items()]
    return table(("in the papers", "task", "metric", "mind"), rows)


def published_table(one: dict[str, Any]) -> str:
    """Return a paper's own rows with its averages made again, and a line for each budget on the others in its table."""
    own = [row for row in one["rows"] if "spec" in row]
    lines: list[tuple[str, ...]] = [("all", "", *map(str, one["vanilla"]), "100", "", _ours(one, None))]
    for row in own:
        again = f"{retention(row['values'], one['vanilla']):.2f}"
        if one.get("partial"):
            again += " of these"
        elif off(row, one):
            again = f"**{again}**"
        lines.append(
            (row["tokens"], f"`{row['spec']}`", *map(str, row["values"]), str(row["average"]), again, _ours(one, row))
        )
    text = table(("tokens", "spec", *one["benchmarks"], "average", "recomputed", "we got"), lines)
    others = [_others(one, tokens) for tokens in dict.fromkeys(row["tokens"] for row in one["rows"])]
    return text + ("\nOthers in that table:\n\n" if any(others) else "") + "".join(others)


def off(row: dict[str, Any], one: dict[str, Any]) -> bool:
    """Whether a printed average is not the mean ratio of its own row."""
    if "values" not in row or one.get("partial"):
        return False
    return abs(retention(row["values"], one["vanilla"]) - row["average"]) > _ROUNDING


def _others(one: dict[str, Any], tokens: str) -> str:
    rows = [row for row in one["rows"] if "spec" not in row and row["tokens"] == tokens]
    said = []
    for row in rows:
        again = f" (recomputed **{retention(row['values'], one['vanilla']):.2f}**)" if off(row, one) else ""
        said.append(f"{row['method']} {row['average']}{again}")
    return f"- {tokens}: {', '.join(said)}\n" if said else ""


def _ours(one: dict[str, Any], row: dict[str, Any] | None) -> str:
    if row is None:
        return " / ".join(map(str, one["ours_vanilla"])) if "ours_vanilla" in one else "not run"
    return f"{retention(row['ours'], one['ours_vanilla']):.1f}" if "ours" in row else "not run"


def commands(tasks: dict[str, list[str]], one: dict[str, Any]) -> str:
    """Return the shell loop that asks the uncompressed model and every own row of a table, in one protocol."""
    specs = ["none", *(row["spec"] for row in one["rows"] if "spec" in row)]
    names = list(dict.fromkeys(tasks[name][0] for name in one["benchmarks"]))
    return "\n".join(
        [
            "```bash",
            f"for method in {' '.join(specs)}; do",
            f"  lmms-eval --model foveate --model_args pretrained={one['model']},method=$method \\",
            f"    --tasks {','.join(names)} \\",
            f"    --batch_size 1 --log_samples --output_path runs/{one['key']}/$method",
            "done",
            "```\n",
        ]
    )


def averages(data: dict[str, Any]) -> str:
    """Return how one method fares in different papers' tables, LLaVA-1.5-7B at 192, 128 and 64 tokens."""
    budgets = ("192", "128", "64")
    found: dict[str, dict[str, list[str]]] = {}
    for one in data["table"]:
        if one["model"] != "llava-hf/llava-1.5-7b-hf" or not {row["tokens"] for row in one["rows"]} & set(budgets):
            continue
        for row in one["rows"]:
            if row["tokens"] in budgets:
                cells = found.setdefault(row["method"], {})
                cells.setdefault(row["tokens"], []).append(f"{row['average']} ({one['paper']})")
    for quoted in data["quoted"]:
        for method, values in quoted["averages"].items():
            for budget, value in zip(budgets, values, strict=True):
                if value != "-":
                    found.setdefault(method, {}).setdefault(budget, []).append(f"{value} ({quoted['source']})")
    rows = [(method, *(", ".join(cells.get(b, [])) for b in budgets)) for method, cells in sorted(found.items())]
    return table(("method", *budgets), rows)


def accuracy() -> str:
    """Return the demo model's accuracy by method and budget, and what share of the uncompressed accuracy that is."""
    rows = [row for row in read(RESULTS / "accuracy.csv") if ":" not in row["method"]]
    bounds = {row["method"]: float(row["accuracy"]) for row in rows if row["method"] in ("full", "blind")}
    cells = {(row["method"], int(row["budget"])): float(row["accuracy"]) for row in rows if row["budget"]}
    budgets = sorted({budget for _, budget in cells}, reverse=True)

    def cell(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f} ({100 * share / bounds['full']:.0f})"

    lines = [(f"`{name}`", *[cell(share)] * len(budgets)) for name, share in bounds.items()]
    for method in dict.fromkeys(name for name, _ in cells):
        lines.append((f"`{method}`", *(cell(cells.get((method, budget))) for budget in budgets)))
    return table(("method", *(f"{budget} tokens" for budget in budgets)), lines)


def speed() -> str:
    """Return what compression gave and cost on a CPU: ratios of medians, none where the spreads overlap."""
    runs = [read(path) for path in (RESULTS / "speed.csv", RESULTS / "speed-bfloat16.csv") if path.exists()]
    cells: dict[str, list[str]] = {}
    heads = ["arm"]
    for place, rows in enumerate(runs):
        by = {(row["arm"], row["metric"]): row for row in rows if row.get("batch", "1") == "1"}
        heads += [f"full / it, {rows[0]['dtype']}", "selection", "peak MiB"]
        for arm in (arm for arm, metric in by if metric == "first_token" and not arm.startswith("hand-cut")):
            chosen, peak = by.get((arm, "selection")), by.get((arm, "peak_memory"))
            line = cells.setdefault(arm, [""] * 3 * len(runs))
            line[3 * place] = _gain(by["full", "first_token"], by[arm, "first_token"])
            line[3 * place + 1] = f"{100 * float(chosen['ratio']):.2f} %" if chosen and chosen["ratio"] else ""
            line[3 * place + 2] = f"{float(peak['median']):.0f}" if peak and peak["median"] else ""
    kept = [place for place in range(3 * len(runs)) if any(line[place] for line in cells.values())]
    lines = [(f"`{arm}`", *(line[place] for place in kept)) for arm, line in cells.items()]
    return table(("arm", *(heads[place + 1] for place in kept)), lines)


def _gain(full: dict[str, str], mine: dict[str, str]) -> str:
    if mine is full:
        return "1"
    if float(mine["quartile_high"]) >= float(full["quartile_low"]):
        return "overlap"
    return f"{float(full['median']) / float(mine['median']):.2f}"


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(cell for cell in line) + " |\n" for line in lines)


def _find(data: dict[str, Any], key: str) -> dict[str, Any]:
    return next(one for one in data["table"] if one["key"] == key)
