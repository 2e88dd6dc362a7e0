"""The world of the demo model: deterministic, and its answers are true."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from foveate.demo import world
from foveate.demo.paint import paint
from foveate.demo.questions import MARGIN, TYPES, ask
from foveate.demo.world import COLOURS, PLACES, SHAPES, SIDE, WORDS, Print, Question, Thing, held_out, layout, scene

SEEDS = range(40_000_000, 40_000_150)
HELD_OUT = "0663dba3fba151dff5a3299e330a1ad79f657424bccfa45dbd97617715d59ba6"

Asked = tuple[tuple[Thing, ...], tuple[Print, ...], Question]


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    """Many questions, each with the layout it is about."""
    found: list[Asked] = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        objects, prints = layout(rng)
        found += [(objects, prints, q) for q in ask(rng, objects, prints, 3)]
    return found


def of_type(asked: list[Asked], kind: str) -> list[Asked]:
    """The questions of a type; there must be some."""
    chosen = [a for a in asked if a[2].type == kind]
    assert len(chosen) > 50
    return chosen


def test_scene_is_a_function_of_its_seed() -> None:
    one, two, other = scene(12), scene(12), scene(13)
    assert one.image.size == (SIDE, SIDE) and one.image.mode == "RGB"
    assert one.image.tobytes() == two.image.tobytes() != other.image.tobytes()
    assert (one.objects, one.prints, one.questions) == (two.objects, two.prints, two.questions)


def test_nothing_overlaps_and_all_is_inside() -> None:
    for seed in SEEDS:
        objects, prints = layout(np.random.default_rng(seed))
        boxes = [item.box for item in (*objects, *prints)]
        for i, a in enumerate(boxes):
            assert a[0] >= 0 and a[1] >= 0 and a[2] <= SIDE and a[3] <= SIDE
            for b in boxes[:i]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_sizes_and_texts_are_those_of_the_card() -> None:
    for seed in SEEDS:
        objects, prints = layout(np.random.default_rng(seed))
        assert 1 <= len(objects) <= 7 and len(prints) <= 4
        assert all(14 <= o.size <= 90 and o.shape in SHAPES and o.colour in COLOURS for o in objects)
        assert all(p.text in WORDS if p.kind == "word" else 10 <= int(p.text) <= 99 for p in prints)


def test_printed_text_stays_in_its_box() -> None:
    """The boxes are made without font metrics; the ink must fit them."""
    for text in WORDS:
        item = Print(text, "word", 40, SIDE // 2, SIDE // 2)
        _, owner = paint(np.random.default_rng(0), [], [item])
        ys, xs = np.nonzero(owner)
        left, top, right, bottom = item.box
        assert left - 8 <= xs.min() and xs.max() <= right + 8 and top - 4 <= ys.min() and ys.max() <= bottom + 4


def test_every_shape_is_painted_where_it_should_be() -> None:
    for shape in SHAPES:
        for size in world.SIZES:
            _, owner = paint(np.random.default_rng(0), [Thing(shape, "red", size, 100, 200)], [])
            ys, xs = np.nonzero(owner)
            assert abs((xs.min() + xs.max()) / 2 - 100) <= 2 + size / 8
            assert abs((ys.min() + ys.max()) / 2 - 200) <= 2 + size / 8
            assert 0.75 * size <= max(np.ptp(xs), np.ptp(ys)) + 1 <= 1.3 * size + 2


def test_presence(asked: list[Asked]) -> None:
    for objects, _, q in of_type(asked, "presence"):
        match = re.search(r"(?:there|see|is) an? (\w+) (\w+)", q.text)
        assert match
        assert q.answer == ("yes" if any((o.colour, o.shape) == match.groups() for o in objects) else "no")


def test_colour(asked: list[Asked]) -> None:
    for objects, _, q in of_type(asked, "colour"):
        shape = q.text.rstrip("?").split()[-1]
        assert [o.colour for o in objects if o.shape == shape] == [q.answer]


def find_place(text: str) -> tuple[int, int]:
    """Row and column of the ninth that a question names."""
    place = next(p for p in sorted(PLACES, key=len, reverse=True) if p in text)
    return divmod(PLACES.index(place), 3)


def test_place(asked: list[Asked]) -> None:
    for objects, _, q in of_type(asked, "place"):
        row, column = find_place(q.text)
        inside = [o for o in objects if (o.y // 112, o.x // 112) == (row, column)]
        assert [o.shape for o in inside] == [q.answer]


def test_count(asked: list[Asked]) -> None:
    for objects, _, q in of_type(asked, "count"):
        shape = next(s for s in SHAPES if s in q.text.split()[2])
        assert str(sum(o.shape == shape for o in objects)) == q.answer


def test_relation(asked: list[Asked]) -> None:
    for objects, _, q in of_type(asked, "relation"):
        match = re.fullmatch(r"is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+)\?", q.text)
        assert match
        (a,) = [o for o in objects if (o.colour, o.shape) == (match[1], match[2])]
        (b,) = [o for o in objects if (o.colour, o.shape) == (match[4], match[5])]
        gap = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[match[3]]
        assert abs(gap) >= MARGIN and q.answer == ("yes" if gap > 0 else "no")


@pytest.mark.parametrize("kind", ["word", "number"])
def test_reading(asked: list[Asked], kind: str) -> None:
    for _, prints, q in of_type(asked, kind):
        mine = [p for p in prints if p.kind == kind]
        if any(place in q.text for place in PLACES):
            row, column = find_place(q.text)
            mine = [p for p in mine if (p.y // 112, p.x // 112) == (row, column)]
        assert [p.text for p in mine] == [q.answer]


def test_smallest(asked: list[Asked]) -> None:
    for objects, _, q in of_type(asked, "smallest"):
        first, second = sorted(objects, key=lambda o: o.size)[:2]
        assert first.size <= 0.7 * second.size
        assert q.answer == (first.colour if "colo" in q.text else first.shape)


def test_questions_of_a_scene_are_different_and_lower_case(asked: list[Asked]) -> None:
    assert all(q.text == q.text.lower() and q.answer == q.answer.lower() and " " not in q.answer for *_, q in asked)
    texts = [q.text for q in scene(5).questions]
    assert len(set(texts)) == len(texts) >= 6
    assert {q.type for *_, q in asked} == set(TYPES)


def test_seeds_for_training_validation_and_test_are_disjoint() -> None:
    parts = [world.TRAIN, world.VALIDATION, world.TEST]
    for i, a in enumerate(parts):
        for b in parts[:i]:
            assert a.stop <= b.start or b.stop <= a.start


def test_held_out_set_is_fixed_and_balanced() -> None:
    pairs = held_out()
    assert len(pairs) == 2000 and {seed for seed, _ in pairs} == set(world.TEST[:500])
    kinds = Counter(q.type for _, q in pairs)
    assert set(kinds) == set(TYPES) and min(kinds.values()) >= 240
    for kind in ("presence", "relation"):
        answers = Counter(q.answer for _, q in pairs if q.type == kind)
        assert abs(answers["yes"] - answers["no"]) <= 2
    counts = Counter(q.answer for _, q in pairs if q.type == "count")
    assert set(counts) == set("01234") and max(counts.values()) <= 1.2 * min(counts.values())
    text = "\n".join(f"{seed}|{q.type}|{q.text}|{q.answer}" for seed, q in pairs)
    assert hashlib.sha256(text.encode()).hexdigest() == HELD_OUT
    assert held_out(100) == pairs[:100]
