"""The world of demo-hd: deterministic, balanced, and its answers are true."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import numpy as np
import pytest
from transformers.image_processing_utils import select_best_resolution

from foveate.demo.hd.build import PINPOINTS
from foveate.demo.hd.paint import ground, paint
from foveate.demo.hd.questions import DOUBLE, SINGLE, TYPES, ask
from foveate.demo.hd.world import CROP, LOOK, PAIRS, SIZES, Item, contents, held_out, scene
from foveate.demo.world import COLOURS, SHAPES, TEST, WORDS, Question

SEEDS = range(40_000_000, 40_000_200)
HELD_OUT = "40acb2857c723303b3a5c97ebedc35120af135340b1582749bd9be316ea1eec8"

Asked = tuple[tuple[tuple[Item, ...], ...], Question]


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    """Many questions, each with what is in its pictures."""
    found: list[Asked] = []
    for seed in SEEDS:
        _, pictures = contents(seed)
        found += [(pictures, q) for q in ask(np.random.default_rng(seed), pictures, 12)]
    return found


def of_type(asked: list[Asked], kind: str) -> list[Asked]:
    """The questions of a type; there must be some."""
    chosen = [a for a in asked if a[1].type == kind]
    assert len(chosen) > 50
    return chosen


def pair_in(text: str) -> tuple[str, str]:
    """The colour and the shape that a question names."""
    match = re.search(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text)
    assert match
    return match[1], match[2]


def test_scene_is_a_function_of_its_seed() -> None:
    one, two, other = scene(12), scene(12), scene(13)
    assert [p.tobytes() for p in one.pictures] == [p.tobytes() for p in two.pictures]
    assert (one.items, one.questions) == (two.items, two.questions)
    assert one.pictures[0].tobytes() != other.pictures[0].tobytes()
    assert len(one.questions) == 4 and one.pictures[0].mode == "RGB"


def test_a_quarter_of_the_scenes_are_pairs_of_pictures_of_one_size() -> None:
    many = [contents(seed) for seed in SEEDS]
    pairs = [size for size, items in many if len(items) == 2]
    assert 30 < len(pairs) < 70 and set(pairs) == set(PAIRS)
    assert {size for size, items in many if len(items) == 1} == set(SIZES)
    seed = next(seed for seed in SEEDS if len(contents(seed)[1]) == 2)
    first, second = scene(seed).pictures
    assert first.size == second.size and first.tobytes() != second.tobytes()


def test_every_size_is_read_in_the_crops_that_the_world_says() -> None:
    for (width, height), (columns, rows) in (SIZES | PAIRS).items():
        assert select_best_resolution((height, width), PINPOINTS) == (rows * CROP, columns * CROP)


def test_nothing_overlaps_and_no_crop_cuts_a_small_thing() -> None:
    for seed in SEEDS:
        (width, height), pictures = contents(seed)
        columns, rows = (SIZES | PAIRS)[width, height]
        for items in pictures:
            for i, a in enumerate(items):
                left, top, right, bottom = a.box
                assert left >= 0 and top >= 0 and right <= width and bottom <= height
                for other in (o.box for o in items[:i]):
                    assert left >= other[2] or other[0] >= right or top >= other[3] or other[1] >= bottom
                if a.kind != "shape" or a.size <= LOOK.small[1]:
                    assert left * columns // width == (right - 1) * columns // width
                    assert top * rows // height == (bottom - 1) * rows // height


def test_printed_text_stays_in_its_box() -> None:
    """The boxes are made without font metrics; the sign must fit them."""
    base = ground(np.random.default_rng(0), (400, 200))
    for text in (*WORDS, "42", "88"):
        item = Item("word", text, "red", LOOK.font[1], 200, 100)
        ys, xs = np.nonzero(paint(np.random.default_rng(0), base, [item])[1])
        left, top, right, bottom = item.box
        assert left - 4 <= xs.min() and xs.max() <= right + 4 and top - 4 <= ys.min() and ys.max() <= bottom + 4


def test_a_faint_shape_is_seen_but_stands_out_less_than_any_other() -> None:
    base = ground(np.random.default_rng(0), (200, 100))

    def contrast(item: Item) -> float:
        image, owner = paint(np.random.default_rng(1), base, [item])
        plain, _ = paint(np.random.default_rng(1), base, [])
        return float(np.abs(image.astype(int) - plain)[owner == 1].mean())

    faint = contrast(Item("faint", "square", "", 40, 60, 50))
    assert 15 < faint < 80
    assert all(contrast(Item("shape", "square", c, 40, 60, 50)) > faint / 2 for c in COLOURS)


def test_presence(asked: list[Asked]) -> None:
    for (items,), q in of_type(asked, "presence"):
        colour, shape = pair_in(q.text)
        there = any(i.kind == "shape" and (i.colour, i.name) == (colour, shape) for i in items)
        assert q.answer == ("yes" if there else "no")
        assert not any(i.kind == "faint" and i.name == shape for i in items)


def test_colour(asked: list[Asked]) -> None:
    for (items,), q in of_type(asked, "colour"):
        shape = q.text.rstrip("?").split()[-1]
        (item,) = [i for i in items if i.name == shape]
        assert item.colour == q.answer and item.size <= LOOK.small[1]


def test_faint(asked: list[Asked]) -> None:
    for (items,), q in of_type(asked, "faint"):
        assert [i.name for i in items if i.kind == "faint"] == [q.answer]
        assert [i.kind for i in items if i.name == q.answer] == ["faint"]


@pytest.mark.parametrize("kind", ["word", "number"])
def test_reading(asked: list[Asked], kind: str) -> None:
    for (items,), q in of_type(asked, kind):
        colour = next(c for c in COLOURS if f"{c} sign" in q.text)
        assert [(i.kind, i.name) for i in items if i.colour == colour and i.kind in ("word", "number")] == [
            (kind, q.answer)
        ]


def test_sign(asked: list[Asked]) -> None:
    for (items,), q in of_type(asked, "sign"):
        word = q.text.rstrip("?").split()[-1]
        assert [i.colour for i in items if i.kind == "word" and i.name == word] == [q.answer]


def test_which(asked: list[Asked]) -> None:
    for pictures, q in of_type(asked, "which"):
        if "word" in q.text:
            word = q.text.rstrip("?").split()[-1]
            there = [any(i.name == word for i in items) for items in pictures]
        else:
            pair = pair_in(q.text)
            there = [any(i.kind == "shape" and (i.colour, i.name) == pair for i in items) for items in pictures]
        assert there == [q.answer == "first", q.answer == "second"]


def test_differs(asked: list[Asked]) -> None:
    for (first, second), q in of_type(asked, "differs"):
        before = {i.name for i in first}
        (new,) = [i for i in second if i.kind == "shape" and i.name not in before]
        assert q.answer == (new.colour if "colour" in q.text else new.name)


def test_questions_are_lower_case_with_one_word_as_answer(asked: list[Asked]) -> None:
    assert all(q.text == q.text.lower() and q.answer == q.answer.lower() and " " not in q.answer for _, q in asked)
    assert {q.type for _, q in asked} == set(TYPES)


def test_held_out_set_is_the_pinned_one_and_balanced() -> None:
    chosen = held_out()
    text = "\n".join(f"{seed}|{q.type}|{q.text}|{q.answer}" for seed, q in chosen)
    assert hashlib.sha256(text.encode()).hexdigest() == HELD_OUT
    assert held_out(200) == chosen[:200] and len(chosen) == 2000
    assert all(Counter(seed for seed, _ in chosen)[seed] == 4 and seed in TEST for seed, _ in chosen[::40])
    types = Counter(q.type for _, q in chosen)
    assert max(types.values()) - min(types.values()) <= 20 and set(types) == {*SINGLE, *DOUBLE}
    for kind, two in (("presence", ("yes", "no")), ("which", ("first", "second"))):
        answers = Counter(q.answer for _, q in chosen if q.type == kind)
        assert abs(answers[two[0]] - answers[two[1]]) <= 2 and len(answers) == 2
    for kind, number in (("colour", 8), ("sign", 8), ("faint", 8), ("word", 48)):
        answers = Counter(q.answer for _, q in chosen if q.type == kind)
        assert len(answers) == number and max(answers.values()) <= 2 * types[kind] / number
