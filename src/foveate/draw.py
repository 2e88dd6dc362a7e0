"""Pictures of what a method did: kept tokens, scores, tokens per layer, and sheets of such pictures. Pillow only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

if TYPE_CHECKING:
    from foveate.report import ImageReport, Report

Picture = Image.Image | str | Path
Grid = tuple[int, int, int]
Colour = tuple[int, int, int]

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
_INK: Colour = (28, 30, 36)
_FAINT: Colour = (150, 154, 162)
_PAPER: Colour = (255, 255, 255)
_OUTLINE: Colour = (255, 214, 64)
_SHORTEST = 336  # pixels of the shorter side of what is drawn, at least
_CELL = 14  # pixels of a cell's shorter side, at least


def kept(
    image: Picture,
    grid: Grid,
    kept: Iterable[int],
    *,
    scores: Sequence[float] | None = None,
    life: Sequence[float] | None = None,
    merged_into: Sequence[int] | None = None,
    crop: bool = False,
) -> Image.Image:
    """Return the picture with kept cells crisp and outlined, the others dimmed and grey.

    Args:
        image: The picture, or its path.
        grid: Frames (or crops), rows, columns of its tokens; frames are drawn side by side.
        kept: Tokens that stayed, as indices into the grid in reading order.
        scores: One per token of the grid; when given, each kept cell is boxed in its score's colour.
        life: One share in 0..1 per token of the grid; when given, a dropped cell is the brighter the larger its share.
        merged_into: One slot per token of the grid, -1 for none; when given, cells of one slot share one outline.
        crop: The processor cut the picture to its central square before it made tokens.

    Raises:
        ValueError: If an index lies outside the grid, or a sequence has another length than the grid.
    """
    n = math.prod(grid)
    slots = [0] * n if merged_into is None else [int(slot) for slot in _per_token(merged_into, n, "merged_into")]
    stays = set(kept) if merged_into is None else {token for token, slot in enumerate(slots) if slot >= 0}
    if stays and not (min(stays) >= 0 and max(stays) < n):
        raise ValueError(f"kept holds an index outside range({n}), the tokens of the grid {grid}")
    light = [0.0] * n if life is None else [0.85 * share for share in _per_token(life, n, "life")]
    light = [1.0 if token in stays else min(1.0, max(0.0, value)) for token, value in enumerate(light)]
    colours = None if scores is None else _levels(_per_token(scores, n, "scores"))
    base = _open(image, grid)
    panels = []
    for frame, rows, columns in _frames(grid):
        panel = base.copy()
        box = _box(panel, crop)
        values = light[frame : frame + rows * columns]
        dark = _dimmed(panel)
        mask = Image.new("L", panel.size)
        mask.paste(_cells(values, rows, columns, box), box[:2])
        panel = Image.composite(panel, dark, mask)
        inside = {token - frame: slots[token] for token in stays if frame <= token < frame + rows * columns}
        if colours is None:
            _contour(panel, box, rows, columns, inside)
        else:
            _boxes(panel, box, rows, columns, {token: colours[frame + token] for token in inside})
        panels.append(panel)
    return _strip(panels)


def heat(image: Picture, grid: Grid, scores: Sequence[float], *, crop: bool = False) -> Image.Image:
    """Return the picture in grey under its score map, with a colour bar.

    Args:
        image: The picture, or its path.
        grid: Frames (or crops), rows, columns of its tokens.
        scores: One per token in reading order; cells whose score is not finite stay dark.
        crop: The processor cut the picture to its central square before it made tokens.

    Raises:
        ValueError: If there is not one score per token.
    """
    levels = _levels(_per_token(scores, math.prod(grid), "scores"))
    base = _open(image, grid)
    panels = []
    for frame, rows, columns in _frames(grid):
        panel = _dimmed(base)
        box = _box(panel, crop)
        part = levels[frame : frame + rows * columns]
        colour = _coloured(_cells([level or 0.0 for level in part], rows, columns, box))
        scored = _cells([0.0 if level is None else 0.72 for level in part], rows, columns, box)
        grey = ImageOps.grayscale(base.crop(box)).convert("RGB")
        panel.paste(Image.composite(colour, grey, scored), box[:2], scored.point(lambda v: 255 if v else 0))
        panels.append(panel)
    finite = [score for score in scores if math.isfinite(score)]
    return _with_bar(_strip(panels), min(finite, default=0.0), max(finite, default=0.0))


def tokens(image: Picture, report: ImageReport, *, crop: bool = False) -> Image.Image:
    """Return the picture of what one report entry says: brighter cells live through more layers.

    The outline goes around the tokens that live longest: to the end, or to the last site that left any.

    Args:
        image: The picture, or its path.
        report: An entry of ``Report.images``; where frames differ in size, each gets a panel.
        crop: The processor cut the picture to its central square before it made tokens.
    """
    lives = report.lives()
    longest = max(lives, default=0.0)
    last = [token for token, life in enumerate(lives) if life == longest and life > 0]
    life = [share / longest if longest else 0.0 for share in lives]
    merged = report.merged_into
    if report.frames is None:
        return kept(image, report.grid, last, life=life, merged_into=merged, crop=crop)
    panels, start = [], 0
    for rows, columns in report.frames:
        end = start + rows * columns
        mine = [token - start for token in last if start <= token < end]
        slots = None if merged is None else merged[start:end]
        grid = (1, rows, columns)
        panels.append(kept(image, grid, mine, life=life[start:end], merged_into=slots, crop=crop))
        start = end
    return _strip(panels)


def alive(report: Report, *, size: tuple[int, int] = (560, 240)) -> Image.Image:
    """Return a bar chart of the visual tokens alive in each decoder layer, all images together.

    Args:
        report: With at least one image.
        size: Width and height in pixels.

    Raises:
        ValueError: If the report has no decoder layers to show.
    """
    layers = [sum(counts) for counts in zip(*(image.alive for image in report.images), strict=True)]
    if not layers:
        raise ValueError("the report shows no decoder layers, nothing has run yet")
    canvas = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(canvas), _font(13)
    left, top, right, bottom = 52, 30, size[0] - 14, size[1] - 40
    most = max(report.tokens, 1)
    pen.text((left, 6), f"visual tokens per layer, mean {report.mean_alive:.1f} of {report.tokens}", _INK, font)
    for value in (0, report.tokens):
        y = bottom - (bottom - top) * value / most
        pen.line((left, y, right, y), _FAINT)
        pen.text((left - 6, y), str(value), _INK, font, anchor="rm")
    step = (right - left) / len(layers)
    every = max(1, math.ceil(len(layers) / 12))
    for layer, count in enumerate(layers):
        x = left + layer * step
        pen.rectangle((x + 0.1 * step, bottom - (bottom - top) * count / most, x + 0.9 * step, bottom), RAMP[3])
        if layer % every == 0:
            pen.text((x + step / 2, bottom + 5), str(layer), _INK, font, anchor="ma")
    pen.text(((left + right) / 2, size[1] - 18), "decoder layer", _INK, font, anchor="ma")
    return canvas


def sheet(
    items: Sequence[tuple[str, Image.Image]], columns: int, *, heading: str = "", width: int = 300
) -> Image.Image:
    """Return labelled pictures in rows: a contact sheet.

    Args:
        items: Title and picture of each panel; a title may have several lines, the first is set larger.
        columns: Panels per row.
        heading: Lines above all panels.
        width: Pixels of a panel's picture.
    """
    gap, title, text = 18, _font(16), _font(13)
    canvas_width = columns * width + (columns + 1) * gap
    cells = []
    for label, picture in items:
        first, *rest = label.split("\n")
        lines = [(line, title) for line in _wrapped(first, title, width)]
        lines += [(line, text) for more in rest for line in _wrapped(more, text, width)]
        scaled = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
        cells.append((lines, scaled))
    head = [line for part in heading.split("\n") if part for line in _wrapped(part, title, canvas_width - 2 * gap)]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    labels = [max(_height(lines) for lines, _ in row) for row in rows]
    pictures = [max(scaled.height for _, scaled in row) for row in rows]
    top = gap + (23 * len(head) + gap // 2 if head else 0)
    canvas = Image.new("RGB", (canvas_width, top + sum(labels) + sum(pictures) + len(rows) * (gap + 6)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    for i, line in enumerate(head):
        pen.text((gap, gap + 23 * i), line, _INK, title)
    for row, label_height, picture_height in zip(rows, labels, pictures, strict=True):
        for column, (lines, scaled) in enumerate(row):
            x, y = gap + column * (width + gap), top
            for line, font in lines:
                pen.text((x, y), line, _INK, font)
                y += _line(font)
            canvas.paste(scaled, (x, top + label_height + 6))
        top += label_height + picture_height + gap + 6
    return canvas


# -- pieces


def _open(image: Picture, grid: Grid) -> Image.Image:
    """Return the picture in RGB, upright, enlarged where it or its cells would be too small to see."""
    if isinstance(image, str | Path):
        with Image.open(image) as opened:
            return _open(opened, grid)
    picture = ImageOps.exif_transpose(image).convert("RGB")
    if min(grid) < 1:
        raise ValueError(f"a grid is frames, rows, columns, each at least 1, got {grid}")
    width, height = picture.size
    scale = max(1.0, _SHORTEST / min(width, height), _CELL * grid[1] / height, _CELL * grid[2] / width)
    if scale > 1:
        picture = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    return picture


def _box(picture: Image.Image, crop: bool) -> tuple[int, int, int, int]:
    width, height = picture.size
    side = min(width, height)
    if not crop:
        return 0, 0, width, height
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _frames(grid: Grid) -> list[tuple[int, int, int]]:
    """Return for each frame its first token, its rows and its columns."""
    frames, rows, columns = grid
    return [(frame * rows * columns, rows, columns) for frame in range(frames)]


def _per_token(values: Sequence[float], n: int, name: str) -> list[float]:
    if len(values) != n:
        raise ValueError(f"{name} must have one value per token of the grid: {n}, got {len(values)}")
    return list(values)


def _levels(scores: Sequence[float]) -> list[float | None]:
    """Return scores stretched to 0..1; None where a score is not finite."""
    finite = [score for score in scores if math.isfinite(score)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = (high - low) or 1.0
    return [(score - low) / span if math.isfinite(score) else None for score in scores]


def _cells(values: Sequence[float], rows: int, columns: int, box: tuple[int, int, int, int]) -> Image.Image:
    small = Image.new("L", (columns, rows))
    small.putdata([round(255 * value) for value in values])
    return small.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST)


def _dimmed(picture: Image.Image) -> Image.Image:
    grey = ImageOps.grayscale(picture).convert("RGB")
    return Image.blend(grey, Image.new("RGB", picture.size, (30, 32, 40)), 0.68)


def _coloured(level: Image.Image) -> Image.Image:
    table = [_ramp(value / 255) for value in range(256)]
    return Image.merge("RGB", [level.point([colour[channel] for colour in table]) for channel in range(3)])


def _ramp(level: float | None) -> Colour:
    place = (level or 0.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    return red, green, blue


def _edges(start: int, end: int, cells: int) -> list[int]:
    """Return the first pixel of each cell and the one after the last, as nearest-neighbour resizing places them."""
    return [start + math.ceil(cell * (end - start) / cells - 0.5) for cell in range(cells + 1)]


def _contour(
    picture: Image.Image, box: tuple[int, int, int, int], rows: int, columns: int, inside: dict[int, int]
) -> None:
    """Draw a line around the kept cells of each slot, only where they meet other cells or the border."""
    pen = ImageDraw.Draw(picture)
    xs, ys = _edges(box[0], box[2], columns), _edges(box[1], box[3], rows)
    thick = max(1, round(min((box[2] - box[0]) / columns, (box[3] - box[1]) / rows) / 12))

    def same(row: int, column: int, slot: int) -> bool:
        return 0 <= row < rows and 0 <= column < columns and inside.get(row * columns + column) == slot

    for token, slot in inside.items():
        row, column = divmod(token, columns)
        left, right, top, bottom = xs[column], xs[column + 1] - 1, ys[row], ys[row + 1] - 1
        if not same(row - 1, column, slot):
            pen.rectangle((left, top, right, top + thick - 1), _OUTLINE)
        if not same(row + 1, column, slot):
            pen.rectangle((left, bottom - thick + 1, right, bottom), _OUTLINE)
        if not same(row, column - 1, slot):
            pen.rectangle((left, top, left + thick - 1, bottom), _OUTLINE)
        if not same(row, column + 1, slot):
            pen.rectangle((right - thick + 1, top, right, bottom), _OUTLINE)


def _boxes(
    picture: Image.Image,
    box: tuple[int, int, int, int],
    rows: int,
    columns: int,
    levels: dict[int, float | None],
) -> None:
    pen = ImageDraw.Draw(picture)
    xs, ys = _edges(box[0], box[2], columns), _edges(box[1], box[3], rows)
    thick = max(1, round(min((box[2] - box[0]) / columns, (box[3] - box[1]) / rows) / 7))
    for token, level in levels.items():
        row, column = divmod(token, columns)
        corners = (xs[column], ys[row], xs[column + 1] - 1, ys[row + 1] - 1)
        pen.rectangle(corners, outline=_FAINT if level is None else _ramp(level), width=thick)


def _strip(panels: Sequence[Image.Image]) -> Image.Image:
    if len(panels) == 1:
        return panels[0]
    width, height = panels[0].size
    strip = Image.new("RGB", (len(panels) * width + (len(panels) - 1) * 8, height), _PAPER)
    for i, panel in enumerate(panels):
        strip.paste(panel, (i * (width + 8), 0))
    return strip


def _with_bar(picture: Image.Image, low: float, high: float) -> Image.Image:
    width, height = picture.size
    font = _font(max(13, height // 28))
    labels = [f"{high:.3g}", f"{low:.3g}"]
    thick = max(14, height // 28)
    room = thick + 16 + max(math.ceil(font.getlength(label)) for label in labels)
    canvas = Image.new("RGB", (width + room + 10, height), _PAPER)
    canvas.paste(picture, (0, 0))
    canvas.paste(_coloured(Image.linear_gradient("L").rotate(180).resize((thick, height))), (width + 10, 0))
    pen = ImageDraw.Draw(canvas)
    pen.text((width + thick + 16, 2), labels[0], _INK, font, anchor="la")
    pen.text((width + thick + 16, height - 2), labels[1], _INK, font, anchor="ld")
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _line(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return round(1.35 * getattr(font, "size", 11))


def _height(lines: Sequence[tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]]) -> int:
    return sum(_line(font) for _, font in lines)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
