"""The world of the demo model: generated pictures of shapes and printed text on cluttered backgrounds.

A scene is a function of its seed alone. Where things lie is decided with integer arithmetic, so that the questions
of a seed are the same on every machine; only the last bit of a pixel may differ between font or image libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 336
PATCH = 14
GRID = SIDE // PATCH

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SIZES = (14, 16, 18, 20, 23, 26, 30, 34, 39, 45, 52, 60, 70, 80, 90)
WORDS = (
    "ant", "apple", "bag", "ball", "bird", "boat", "book", "box", "bus", "cake", "car", "cat", "coin", "corn",
    "cup", "desk", "dog", "door", "duck", "egg", "fish", "flag", "fox", "gate", "hat", "ice", "jam", "key",
    "king", "lamp", "leaf", "milk", "nest", "open", "park", "pen", "pig", "rain", "road", "salt", "ship", "shop",
    "snow", "stop", "sun", "tea", "tree", "zoo",
)  # fmt: skip
PLACES = (
    "top left", "top middle", "top right",
    "middle left", "middle", "middle right",
    "bottom left", "bottom middle", "bottom right",
)  # fmt: skip

TRAIN = range(0, 10_000_000)
"""Seeds of the scenes a model may learn from."""
VALIDATION = range(20_000_000, 20_100_000)
"""Seeds for choices made while training."""
TEST = range(30_000_000, 30_100_000)
"""Seeds of the held-out set: nothing is ever chosen on them."""

Area = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """A coloured shape.

    Args:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        size: Side of its bounding box before a small rotation, in px.
        x: Centre, px from the left edge of the canvas.
        y: Centre, px from the top edge of the canvas.
    """

    shape: str
    colour: str
    size: int
    x: int
    y: int

    @property
    def box(self) -> Area:
        """Left, top, right, bottom in px."""
        half = (self.size + 1) // 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Print:
    """A printed word or two-digit number.

    Args:
        text: What is printed, lower case (the letters in the picture are capitals).
        kind: "word" or "number".
        height: Font size in px; capitals are about 0.7 of it.
        x: Centre, px from the left edge of the canvas.
        y: Centre, px from the top edge of the canvas.
    """

    text: str
    kind: str
    height: int
    x: int
    y: int

    @property
    def box(self) -> Area:
        """Left, top, right, bottom in px: room for the text, whatever the exact font metrics are."""
        half_w = (len(self.text) * self.height * 37 // 100 + 8) // 1
        half_h = self.height * 45 // 100 + 3
        return self.x - half_w, self.y - half_h, self.x + half_w, self.y + half_h


@dataclass(frozen=True)
class Question:
    """A question with its one true answer.

    Args:
        text: The question, lower case.
        answer: One lower-case word or a number.
        type: One of `foveate.demo.questions.TYPES`.
    """

    text: str
    answer: str
    type: str


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, what is in it, and questions about it.

    Args:
        seed: The seed that made it.
        image: The picture, RGB.
        objects: The shapes.
        prints: The printed words and numbers.
        questions: Up to two questions of every type that this scene allows.
    """

    seed: int
    image: Image.Image
    objects: tuple[Thing, ...]
    prints: tuple[Print, ...]
    questions: tuple[Question, ...] = field(repr=False)


def _apart(box: Area, others: Sequence[Area], gap: int) -> bool:
    return all(
        box[2] + gap <= o[0] or o[2] + gap <= box[0] or box[3] + gap <= o[1] or o[3] + gap <= box[1] for o in others
    )


def _place(rng: np.random.Generator, half_w: int, half_h: int, area: Area, taken: list[Area]) -> tuple[int, int] | None:
    """A random free centre inside the area, or None after many tries."""
    x0, y0, x1, y1 = area[0] + half_w + 1, area[1] + half_h + 1, area[2] - half_w - 1, area[3] - half_h - 1
    if x1 <= x0 or y1 <= y0:
        return None
    for _ in range(40):
        x, y = int(rng.integers(x0, x1)), int(rng.integers(y0, y1))
        box = (x - half_w, y - half_h, x + half_w, y + half_h)
        if _apart(box, taken, 4):
            taken.append(box)
            return x, y
    return None


def layout(
    rng: np.random.Generator,
    area: Area = (0, 0, SIDE, SIDE),
    count: tuple[int, int] = (4, 7),
    prints: tuple[int, int] = (2, 2),
    largest: int = 90,
) -> tuple[tuple[Thing, ...], tuple[Print, ...]]:
    """Decides what lies where.

    Args:
        rng: Source of chance.
        area: The part of the canvas to fill: left, top, right, bottom in px.
        count: Fewest and most shapes.
        prints: Most words and most numbers.
        largest: Largest shape in px.

    Returns:
        The shapes and the printed texts; no two boxes overlap.
    """
    taken: list[Area] = []
    texts: list[Print] = []
    for kind, most in (("word", prints[0]), ("number", prints[1])):
        for _ in range(int(rng.integers(0, most + 1))):
            text = WORDS[rng.integers(len(WORDS))] if kind == "word" else str(rng.integers(10, 100))
            if any(p.text == text for p in texts):
                continue
            draft = Print(text, kind, int(rng.integers(24, 41)), 0, 0)
            spot = _place(rng, draft.box[2], draft.box[3], area, taken)
            if spot:
                texts.append(Print(text, kind, draft.height, *spot))
    n = int(rng.integers(count[0], count[1] + 1))
    order = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    many = int(rng.integers(2, 5)) if n >= 3 and rng.integers(100) < 70 else 1
    shapes = ([order[0]] * min(many, n) + order[1:])[:n]
    table = [s for s in SIZES if s <= largest]
    sizes = sorted((table[i] for i in rng.integers(len(table), size=n)), reverse=True)
    if n >= 2 and rng.integers(100) < 75 and sizes[-2] > 20:
        fitting = [s for s in SIZES if s * 10 <= sizes[-2] * 7]
        sizes[-1] = fitting[rng.integers(len(fitting))]
    objects: list[Thing] = []
    for size, i in zip(sizes, rng.permutation(n), strict=True):
        colour = COLOURS[rng.integers(len(COLOURS))]
        half = (size + 1) // 2
        spot = _place(rng, half, half, area, taken)
        if spot:
            objects.append(Thing(shapes[i], colour, size, *spot))
    return tuple(objects[i] for i in rng.permutation(len(objects))), tuple(texts)


def scene(seed: int) -> Scene:
    """The scene of a seed.

    Args:
        seed: Any non-negative integer; see `TRAIN`, `VALIDATION`, `TEST`.

    Returns:
        The same scene for the same seed, always.

    Example:
        >>> scene(7).image.size
        (336, 336)
    """
    from foveate.demo.paint import paint
    from foveate.demo.questions import ask

    objects, prints = layout(np.random.default_rng([seed, 1]))
    image, _ = paint(np.random.default_rng([seed, 2]), objects, prints)
    questions = ask(np.random.default_rng([seed, 3]), objects, prints, per_type=2)
    return Scene(seed, Image.fromarray(image), objects, prints, questions)


def held_out(n: int = 2000) -> list[tuple[int, Question]]:
    """The fixed test set: four questions on each of n / 4 scenes, types and closed answers balanced.

    Args:
        n: How many questions, a multiple of four; the first m of a longer set are the set of m.

    Returns:
        Pairs of a seed (see `scene`) and a question.
    """
    from foveate.demo.questions import balanced

    chosen: list[tuple[int, Question]] = []
    tally: dict[str, dict[str, int]] = {}
    for seed in TEST[: n // 4]:
        objects, prints = layout(np.random.default_rng([seed, 1]))
        chosen += [(seed, q) for q in balanced(np.random.default_rng([seed, 4]), objects, prints, tally, 4)]
    return chosen


def patches_of(pixels: NDArray[np.uint8], classes: int, patch: int = PATCH) -> NDArray[np.int64]:
    """Counts of each value of a map in every patch: shape (rows, columns, classes)."""
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    index = np.arange(rows).repeat(patch)[:, None] * columns + np.arange(columns).repeat(patch)[None, :]
    flat = np.bincount((index * classes + pixels).ravel(), minlength=rows * columns * classes)
    return flat.reshape(rows, columns, classes)
