"""Tokens alive in each layer as bars or lines, and sheets of labelled pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from foveate.draw import scene
from foveate.draw.scene import FAINT, LINES, RAMP, Colour, Drawing, Photo, Rect, Rects, Scene, Text, font

if TYPE_CHECKING:
    from foveate.report import Report

_FONT = 13
_LINE = 3
_MOST = 12  # numbers along an axis


@Drawing
def alive(report: Report, *others: Report, size: tuple[int, int] = (560, 240)) -> Scene:
    """Return the visual tokens alive in each decoder layer, all images together: bars of one report, lines of several.

    Args:
        report: With at least one image.
        others: More reports about the same prompt.
        size: Width and height in pixels.

    Raises:
        ValueError: If a report has no decoder layers to show, or another number of them.
    """
    reports = (report, *others)
    counts = [_counts(each) for each in reports]
    if len({len(each) for each in counts}) > 1:
        raise ValueError(f"reports of different models, with {', '.join(str(len(each)) for each in counts)} layers")
    if len(reports) > len(LINES):
        raise ValueError(f"{len(reports)} lines cannot be told apart, {len(LINES)} can")
    left, top, bottom = 52, 30, size[1] - 40
    names = [each.method for each in reports] if others else []
    right = size[0] - 14 - max((math.ceil(font(_FONT).getlength(name)) + 8 for name in names), default=0)
    most = max(1, *(each.tokens for each in reports))
    step, unit = (right - left) / len(counts[0]), (bottom - top) / most
    mean = f", mean {report.mean_alive:.1f} of {report.tokens}" if not others else ""
    items: list[Rects | Text] = [Text(left, 6, f"visual tokens per layer{mean}", _FONT)]
    for value in (0, most):
        y = bottom - unit * value
        items += [Rects(((left, round(y), right, round(y) + 1),), FAINT), Text(left - 6, y, str(value), _FONT, "rm")]
    if others:
        items += _lines(counts, names, left, right, bottom, step, unit)
    else:
        bars = tuple(
            (left + (layer + 0.1) * step, bottom - unit * count, left + (layer + 0.9) * step, bottom)
            for layer, count in enumerate(counts[0])
        )
        items.append(Rects(bars, RAMP[3]))
    for layer in range(0, len(counts[0]), max(1, math.ceil(len(counts[0]) / _MOST))):
        items.append(Text(left + (layer + 0.5) * step, bottom + 5, str(layer), _FONT, "ma"))
    items.append(Text((left + right) / 2, size[1] - 18, "decoder layer", _FONT, "ma"))
    return Scene(*size, tuple(items))


@Drawing
def sheet(items: Sequence[tuple[str, Image.Image]], columns: int, *, heading: str = "", width: int = 300) -> Scene:
    """Return labelled pictures in rows: a contact sheet.

    Args:
        items: Title and picture of each panel; a title may have several lines, the first is set larger.
        columns: Panels per row.
        heading: Lines above all panels.
        width: Pixels of a panel's picture.
    """
    shown = [(title, Scene(*picture.size, (Photo(picture.convert("RGB")),))) for title, picture in items]
    return scene.sheet(shown, columns, heading, width)


def _counts(report: Report) -> list[int]:
    counts = [sum(each) for each in zip(*(image.alive for image in report.images), strict=True)]
    if not counts:
        raise ValueError("the report shows no decoder layers, nothing has run yet")
    return counts


def _lines(
    counts: Sequence[Sequence[int]],
    names: Sequence[str],
    left: float,
    right: float,
    bottom: float,
    step: float,
    unit: float,
) -> list[Rects | Text]:
    """A step curve for each report, its name at its end; names that would cover each other are moved apart."""
    items: list[Rects | Text] = []
    ends: list[tuple[float, str, Colour]] = []
    for place, (each, name, colour) in enumerate(zip(counts, names, LINES, strict=False)):
        shift = _LINE * (place - len(counts) // 2)  # curves of one height lie beside each other
        ys = [round(bottom - unit * count) + shift for count in each]
        line: list[Rect] = []
        for layer, y in enumerate(ys):
            x, end = round(left + layer * step), round(left + (layer + 1) * step)
            line.append((x, y, end, y + _LINE))
            if layer and ys[layer - 1] != y:
                line.append((x, min(y, ys[layer - 1]), x + _LINE, max(y, ys[layer - 1]) + _LINE))
        items.append(Rects(tuple(line), colour))
        ends.append((ys[-1], name, colour))
    low = float(bottom)
    for height, name, colour in sorted(ends, key=lambda end: -end[0]):
        low = min(height, low)
        items.append(Text(right + 8, low, name, _FONT, "lm", colour))
        low -= scene.line_height(_FONT)
    return items
