"""Training data: clips with labels for every visual token, and questions packed behind one clip."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from foveate.demo.data import IGNORE
from foveate.demo.video.paint import film
from foveate.demo.video.questions import TYPES, ask
from foveate.demo.video.world import CELL, GRID, WAYS, Life, layout
from foveate.demo.world import COLOURS, SHAPES, Question

CELLS = GRID * GRID
"""Visual tokens of a frame."""
LABELS = {
    "kind": 1 + len(SHAPES), "colour": len(COLOURS), "state": 3 + len(WAYS), "former": len(COLOURS),
    "gone": 1 + len(SHAPES), "rank": 3, "first": 2,
}  # fmt: skip
"""Name and number of classes of each label of a visual token.

state: nothing yet, appeared, moved left, right, up, down, changed colour; former: the colour it had before;
gone: nothing, or what was here and has vanished; rank: how many appeared before it; first: not the first frame, or it.
"""
CLEAR = 14
"""Least way in px that tells where a shape moves."""

Labels = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Mix:
    """What a training sample is made of.

    Args:
        lengths: Frames of a clip; one length for each batch.
        count: Fewest and most shapes.
        per_type: Questions drawn of each type.
        types: The types to draw, with repetition for more of one.
    """

    lengths: tuple[int, ...]
    count: tuple[int, int]
    per_type: int = 1
    types: tuple[str, ...] = TYPES


def covers(owners: NDArray[np.uint8], lives: Sequence[Life]) -> NDArray[np.int64]:
    """What each visual token shows: 0 nothing, 1 + i the i-th of lives, -1 too little to tell (frames, cells)."""
    frames, classes = len(owners), 1 + len(lives)
    tiles = owners.reshape(frames, GRID, CELL, GRID, CELL).transpose(0, 1, 3, 2, 4).reshape(frames * CELLS, -1)
    index = np.arange(frames * CELLS)[:, None] * classes + tiles
    share = np.bincount(index.ravel(), minlength=frames * CELLS * classes).reshape(frames, CELLS, classes) / CELL**2
    best = np.zeros((frames, CELLS), np.int64)
    if classes > 1:
        most = share[..., 1:].max(-1)
        best = np.where(most >= 0.1, share[..., 1:].argmax(-1) + 1, np.where(most > 0.02, -1, 0))
        for i in range(1, classes):
            frame = np.nonzero(share[..., i].max(1))[0]
            best[frame, share[frame, :, i].argmax(1)] = i
    return best


def label(best: NDArray[np.int64], lives: Sequence[Life]) -> Labels:
    """Says for every visual token what it shows and what has happened to that by its frame, as one flat array each."""
    frames = len(best)
    labels = {name: np.full((frames, CELLS), IGNORE, np.int64) for name in LABELS}
    labels["kind"][best == 0] = labels["gone"][best == 0] = 0
    labels["first"][:] = 0
    labels["first"][0] = 1
    order = sorted(o.at for o in lives if o.event == "appears")
    for i, life in enumerate(lives, 1):
        kind = SHAPES.index(life.shape)
        mine = best == i
        labels["kind"][mine], labels["state"][mine] = 1 + kind, 0
        if life.event == "appears":
            labels["state"][mine], labels["rank"][mine] = 1, order.index(life.at)
        for frame in range(frames):
            here = mine[frame]
            labels["colour"][frame, here] = COLOURS.index(life.tint(frame))
            if life.event == "moves" and life.moved(frame):
                way = 2 + tuple(WAYS).index(life.way)
                labels["state"][frame, here] = way if life.moved(frame) >= CLEAR else IGNORE
            if life.event == "changes" and frame >= life.at:
                labels["state"][frame, here], labels["former"][frame, here] = 6, COLOURS.index(life.colour)
        if life.event == "vanishes":
            left = mine[life.at - 1] & (best[life.at :] == 0)
            labels["gone"][life.at :][left] = 1 + kind
            labels["gone"][life.at][left[0]] = IGNORE  # it may have moved
    return {name: values.reshape(-1) for name, values in labels.items()}


def goal(question: Question, best: NDArray[np.int64], lives: Sequence[Life], labels: Labels) -> NDArray[np.bool_]:
    """The visual tokens that hold the answer to a question, flat."""
    shape = labels["kind"] - 1
    named = [SHAPES.index(w) for w in re.findall("[a-z]+", question.text) if w in SHAPES]
    frames = np.arange(len(best)).repeat(CELLS)
    one = SHAPES.index(question.answer) if question.answer in SHAPES else named[0] if named else IGNORE
    mine, gone, done = shape == one, labels["gone"] == 1 + one, labels["state"] > 0
    found: NDArray[np.bool_]
    match question.type:
        case "start" | "end":
            found = mine & (labels["colour"] == COLOURS.index(question.answer))
        case "appears" | "order" | "moves" | "changes" | "direction":
            found = mine & done
        case "vanishes":
            found = gone
        case "count":
            found = labels["rank"] == int(question.answer) - 1
        case _:
            late = "end" in question.text
            changes = [o.at for o in lives if SHAPES.index(o.shape) == one and o.event == "changes"]
            if changes:
                mine &= (frames >= changes[0]) == late
            found = gone if late and gone.any() else mine
    return found


def sample(rng: np.random.Generator, mix: Mix, frames: int) -> dict[str, Any]:
    """A new clip with labels and questions."""
    frames, lives = layout(rng, frames, mix.count)
    return describe(frames, lives, rng, ask(rng, frames, lives, mix.per_type, mix.types))


def describe(
    frames: int, lives: tuple[Life, ...], rng: np.random.Generator, questions: Sequence[Question]
) -> dict[str, Any]:
    """Paints a clip and labels it."""
    pictures, owners = film(rng, frames, lives)
    best = covers(owners, lives)
    labels = label(best, lives)
    asked = [questions[i] for i in np.random.default_rng(len(questions)).permutation(len(questions))]
    goals = [goal(q, best, lives, labels) for q in asked]
    return {"pixels": pictures, "questions": asked, "goals": goals} | labels


class Stream(IterableDataset[dict[str, Any]]):
    """Batches without end, each sample new.

    Args:
        mix: What a sample is made of.
        batch: Samples per batch of clips of twelve frames; fewer longer ones, more shorter ones.
        seed: The stream is a function of it.
        tokens: The tokenizer.
    """

    def __init__(self, mix: Mix, batch: int, seed: int, tokens: Any) -> None:
        self.mix, self.batch, self.seed, self.tokens = mix, batch, seed, tokens

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, 78, info.id if info else 0])
        while True:
            frames = self.mix.lengths[rng.integers(len(self.mix.lengths))]
            yield collate(
                [sample(rng, self.mix, frames) for _ in range(max(1, self.batch * 12 // frames))], self.tokens
            )


def collate(samples: Sequence[dict[str, Any]], tokens: Any) -> dict[str, Any]:
    """Stacks samples of one length and packs their questions."""
    listed = ("questions", "goals")
    out = {k: torch.from_numpy(np.stack([s[k] for s in samples])) for k in samples[0] if k not in listed}
    return out | pack([s["questions"] for s in samples], [s["goals"] for s in samples], tokens)


def pack(
    questions: Sequence[Sequence[Question]], goals: Sequence[Sequence[NDArray[np.bool_]]], tokens: Any
) -> dict[str, Any]:
    """Puts the questions of each clip in one row, each a segment of its own.

    Returns:
        ids, segment (0 is padding, questions count from 1), step (place in the segment), target (the next token where
        an answer is to be learned), type (its number), hint (at the question mark, the answer, as a middle layer
        should know it) and look (1 from the question mark on, where a layer should look at the goal), all of shape
        (clips, longest row); and goal (clips, most questions + 1, visual tokens), the first of each clip empty.
    """
    mark = tokens("?", add_special_tokens=False).input_ids[0]
    rows: list[list[tuple[int, ...]]] = []
    for asked in questions:
        row: list[tuple[int, ...]] = []
        stems = tokens([f"\n{q.text} ASSISTANT:" for q in asked], add_special_tokens=False).input_ids
        answers = tokens([f" {q.answer}" for q in asked], add_special_tokens=False).input_ids
        for k, (question, stem, answer) in enumerate(zip(asked, stems, answers, strict=True), 1):
            end = stem.index(mark)
            for j, token in enumerate([*stem, *answer]):
                later = j - len(stem) + 1
                target = IGNORE if later < 0 else [*answer, tokens.eos_token_id][later]
                hint = answer[-1] if j == end else IGNORE
                row.append((token, k, j, target, TYPES.index(question.type), hint, int(end <= j < len(stem))))
        rows.append(row)
    width = max(len(row) for row in rows)
    filled = [row + [(tokens.pad_token_id, 0, 0, IGNORE, 0, IGNORE, 0)] * (width - len(row)) for row in rows]
    array = torch.tensor(filled, dtype=torch.long)
    most = max(len(g) for g in goals)
    table = torch.zeros(len(goals), most + 1, len(goals[0][0]), dtype=torch.bool)
    for i, mine in enumerate(goals):
        table[i, 1 : len(mine) + 1] = torch.from_numpy(np.stack(mine))
    names = ["ids", "segment", "step", "target", "type", "hint", "look"]
    return {name: array[..., i] for i, name in enumerate(names)} | {"goal": table}
