"""What a drawing is made of, before it becomes pixels or SVG: photos, cells, rectangles and text on a white sheet."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, ParamSpec

from PIL import Image, ImageFont

Colour = tuple[int, int, int]
Rect = tuple[float, float, float, float]
Anchor = Literal["la", "ma", "ra", "lm", "rm", "mm", "ld"]
P = ParamSpec("P")

#: Blue to yellow, even in brightness, and readable with any colour vision (ten points of viridis).
RAMP: tuple[Colour, ...] = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 74, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (109, 205, 89),
    (180, 222, 44),
    (253, 231, 37),
)
#: Lines that any colour vision can tell apart.
LINES: tuple[Colour, ...] = ((0, 114, 178), (213, 94, 0), (0, 143, 104), (184, 82, 143), (58, 63, 71), (210, 140, 0))
INK: Colour = (28, 30, 36)
FAINT: Colour = (150, 154, 162)
PAPER: Colour = (255, 255, 255)
OUTLINE: Colour = (255, 214, 64)
FIRST: Colour = (255, 166, 48)
SECOND: Colour = (96, 200, 255)
#: What a dimmed photo is mixed with, and how much of it.
SHADE: Colour = (30, 32, 40)
SHADED = 0.68
_THICKEST = 6  # pixels of a line around cells


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture at its own size.

    Args:
        picture: In RGB.
        tone: As it is, in grey, or grey and dark.
        box: Where a grid of cells lies on it; outside the cells it is hidden, if ``light`` says so of any.
        rows: Of the grid.
        columns: Of the grid.
        light: How much of the photo is seen in each cell; () = it is seen everywhere.
    """

    picture: Image.Image
    tone: Literal["plain", "grey", "dim"] = "plain"
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    rows: int = 0
    columns: int = 0
    light: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cells:
    """A grid of coloured cells; None lets what is below be seen."""

    box: tuple[int, int, int, int]
    rows: int
    columns: int
    colours: tuple[Colour | None, ...]
    opacity: float = 1.0


@dataclass(frozen=True)
class Rects:
    """Filled rectangles: lines, outlines, bars. Left, top, right, bottom; the last two are outside."""

    rects: tuple[Rect, ...]
    colour: Colour


@dataclass(frozen=True)
class Text:
    """A line of text; the first letter of the anchor is horizontal, the second vertical, as Pillow has it."""

    x: float
    y: float
    text: str
    size: int
    anchor: Anchor = "la"
    colour: Colour = INK


@dataclass(frozen=True, eq=False)
class Group:
    """A drawing within a drawing, made smaller or larger."""

    scene: Scene
    x: int
    y: int
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Scene:
    """A drawing: what lies on a white sheet, the lowest first."""

    width: int
    height: int
    items: tuple[Photo | Cells | Rects | Text | Group, ...]


class Drawing(Generic[P]):
    """A function that draws: called, it returns an image of Pillow; its ``svg`` takes the same and returns SVG."""

    def __init__(self, scene: Callable[P, Scene]) -> None:
        self.scene = scene
        functools.update_wrapper(self, scene)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Image.Image:
        """Return the drawing in pixels."""
        from foveate.draw import raster

        return raster.render(self.scene(*args, **kwargs))

    def svg(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the drawing as SVG: cells and lines as shapes, text as text, photos inside it."""
        from foveate.draw import svg

        return svg.render(self.scene(*args, **kwargs))


# -- colours and cells


def ramp(level: float) -> Colour:
    """Return the colour of a level in 0..1."""
    place = level * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    return red, green, blue


def levels(scores: Sequence[float]) -> list[float | None]:
    """Return scores stretched to 0..1; None where a score is not finite."""
    finite = [score for score in scores if math.isfinite(score)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = (high - low) or 1.0
    return [(score - low) / span if math.isfinite(score) else None for score in scores]


def edges(start: int, end: int, cells: int) -> list[int]:
    """Return the first pixel of each cell and the one after the last, as nearest-neighbour resizing places them."""
    return [start + math.ceil(cell * (end - start) / cells - 0.5) for cell in range(cells + 1)]


def outline(
    box: tuple[int, int, int, int], rows: int, columns: int, inside: Mapping[int, int], width: float = 1.0
) -> tuple[Rect, ...]:
    """Return lines around the cells of each slot, only where they meet other cells or the border.

    Args:
        box: Where the grid lies.
        rows: Of the grid.
        columns: Of the grid.
        inside: The slot of each cell that has one.
        width: Of the lines, where 1 is a twelfth of a cell, but not more than a few pixels.
    """
    xs, ys = edges(box[0], box[2], columns), edges(box[1], box[3], rows)
    cell_side = min((box[2] - box[0]) / columns, (box[3] - box[1]) / rows)
    thick = max(1, round(width * min(cell_side / 12, _THICKEST)))

    def same(row: int, column: int, slot: int) -> bool:
        return 0 <= row < rows and 0 <= column < columns and inside.get(row * columns + column) == slot

    lines: list[Rect] = []
    for cell, slot in inside.items():
        row, column = divmod(cell, columns)
        left, right, top, bottom = xs[column], xs[column + 1], ys[row], ys[row + 1]
        if not same(row - 1, column, slot):
            lines.append((left, top, right, top + thick))
        if not same(row + 1, column, slot):
            lines.append((left, bottom - thick, right, bottom))
        if not same(row, column - 1, slot):
            lines.append((left, top, left + thick, bottom))
        if not same(row, column + 1, slot):
            lines.append((right - thick, top, right, bottom))
    return tuple(lines)


# -- text


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font of all drawings."""
    return ImageFont.load_default(size)


def line_height(size: int) -> int:
    """Pixels from one line of text to the next."""
    return round(1.35 * size)


def wrapped(text: str, size: int, width: float) -> list[str]:
    """Return the text in lines that are not wider than this, where its words allow it."""
    lines, letters = [""], font(size)
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and letters.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


# -- joining


def strip(scenes: Sequence[Scene], gap: int = 8) -> Scene:
    """Return drawings side by side, from left to right."""
    if len(scenes) == 1:
        return scenes[0]
    items, x = [], 0
    for scene in scenes:
        items.append(Group(scene, x, 0))
        x += scene.width + gap
    return Scene(x - gap, max(scene.height for scene in scenes), tuple(items))


def sheet(items: Iterable[tuple[str, Scene]], columns: int, heading: str, width: int) -> Scene:
    """Return labelled drawings in rows.

    Args:
        items: Title and drawing of each; a title may have several lines, the first is set larger.
        columns: Drawings per row.
        heading: Lines above all of them.
        width: Pixels of a drawing.
    """
    gap, title, text = 18, 16, 13
    full = columns * width + (columns + 1) * gap
    cells = []
    for label, scene in items:
        first, *rest = label.split("\n")
        lines = [(line, title) for line in wrapped(first, title, width) if first]
        lines += [(line, text) for more in rest for line in wrapped(more, text, width)]
        cells.append((lines, scene, width / scene.width))
    head = [line for part in heading.split("\n") if part for line in wrapped(part, title, full - 2 * gap)]
    made: list[Text | Group] = [Text(gap, gap + 23 * i, line, title) for i, line in enumerate(head)]
    top = gap + (23 * len(head) + gap // 2 if head else 0)
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        label_height = max(sum(line_height(size) for _, size in lines) for lines, _, _ in row)
        for column, (lines, scene, scale) in enumerate(row):
            x, y = gap + column * (width + gap), top
            for line, size in lines:
                made.append(Text(x, y, line, size))
                y += line_height(size)
            made.append(Group(scene, x, top + label_height + 6, scale))
        top += label_height + 6 + max(round(scene.height * scale) for _, scene, scale in row) + gap
    return Scene(full, top, tuple(made))
