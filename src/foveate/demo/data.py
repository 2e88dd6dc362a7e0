"""Training data: windows of the canvas with a label for every patch, and questions packed behind one image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from foveate.demo.paint import _font, paint
from foveate.demo.questions import TYPES, ask, place_of
from foveate.demo.world import (
    COLOURS,
    GRID,
    PATCH,
    PLACES,
    SHAPES,
    SIZES,
    WORDS,
    Area,
    Print,
    Question,
    Thing,
    layout,
    patches_of,
)  # fmt: skip

IGNORE = -100
KINDS = 1 + len(SHAPES) + 2
"""Nothing, the shapes, a word, a number."""
SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"
LABELS = {
    "kind": KINDS, "colour": len(COLOURS), "size": len(SIZES), "word": len(WORDS), "tens": 10, "ones": 10,
    "sign": len(SIGNS), "row": GRID, "column": GRID, "smallest": 2, "ninth": len(PLACES),
}  # fmt: skip
"""Name and number of classes of each label of a patch; ninth: where on the canvas the middle of its item lies."""
MARKS = {"pairs": len(SHAPES) * len(COLOURS), "words": len(WORDS), "counts": len(SHAPES) * 5}
"""Name and width of each label of a whole picture."""

Labels = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Mix:
    """What a training sample is made of.

    Args:
        rows: Side of the square window in patches; 24 is the whole canvas.
        count: Fewest and most shapes.
        prints: Most words and most numbers.
        largest: Largest shape in px.
        per_type: Questions drawn of each type; none when zero.
        types: The types to draw, with repetition for more of one.
    """

    rows: int
    count: tuple[int, int]
    prints: tuple[int, int]
    largest: int = 90
    per_type: int = 0
    types: tuple[str, ...] = TYPES


def label(objects: Sequence[Thing], prints: Sequence[Print], owner: NDArray[np.uint8], area: Area) -> Labels:
    """Says what is in every patch.

    Args:
        objects: The shapes.
        prints: The printed texts.
        owner: The pixel map that `paint` returned.
        area: The painted part of the canvas.

    Returns:
        For each name in `LABELS` a flat array over patches; "item", the item of a patch from 1, 0 nothing, -1 unclear;
        "cover", the share of a patch that its item covers; "mass", the share of its item that a patch shows; "offset",
        px from a patch to the centre of its item.
    """
    share = patches_of(owner, 1 + len(objects) + len(prints)) / (PATCH * PATCH)
    rows, columns = share.shape[:2]
    best = np.zeros((rows, columns), np.int64)
    if share.shape[2] > 1:
        top = share[..., 1:].argmax(-1)
        most = np.take_along_axis(share[..., 1:], top[..., None], -1)[..., 0]
        best = np.where(most >= 0.12, top + 1, np.where(most > 0.02, -1, 0))
    items: list[Thing | Print] = [*objects, *prints]
    for i, thing in enumerate(objects, 1):
        if thing.box[2] - thing.box[0] < 3 * PATCH:
            best[(thing.y - area[1]) // PATCH, (thing.x - area[0]) // PATCH] = i
    table = {name: np.full(len(items) + 2, IGNORE, np.int64) for name in LABELS}
    table["kind"][1] = 0
    least = min((o.size for o in objects), default=0)
    for i, item in enumerate(items, 2):
        table["ninth"][i] = place_of(item.x, item.y)
        if isinstance(item, Thing):
            table["kind"][i] = 1 + SHAPES.index(item.shape)
            table["colour"][i] = COLOURS.index(item.colour)
            table["size"][i] = SIZES.index(item.size)
            table["smallest"][i] = int(item.size == least)
        elif item.kind == "word":
            table["kind"][i] = 1 + len(SHAPES)
            table["word"][i] = WORDS.index(item.text)
        else:
            table["kind"][i] = 2 + len(SHAPES)
            table["tens"][i], table["ones"][i] = int(item.text[0]), int(item.text[1])
    labels = {name: values[best + 1] for name, values in table.items()}
    y, x = np.mgrid[0:rows, 0:columns]
    labels["row"], labels["column"] = y + area[1] // PATCH, x + area[0] // PATCH
    labels["item"] = best
    labels["sign"] = np.full((rows, columns), IGNORE, np.int64)
    for i, text in enumerate(prints, 1 + len(objects)):
        font, capitals = _font(text.height), text.text.upper()
        start = text.x - area[0] - font.getlength(capitals) / 2
        ends = [start + font.getlength(capitals[: k + 1]) for k in range(len(capitals))]
        for r, c in np.argwhere(best == i):
            k = int(np.searchsorted(ends, c * PATCH + PATCH / 2))
            if start - 4 <= c * PATCH + PATCH / 2 and k < len(ends):
                labels["sign"][r, c] = SIGNS.index(text.text[k])
    place = np.array([(0, 0), (0, 0), *((o.x - area[0], o.y - area[1]) for o in items)])[best + 1]
    offset = (place - np.stack([x, y], -1) * PATCH - PATCH // 2).reshape(-1, 2)
    flat = {name: values.reshape(-1).astype(np.int64) for name, values in labels.items()}
    flat["offset"] = np.where((best > 0).reshape(-1, 1), offset, 0).astype(np.int64)
    cover = np.where(best > 0, np.take_along_axis(share, best.clip(0)[..., None], -1)[..., 0], 0.0).reshape(-1)
    whole = np.bincount(best.clip(0).reshape(-1), cover)[best.clip(0).reshape(-1)]
    flat["cover"], flat["mass"] = cover.astype(np.float32), (cover / whole.clip(0.05)).astype(np.float32)
    return flat


def marks(objects: Sequence[Thing], prints: Sequence[Print]) -> Labels:
    """Says what is in the whole picture: coloured shapes, words, and how many of each shape (at most 4)."""
    pairs, words = np.zeros(MARKS["pairs"], np.int64), np.zeros(MARKS["words"], np.int64)
    counts = np.zeros(len(SHAPES), np.int64)
    for o in objects:
        pairs[SHAPES.index(o.shape) * len(COLOURS) + COLOURS.index(o.colour)] = 1
        counts[SHAPES.index(o.shape)] += 1
    for p in prints:
        if p.kind == "word":
            words[WORDS.index(p.text)] = 1
    return {"pairs": pairs, "words": words, "counts": np.minimum(counts, 4)}


class Stream(IterableDataset[dict[str, Any]]):
    """Batches without end, each sample new.

    Args:
        mix: What a sample is made of.
        batch: Samples per batch.
        seed: The stream is a function of it.
        tokens: The tokenizer, needed for questions.
    """

    def __init__(self, mix: Mix, batch: int, seed: int, tokens: Any = None) -> None:
        self.mix, self.batch, self.seed, self.tokens = mix, batch, seed, tokens

    def _sample(self, rng: np.random.Generator) -> dict[str, Any]:
        mix = self.mix
        side = mix.rows * PATCH
        x, y = (int(v) * PATCH for v in rng.integers(0, GRID - mix.rows + 1, 2))
        area = (x, y, x + side, y + side)
        objects, prints = layout(rng, area, mix.count, mix.prints, mix.largest)
        image, owner = paint(rng, objects, prints, area)
        sample: dict[str, Any] = {"pixels": image, "corner": np.array([y // PATCH, x // PATCH])}
        if mix.per_type:
            questions = list(ask(rng, objects, prints, mix.per_type, mix.types))
            sample["questions"] = [questions[i] for i in rng.permutation(len(questions))]
        sample |= label(objects, prints, owner, area) | marks(objects, prints)
        return sample

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, 77, info.id if info else 0])
        while True:
            samples = [self._sample(rng) for _ in range(self.batch)]
            out: dict[str, Any] = {
                name: torch.from_numpy(np.stack([s[name] for s in samples]))
                for name in samples[0]
                if name != "questions"
            }
            if self.mix.per_type:
                out |= pack([s["questions"] for s in samples], self.tokens)
            yield out


def subject(question: Question) -> int:
    """What a question is about, where it names no shape.

    Returns:
        3 * place + (0 shape, 1 word, 2 number), 27 for the smallest shape, 28 and 29 for the only word and number.
    """
    if question.type == "smallest":
        return 27
    found = re.search("(?:at|in) the ((?:top|middle|bottom)(?: left| middle| right)?)", question.text)
    kinds = {"place": 0, "word": 1, "number": 2}
    if question.type not in kinds:
        return IGNORE
    return 3 * PLACES.index(found[1]) + kinds[question.type] if found else 27 + kinds[question.type]


def pack(questions: Sequence[Sequence[Question]], tokens: Any) -> dict[str, Any]:
    """Puts the questions of each picture in one row, each a segment of its own.

    Returns:
        ids, segment (0 is padding, questions count from 1), step (place in the segment), target (the next token where
        an answer is to be learned), type (its number), hint (what a middle layer should know: at the last shape that a
        question names, or else at its question mark, how the answer begins; then the next token of the answer), about
        (from the question mark on, see `subject`) and other (at the second of two named shapes, where the first is in
        the row), all of shape (pictures, longest row).
    """
    plurals = [f" {s}{end}" for s in SHAPES for end in ("", "s", "es")]
    mark = tokens("?", add_special_tokens=False).input_ids[0]
    shapes = {ids[0] for ids in tokens(plurals, add_special_tokens=False).input_ids if len(ids) == 1}
    rows: list[list[tuple[int, ...]]] = []
    for asked in questions:
        row: list[tuple[int, ...]] = []
        if asked:
            stems = tokens([f"\n{q.text} ASSISTANT:" for q in asked], add_special_tokens=False).input_ids
            answers = tokens([f" {q.answer}" for q in asked], add_special_tokens=False).input_ids
            for k, (stem, answer) in enumerate(zip(stems, answers, strict=True), 1):
                ids = [*stem, *answer]
                target = [IGNORE] * (len(stem) - 1) + [*answer, tokens.eos_token_id]
                kind = TYPES.index(asked[k - 1].type)
                named = [j for j, token in enumerate(stem) if token in shapes]
                end = stem.index(mark)
                hint = [IGNORE] * len(ids)
                hint[named[-1] if named else end] = answer[len(answer) > 1]  # a number begins with a space
                hint[len(stem) - 1 : len(ids) - 1] = answer
                about = [IGNORE] * len(ids)
                about[end : len(ids) - 1] = [subject(asked[k - 1])] * (len(ids) - 1 - end)
                other = [IGNORE] * len(ids)
                if len(named) == 2:
                    other[named[1]] = len(row) + named[0]
                row += [(ids[j], k, j, target[j], kind, hint[j], about[j], other[j]) for j in range(len(ids))]
        rows.append(row)
    width = max(len(row) for row in rows)
    filled = [row + [(tokens.pad_token_id, 0, 0, IGNORE, 0, *[IGNORE] * 3)] * (width - len(row)) for row in rows]
    array = torch.tensor(filled, dtype=torch.long)
    names = ["ids", "segment", "step", "target", "type", "hint", "about", "other"]
    return {name: array[..., i] for i, name in enumerate(names)}
