"""The world of demo-hd: large pictures of odd sizes, in which most of what is asked about is small.

A scene is a function of its seed alone; where things lie is decided with integer arithmetic. One scene in four is a
pair of pictures that differ in a few things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from PIL import Image

from foveate.demo.world import COLOURS, SHAPES, TEST, TRAIN, VALIDATION, WORDS, Area, Question, _place

__all__ = [
    "CROP",
    "PAIRS",
    "SIZES",
    "TEST",
    "TRAIN",
    "VALIDATION",
    "Item",
    "Look",
    "Scene",
    "held_out",
    "layout",
    "scene",
]

CROP = 336
"""Side of a crop, px."""
Size = tuple[int, int]
SIZES: dict[Size, Size] = {
    (672, 672): (2, 2), (672, 336): (2, 1), (336, 672): (1, 2), (1008, 336): (3, 1), (336, 1008): (1, 3),
    (600, 450): (2, 2), (500, 672): (2, 2), (640, 300): (2, 1),
}  # fmt: skip
"""Width and height of a picture, and how many crops it is read in, across and down."""
PAIRS: dict[Size, Size] = {(448, 336): (2, 1), (336, 448): (1, 2)}
"""The same for the pictures of a pair."""

Kind = Literal["shape", "faint", "word", "number"]


@dataclass(frozen=True)
class Item:
    """A shape, a faint shape, or a coloured sign with a word or number.

    Args:
        kind: Which of these.
        name: The shape, or what is printed, lower case.
        colour: One of `COLOURS`; a faint shape has none ("").
        size: Side of a shape before a small rotation, or font size of a sign, in px.
        x: Centre, px from the left edge.
        y: Centre, px from the top edge.
    """

    kind: Kind
    name: str
    colour: str
    size: int
    x: int
    y: int

    @property
    def half(self) -> Size:
        """Half of width and height in px; for signs without the exact font metrics."""
        if self.kind in ("shape", "faint"):
            return (self.size + 1) // 2, (self.size + 1) // 2
        return len(self.name) * self.size * 37 // 100 + 8, self.size * 45 // 100 + 6

    @property
    def box(self) -> Area:
        """Left, top, right, bottom in px."""
        w, h = self.half
        return self.x - w, self.y - h, self.x + w, self.y + h


@dataclass(frozen=True)
class Look:
    """How large things are.

    Args:
        small: Smallest and largest side of a small shape, px.
        large: The same of a distractor.
        font: Smallest and largest font size of a sign, px.
    """

    small: tuple[int, int] = (20, 48)
    large: tuple[int, int] = (90, 180)
    font: tuple[int, int] = (20, 30)


LOOK = Look()


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture or two, what is in them, and four questions.

    Args:
        seed: The seed that made it.
        pictures: One RGB picture or two of the same size.
        items: What is in each.
        questions: Four questions about them.
    """

    seed: int
    pictures: tuple[Image.Image, ...]
    items: tuple[tuple[Item, ...], ...]
    questions: tuple[Question, ...] = field(repr=False)


class _Canvas:
    """Puts items where nothing is yet; small ones where the border of two crops does not cut them."""

    def __init__(self, rng: np.random.Generator, size: Size, grid: Size) -> None:
        self.rng, self.size, self.grid = rng, size, grid
        self.taken: list[Area] = []
        self.items: list[Item] = []

    def put(self, kind: Kind, name: str, colour: str, size: int, whole: bool = True) -> bool:
        rng, (columns, rows), (width, height) = self.rng, self.grid, self.size
        draft = Item(kind, name, colour, size, 0, 0)
        for _ in range(3):
            area = (0, 0, width, height)
            if whole:
                c, r = int(rng.integers(columns)), int(rng.integers(rows))
                area = (c * width // columns, r * height // rows, (c + 1) * width // columns, (r + 1) * height // rows)
            spot = _place(rng, *draft.half, area, self.taken)
            if spot:
                self.items.append(replace(draft, x=spot[0], y=spot[1]))
                return True
        return False

    def any(self, span: tuple[int, int]) -> int:
        """A whole number of a span, both ends included."""
        return int(self.rng.integers(span[0], span[1] + 1))


def layout(rng: np.random.Generator, size: Size, grid: Size, look: Look = LOOK) -> tuple[Item, ...]:
    """Decides what lies where in one picture.

    Args:
        rng: Source of chance.
        size: Width and height of the picture.
        grid: Crops across and down.
        look: How large things are.

    Returns:
        The items; no two boxes overlap, the colours of signs differ, and the shape of a faint item is that of no other.
    """
    canvas = _Canvas(rng, size, grid)
    crops = grid[0] * grid[1]
    tints = [COLOURS[i] for i in rng.permutation(len(COLOURS))]
    kinds: list[Kind] = ["word", "number", *(("word", "number")[i] for i in rng.integers(2, size=min(crops - 1, 2)))]
    names: set[str] = set()
    for kind, tint in zip(kinds, tints, strict=False):
        name = WORDS[rng.integers(len(WORDS))] if kind == "word" else str(rng.integers(10, 100))
        if name not in names:
            canvas.put(kind, name, tint, canvas.any(look.font))
        names.add(name)
    faint, single, *others = (SHAPES[i] for i in rng.permutation(len(SHAPES)))
    canvas.put("shape", single, COLOURS[rng.integers(8)], canvas.any(look.small))
    canvas.put("faint", faint, "", canvas.any((look.small[0] + 14, look.small[1] + 14)))
    for _ in range(canvas.any((1, 1 + crops // 2)) if crops > 1 else 0):
        canvas.put("shape", others[rng.integers(6)], COLOURS[rng.integers(8)], canvas.any(look.large), whole=False)
    for _ in range(canvas.any((1, 1 + crops))):
        canvas.put("shape", others[rng.integers(6)], COLOURS[rng.integers(8)], canvas.any(look.small))
    return tuple(canvas.items)


def layout_pair(rng: np.random.Generator, size: Size, grid: Size, look: Look = LOOK) -> tuple[tuple[Item, ...], ...]:
    """Decides what lies where in two pictures of one scene.

    In the second picture one small shape is of another kind, which the first picture does not show, or is new there;
    one shape has another colour, and one sign another word.
    """
    canvas = _Canvas(rng, size, grid)
    before, after, turned, *others = (SHAPES[i] for i in rng.permutation(len(SHAPES)))
    tints = [COLOURS[i] for i in rng.permutation(len(COLOURS))]
    first, second = (WORDS[i] for i in rng.permutation(len(WORDS))[:2])
    canvas.put("word", max(first, second, key=len), tints[0], canvas.any(look.font))
    canvas.put("shape", before, COLOURS[rng.integers(8)], canvas.any(look.small))
    canvas.put("shape", turned, tints[1], canvas.any(look.small))
    word, changed, tinted = canvas.items
    if rng.integers(2):
        canvas.put("shape", others[0], COLOURS[rng.integers(8)], canvas.any(look.large), whole=False)
    for _ in range(canvas.any((1, 2))):
        canvas.put("shape", others[rng.integers(len(others))], COLOURS[rng.integers(8)], canvas.any(look.small))
    rest = canvas.items[3:]
    new = bool(rng.integers(2))
    left = [replace(word, name=first), tinted, *([] if new else [changed]), *rest]
    right = [replace(word, name=second), replace(tinted, colour=tints[2]), replace(changed, name=after), *rest]
    return tuple(left), tuple(right)


def contents(seed: int) -> tuple[Size, tuple[tuple[Item, ...], ...]]:
    """Size of the pictures of a seed, and what is in each."""
    rng = np.random.default_rng([seed, 21])
    if rng.integers(4) == 0:
        size = list(PAIRS)[rng.integers(len(PAIRS))]
        return size, layout_pair(rng, size, PAIRS[size])
    size = list(SIZES)[rng.integers(len(SIZES))]
    return size, (layout(rng, size, SIZES[size]),)


def pictures(rng: np.random.Generator, size: Size, items: Sequence[Sequence[Item]]) -> tuple[Image.Image, ...]:
    """The pictures of a scene; those of a pair have one background."""
    from foveate.demo.hd.paint import ground, paint

    base = ground(rng, size)
    return tuple(Image.fromarray(paint(rng, base, part)[0]) for part in items)


def scene(seed: int) -> Scene:
    """The scene of a seed.

    Args:
        seed: Any non-negative integer; see `TRAIN`, `VALIDATION`, `TEST`.

    Returns:
        The same scene for the same seed, always.

    Example:
        >>> [picture.size for picture in scene(7).pictures]
        [(672, 672)]
    """
    from foveate.demo.hd.questions import ask

    size, items = contents(seed)
    asked = ask(np.random.default_rng([seed, 23]), items, 4)
    return Scene(seed, pictures(np.random.default_rng([seed, 22]), size, items), items, asked)


def held_out(n: int = 2000) -> list[tuple[int, Question]]:
    """The fixed test set: four questions on each of n / 4 scenes, types and closed answers balanced.

    Args:
        n: How many questions, a multiple of four; the first m of a longer set are the set of m.

    Returns:
        Pairs of a seed (see `scene`) and a question.
    """
    from foveate.demo.hd.questions import balanced

    chosen: list[tuple[int, Question]] = []
    tally: dict[str, dict[str, int]] = {}
    for seed in TEST[: n // 4]:
        chosen += [(seed, q) for q in balanced(np.random.default_rng([seed, 24]), contents(seed)[1], tally, 4)]
    return chosen
