"""The world of the video model: short clips of shapes that stay, appear, vanish, move or change colour.

A clip is a function of its seed alone. What happens is decided with integer arithmetic, so that the questions of a
seed are the same on every machine; only the last bit of a pixel may differ between image libraries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from foveate.demo.world import COLOURS, SHAPES, TEST, TRAIN, VALIDATION, Area, Question, _place

__all__ = ["EVENTS", "LENGTHS", "SIDE", "TEST", "TRAIN", "VALIDATION", "Clip", "Life", "clip", "held_out", "layout"]

SIDE = 168
PATCH = 14
CELL = 28
"""Side in px of what one visual token shows: patches are pooled two by two."""
GRID = SIDE // CELL

LENGTHS = (8, 12, 16)
"""Frames of a clip."""
SIZES = (22, 24, 27, 30, 34, 38, 42, 47, 52)
EVENTS = ("stays", "appears", "vanishes", "moves", "changes")
SHARES = (14, 32, 18, 18, 18)
"""How often each event is drawn, in percent."""
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Life:
    """A coloured shape and the one thing that happens to it.

    Args:
        shape: One of `SHAPES`; no two shapes of a clip are alike.
        colour: One of `COLOURS`, at first.
        size: Side of its bounding box before a small rotation, in px.
        x: Centre at first, px from the left edge.
        y: Centre at first, px from the top edge.
        event: One of `EVENTS`.
        at: The first frame that shows it there, gone, on its way or in its new colour; 0 for one that stays.
        steps: In how many frames it moves.
        way: Where to, one of `WAYS`, for one that moves.
        far: By how many px in all.
        later: Its colour in the end.
    """

    shape: str
    colour: str
    size: int
    x: int
    y: int
    event: str
    at: int
    steps: int
    way: str
    far: int
    later: str

    def there(self, frame: int) -> bool:
        """Whether a frame shows it."""
        match self.event:
            case "appears":
                return frame >= self.at
            case "vanishes":
                return frame < self.at
            case _:
                return True

    def moved(self, frame: int) -> int:
        """How many px it has moved by a frame."""
        return self.far * min(max(frame - self.at + 1, 0), self.steps) // max(self.steps, 1)

    def centre(self, frame: int) -> tuple[int, int]:
        """Where a frame shows it."""
        dx, dy = WAYS.get(self.way, (0, 0))
        return self.x + dx * self.moved(frame), self.y + dy * self.moved(frame)

    def tint(self, frame: int) -> str:
        """Its colour in a frame."""
        return self.later if self.event == "changes" and frame >= self.at else self.colour


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames, what happens in them, and questions about it.

    Args:
        seed: The seed that made it.
        frames: The pictures, RGB.
        lives: The shapes and what happens to each.
        questions: Up to two questions of every type that this clip allows.
    """

    seed: int
    frames: tuple[Image.Image, ...]
    lives: tuple[Life, ...]
    questions: tuple[Question, ...] = field(repr=False)


def _slots(rng: np.random.Generator, events: list[str], frames: int) -> list[int]:
    """A frame for each event, no two alike; those that move get one that leaves them time."""
    edge = 2 if frames >= 8 else 1
    free = [int(f) for f in rng.permutation(np.arange(edge, frames - edge + 1))]
    at = [0] * len(events)
    for i in sorted(range(len(events)), key=lambda i: events[i] != "moves"):
        if events[i] == "stays":
            continue
        fitting = [f for f in free if events[i] != "moves" or f <= frames - edge - 2] or free
        if fitting:
            at[i] = fitting[0]
            free.remove(fitting[0])
    return at


def layout(
    rng: np.random.Generator, frames: int | None = None, count: tuple[int, int] = (3, 5)
) -> tuple[int, tuple[Life, ...]]:
    """Decides what happens.

    Args:
        rng: Source of chance.
        frames: Length of the clip; one of `LENGTHS` unless told.
        count: Fewest and most shapes.

    Returns:
        The number of frames, and the shapes; their ways and boxes never cross.
    """
    drawn = LENGTHS[rng.integers(len(LENGTHS))]
    frames = frames or drawn
    n = int(rng.integers(count[0], count[1] + 1))
    kinds = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:n]]
    limits = np.cumsum(SHARES)
    events = [EVENTS[int(np.searchsorted(limits, rng.integers(100), "right"))] for _ in range(n)]
    for i in [i for i, e in enumerate(events) if e == "appears"][3:]:
        events[i] = "stays"
    at = _slots(rng, events, frames)
    events = [e if f else "stays" for e, f in zip(events, at, strict=True)]
    lives: list[Life] = []
    taken: list[Area] = []
    for i in sorted(range(n), key=lambda i: events[i] != "moves"):
        size = SIZES[rng.integers(len(SIZES))]
        half = (size + 1) // 2
        first, other = (int(v) for v in rng.choice(len(COLOURS), 2, replace=False))
        way, far, steps, (dx, dy) = "", 0, 0, (0, 0)
        if events[i] == "moves":
            way = tuple(WAYS)[rng.integers(4)]
            far, steps, (dx, dy) = int(rng.integers(42, 85)), int(rng.integers(2, 6)), WAYS[way]
            steps = min(steps, max(frames - (2 if frames >= 8 else 1) - at[i], 1))
        spot = _place(rng, half + abs(dx) * (far + 1) // 2, half + abs(dy) * (far + 1) // 2, (0, 0, SIDE, SIDE), taken)
        if spot:
            x, y = spot[0] - dx * (far // 2), spot[1] - dy * (far // 2)
            later = COLOURS[other] if events[i] == "changes" else COLOURS[first]
            lives.append(Life(kinds[i], COLOURS[first], size, x, y, events[i], at[i], steps, way, far, later))
    return frames, tuple(lives[i] for i in rng.permutation(len(lives)))


def clip(seed: int) -> Clip:
    """The clip of a seed.

    Args:
        seed: Any non-negative integer; see `TRAIN`, `VALIDATION`, `TEST`.

    Returns:
        The same clip for the same seed, always.

    Example:
        >>> clip(7).frames[0].size
        (168, 168)
    """
    from foveate.demo.video.paint import film
    from foveate.demo.video.questions import ask

    frames, lives = layout(np.random.default_rng([seed, 11]))
    pictures, _ = film(np.random.default_rng([seed, 12]), frames, lives)
    questions = ask(np.random.default_rng([seed, 13]), frames, lives, per_type=2)
    return Clip(seed, tuple(Image.fromarray(p) for p in pictures), lives, questions)


def held_out(n: int = 2000) -> list[tuple[int, Question]]:
    """The fixed test set: four questions on each of n / 4 clips, types and closed answers balanced.

    Args:
        n: How many questions, a multiple of four; the first m of a longer set are the set of m.

    Returns:
        Pairs of a seed (see `clip`) and a question.
    """
    from foveate.demo.video.questions import balanced

    chosen: list[tuple[int, Question]] = []
    tally: dict[str, dict[str, int]] = {}
    for seed in TEST[: n // 4]:
        frames, lives = layout(np.random.default_rng([seed, 11]))
        chosen += [(seed, q) for q in balanced(np.random.default_rng([seed, 14]), frames, lives, tally, 4)]
    return chosen
