"""Makes the tables of docs/accuracy*.md from what `foveate eval` wrote to results/."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PAGES = tuple(ROOT / "docs" / f"accuracy{name}.md" for name in ("", "-hd", "-video"))

BOUNDS = ("full", "blind")
SHOWN = ("todre", "adav", "evocut", "v2drop", "random", "grid", "pool", "downscale")

Line = dict[str, str]
Lines = Sequence[Line]


def page(text: str) -> str:
    """Return the page with every block between markers made anew: ``<!-- accuracy-hd.csv budgets: begin ... -->``."""

    def made(match: re.Match[str]) -> str:
        name, what = match["what"].split()
        return match["begin"] + block(RESULTS / name, what) + match["end"]

    pattern = r"(?P<begin><!-- (?P<what>[\w.-]+ \w+): begin.*?-->\n).*?(?P<end><!-- (?P=what): end -->)"
    return re.sub(pattern, made, text, flags=re.DOTALL)


def block(path: Path, what: str) -> str:
    """Return a table (or ``conditions``) of one file; a word where there is none yet."""
    if not path.exists():
        return f"Not measured yet: results/{path.name}.\n"
    with path.open(encoding="utf-8", newline="") as file:
        text = TABLES[what](list(csv.DictReader(file)))
    if what != "conditions":
        return text
    tables, figures = f"[results/{path.stem}.md](../results/{path.stem}.md)", f"`results/{path.stem}.html`"
    return f"{text}\n**Tables: {tables}** · `results/{path.name}` · page with figures: {figures}\n"


def budgets(lines: Lines) -> str:
    """Return accuracy and the paired difference to ``random`` of each method at each budget."""
    found = [line for line in lines if line["budget"]]
    sizes, at = _sizes(found), {(line["method"], line["budget"]): line for line in found}
    names = [method for method in dict.fromkeys(line["method"] for line in found) if ":" not in method]
    best = {name: max(float(at[name, s]["accuracy"]) for s in sizes if (name, s) in at) for name in names}
    rows = [[line["arm"], *[_percent(line)] * len(sizes)] for line in lines if line["arm"] in BOUNDS]
    for name in sorted(names, key=lambda name: -best[name]):
        rows.append([f"`{name}`", *(_against(at.get((name, size)), "random") for size in sizes)])
    return _table(["method", *map(_budget, sizes)], rows)


def leaders(lines: Lines) -> str:
    """Return by budget the best and the worst method, against ``random``."""
    rows = []
    for size in _sizes([line for line in lines if line["budget"]]):
        methods = [line for line in lines if line["budget"] == size and ":" not in line["method"]]
        ranked = sorted(methods, key=lambda line: -float(line["accuracy"]))
        plain = [line for line in ranked if line["method"] != "random"]
        ahead, behind = (sum(_side(line, "random") == side for line in plain) for side in (1, -1))
        ends = [f"`{line['method']}` {_against(line, 'random')}" for line in (plain[0], plain[-1])]
        rows.append([_budget(size), *ends, f"{ahead} of {len(plain)}", f"{behind} of {len(plain)}"])
    return _table(["budget", "best", "worst", "surely ahead of `random`", "surely behind"], rows)


def types(lines: Lines) -> str:
    """Return accuracy by type of question at each budget: the four, the naive ones, and the best of the others."""
    parts = []
    kinds = _kinds(lines)
    bounds = {line["arm"]: line for line in lines if line["arm"] in BOUNDS}
    for size in _sizes([line for line in lines if line["budget"]]):
        methods = [line for line in lines if line["budget"] == size and ":" not in line["method"]]
        others = sorted((m for m in methods if m["method"] not in SHOWN), key=lambda line: -float(line["accuracy"]))
        chosen = [line for name in SHOWN for line in methods if line["method"] == name] + others[:3]
        tops = {kind: max(float(line[f"type_{kind}"] or 0) for line in methods) for kind in kinds}
        rows = []
        for line in [
            *(bounds[name] for name in BOUNDS[:1] if name in bounds),
            *chosen,
            *(bounds[n] for n in BOUNDS[1:] if n in bounds),
        ]:
            cells = [
                (line[f"type_{kind}"], line["arm"] not in BOUNDS and float(line[f"type_{kind}"] or 0) == tops[kind])
                for kind in kinds
            ]
            name = line["arm"] if line["arm"] in BOUNDS else f"`{line['method']}`"
            rows.append([name, *(_share(text, top) for text, top in cells)])
        counts = next((line for line in bounds.values()), methods[0])
        rows.append(["questions", *(counts[f"type_{kind}_n"] for kind in kinds)])
        parts.append(f"**{_budget(size)}**\n\n" + _table(["method", *kinds], rows))
    return "\n".join(parts)


def design(lines: Lines) -> str:
    """Return arms with options against the same method without them, and those with a budget of their own."""
    rows = []
    for line in lines:
        if line["plain_n"]:
            cells = [_budget(line["budget"]), line["tokens_per_layer"], _percent(line), _difference(line, "plain")]
            rows.append([f"`{line['arm']}`", *cells, _difference(line, "random")])
        elif not line["budget"] and line["arm"] not in BOUNDS and not line["arm"].endswith(", all"):
            cells = ["its own", line["tokens_per_layer"], _percent(line), f"{_difference(line, 'full')} to `full`"]
            rows.append([f"`{line['arm']}`", *cells, ""])
    columns = [
        "arm",
        "budget",
        "tokens per layer",
        "% right",
        "points to the method without options",
        "points to `random`",
    ]
    return _table(columns, rows)


def conditions(lines: Lines) -> str:
    """Return what was asked of whom, as sentences."""
    one, methods = lines[0], [line for line in lines if line["budget"]]
    arms = sum(not line["arm"].endswith(", all") for line in lines)
    whole = [line for line in lines if line["arm"].endswith(", all")] or [
        line for line in lines if line["arm"] in BOUNDS
    ]
    every = "; ".join(f"{line['method']} {_percent(line)} % of {line['n']}" for line in whole)
    asked = max(int(line["n"]) for line in methods) if methods else 0
    return (
        f"{arms} arms; methods answered the first {asked} questions. Right over all that were put to the other two: "
        f"{every}. {one['run_dtype']}, {one['run_attention']} attention, {one['run_cpu']}, torch {one['run_torch']}, "
        f"transformers {one['run_transformers']}, commit {one['run_commit']}. Regenerate: `{one['run_command']}`\n"
    )


# -- cells


def _sizes(lines: Lines) -> list[str]:
    """Return the budgets, tokens before shares, from large to small."""
    found = dict.fromkeys(line["budget"] for line in lines)
    return sorted(found, key=lambda size: ("." not in size, float(size)), reverse=True)


def _budget(size: str) -> str:
    return f"{100 * float(size):g} % of tokens" if "." in size else f"{size} tokens"


def _kinds(lines: Lines) -> list[str]:
    names = (name for name in lines[0] if name.startswith("type_") and name.endswith("_n"))
    return [name.removeprefix("type_").removesuffix("_n") for name in names]


def _percent(line: Line) -> str:
    low, high = (100 * float(line[end]) for end in ("low", "high"))
    return f"{100 * float(line['accuracy']):.1f} ({low:.1f} .. {high:.1f})"


def _side(line: Line, other: str) -> int:
    """Return 1 where the interval of a difference lies above 0, -1 where below, 0 where it holds it."""
    low, high = line[f"{other}_points_low"], line[f"{other}_points_high"]
    return 0 if not low or not high else int(float(low) > 0) - int(float(high) < 0)


def _difference(line: Line, other: str) -> str:
    """Return a paired difference with its interval, strong where it is sure."""
    if not line[f"{other}_points"]:
        return ""
    text = f"{float(line[f'{other}_points']):+.1f}"
    if line[f"{other}_points_low"]:
        text += " ({:+.1f} .. {:+.1f})".format(*(float(line[f"{other}_points_{end}"]) for end in ("low", "high")))
    text = text.replace("-", "−")
    return f"**{text}**" if _side(line, other) else text


def _against(line: Line | None, other: str) -> str:
    if line is None:
        return ""
    return f"{100 * float(line['accuracy']):.1f} {_difference(line, other)}".rstrip()


def _share(text: str, strong: bool) -> str:
    shown = f"{100 * float(text):.0f}" if text else ""
    return f"**{shown}**" if strong and shown else shown


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in [headings, ["---"] * len(headings), *rows])


TABLES: dict[str, Callable[[Lines], str]] = {
    "budgets": budgets,
    "leaders": leaders,
    "types": types,
    "design": design,
    "conditions": conditions,
}
