"""Questions about a layout, answered from the layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from foveate.demo.world import COLOURS, PLACES, SHAPES, SIDE, Print, Question, Thing

TYPES = ("presence", "colour", "place", "count", "relation", "word", "number", "smallest")
MARGIN = 40
"""Least distance in px that makes a relation clear."""

Slots = tuple[str, ...]
Candidate = tuple[str, Slots]
Tally = dict[str, dict[str, int]]

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "presence": ("is there {0} {1}?", "can you see {0} {1}?", "is {0} {1} in the picture?"),
    "colour": ("what colour is the {0}?", "what color is the {0}?", "which colour is the {0}?"),
    "place": ("what shape is {0}?", "which shape is {0}?", "what is the shape {0}?"),
    "count": ("how many {0} are there?", "how many {0} can you see?", "how many {0} are in the picture?"),
    "relation": ("is the {0} {1} {2} the {3} {4}?",),
    "word": ("what word is written{0}?", "which word is printed{0}?", "what does the word{0} say?"),
    "number": ("what number is written{0}?", "which number is printed{0}?", "what is the number{0}?"),
    "smallest": ("what {0} is the smallest shape?", "which {0} is the smallest shape?"),
}


def _where(place: int) -> str:
    return "in the middle" if place == 4 else f"at the {PLACES[place]}"


def place_of(x: int, y: int) -> int:
    """The ninth of the canvas, row by row, in which a point lies."""
    return min(y * 3 // SIDE, 2) * 3 + min(x * 3 // SIDE, 2)


def _alone(items: Sequence[Thing | Print], place: int, slack: int = 10) -> Thing | Print | None:
    """The one item whose centre lies clearly in a ninth, when no other comes near that ninth."""
    left, top = place % 3 * SIDE // 3, place // 3 * SIDE // 3
    right, bottom = left + SIDE // 3, top + SIDE // 3
    near = [i for i in items if left - slack <= i.x < right + slack and top - slack <= i.y < bottom + slack]
    if len(near) != 1:
        return None
    item = near[0]
    inside = left + slack <= item.x < right - slack and top + slack <= item.y < bottom - slack
    edge = (place % 3 == 0 and item.x < left + slack) or (place % 3 == 2 and item.x >= right - slack)
    edge_y = (place // 3 == 0 and item.y < top + slack) or (place // 3 == 2 and item.y >= bottom - slack)
    clear_x = left + slack <= item.x < right - slack or edge
    clear_y = top + slack <= item.y < bottom - slack or edge_y
    return item if inside or (clear_x and clear_y) else None


def candidates(kind: str, objects: Sequence[Thing], prints: Sequence[Print]) -> list[Candidate]:
    """Every clear question of a type, as its answer and the words that fill a template."""
    shapes = Counter(o.shape for o in objects)
    pairs = Counter((o.colour, o.shape) for o in objects)
    found: list[Candidate] = []
    if kind == "presence":
        found = [("yes", (c, s)) for c, s in pairs]
        colours = {o.colour for o in objects}
        near = [("no", (c, s)) for c in COLOURS for s in SHAPES if c in colours and s in shapes and (c, s) not in pairs]
        far = [("no", (c, s)) for c in COLOURS for s in SHAPES if (c in colours) != (s in shapes)]
        found += near * (1 + len(far) // max(len(near), 1)) + far
    elif kind == "colour":
        found = [(o.colour, (o.shape,)) for o in objects if shapes[o.shape] == 1]
    elif kind == "place":
        for place in range(9):
            item = _alone(objects, place)
            if isinstance(item, Thing):
                found.append((item.shape, (_where(place),)))
    elif kind == "count":
        found = [(str(shapes[s]), (s + ("es" if s == "cross" else "s"),)) for s in SHAPES if shapes[s] <= 4]
    elif kind == "relation":
        single = [o for o in objects if pairs[o.colour, o.shape] == 1]
        for a in single:
            for b in single:
                names = (a.colour, a.shape), (b.colour, b.shape)
                for gap, less, more in ((b.x - a.x, "left of", "right of"), (b.y - a.y, "above", "below")):
                    if abs(gap) >= MARGIN:
                        found.append(("yes" if gap > 0 else "no", (*names[0], less, *names[1])))
                        found.append(("no" if gap > 0 else "yes", (*names[0], more, *names[1])))
    elif kind in ("word", "number"):
        mine = [p for p in prints if p.kind == kind]
        if len(mine) == 1:
            found = [(mine[0].text, ("",))]
        for place in range(9):
            item = _alone(mine, place)
            if isinstance(item, Print):
                found.append((item.text, (" " + _where(place),)))
    elif kind == "smallest":
        order = sorted(objects, key=lambda o: o.size)
        if len(order) >= 2 and order[0].size * 10 <= order[1].size * 7:
            found = [(order[0].colour, ("colour",)), (order[0].colour, ("color",)), (order[0].shape, ("",))]
    return found


def phrase(kind: str, slots: Slots, rng: np.random.Generator) -> str:
    """One wording of a question."""
    if kind == "presence":
        slots = (("an " if slots[0][0] in "aeiou" else "a ") + slots[0], slots[1])
    template = _TEMPLATES[kind][rng.integers(len(_TEMPLATES[kind]))]
    if kind == "smallest" and slots == ("",):
        template = ("what is the smallest shape?", "which shape is the smallest?")[rng.integers(2)]
    return template.format(*slots)


def _draw(rng: np.random.Generator, kind: str, options: list[Candidate]) -> Question:
    answer, slots = options[rng.integers(len(options))]
    return Question(phrase(kind, slots, rng), answer, kind)


def ask(
    rng: np.random.Generator,
    objects: Sequence[Thing],
    prints: Sequence[Print],
    per_type: int,
    types: Sequence[str] = TYPES,
) -> tuple[Question, ...]:
    """Asks at most `per_type` different questions of each type; closed answers come out balanced over many scenes."""
    asked: dict[str, Question] = {}
    for kind in types:
        options = candidates(kind, objects, prints)
        if not options:
            continue
        answers = sorted({answer for answer, _ in options})
        weight = np.array([5 if kind == "count" and a in "234" else 1 for a in answers], np.float64)
        by_answer = {a: [o for o in options if o[0] == a] for a in answers}
        for pick in rng.choice(len(answers), size=per_type, p=weight / weight.sum()):
            if kind in ("presence", "relation", "count"):
                question = _draw(rng, kind, by_answer[answers[pick]])
            else:
                question = _draw(rng, kind, options)
            asked.setdefault(question.text, question)
    return tuple(asked.values())


def balanced(
    rng: np.random.Generator, objects: Sequence[Thing], prints: Sequence[Print], tally: Tally, n: int
) -> list[Question]:
    """Asks n questions of n types, those asked least so far, with the answers given least so far."""
    chosen: list[Question] = []
    order = sorted(TYPES, key=lambda kind: sum(tally.get(kind, {}).values()))
    for kind in order:
        options = candidates(kind, objects, prints)
        if not options or len(chosen) == n:
            continue
        seen = tally.setdefault(kind, {})
        least = min(seen.get(answer, 0) for answer, _ in options)
        question = _draw(rng, kind, [o for o in options if seen.get(o[0], 0) == least])
        seen[question.answer] = seen.get(question.answer, 0) + 1
        chosen.append(question)
    return chosen
