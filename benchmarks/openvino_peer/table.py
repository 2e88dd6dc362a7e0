"""Writes results/peers.csv into docs/peers.md: `python -m benchmarks.openvino_peer.table [--check]`."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.openvino_peer.rows import Arm, Row

ROOT = Path(__file__).resolve().parent.parent.parent
MEASURED, PAGE = ROOT / "results" / "peers.csv", ROOT / "docs" / "peers.md"
MARKERS = re.compile(r"(<!-- peers: begin.*?-->\n).*?(<!-- peers: end -->)", re.DOTALL)

Cells = dict[str, str]

#: The arms that stand beside each other: engine and method, and the heading.
SIDE_BY_SIDE = {
    ("openvino", "cdpruner"): "OpenVINO GenAI",
    ("openvino-one-block", "cdpruner"): "OpenVINO GenAI, one block",
    ("foveate", "cdpruner"): "foveate `cdpruner`",
}


def filled(page: str, rows: Sequence[Cells]) -> str:
    """Return the page with its tables made anew between the markers."""
    text = _tables(rows) if rows else "Not measured yet: `make peers`.\n"
    page, count = MARKERS.subn(lambda found: found[1] + text + found[2], page)
    if count != 1:
        raise ValueError("the page needs one pair of markers <!-- peers: begin --> and <!-- peers: end -->")
    return page


def _tables(rows: Sequence[Cells]) -> str:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    parts = [_conditions(rows), "### Time to first token, compressed by uncompressed\n", _side_by_side(rows)]
    parts += ["### Time to first token, foveate by OpenVINO GenAI\n", _absolute(rows)]
    for dtype in dtypes:
        parts += [f"### Every arm, {dtype}\n", _every_arm([row for row in rows if row["dtype"] == dtype])]
    return "\n".join(parts)


def _conditions(rows: Sequence[Cells]) -> str:
    one = rows[0]
    busy = [max(_samples(row)) for row in rows if row["metric"] == "idle_cpu"]
    rounds = ", ".join(
        f"{next(row['rounds'] for row in rows if row['dtype'] == dtype)} in {dtype}"
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    )
    return (
        f"{one['cpu']}, {one['cores']} cores, {one['threads']} threads each; load average {one['load_before']} before, "
        f"{one['load_after']} after.\nOpenVINO {one['openvino']}, GenAI {one['openvino-genai']}; torch {one['torch']}, "
        f"transformers {one['transformers']},\n{one['attention']} attention, Python {one['python']}, foveate "
        f"{one['foveate']} at {one['commit']}, {one['date']}.\nRounds: {rounds}. CPU time that the waiting workers "
        f"used during a run: at most {max(busy):.0f} ms.\n"
    )


def _side_by_side(rows: Sequence[Cells]) -> str:
    first = {(r["dtype"], r["prune"], r["engine"], r["method"]): r for r in rows if r["metric"] == "first_token"}
    lines = []
    for dtype, prune in dict.fromkeys((dtype, prune) for dtype, prune, *_ in first):
        full = first[dtype, "0", "openvino", "full"]
        arms = [first[dtype, prune, *arm] for arm in SIDE_BY_SIDE if (dtype, prune, *arm) in first]
        if prune == "0" or len(arms) < len(SIDE_BY_SIDE):
            continue
        share = int(arms[0]["tokens"]) / int(full["tokens"])
        lines.append((dtype, f"{arms[0]['tokens']} of {full['tokens']}", f"{share:.3f}", *map(_ratio, arms)))
    return _table(("dtype", "input tokens", "share", *SIDE_BY_SIDE.values()), lines)


def _absolute(rows: Sequence[Cells]) -> str:
    first = {(r["dtype"], r["prune"], r["engine"], r["method"]): r for r in rows if r["metric"] == "first_token"}
    lines = []
    for (dtype, prune, engine, method), theirs in first.items():
        if engine != "openvino" or (ours := first.get((dtype, prune, "foveate", method))) is None:
            continue
        arm = Arm("foveate", method, int(prune), {})
        ratio, why = Row(arm, dtype, 0, "first_token", _samples(ours), "", _samples(theirs)).verdict()
        told = f"{ratio.value:.2f} ({ratio.low:.2f} .. {ratio.high:.2f})" if ratio else why
        times = (f"{float(row['median']) / 1e3:.2f}" for row in (theirs, ours))
        lines.append((dtype, theirs["tokens"], f"`{method}`", *times, told))
    headings = ("dtype", "input tokens", "method", "OpenVINO GenAI, s", "foveate, s", "foveate by OpenVINO (95 %)")
    return _table(headings, lines)


def _samples(row: Cells) -> list[float]:
    return [float(value) for value in row["samples"].split(";")]


def _every_arm(rows: Sequence[Cells]) -> str:
    by = {(row["arm"], row["metric"]): row for row in rows}
    lines = []
    arms = {row["arm"]: row for row in rows}.values()
    for arm in sorted(arms, key=lambda row: (int(row["prune"]), row["engine"] == "foveate")):
        found = [by.get((arm["arm"], metric)) for metric in ("first_token", "first_token_cpu", "before_llm", "llm")]
        first, *rest = found
        assert first is not None
        spread = f"{_number(first, 'median')} ({_number(first, 'quartile_low')} .. {_number(first, 'quartile_high')})"
        parts = ["" if row is None else _number(row, "median") for row in [*rest, by.get((arm["arm"], "select"))]]
        lines.append((arm["tokens"], arm["engine"], f"`{arm['method']}`", spread, _ratio(first), *parts))
    headings = ("input tokens", "engine", "method", "first token, ms (quartiles)", "by its own full run (95 %)")
    return _table((*headings, "CPU time, ms", "before the LLM, ms", "LLM, ms", "choosing, ms"), lines)


def _number(row: Cells, column: str) -> str:
    value = float(row[column])
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(row: Cells) -> str:
    if row["ratio"]:
        return f"{float(row['ratio']):.3f} ({float(row['ratio_low']):.3f} .. {float(row['ratio_high']):.3f})"
    return row["no_ratio"]


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    written = [headings, ["---"] * len(headings), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in written)


def read(path: Path) -> list[Cells]:
    """Return the rows of the CSV; none where nothing has been measured."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> int:
    """Write the page, or check that it is fresh; return the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.openvino_peer.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the page is stale")
    check, page = parser.parse_args().check, PAGE.read_text(encoding="utf-8")
    wanted = filled(page, read(MEASURED))
    if wanted == page:
        return 0
    if check:
        sys.stderr.write("error: docs/peers.md is stale\nhint: python -m benchmarks.openvino_peer.table\n")
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
