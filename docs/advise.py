"""Makes what `foveate advise` knows of papers, and the table of its check in docs/advise.md; `make docs` runs it."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate import registry

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "src" / "foveate" / "lab" / "advice" / "published.json"
PAGE = ROOT / "docs" / "advise.md"
RESULTS = ROOT / "results" / "advise.csv"

#: Type and, where papers count tokens, visual tokens of a picture of the models that they use; videos are left out.
MODELS = {
    "llava-hf/llava-1.5-7b-hf": ("llava", 576),
    "llava-hf/llava-v1.6-vicuna-7b-hf": ("llava_next", 2880),
    "llava-hf/llava-v1.6-vicuna-13b-hf": ("llava_next", 2880),
    "Qwen/Qwen2-VL-7B-Instruct": ("qwen2_vl", None),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", None),
}

Cells = dict[str, str]


def published() -> str:
    """Return the retention that papers print, by type of model, method and share of tokens, as JSON."""
    with (ROOT / "docs" / "published.toml").open("rb") as file:
        tables = tomllib.load(file)["table"]
    rows = [_published(table, row) for table in tables if "video" not in table["key"] for row in table["rows"]]
    return "[\n" + ",\n".join(json.dumps(row) for row in rows if row is not None) + "\n]\n"


def _published(table: dict[str, Any], row: dict[str, Any]) -> dict[str, Any] | None:
    method = row["method"].lower()
    if table["model"] not in MODELS or method not in registry.names():
        return None
    kind, total = MODELS[table["model"]]
    tokens, percent, _ = row["tokens"].partition("%")
    reading = None
    if "values" in row and "TextVQA" in table["benchmarks"]:
        place = table["benchmarks"].index("TextVQA")
        reading = round(row["values"][place] / table["vanilla"][place], 4)
    return {
        "model_type": kind,
        "model": table["model"],
        "paper": table["paper"],
        "method": method,
        "keep": round(float(tokens) / (100 if percent else total), 4),
        "share": round(row["average"] / 100, 4),
        "reading": reading,
        "benchmarks": len(table["benchmarks"]),
    }


def page(text: str) -> str:
    """Return the page with the table of the check made anew; as it is where nothing was measured yet."""
    if not RESULTS.exists():
        return text
    with RESULTS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    pattern = r"(<!-- check: begin.*?-->\n).*?(<!-- check: end -->)"
    text, count = re.subn(pattern, lambda match: match[1] + checked(rows) + match[2], text, flags=re.DOTALL)
    assert count == 1, "docs/advise.md needs one pair of markers for check"
    return text


def checked(rows: Sequence[Cells]) -> str:
    """Return predicted against measured as Markdown, model by model."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        parts.append(_model([row for row in rows if row["model"] == model]))
    return "\n".join(parts)


def _model(rows: Sequence[Cells]) -> str:
    one, points = rows[0], [row for row in rows if row["kind"] == "point"]
    calls: dict[tuple[str, ...], dict[str, Cells]] = {}
    for row in points:
        calls.setdefault((row["arm"], row["question"], row["output"], row["batch"]), {})[row["metric"]] = row
    lines = [
        f"**{one['model']}**: {one['dtype']}, {one['attention']}, {one['hardware']}, {one['threads']} threads, torch "
        f"{one['torch']}, transformers {one['transformers']}; {one['visual_tokens']} visual tokens, {one['layers']} "
        f"decoder layers; a profile of {one['profile_rounds']} rounds in {one['profile_seconds']} s; load "
        f"{one['load_before']} before, {one['load_after']} after; {one['date']}, commit {one['commit']}.",
        "",
        "| call | question | answer | batch | first token, ms | error | whole answer, ms | error | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (arm, question, output, batch), by in calls.items():
        first, answer, memory = by["first_token"], by["answer"], by["memory"]
        cells = [f"`{arm}`", question, output, batch, _both(first), _error(first), _both(answer), _error(answer)]
        lines.append("| " + " | ".join([*cells, _error(memory)]) + " |")
    return "\n".join([*lines, "", _verdict(points), *map(_drift, rows[: len(rows) - len(points)])]) + "\n"


def _both(row: Cells) -> str:
    low, high = float(row["quartile_low"]), float(row["quartile_high"])
    return f"{float(row['predicted']):.0f} / {float(row['measured']):.0f} ({low:.0f} .. {high:.0f})"


def _error(row: Cells) -> str:
    text = f"{100 * float(row['error']):+.1f} %"
    return text if row["within_target"] == "yes" else f"**{text}**"


def _verdict(points: Sequence[Cells]) -> str:
    times = [row for row in points if row["unit"] == "ms"]
    within = sum(row["within_target"] == "yes" for row in times)
    worst = max(times, key=lambda row: abs(float(row["error"])))
    held = sum(abs(float(row["predicted"]) - float(row["measured"])) <= 2 * float(row["uncertainty"]) for row in times)
    memory = max(abs(float(row["error"])) for row in points if row["metric"] == "memory")
    return (
        f"- {within} of {len(times)} times within 10 %; the largest error is {_error(worst).strip('*')} "
        f"(`{worst['arm']}`, {worst['metric'].replace('_', ' ')}); {held} lie within twice the stated uncertainty. "
        f"Memory: largest error {100 * memory:.1f} %."
    )


def _drift(row: Cells) -> str:
    when, change = row["kind"].removeprefix("anchor "), float(row["measured"]) / float(row["predicted"]) - 1
    return f"- The same call as in the profile, {when} the points: {100 * change:+.1f} % ({row['measured']} ms)."
