"""Kept tokens over the picture: one image, the frames of a video, the stages of a method, two methods side by side."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from foveate.draw import panels as geometry
from foveate.draw.ground import Frames, Picture, enlarged, films, frame, opened, upright
from foveate.draw.panels import Grid, Panel
from foveate.draw.scene import (
    FAINT,
    FIRST,
    INK,
    OUTLINE,
    SECOND,
    Cells,
    Colour,
    Drawing,
    Group,
    Photo,
    Rects,
    Scene,
    Text,
    edges,
    font,
    levels,
    line_height,
    outline,
    ramp,
    sheet,
    strip,
    wrapped,
)

if TYPE_CHECKING:
    from foveate.report import ImageReport, Report

_DIM = 0.85  # how much light is left to a token that nearly reached the end
_BAR = 64  # cells of a colour bar
_WIDEST = 680  # pixels of a picture among others


@Drawing
def kept(
    image: Picture,
    grid: Grid,
    kept: Iterable[int],
    *,
    scores: Sequence[float] | None = None,
    life: Sequence[float] | None = None,
    merged_into: Sequence[int] | None = None,
    crop: bool = False,
) -> Scene:
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
    picture = upright(image)
    shown = geometry.of_grid(grid, geometry.central(picture.size) if crop else geometry.WHOLE)
    slots = dict.fromkeys(kept, 0)
    if merged_into is not None:
        slots = {token: int(slot) for token, slot in enumerate(_per_token(merged_into, n, "merged_into")) if slot >= 0}
    if slots and not (min(slots) >= 0 and max(slots) < n):
        raise ValueError(f"kept holds an index outside range({n}), the tokens of the grid {grid}")
    light = [0.0] * n if life is None else [_DIM * share for share in _per_token(life, n, "life")]
    boxes = None if scores is None else levels(_per_token(scores, n, "scores"))
    base = enlarged(picture, shown)
    return strip([_panel(base, panel, slots, light, boxes) for panel in shown])


@Drawing
def heat(image: Picture, grid: Grid, scores: Sequence[float], *, crop: bool = False) -> Scene:
    """Return the picture in grey under its score map, with a colour bar.

    Args:
        image: The picture, or its path.
        grid: Frames (or crops), rows, columns of its tokens.
        scores: One per token in reading order; cells whose score is not finite stay dark.
        crop: The processor cut the picture to its central square before it made tokens.

    Raises:
        ValueError: If there is not one score per token.
    """
    values = _per_token(scores, math.prod(grid), "scores")
    picture = upright(image)
    shown = geometry.of_grid(grid, geometry.central(picture.size) if crop else geometry.WHOLE)
    return _with_bar(_heat([picture], shown, values), values)


@Drawing
def tokens(image: Frames, report: ImageReport, *, crop: bool = False) -> Scene:
    """Return the picture of what one report entry says: brighter cells live through more layers.

    The outline goes around the tokens that live longest: to the end, or to the last site that left any. Of a picture
    that was read as a whole and in tiles both are drawn, the tiles put together; of a video each frame.

    Args:
        image: The picture, or its path; of a video all frames that were shown to the processor.
        report: An entry of ``Report.images``.
        crop: The processor cut the picture to its central square before it made tokens.
    """
    pictures = opened(image)
    shown = geometry.panels(report, pictures[0].size, crop=crop)
    scenes = _tokens(pictures, shown, report)
    if report.modality == "image":
        return strip(scenes)
    alive = set(_longest(report))
    labels = [f"{panel.title}: {len(alive & set(panel.order))} of {len(panel.order)}" for panel in shown]
    return sheet(list(zip(labels, scenes, strict=True)), min(4, len(scenes)), "", 220)


@Drawing
def scores(image: Frames, report: ImageReport, *, crop: bool = False) -> Scene:
    """Return the map of the last score that each token got, with a colour bar; tokens without a score stay dark.

    Args:
        image: The picture, or its path; of a video all frames that were shown to the processor.
        report: An entry of ``Report.images``.
        crop: The processor cut the picture to its central square before it made tokens.

    Raises:
        ValueError: If the method gave no scores.
    """
    values = report.scores()
    if values is None:
        raise ValueError("the method gave no scores, there is nothing to map")
    pictures = opened(image)
    return _with_bar(_heat(pictures, geometry.panels(report, pictures[0].size, crop=crop), list(values)), values)


@Drawing
def stages(image: Frames, report: ImageReport, *, crop: bool = False, width: int = 220) -> Scene:
    """Return a strip with the tokens alive at the start and after each stage of a method that drops inside the LLM.

    Args:
        image: The picture, or its path; of a video all frames that were shown to the processor.
        report: An entry of ``Report.images``.
        crop: The processor cut the picture to its central square before it made tokens.
        width: Pixels of each picture; of a video, of a frame where there are few.
    """
    pictures = opened(image)
    shown = geometry.panels(report, pictures[0].size, crop=crop)
    steps = [] if any(stage.site == 0 for stage in report.stages) else [("before the LLM", report.tokens)]
    steps += [
        (f"before layer {stage.site}" if stage.site else "before the LLM", len(stage.kept)) for stage in report.stages
    ]
    alive = [tuple(range(report.tokens))] * (len(steps) - len(report.stages)) + [stage.kept for stage in report.stages]
    items = []
    for (place, count), tokens in zip(steps, alive, strict=True):
        slots = dict.fromkeys(tokens, 0)
        scenes = [_panel(enlarged(frame(pictures, panel, shown), shown), panel, slots) for panel in shown]
        items.append((f"{place}\n{count} of {report.tokens} tokens", strip(scenes)))
    if len(shown) > 2:  # frames: a row for each stage
        return sheet(items, 1, "", width * min(len(shown), 4))
    return sheet(items, len(items), "", width)


@Drawing
def compare(
    image: Frames,
    first: ImageReport,
    second: ImageReport,
    names: tuple[str, str] = ("first", "second"),
    *,
    crop: bool = False,
    width: int = 300,
) -> Scene:
    """Return what two methods kept side by side, and a picture of what only one of them kept.

    Args:
        image: The picture, or its path; of a video all frames that were shown to the processor.
        first: An entry of one ``Report.images``.
        second: The same entry of another, about the same picture.
        names: What the two are called.
        crop: The processor cut the picture to its central square before it made tokens.
        width: Pixels of each picture.

    Raises:
        ValueError: If the two are not about the same tokens.
    """
    if (first.grid, first.tokens, first.frames) != (second.grid, second.tokens, second.frames):
        raise ValueError(f"two pictures: {first.tokens} tokens on {first.grid}, {second.tokens} on {second.grid}")
    pictures = opened(image)
    shown = geometry.panels(first, pictures[0].size, crop=crop)
    one, other = set(_longest(first)), set(_longest(second))
    marked = (((one - other), FIRST, f"only {names[0]}"), ((other - one), SECOND, f"only {names[1]}"))
    both = [_both(enlarged(frame(pictures, panel, shown), shown), panel, one | other, marked) for panel in shown]
    key = _key([(colour, f"{len(tokens)} {text}") for tokens, colour, text in marked], len(one & other), width)
    items = [
        (f"{name}\n{len(tokens)} tokens", strip(_tokens(pictures, shown, report)))
        for name, tokens, report in ((names[0], one, first), (names[1], other, second))
    ]
    difference = _below(strip(both), key, width)
    return sheet([*items, ("what only one kept\n ", difference)], 3, "", width)


@Drawing
def prompt(images: Sequence[Frames], report: Report, *, crop: bool = False) -> Scene:
    """Return all pictures and videos of a prompt side by side, each as `tokens` draws it.

    Args:
        images: What was asked about, in the order of the prompt: one entry for each in ``report.images``. Where a model
            counts tiles as pictures, so that there are more in the report, tokens are shown on plain ground.
        report: With at least one image.
        crop: The processor cut pictures to their central square before it made tokens.
    """
    grounds = films(images, report.images)
    scenes = [tokens.scene(*pair, crop=crop) for pair in zip(grounds, report.images, strict=True)]
    if len(scenes) == 1:
        return scenes[0]
    shown = enumerate(report.images, 1)
    titles = [f"{each.modality} {number}: {len(_longest(each))} of {each.tokens} tokens" for number, each in shown]
    width = min(_WIDEST, max(scene.width for scene in scenes))
    return sheet(list(zip(titles, scenes, strict=True)), min(4, len(scenes)), "", width)


# -- pieces


def _pixels(picture: Image.Image, panel: Panel) -> tuple[int, int, int, int]:
    """Where the grid of a panel lies on the picture."""
    left, top, right, bottom = panel.box
    width, height = picture.size
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def _longest(report: ImageReport) -> tuple[int, ...]:
    """The tokens that live longest."""
    lives = report.lives()
    longest = max(lives, default=0.0)
    return tuple(token for token, life in enumerate(lives) if life == longest and life > 0)


def _tokens(pictures: Sequence[Image.Image], shown: Sequence[Panel], report: ImageReport) -> list[Scene]:
    lives = report.lives()
    longest = max(lives, default=0.0)
    light = [_DIM * life / longest if longest else 0.0 for life in lives]
    slots = dict.fromkeys(_longest(report), 0)
    if report.merged_into is not None:
        slots = {token: slot for token, slot in enumerate(report.merged_into) if slot >= 0}
    return [_panel(enlarged(frame(pictures, panel, shown), shown), panel, slots, light) for panel in shown]


def _panel(
    picture: Image.Image,
    panel: Panel,
    slots: Mapping[int, int],
    light: Sequence[float] | None = None,
    boxes: Sequence[float | None] | None = None,
) -> Scene:
    """One panel: the tokens with a slot crisp and outlined, or boxed in colours; the others as light as they are."""
    box, rows, columns = _pixels(picture, panel), panel.rows, panel.columns
    seen = [1.0 if token in slots else 0.0 if light is None else light[token] for token in panel.order]
    clear = tuple(min(1.0, max(0.0, share)) for share in seen)
    items: list[Photo | Rects] = [Photo(picture, "dim"), Photo(picture, "plain", box, rows, columns, clear)]
    inside = {cell: slots[token] for cell, token in enumerate(panel.order) if token in slots}
    if boxes is None:
        items.append(Rects(outline(box, rows, columns, inside), OUTLINE))
    else:
        by_colour: dict[Colour, dict[int, int]] = {}
        for cell in inside:
            level = boxes[panel.order[cell]]
            by_colour.setdefault(FAINT if level is None else ramp(level), {})[cell] = cell
        items += [Rects(outline(box, rows, columns, cells, 12 / 7), colour) for colour, cells in by_colour.items()]
    return Scene(*picture.size, tuple(items))


def _both(
    picture: Image.Image,
    panel: Panel,
    seen: Collection[int],
    marked: Sequence[tuple[Collection[int], Colour, str]],
) -> Scene:
    """One panel with two sets of tokens: the first outlined, the second outlined and dotted."""
    box, rows, columns = _pixels(picture, panel), panel.rows, panel.columns
    clear = tuple(float(token in seen) for token in panel.order)
    items: list[Photo | Rects] = [Photo(picture, "dim"), Photo(picture, "plain", box, rows, columns, clear)]
    for place, (tokens, colour, _) in enumerate(marked):
        cells = [cell for cell, token in enumerate(panel.order) if token in tokens]
        lines = outline(box, rows, columns, dict.fromkeys(cells, 0), 2)
        if place:
            xs, ys = edges(box[0], box[2], columns), edges(box[1], box[3], rows)
            third = min((box[2] - box[0]) / columns, (box[3] - box[1]) / rows) / 6
            for cell in cells:
                row, column = divmod(cell, columns)
                x, y = (xs[column] + xs[column + 1]) / 2, (ys[row] + ys[row + 1]) / 2
                lines += ((round(x - third), round(y - third), round(x + third), round(y + third)),)
        items.append(Rects(lines, colour))
    return Scene(*picture.size, tuple(items))


def _key(entries: Sequence[tuple[Colour, str]], common: int, width: int) -> Scene:
    """The key of `_both`."""
    items: list[Rects | Text] = []
    y = 6
    for place, (colour, text) in enumerate(entries):
        border, inner = (0, y, 14, y + 14), (3, y + 3, 11, y + 11)
        items += [Rects((border,), colour), Rects((inner,), INK)]
        if place:
            items.append(Rects(((5, y + 5, 9, y + 9),), colour))
        for line in wrapped(text, 13, width - 22):
            items.append(Text(22, y, line, 13))
            y += line_height(13)
        y += 4
    items.append(Text(22, y, f"{common} both, without a line", 13))
    return Scene(width, y + line_height(13), tuple(items))


def _below(scene: Scene, key: Scene, width: int) -> Scene:
    """A drawing at a width, with a key below it."""
    scale = width / scene.width
    height = round(scene.height * scale)
    return Scene(width, height + key.height, (Group(scene, 0, 0, scale), Group(key, 0, height)))


def _heat(pictures: Sequence[Image.Image], shown: Sequence[Panel], scores: Sequence[float]) -> Scene:
    level = levels(scores)
    scenes = []
    for panel in shown:
        picture = enlarged(frame(pictures, panel, shown), shown)
        box, rows, columns = _pixels(picture, panel), panel.rows, panel.columns
        mine = [level[token] for token in panel.order]
        scored = tuple(float(one is not None) for one in mine)
        colours = tuple(None if one is None else ramp(one) for one in mine)
        grey = Photo(picture, "grey", box, rows, columns, scored)
        scenes.append(Scene(*picture.size, (Photo(picture, "dim"), grey, Cells(box, rows, columns, colours, 0.72))))
    return strip(scenes)


def _with_bar(scene: Scene, scores: Sequence[float]) -> Scene:
    finite = [score for score in scores if math.isfinite(score)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    size = max(13, scene.height // 28)
    labels = [f"{high:.3g}", f"{low:.3g}"]
    notes = ["stays", "goes"]
    x, gap = scene.width + 10, 6
    right = x + size + gap
    room = max(math.ceil(font(size).getlength(label)) for label in labels + notes)
    bar = Cells((x, 0, x + size, scene.height), _BAR, 1, tuple(ramp(1 - row / (_BAR - 1)) for row in range(_BAR)))
    text = [
        Text(right, 2, labels[0], size),
        Text(right, 2 + line_height(size), notes[0], size),
        Text(right, scene.height - 2 - line_height(size), notes[1], size, "ld"),
        Text(right, scene.height - 2, labels[1], size, "ld"),
    ]
    return Scene(right + room + 4, scene.height, (Group(scene, 0, 0), bar, *text))


def _per_token(values: Sequence[float], n: int, name: str) -> list[float]:
    if len(values) != n:
        raise ValueError(f"{name} must have one value per token of the grid: {n}, got {len(values)}")
    return list(values)
