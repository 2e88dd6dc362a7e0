"""The world of the video model: deterministic, and its answers are true."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from foveate.demo.paint import RGB
from foveate.demo.video.paint import film
from foveate.demo.video.questions import TYPES, ask
from foveate.demo.video.world import LENGTHS, SIDE, SIZES, Life, clip, held_out, layout
from foveate.demo.world import COLOURS, SHAPES, Question

SEEDS = range(40_000_000, 40_000_250)
HELD_OUT = "bede01057f49b5ba3fa123da4c177550b7062ad511b92ed46f26cc2e032282b5"

Moment = dict[str, tuple[str, int, int]]
"""What one frame shows: shape -> colour, column and row of its middle."""


def moments(frames: int, lives: tuple[Life, ...]) -> list[Moment]:
    """Every frame of a clip, written down."""
    return [{o.shape: (o.tint(f), *o.centre(f)) for o in lives if o.there(f)} for f in range(frames)]


def answer(question: Question, seen: list[Moment]) -> str:
    """The answer to a question, from what the frames show alone."""
    words = question.text.rstrip("?").replace(",", "").split()
    named = [w for w in words if w in SHAPES]
    first, last = seen[0], seen[-1]
    begins = {s: min(f for f, m in enumerate(seen) if s in m) for s in {s for m in seen for s in m}}
    new = [s for s, f in begins.items() if f]
    match question.type:
        case "start" | "end":
            return (first if words[-1] == "start" else last)[named[0]][0]
        case "appears":
            (only,) = new
            return only
        case "vanishes":
            (only,) = set(first) - set(last)
            return only
        case "moves":
            (only,) = [s for s in first if s in last and first[s][1:] != last[s][1:]]
            return only
        case "changes":
            (only,) = [s for s in first if s in last and first[s][0] != last[s][0]]
            return only
        case "direction":
            dx, dy = (last[named[0]][i] - first[named[0]][i] for i in (1, 2))
            return ("left" if dx < 0 else "right") if dx else "up" if dy < 0 else "down"
        case "order":
            assert all(s in new for s in named)
            return min(named, key=lambda s: begins[s])
        case "count":
            return str(len(new))
        case _:
            colour = next(w for w in words if w in COLOURS)
            frame = first if words[-1] == "start" else last
            return "yes" if frame.get(named[0], ("",))[0] == colour else "no"


def test_clip_is_a_function_of_its_seed() -> None:
    one, two, other = clip(12), clip(12), clip(13)
    assert len(one.frames) in LENGTHS and {(f.size, f.mode) for f in one.frames} == {((SIDE, SIDE), "RGB")}
    assert [f.tobytes() for f in one.frames] == [f.tobytes() for f in two.frames]
    assert one.frames[0].tobytes() not in {one.frames[1].tobytes(), other.frames[0].tobytes()}
    assert (one.lives, one.questions) == (two.lives, two.questions)


def test_every_answer_is_what_the_frames_show() -> None:
    kinds = Counter[str]()
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        frames, lives = layout(rng)
        for question in ask(rng, frames, lives, 3):
            assert answer(question, moments(frames, lives)) == question.answer, question
            kinds[question.type] += 1
    assert set(kinds) == set(TYPES) and min(kinds.values()) > 50


def test_what_happens_is_clear() -> None:
    for seed in SEEDS:
        frames, lives = layout(np.random.default_rng(seed))
        seen = moments(frames, lives)
        assert 1 <= len(lives) <= 5 and len({o.shape for o in lives}) == len(lives)
        assert all(o.size in SIZES for o in lives)
        starts = [o.at for o in lives if o.event != "stays"]
        assert len(set(starts)) == len(starts) and all(2 <= at <= frames - 2 for at in starts)
        assert seen[0] == seen[1] and seen[-2] == seen[-1]
        for life in lives:
            if life.event == "moves":
                x, y = life.centre(frames - 1)
                assert 42 <= abs(x - life.x) + abs(y - life.y) <= 84 and 0 in (x - life.x, y - life.y)
        for frame in range(frames):
            boxes = [(*o.centre(frame), (o.size + 1) // 2) for o in lives]
            for i, (x, y, half) in enumerate(boxes):
                assert half <= x <= SIDE - half and half <= y <= SIDE - half
                for p, q, other in boxes[:i]:
                    assert max(abs(x - p), abs(y - q)) >= half + other


def test_frames_show_shapes_in_their_colours_on_a_still_background() -> None:
    frames, lives = layout(np.random.default_rng(3), 8, (5, 5))
    pictures, owners = film(np.random.default_rng(4), frames, lives)
    for frame, seen in enumerate(moments(frames, lives)):
        for i, life in enumerate(lives, 1):
            mine = owners[frame] == i
            assert mine.any() == (life.shape in seen)
            if mine.any():
                ys, xs = np.nonzero(mine)
                assert abs((xs.min() + xs.max()) / 2 - life.centre(frame)[0]) < life.size / 6 + 2
                assert abs((ys.min() + ys.max()) / 2 - life.centre(frame)[1]) < life.size / 6 + 2
                mean = pictures[frame][mine].mean(0)
                near = min(COLOURS, key=lambda c: float(np.abs(mean - RGB[c]).sum()))
                assert near == life.tint(frame)
    bare = (owners == 0).all(0)
    spread = np.ptp(pictures[:, bare].astype(int), axis=0)
    assert (spread > 22).mean() < 0.03  # the soft edges of shapes that come and go
    assert (pictures[0][bare] != pictures[1][bare]).any()


def test_held_out_set_is_fixed_and_balanced() -> None:
    chosen = held_out()
    assert len(chosen) == 2000 and chosen[:400] == held_out(400)
    text = "\n".join(f"{seed}\t{q.type}\t{q.text}\t{q.answer}" for seed, q in chosen)
    assert hashlib.sha256(text.encode()).hexdigest() == HELD_OUT
    assert set(Counter(seed for seed, _ in chosen).values()) == {4}
    kinds = Counter(q.type for _, q in chosen)
    assert set(kinds) == set(TYPES) and min(kinds.values()) >= 170
    for kind, share in (("there", 0.51), ("direction", 0.27), ("start", 0.14), ("end", 0.14), ("appears", 0.16)):
        answers = Counter(q.answer for _, q in chosen if q.type == kind)
        assert max(answers.values()) <= share * kinds[kind]


@pytest.mark.parametrize("frames", LENGTHS)
def test_a_length_can_be_chosen(frames: int) -> None:
    assert layout(np.random.default_rng(0), frames)[0] == frames
