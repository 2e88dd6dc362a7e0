"""Questions about a clip, answered from what happens in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foveate.demo.video.world import Life
from foveate.demo.world import Question

TYPES = ("start", "end", "appears", "vanishes", "moves", "direction", "changes", "order", "count", "there")

Slots = tuple[str, ...]
Candidate = tuple[str, Slots]
Tally = dict[str, dict[str, int]]

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "start": ("what colour is the {0} at the start?", "what color is the {0} at the start?"),
    "end": ("what colour is the {0} at the end?", "what color is the {0} at the end?"),
    "appears": ("what shape appears?", "which shape appears?"),
    "vanishes": ("what shape vanishes?", "which shape vanishes?"),
    "moves": ("what shape moves?", "which shape moves?"),
    "direction": ("which way does the {0} move?", "what way does the {0} move?"),
    "changes": ("what shape changes colour?", "what shape changes color?", "which shape changes colour?"),
    "order": ("what appears first, the {0} or the {1}?", "which shape appears first, the {0} or the {1}?"),
    "count": ("how many shapes appear?",),
    "there": ("was there {0} {1} at the {2}?", "is there {0} {1} at the {2}?"),
}
BALANCED = ("direction", "count", "there")
"""Types whose few answers are drawn evenly."""


def candidates(kind: str, frames: int, lives: Sequence[Life]) -> list[Candidate]:
    """Every clear question of a type, as its answer and the words that fill a template."""
    found: list[Candidate] = []
    if kind in ("start", "end"):
        frame = 0 if kind == "start" else frames - 1
        for o in lives:
            if o.there(frame):
                found += [(o.tint(frame), (o.shape,))] * (4 if o.event == "changes" else 1)
    elif kind in ("appears", "vanishes", "moves", "changes"):
        mine = [o for o in lives if o.event == kind]
        if len(mine) == 1:
            found = [(mine[0].shape, ())]
    elif kind == "direction":
        found = [(o.way, (o.shape,)) for o in lives if o.event == "moves"]
    elif kind == "order":
        mine = [o for o in lives if o.event == "appears"]
        found = [(min(a, b, key=lambda o: o.at).shape, (a.shape, b.shape)) for a in mine for b in mine if a is not b]
    elif kind == "count":
        found = [(str(sum(o.event == "appears" for o in lives)), ())]
    elif kind == "there":
        for frame, when in ((0, "start"), (frames - 1, "end")):
            seen = {(o.tint(frame), o.shape) for o in lives if o.there(frame)}
            ever = {(c, o.shape) for o in lives for c in (o.colour, o.later)} - seen
            near = {(c, s) for c, _ in seen | ever for _, s in seen | ever} - seen - ever
            found += [("yes", (*pair, when)) for pair in sorted(seen)]
            found += [("no", (*pair, when)) for pair in sorted(ever)] * 4
            found += [("no", (*pair, when)) for pair in sorted(near)]
    return found


def phrase(kind: str, slots: Slots, rng: np.random.Generator) -> str:
    """One wording of a question."""
    if kind == "there":
        slots = (("an " if slots[0][0] in "aeiou" else "a ") + slots[0], *slots[1:])
    return _TEMPLATES[kind][rng.integers(len(_TEMPLATES[kind]))].format(*slots)


def _draw(rng: np.random.Generator, kind: str, options: list[Candidate]) -> Question:
    answer, slots = options[rng.integers(len(options))]
    return Question(phrase(kind, slots, rng), answer, kind)


def ask(
    rng: np.random.Generator, frames: int, lives: Sequence[Life], per_type: int, types: Sequence[str] = TYPES
) -> tuple[Question, ...]:
    """Asks at most `per_type` different questions of each type."""
    asked: dict[str, Question] = {}
    for kind in types:
        options = candidates(kind, frames, lives)
        for _ in range(per_type if options else 0):
            answers = sorted({answer for answer, _ in options})
            pick = answers[rng.integers(len(answers))]
            mine = [o for o in options if o[0] == pick] if kind in BALANCED else options
            question = _draw(rng, kind, mine)
            asked.setdefault(question.text, question)
    return tuple(asked.values())


def balanced(rng: np.random.Generator, frames: int, lives: Sequence[Life], tally: Tally, n: int) -> list[Question]:
    """Asks n questions of n types, those asked least so far, with the answers given least so far."""
    chosen: dict[str, Question] = {}
    order = sorted(TYPES, key=lambda kind: sum(tally.get(kind, {}).values()))
    for kind in order * n:  # types come round again only where a clip allows fewer than n
        options = candidates(kind, frames, lives)
        if not options or len(chosen) == n:
            continue
        seen = tally.setdefault(kind, {})
        least = min(seen.get(answer, 0) for answer, _ in options)
        question = _draw(rng, kind, [o for o in options if seen.get(o[0], 0) == least])
        if question.text not in chosen:
            seen[question.answer] = seen.get(question.answer, 0) + 1
            chosen[question.text] = question
    return list(chosen.values())
