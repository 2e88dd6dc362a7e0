"""Questions about one picture or two, answered from what is in them; each is found by looking up one thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from foveate.demo.hd.world import Item
from foveate.demo.world import COLOURS, SHAPES, Question

SINGLE = ("presence", "colour", "faint", "word", "number", "sign")
"""Types asked about one picture."""
DOUBLE = ("which", "differs")
"""Types asked about two."""
TYPES = SINGLE + DOUBLE

Slots = tuple[str, ...]
Candidate = tuple[str, Slots]
Tally = dict[str, dict[str, int]]

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "presence": ("is there {0}?", "can you see {0}?", "is {0} in the picture?"),
    "colour": ("what colour is the {0}?", "what color is the {0}?", "which colour is the {0}?"),
    "faint": ("what is the faint shape?", "which shape is faint?", "what shape is faint?"),
    "word": ("what word is on the {0} sign?", "which word is on the {0} sign?", "what does the {0} sign say?"),
    "number": ("what number is on the {0} sign?", "which number is on the {0} sign?"),
    "sign": ("what colour is the sign with the word {0}?", "which colour is the sign with the word {0}?"),
    "which": ("which picture has {0}?",),
    "differs": ("{0} only in the second picture?",),
}


def _a(colour: str, shape: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def _pairs(items: Sequence[Item]) -> Counter[tuple[str, str]]:
    return Counter((i.colour, i.name) for i in items if i.kind == "shape")


def candidates(kind: str, pictures: Sequence[Sequence[Item]]) -> list[Candidate]:
    """Every clear question of a type, as its answer and the words that fill a template."""
    items = pictures[0]
    found: list[Candidate] = []
    if (kind in DOUBLE) != (len(pictures) == 2):
        return found
    if kind == "presence":
        pairs = _pairs(items)
        colours, shapes = {c for c, _ in pairs}, {s for _, s in pairs}
        faint = {i.name for i in items if i.kind == "faint"}
        found = [
            ("yes", (_a(i.colour, i.name),)) for i in items if i.kind == "shape" for _ in range(1 if i.size > 60 else 3)
        ]
        absent = [(c, s) for c in COLOURS for s in SHAPES if s not in faint and (c, s) not in pairs]
        near = [("no", (_a(c, s),)) for c, s in absent if c in colours and s in shapes]
        far = [("no", (_a(c, s),)) for c, s in absent if (c in colours) != (s in shapes)]
        found += near * (1 + len(far) // max(len(near), 1)) + far
    elif kind == "colour":
        shapes_of = Counter(i.name for i in items if i.kind in ("shape", "faint"))
        found = [(i.colour, (i.name,)) for i in items if i.kind == "shape" and shapes_of[i.name] == 1 and i.size <= 60]
    elif kind == "faint":
        found = [(i.name, ()) for i in items if i.kind == "faint"]
    elif kind in ("word", "number"):
        found = [(i.name, (i.colour,)) for i in items if i.kind == kind]
    elif kind == "sign":
        found = [(i.colour, (i.name,)) for i in items if i.kind == "word"]
    elif kind == "which":
        for answer, mine, other in (("first", items, pictures[1]), ("second", pictures[1], items)):
            found += [(answer, (_a(*pair),)) for pair in _pairs(mine) if pair not in _pairs(other)]
            words = {i.name for i in mine if i.kind == "word"} - {i.name for i in other}
            found += [(answer, (f"the word {word}",)) for word in sorted(words)]
    else:
        known = {i.name for i in items}
        for new in (i for i in pictures[1] if i.kind == "shape" and i.name not in known):
            found += [(new.name, (f"{word} shape is",)) for word in ("what", "which")]
            found += [(new.colour, (f"{word} colour is the shape",)) for word in ("what", "which")]
    return found


def _draw(rng: np.random.Generator, kind: str, options: Sequence[Candidate]) -> Question:
    answer, slots = options[int(rng.integers(len(options)))]
    templates = _TEMPLATES[kind]
    return Question(templates[rng.integers(len(templates))].format(*slots), answer, kind)


def ask(
    rng: np.random.Generator, pictures: Sequence[Sequence[Item]], n: int, types: Sequence[str] = TYPES
) -> tuple[Question, ...]:
    """Asks at most n different questions, of one type after the other; the answers to closed ones come out balanced."""
    fitting = [kind for kind in types if candidates(kind, pictures)]
    order = [fitting[i] for i in rng.permutation(len(fitting))]
    asked: dict[str, Question] = {}
    for turn in range(4 * n):
        kind = order[turn % len(order)]
        options = candidates(kind, pictures)
        if kind in ("presence", "which"):
            answers = sorted({answer for answer, _ in options})
            pick = answers[rng.integers(len(answers))]
            options = [o for o in options if o[0] == pick]
        question = _draw(rng, kind, options)
        asked.setdefault(question.text, question)
        if len(asked) == n:
            break
    return tuple(asked.values())


def balanced(rng: np.random.Generator, pictures: Sequence[Sequence[Item]], tally: Tally, n: int) -> list[Question]:
    """Asks n different questions of the types asked least so far, with the answers given least so far."""
    chosen: dict[str, Question] = {}
    options = {kind: found for kind in TYPES if (found := candidates(kind, pictures))}
    for _ in range(4 * n):
        kind = min(options, key=lambda k: sum(tally.get(k, {}).values()))
        seen = tally.setdefault(kind, {})
        least = min(seen.get(answer, 0) for answer, _ in options[kind])
        question = _draw(rng, kind, [o for o in options[kind] if seen.get(o[0], 0) == least])
        if question.text in chosen:
            continue
        seen[question.answer] = seen.get(question.answer, 0) + 1
        chosen[question.text] = question
        if len(chosen) == n:
            break
    return list(chosen.values())
