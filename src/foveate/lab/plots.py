"""The figures of the accuracy page: SVG whose text is text, in colours that follow the page from light to dark."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from foveate.errors import MissingDependency
from foveate.lab.summary import BLIND, FULL, RANDOM, Budget, Row, Summary

try:
    from matplotlib import colormaps, rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle
    from matplotlib.textpath import TextPath
except ImportError as missing:  # raised on import: sooner than after hours of answers
    raise MissingDependency("figures are drawn with matplotlib", "pip install 'foveate[lab]'") from missing

#: Colours of the page, in the light and in the dark; figures are drawn in the first and name them in the SVG.
COLOURS = {
    "ink": ("#17191d", "#e9ebee"),
    "muted": ("#5d6470", "#a3abb8"),
    "line": ("#dde1e6", "#343a44"),
    "paper": ("#fefefd", "#14171c"),
    "other": ("#b4bac3", "#4c5460"),
    "better": ("#0b66a8", "#5cb2ee"),
    "worse": ("#c14e02", "#f28c4b"),
    "evocut": ("#0072b2", "#4fb0ea"),
    "todre": ("#d55e00", "#f58231"),
    "adav": ("#008f68", "#2cc598"),
    "v2drop": ("#b8528f", "#e08fc0"),
    "random": ("#3a3f47", "#c9ced6"),
    "grid": ("#d28c00", "#f0b93c"),
    "pool": ("#3d9fd8", "#8fd0f7"),
    "downscale": ("#7a7320", "#c2ba55"),
}
#: What matplotlib writes that would reach beyond the figure, or says nothing.
_NOISE = (
    re.compile(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", re.DOTALL),
    re.compile(r'(?<=<g) id="[^"]*"| transform="rotate\(-0 [^"]*"|font-family: [^;"]*;? ?'),
    re.compile(r"(?<=\n)\s+"),
)

#: The methods that get a colour, those that know no better dashed; others take the places that these leave.
HEADLINE, NAIVE = ("evocut", "todre", "adav", "v2drop"), (RANDOM, "grid", "pool", "downscale")

_SIZE, _ROW, _CELL, _LEAN = 11.0, 18.0, 34.0, math.radians(40)
_MAP = colormaps["cividis"]


def forest(summary: Summary, budget: Budget) -> Figure:
    """Return each method's accuracy at a budget with its interval, between those of the bounds.

    A point is filled in the colour of its side where the method certainly differs from ``random``.
    """
    rows = summary.at(budget)
    bounds = {name: row for name in (FULL, BLIND) if (row := summary.row(name)) is not None}
    bounds |= {row.method: row for row in rows if row.method == RANDOM}
    low, high = _limits(summary)
    left, right, width = max(_wide(row.method) for row in rows) + 14, 44.0, 276.0
    scale = width / (high - low)
    labels = {name: f"{name} {_percent(row):.1f}" for name, row in bounds.items()}
    halves = {name: _wide(label) / 2 / scale for name, label in labels.items()}
    places = {name: max(_percent(row), low + halves[name]) for name, row in bounds.items()}
    levels = _levels([(places[name], 2 * halves[name] + 8 / scale) for name in bounds])
    top, bottom = 15.0 * (max(levels, default=0) + 1) + 8, 40.0
    figure, axes = _figure(left + width + right, _ROW * len(rows) + top + bottom, left, right, bottom, top)
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color=_light("line"), linewidth=1)
    axes.set_yticks(range(len(rows)), [row.method for row in rows], parse_math=False)
    axes.set_xlabel("right answers, %", size=_SIZE, color=_light("muted"))
    dashes = {FULL: "-", BLIND: ":", RANDOM: "--"}
    for (name, row), level in zip(bounds.items(), levels, strict=True):
        axes.axvline(_percent(row), color=_light("muted"), linewidth=1.2, linestyle=dashes[name])
        _text(axes, places[name], -0.5 - (7 + 15 * level) / _ROW, labels[name], "muted", va="baseline")
    for place, row in enumerate(rows):
        decided = row.random is not None and row.random.decided
        colour = _light("muted" if row.random is None or not decided else _side(row.random.difference))
        axes.plot([100 * end for end in row.score.interval], [place, place], color=colour, linewidth=1.8)
        face = colour if decided else _light("paper")
        axes.plot(_percent(row), place, "o", markersize=6, markeredgewidth=1.6, color=colour, markerfacecolor=face)
        _text(axes, high + 8 / scale, place, f"{_percent(row):.1f}", "ink", ha="left")
    return figure


def coloured(summary: Summary) -> list[str]:
    """Return the methods that get a colour and a label: the headline ones, then the most accurate of the others."""
    methods = summary.methods()
    named = [name for name in (*HEADLINE, *NAIVE) if name in methods]
    return (named + [name for name in methods if name not in named])[: len(HEADLINE) + len(NAIVE)]


def curves(summary: Summary, width: float, height: float) -> Figure:
    """Return accuracy over measured tokens per layer, a line for each method.

    Points at one budget stand side by side, so that their intervals can be told apart.
    """
    shown = coloured(summary)
    spare = iter([name for name in (*HEADLINE, *NAIVE) if name not in shown])
    colours = {name: _light(name if name in COLOURS else next(spare)) for name in shown}
    bounds = {name: row for name in (FULL, BLIND) if (row := summary.row(name)) is not None}
    at = [_middle([row.mean_alive for row in summary.at(budget)]) for budget in summary.budgets]
    means = [row.mean_alive for budget in summary.budgets for row in summary.at(budget)]
    few, many = min(means) / 1.25, max(means) * 1.25
    margins = 40.0, max(map(_wide, (*shown, *bounds))) + 26, 40.0, 10.0
    width = max(width, margins[0] + margins[1] + 200)
    figure, axes = _figure(width, height, *margins)
    axes.set_xscale("log", base=2)
    axes.set_xlim(few, many)
    axes.set_ylim(*_limits(summary))
    axes.set_xticks(at, [f"{tokens:.0f}" for tokens in at])
    axes.set_xticks([], minor=True)
    axes.grid(axis="y", color=_light("line"), linewidth=1)
    axes.set_xlabel("visual tokens per decoder layer, measured", size=_SIZE, color=_light("muted"))
    axes.set_ylabel("right answers, %", size=_SIZE, color=_light("muted"))
    ends = []
    for name, row in bounds.items():
        style = "-" if name == FULL else ":"
        axes.axhline(_percent(row), color=_light("muted"), linewidth=1.2, linestyle=style, zorder=1)
        ends.append((name, many, _percent(row), _light("muted")))
    pixel = (many / few) ** (1 / (width - margins[0] - margins[1]))
    for name in summary.methods():
        rows = sorted((row for row in summary.rows if row.method == name), key=lambda row: row.mean_alive)
        if name not in shown:
            xs, ys = [row.mean_alive for row in rows], [_percent(row) for row in rows]
            axes.plot(xs, ys, color=_light("other"), linewidth=0.9, zorder=1)
            continue
        aside = pixel ** (4 * (shown.index(name) - (len(shown) - 1) / 2))
        dash, marker = ("--", "s") if name in NAIVE else ("-", "o")
        xs, ys = [row.mean_alive * aside for row in rows], [_percent(row) for row in rows]
        axes.plot(xs, ys, dash, color=colours[name], linewidth=1.8, marker=marker, markersize=4.5, zorder=3)
        for x, row in zip(xs, rows, strict=True):
            axes.plot([x, x], [100 * end for end in row.score.interval], color=colours[name], linewidth=1.2, zorder=2)
        ends.append((name, xs[-1], ys[-1], colours[name]))
    _name_ends(axes, ends, width - margins[0] - margins[1], height - margins[2] - margins[3])
    return figure


def heat(summary: Summary, budget: Budget) -> Figure:
    """Return accuracy by method and type at a budget; the best of each type is bold, framed where that is sure."""
    rows = [row for row in (summary.row(FULL), *summary.at(budget), summary.row(BLIND)) if row is not None]
    kinds: list[str | None] = [None, *summary.types]
    names, counts = ["all", *summary.types], [summary.items, *summary.types.values()]
    won = summary.won(budget)
    left = max(map(_wide, ("questions", *(row.method for row in rows)))) + 12
    top = max(map(_wide, names)) * math.sin(_LEAN) + 20
    right = max(4.0, *(_wide(name) * math.cos(_LEAN) - _CELL * (i + 0.5) for i, name in enumerate(reversed(names)))) + 4
    height = _ROW * (len(rows) + 1)
    figure, axes = _figure(left + _CELL * len(kinds) + right, height + top + 4, left, right, 4, top)
    axes.set_xlim(0, len(kinds))
    axes.set_ylim(len(rows) + 1, 0)
    axes.set_xticks([])
    axes.set_yticks(
        [place + 0.5 for place in range(len(rows) + 1)], [*(row.method for row in rows), "questions"], parse_math=False
    )
    lean: dict[str, Any] = {"rotation": math.degrees(_LEAN), "rotation_mode": "anchor", "ha": "left", "va": "baseline"}
    for column, (kind, name, n) in enumerate(zip(kinds, names, counts, strict=True)):
        _text(axes, column + 0.5, -6 / _ROW, name, "ink", **lean)
        _text(axes, column + 0.5, len(rows) + 0.5, str(n), "muted", size=9.5)
        for place, row in enumerate(rows):
            score = row.score if kind is None else row.types.get(kind)
            best = kind in won and won[kind].best == row.method
            if score is not None:
                _cell(axes, column, place, score.accuracy, best, best and won[kind].lead.decided)
    return figure


def svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an element of a page that defines `COLOURS` as variables.

    Args:
        figure: The figure.
        name: Unique in the page; the names inside the element are made from it.
        label: What a screen reader says it is.
    """
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    for noise in _NOISE:
        body = noise.sub("", body)
    for variable, (light, _) in COLOURS.items():
        body = body.replace(light, f"var(--{variable})")
    width, height = (72 * side for side in figure.get_size_inches())
    style = f"width: 100%; min-width: {0.75 * width:.0f}px; max-width: {1.2 * width:.0f}px"
    head = f'<svg class="plot" role="img" viewBox="0 0 {width:g} {height:g}" style="{style}">'
    return f"{head}\n<title>{html.escape(label)}</title>{body.strip()}"


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart until neighbours are ``gap`` apart, in their order and, if there is room, within limits.

    Example:
        >>> spread([5.0, 1.0, 5.0], 2.0, 0.0, 6.0)
        [4.0, 1.0, 6.0]
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [0.0] * len(places)
    below = low - gap
    for i in order:
        moved[i] = below = max(places[i], below + gap)
    above = high + gap
    for i in reversed(order):
        moved[i] = above = min(moved[i], above - gap)
    return moved


# -- pieces


def _light(name: str) -> str:
    return COLOURS[name][0]


def _side(difference: float) -> str:
    return "better" if difference > 0 else "worse"


def _percent(row: Row) -> float:
    return 100 * row.score.accuracy


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _limits(summary: Summary) -> tuple[float, float]:
    """Return the ends of an axis of accuracy that holds every interval, the same in all figures."""
    ends = [100 * end for row in summary.rows for end in row.score.interval]
    return max(0.0, min(ends) - 2), min(100.0, max(ends) + 2)


def _wide(text: str) -> float:
    """Return about how many pixels a label takes."""
    return float(TextPath((0, 0), text, size=_SIZE, prop=FontProperties()).get_extents().width)


def _figure(width: float, height: float, left: float, right: float, bottom: float, top: float) -> tuple[Figure, Axes]:
    """Return a figure and its bare axes, all in pixels."""
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    place = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    axes = figure.add_axes(place, facecolor="none")
    axes.tick_params(length=0, pad=5, labelsize=_SIZE, labelcolor=_light("ink"))
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _text(axes: Axes, x: float, y: float, text: str, colour: str, size: float = _SIZE, **style: Any) -> None:
    placed: dict[str, Any] = {"ha": "center", "va": "center_baseline", "parse_math": False} | style
    axes.text(x, y, text, color=COLOURS.get(colour, (colour,))[0], size=size, **placed)


def _levels(labels: Sequence[tuple[float, float]]) -> list[int]:
    """Return a line for each label, given its middle and its width, so that none of a line touch."""
    taken: list[list[tuple[float, float]]] = []
    levels = []
    for middle, width in labels:
        level = 0
        while level < len(taken) and any(abs(middle - other) < (width + w) / 2 for other, w in taken[level]):
            level += 1
        taken[level:] = taken[level:] or [[]]
        taken[level].append((middle, width))
        levels.append(level)
    return levels


def _name_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str]], width: float, height: float) -> None:
    """Write the name of each line at the right of the axes, with a thread from its last point."""
    low, high = axes.get_ylim()
    places = spread([(y - low) / (high - low) for _, _, y, _ in ends], 14 / height, 0.0, 1.0)
    for (name, x, y, colour), place in zip(ends, places, strict=True):
        start = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        thread: dict[str, Any] = {"color": colour, "linewidth": 0.8, "transform": axes.transAxes, "clip_on": False}
        axes.plot([start[0], 1 + 14 / width], [start[1], place], **thread)
        _text(axes, 1 + 18 / width, place, name, "ink", ha="left", transform=axes.transAxes)


def _cell(axes: Axes, column: int, place: int, accuracy: float, bold: bool, framed: bool) -> None:
    """Draw one field of the heat map, its number in whichever of black and white can be read on it."""
    red, green, blue, _ = _MAP(accuracy)
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45
    axes.add_patch(
        Rectangle((column, place), 1, 1, facecolor=(red, green, blue), edgecolor=_light("paper"), linewidth=1)
    )
    colour, weight = "#000000" if light else "#ffffff", "bold" if bold else "normal"
    _text(axes, column + 0.5, place + 0.5, f"{100 * accuracy:.0f}", colour, size=10, weight=weight)
    if framed:
        axes.add_patch(Rectangle((column + 0.05, place + 0.1), 0.9, 0.8, fill=False, edgecolor=colour, linewidth=1.5))
