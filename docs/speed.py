"""Makes the tables of docs/speed.md from what `foveate bench` wrote to results/."""

from __future__ import annotations

import re
from pathlib import Path

from foveate.lab.speed.rows import read
from foveate.lab.speed.tables import TABLES, Lines, number, promises

PAGE = Path(__file__).parent / "speed.md"
RESULTS = PAGE.parent.parent / "results"


def page(text: str) -> str:
    """Return the page with every block between markers made anew: ``<!-- speed.csv stages: begin ... -->``."""

    def made(match: re.Match[str]) -> str:
        name, what = match["what"].split()
        return match["begin"] + block(RESULTS / name, what) + match["end"]

    pattern = r"(?P<begin><!-- (?P<what>[\w.-]+ \w+): begin.*?-->\n).*?(?P<end><!-- (?P=what): end -->)"
    return re.sub(pattern, made, text, flags=re.DOTALL)


def block(path: Path, what: str) -> str:
    """Return a table (or ``conditions``, or ``promises``) of one file; a word where there is none yet."""
    lines = read(path) if path.exists() else []
    if not lines or "batch" not in lines[0]:
        return f"Not measured yet: results/{path.name}.\n"
    if what == "conditions":
        return conditions(lines)
    each = Lines(lines)
    if what == "promises":
        return "".join(f"- {line}\n" for line in promises(lines, min(each.batches)))
    if what in ("throughput", "sizes"):
        return TABLES[what](each).markdown()
    return TABLES[what](each, min(each.batches)).markdown()


def conditions(lines: list[dict[str, str]]) -> str:
    """Return what a run's numbers depend on, as a sentence."""
    one = max(lines, key=lambda line: int(line["rounds"]))
    where = one["cpu"] if one["device"] == "cpu" else one["device"]
    gflop = [line for line in lines if line["metric"] == "operations"]
    most = f"; {number(float(gflop[0]['median']))} GFLOP to the first token of `full`" if gflop else ""
    return (
        f"{one['rounds']} rounds on {where}, threads: {one['threads']}, {one['dtype']}, {one['attention']}, batch 1 "
        f"unless told; load {one['load_before']} before and {one['load_after']} after. "
        f"Decoder {one['layers']} x {one['width']}, {one['visual_tokens']} visual and {one['text_tokens']} text "
        f"tokens, decode steps: {one['steps']}{most}. "
        f"torch {one['torch']}, transformers {one['transformers']}, commit {one['commit']}.\n"
    )
