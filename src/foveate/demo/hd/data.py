"""Training data: crops and thumbnails with a label for every patch, and questions packed behind one picture or two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import IterableDataset
from transformers.image_processing_utils import get_patch_output_size

from foveate.demo.data import IGNORE, SIGNS
from foveate.demo.hd.paint import ground, paint
from foveate.demo.hd.questions import TYPES, ask
from foveate.demo.hd.world import CROP, LOOK, PAIRS, SIZES, Item, Kind, Look, Size, _Canvas, layout, layout_pair
from foveate.demo.paint import Pixels, _font
from foveate.demo.world import COLOURS, SHAPES, WORDS, Question, patches_of

PATCH = 28
GRID = CROP // PATCH
LABELS = {"kind": 3 + len(SHAPES), "colour": len(COLOURS), "faint": 2, "word": len(WORDS), "tens": 10, "ones": 10}
"""Name and number of classes of each label of a patch; kinds are nothing, the shapes, a word, a number."""
MARKS = {"pairs": len(SHAPES) * len(COLOURS), "words": len(WORDS)}
"""Name and width of each label of a whole crop."""

Labels = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Mix:
    """What a training sample is made of.

    Args:
        sizes: Sizes of pictures and their crops across and down; all pictures of a batch have one size.
        look: How large things are.
        pair: Share of batches with two pictures, of sizes of `PAIRS`.
        questions: Questions asked about each picture or pair; none when zero: then pictures are crowded.
    """

    sizes: tuple[tuple[Size, Size], ...] = tuple(SIZES.items())
    look: Look = LOOK
    pair: float = 0.0
    questions: int = 0


def crowd(rng: np.random.Generator, size: Size, grid: Size, look: Look) -> tuple[Item, ...]:
    """A picture full of things, for learning what they look like."""
    canvas = _Canvas(rng, size, grid)
    crops = grid[0] * grid[1]

    def put(kind: Kind, span: tuple[int, int], whole: bool = True) -> None:
        name = SHAPES[rng.integers(len(SHAPES))]
        if kind in ("word", "number"):
            name = WORDS[rng.integers(len(WORDS))] if kind == "word" else str(rng.integers(10, 100))
        canvas.put(kind, name, "" if kind == "faint" else COLOURS[rng.integers(len(COLOURS))], canvas.any(span), whole)

    for _ in range(3 * crops):
        put("word", look.font)
        if rng.integers(2):
            put("number", look.font)
    for _ in range(crops // 2):
        put("shape", look.large, whole=False)
    for _ in range(3 * crops):
        put("shape", look.small)
        if rng.integers(2):
            put("faint", (look.small[0] + 14, look.small[1] + 14))
    return tuple(canvas.items)


def _stretch(picture: Pixels, grid: Size) -> tuple[Size, Size]:
    """Width and height that a picture gets before it is cut into crops, and the padding at its left and top."""
    rows, columns = grid[1] * CROP, grid[0] * CROP
    height, width = get_patch_output_size(picture.reshape(*picture.shape[:2], -1), (rows, columns), "channels_last")
    return (width, height), ((columns - width) // 2, (rows - height) // 2)


def cut(picture: Pixels, grid: Size, smooth: bool = True) -> Pixels:
    """The frames of a picture as the image processor cuts them: its thumbnail, then its crops row by row.

    Args:
        picture: Pixels (h, w, 3), or a map (h, w).
        grid: Crops across and down.
        smooth: Whether to interpolate; a map is not.

    Returns:
        Frames of 336 x 336.
    """
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    image = Image.fromarray(picture)
    thumbnail = image.resize((CROP, CROP), how)
    size, (left, top) = _stretch(picture, grid)
    canvas = np.zeros((grid[1] * CROP, grid[0] * CROP, *picture.shape[2:]), np.uint8)
    canvas[top : top + size[1], left : left + size[0]] = np.asarray(
        image if size == image.size else image.resize(size, how)
    )
    crops = canvas.reshape(grid[1], CROP, grid[0], CROP, *picture.shape[2:]).swapaxes(1, 2)
    return np.concatenate([np.asarray(thumbnail)[None], crops.reshape(-1, CROP, CROP, *picture.shape[2:])])


def label(items: Sequence[Item], owner: Pixels, grid: Size) -> Labels:
    """Says what is in every patch of every frame.

    Args:
        items: What is in the picture.
        owner: The pixel map that `paint` returned.
        grid: Crops across and down.

    Returns:
        For each name in `LABELS` an array (frames, patches), "item" (the item of a patch from 1, 0 nothing, -1
        unclear), "letters" (frames, patches, `SIGNS`), 1 where a patch shows part of a letter, and for each name in
        `MARKS` an array (frames, width). Print in thumbnails has no label, nor has a whole thumbnail.
    """
    (width, height), pad = _stretch(owner, grid)
    zoom = width / owner.shape[1], height / owner.shape[0]
    frames = cut(owner, grid, smooth=False)
    table = {name: np.full(len(items) + 2, IGNORE, np.int64) for name in LABELS}
    table["kind"][1] = 0
    for i, item in enumerate(items, 2):
        table["colour"][i] = COLOURS.index(item.colour) if item.colour else IGNORE
        if item.kind in ("shape", "faint"):
            table["kind"][i], table["faint"][i] = 1 + SHAPES.index(item.name), int(item.kind == "faint")
        elif item.kind == "word":
            table["kind"][i], table["word"][i] = 1 + len(SHAPES), WORDS.index(item.name)
        else:
            table["kind"][i] = 2 + len(SHAPES)
            table["tens"][i], table["ones"][i] = int(item.name[0]), int(item.name[1])
    found = np.zeros((len(frames), GRID, GRID), np.int64)
    letters = np.zeros((len(frames), GRID, GRID, len(SIGNS)), np.int64)
    marks = {name: np.zeros((len(frames), size), np.int64) for name, size in MARKS.items()}
    for f, frame in enumerate(frames):
        share = patches_of(frame, 1 + len(items), PATCH)[..., 1:] / PATCH**2
        top = share.argmax(-1)
        most = np.take_along_axis(share, top[..., None], -1)[..., 0]
        best = np.where(most >= (0.12 if f else 0.25), top + 1, np.where(most > 0.01, -1, 0))
        for i, item in enumerate(items, 1) if f else ():
            left, upper = (f - 1) % grid[0] * CROP - pad[0], (f - 1) // grid[0] * CROP - pad[1]
            x, y = item.x * zoom[0] - left, item.y * zoom[1] - upper
            if not (0 <= x < CROP and 0 <= y < CROP):
                continue
            if item.half[0] < 1.5 * PATCH and most[int(y) // PATCH, int(x) // PATCH] > 0.03:
                best[int(y) // PATCH, int(x) // PATCH] = i
            if item.kind == "shape":
                marks["pairs"][f, SHAPES.index(item.name) * len(COLOURS) + COLOURS.index(item.colour)] = 1
            elif item.kind == "word":
                marks["words"][f, WORDS.index(item.name)] = 1
            if item.kind in ("word", "number"):
                font, capitals = _font(item.size), item.name.upper()
                ends = [zoom[0] * font.getlength(capitals[:k]) for k in range(len(capitals) + 1)]
                for r, c in np.argwhere(best == i):
                    start = c * PATCH - (x - ends[-1] / 2)
                    for k, letter in enumerate(item.name):
                        if min(ends[k + 1], start + PATCH) - max(ends[k], start) > 0.35 * (ends[k + 1] - ends[k]):
                            letters[f, r, c, SIGNS.index(letter)] = 1
        found[f] = best
    labels = {name: values[found + 1].reshape(len(frames), -1) for name, values in table.items()}
    for values in (labels["word"], labels["tens"], labels["ones"], *marks.values()):
        values[0] = IGNORE
    flat = found.reshape(len(frames), -1)
    return labels | {"item": flat, "letters": letters.reshape(len(frames), GRID * GRID, -1)} | marks


class Stream(IterableDataset[dict[str, Any]]):
    """Batches without end, each sample new.

    Args:
        mix: What a sample is made of.
        batch: Frames per batch without questions; with questions, about as many tokens, at least one row.
        seed: The stream is a function of it.
        tokens: The tokenizer, needed for questions.
    """

    def __init__(self, mix: Mix, batch: int, seed: int, tokens: Any = None) -> None:
        self.mix, self.batch, self.seed, self.tokens = mix, batch, seed, tokens

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, 78, info.id if info else 0])
        yield from self._asked(rng) if self.mix.questions else self._seen(rng)

    def _seen(self, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Batches of single frames; of two thumbnails one is left out."""
        store: list[dict[str, NDArray[Any]]] = []
        while True:
            while len(store) < self.batch:
                size, grid = self.mix.sizes[rng.integers(len(self.mix.sizes))]
                items = crowd(rng, size, grid, self.mix.look)
                image, owner = paint(rng, ground(rng, size), items)
                frames, labels = cut(image, grid), label(items, owner, grid)
                for f in range(int(rng.integers(2)), len(frames)):
                    store.append({"pixels": frames[f]} | {name: values[f] for name, values in labels.items()})
            order = rng.permutation(len(store))
            part = [store[i] for i in order[: self.batch]]
            store = [store[i] for i in order[self.batch :]]
            yield {name: torch.from_numpy(np.stack([s[name] for s in part])) for name in part[0]}

    def _asked(self, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Batches of pictures, or pairs, of one size, with questions."""
        while True:
            pair = rng.random() < self.mix.pair
            sizes = tuple(PAIRS.items()) if pair else self.mix.sizes
            size, grid = sizes[rng.integers(len(sizes))]
            length = (2 if pair else 1) * (1 + grid[0] * grid[1]) * 150 + 12 * self.mix.questions
            rows: list[tuple[tuple[Item, ...], ...]] = [
                layout_pair(rng, size, grid, self.mix.look) if pair else (layout(rng, size, grid, self.mix.look),)
                for _ in range(max(1, round(self.batch / length)))
            ]
            yield collate(rng, size, grid, rows, self.mix.questions, self.tokens)


def collate(
    rng: np.random.Generator,
    size: Size,
    grid: Size,
    rows: Sequence[Sequence[Sequence[Item]]],
    questions: int,
    tokens: Any,
) -> dict[str, Any]:
    """A batch of pictures of one size, or of pairs, with questions behind each.

    Returns:
        pixels (rows, pictures, frames, 336, 336, 3), labels (rows, pictures, frames, ...), "other" (rows, pictures,
        frames, patches): 1 where a patch of the second picture shows a shape that is not in the first, 0 where it
        shows another, size, and what `pack` returned.
    """
    samples, asked = [], []
    for pictures in rows:
        base = ground(rng, size)
        parts = []
        for k, items in enumerate(pictures):
            image, owner = paint(rng, base, items)
            part: dict[str, NDArray[Any]] = {"pixels": cut(image, grid)} | label(items, owner, grid)
            known = {i.name for i in pictures[0]}
            news = np.array(
                [IGNORE, IGNORE, *(int(i.name not in known) if i.kind == "shape" else IGNORE for i in items)]
            )
            part["other"] = news[part["item"] + 1] if k else np.full_like(part["item"], IGNORE)
            parts.append(part)
        samples.append({name: np.stack([p[name] for p in parts]) for name in parts[0]})
        found = list(ask(rng, pictures, questions))
        asked.append((pictures, found))
    batch: dict[str, Any] = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}
    return batch | {"size": size} | pack(asked, tokens)


def subject(question: Question, pictures: Sequence[Sequence[Item]]) -> list[tuple[int, int]]:
    """The items that a question is about, as (picture, number of the item from 1); none where there is none."""
    words = question.text.rstrip("?").split()
    found = []
    for p, items in enumerate(pictures):
        for i, item in enumerate(items, 1):
            match question.type:
                case "faint":
                    fits = item.kind == "faint"
                case "word" | "number":
                    fits = item.kind == question.type and item.colour in words
                case "sign":
                    fits = item.kind == "word" and item.name == words[-1]
                case "differs":
                    fits = p == 1 and item.kind == "shape" and item.name not in {o.name for o in pictures[0]}
                case "which" if "word" in words:
                    fits = item.kind == "word" and item.name == words[-1]
                case "colour":
                    fits = item.kind == "shape" and item.name in words
                case _:
                    fits = item.kind == "shape" and item.name in words and item.colour in words
            if fits:
                found.append((p, i))
    return found


def pack(asked: Sequence[tuple[Sequence[Sequence[Item]], Sequence[Question]]], tokens: Any) -> dict[str, Any]:
    """Puts the questions of each row behind it, each a segment of its own.

    Returns:
        ids, segment (0 is padding, questions count from 1), step (place in the segment), target (the next token where
        an answer is to be learned), type (its number), hint (what a middle layer should know: at the last word how the
        answer begins, then the next token of the answer), all of shape (rows, longest row), and "about" (rows, longest
        row, pictures, 40): from the last word of a question on, 1 for the items that it is about.
    """
    columns: list[list[tuple[int, ...]]] = []
    about: list[list[list[tuple[int, int]]]] = []
    for pictures, questions in asked:
        row: list[tuple[int, ...]] = []
        subjects: list[list[tuple[int, int]]] = []
        stems = tokens([f"\n{q.text} ASSISTANT:" for q in questions], add_special_tokens=False).input_ids
        answers = tokens([f" {q.answer}" for q in questions], add_special_tokens=False).input_ids
        for k, (stem, answer) in enumerate(zip(stems, answers, strict=True), 1):
            ids = [*stem, *answer]
            target = [IGNORE] * (len(stem) - 1) + [*answer, tokens.eos_token_id]
            hint = [IGNORE] * len(ids)
            hint[len(stem) - 4] = answer[len(answer) > 1]  # a number begins with a space
            hint[len(stem) - 1 : len(ids) - 1] = answer
            kind = TYPES.index(questions[k - 1].type)
            of = subject(questions[k - 1], pictures)
            row += [(ids[j], k, j, target[j], kind, hint[j]) for j in range(len(ids))]
            last = range(len(stem) - 4, len(ids))
            subjects += [of if j in last else [] for j in range(len(ids))]
        columns.append(row)
        about.append(subjects)
    width = max(len(row) for row in columns)
    filled = [row + [(tokens.pad_token_id, 0, 0, IGNORE, 0, IGNORE)] * (width - len(row)) for row in columns]
    array = torch.tensor(filled, dtype=torch.long)
    marks = torch.zeros(len(columns), width, len(asked[0][0]), 40, dtype=torch.bool)
    for b, subjects in enumerate(about):
        for j, of in enumerate(subjects):
            for p, i in of:
                marks[b, j, p, i] = True
    names = ["ids", "segment", "step", "target", "type", "hint"]
    return {name: array[..., i] for i, name in enumerate(names)} | {"about": marks}
