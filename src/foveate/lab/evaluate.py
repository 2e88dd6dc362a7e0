"""Asks every question in every arm, and writes each answer down as it comes: the work behind ``foveate eval``.

Questions about the same pictures share one pass of the encoder, over all budgets of a method and over all methods that
read the same of it (`Handle.reselect`). A run that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, zip_longest
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.budget import Keep, resolve_keep
from foveate.errors import BudgetError, TaskError, UnsupportedCall
from foveate.lab.answers import Answer, read
from foveate.lab.chat import answers, prepare, visual_tokens
from foveate.lab.contest import BLIND, FULL, Arm
from foveate.lab.downscale import downscaled
from foveate.lab.media import Media, Video, grey
from foveate.lab.tasks import Item, Task, right

#: Rounds of as many groups as a batch has that are looked at together, so that a batch is about pictures of like size.
NEAR = 4

#: Reads nothing of the encoder, so that what it encoded serves all others; one token, to be quick.
SCOUT = "random:keep=1"


class Run:
    """A model, a task, and the file in which the answers are.

    Args:
        network: The model.
        processor: Its processor.
        task: What is asked.
        arms: Who answers.
        log: JSONL file; lines are added to what it has.
        header: What the first line says of the run. What `identity` names must be as it was when the file was begun.
        score: How answers are judged, see `foveate.lab.tasks.right`.
        batch: Pictures (groups of pictures, videos) that are read together.
        limit: Longest answer, in tokens.
        first: Only ``full`` and ``blind`` answer more than the first so many questions; None: all answer all.

    Raises:
        TaskError: If the file holds answers of another run.
    """

    def __init__(
        self,
        network: Any,
        processor: Any,
        task: Task,
        arms: Sequence[Arm],
        log: Path,
        header: dict[str, Any],
        score: str = "exact",
        batch: int = 20,
        limit: int = 16,
        first: int | None = None,
    ) -> None:
        self.network, self.processor, self.task, self.arms = network, processor, task, list(arms)
        self.log, self.score, self.batch, self.limit = log, score, batch, limit
        self.header = header | identity(network, task, score, limit) | {"first": first}
        self._early = {item.name for item in task.items[:first]}
        self.done = _resume(log, self.header)
        self.refused: dict[str, str] = {}
        self._open: dict[str, Media] = {}
        self._handle: foveate.Handle | None = None
        self._encoded: tuple[tuple[str, ...], ...] = ()
        self._tokens: dict[tuple[str, ...], list[int]] = {}
        self._prepared: dict[tuple[str, ...], Any] = {}
        self._pixels: dict[tuple[tuple[str, ...], ...], dict[str, torch.Tensor]] = {}

    @property
    def total(self) -> int:
        """Answers that make it complete."""
        return sum(len(self.task.items) if arm in (FULL, BLIND) else len(self._early) for arm in self.arms)

    @property
    def left(self) -> int:
        """Answers that are still to be given."""
        return sum(self._wants(arm, item) for arm in self.arms for item in self.task.items)

    def answers(self) -> Iterator[tuple[Arm, int]]:
        """Ask what has not been asked; yields the arm and the number of answers, each time some were written."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        _mend(self.log)
        with self.log.open("a", encoding="utf-8") as out, torch.inference_mode():
            out.write(json.dumps({"run": self.header}) + "\n")
            try:
                for part in (part for near in self._near() for part in near):
                    self._show(part)
                    for arm in self.arms:
                        for asked in part:
                            todo = [item for item in asked if self._wants(arm, item)]
                            if todo and arm.name not in self.refused:
                                yield arm, self._write(out, arm, todo)
            finally:
                self._detach()

    def estimate(self) -> float:
        """Return about how many seconds the rest will take, from a few answers that are thrown away.

        An answer takes longer in proportion to its tokens beyond the fewest. An encoder pass is added to every answer
        of the arms that read all tokens, and, as methods share theirs, for a tenth to the others.
        """
        near = next(self._near())
        part = near[len(near) // 2]
        self._show(part)
        asked = part[0]
        with torch.inference_mode():
            self._scout(asked)
            counts = self._tokens[asked[0].pictures]
            tokens = sum(counts)
            means = {
                arm: float(tokens) if arm.budget is None else sum(mean_of(arm.budget, n) for n in counts)
                for arm in self.arms
            }
            least = min(means.values())
            few = Arm(f"random:keep={max(1, int(least))}", "random")
            shared = self._timed(few, asked)  # the scout has encoded
            full = self._timed(FULL, asked)
            encode = max(0.0, self._timed(few, asked) - shared)
            self._detach()
        per_token = max(0.0, full - encode - shared) / max(1.0, tokens - least)
        seconds = 0.0
        for arm, mean in means.items():
            left = sum(self._wants(arm, item) for item in self.task.items)
            passes = 1.0 if arm.budget is None else 0.1
            seconds += left * (shared + passes * encode + per_token * (mean - least)) / len(asked)
        return seconds

    # -- asking

    def _wants(self, arm: Arm, item: Item) -> bool:
        """Whether an arm still has to answer a question."""
        return (arm.name, item.name) not in self.done and (arm in (FULL, BLIND) or item.name in self._early)

    def _near(self) -> Iterator[list[list[list[Item]]]]:
        """Yield parts of the task, those about neighbours together.

        A part is about the same ``batch`` groups of pictures, of like size, or videos of one length and size. It has
        rounds, each of which asks one question about each.
        """
        about: dict[tuple[str, ...], list[Item]] = defaultdict(list)
        for item in self.task.items:
            about[item.pictures].append(item)
        groups = [
            items for items in about.values() if any(self._wants(arm, item) for arm in self.arms for item in items)
        ]
        for start in range(0, len(groups), NEAR * self.batch):
            near = groups[start : start + NEAR * self.batch]
            sized = [(_size([self.task.open(key) for key in items[0].pictures]), items) for items in near]
            sized.sort(key=itemgetter(0))
            parts = []
            for _, alike in groupby(sized, lambda one: one[0][0]):
                found = [items for _, items in alike]
                for at in range(0, len(found), self.batch):
                    parts += self._rounds(found[at : at + self.batch])
            yield parts

    def _show(self, part: list[list[Item]]) -> None:
        """Open what a part is about; what is open already stays so."""
        keys = {key for asked in part for item in asked for key in item.pictures}
        self._open = {key: self._open[key] if key in self._open else self.task.open(key) for key in sorted(keys)}
        self._prepared.clear()
        self._pixels.clear()

    def _rounds(self, together: list[list[Item]]) -> list[list[list[Item]]]:
        """Return parts whose rounds are all about the same pictures."""
        rounds = [[item for item in asked if item is not None] for asked in zip_longest(*together)]
        return [list(same) for _, same in groupby(rounds, lambda asked: [item.pictures for item in asked])]

    def _write(self, out: Any, arm: Arm, items: list[Item]) -> int:
        try:
            given, alive = self._ask(arm, items)
        except (BudgetError, UnsupportedCall) as error:
            if isinstance(error, UnsupportedCall) and arm.method != "downscale":
                raise
            self.refused[arm.name] = error.message
            out.write(json.dumps({"refused": {arm.name: error.message}}) + "\n")
            self._detach()
            return 0
        for item, text, mean in zip(items, given, alive, strict=True):
            fine = right(text, item.answers, self.score)
            line = Answer(
                arm.name, arm.method, arm.budget, item.name, "+".join(item.pictures), item.type, text, fine, mean
            )
            out.write(json.dumps(asdict(line)) + "\n")
            self.done.add((arm.name, item.name))
        out.flush()
        return len(items)

    def _ask(self, arm: Arm, items: list[Item]) -> tuple[list[str], list[float]]:
        """Return the answers, and the mean of visual tokens per decoder layer behind each."""
        if arm.method in ("full", "blind", "downscale"):
            if any(item.pictures not in self._tokens for item in items):
                self._scout(items)
            self._detach()
            if arm.method == "downscale":
                assert arm.budget is not None
                pictures, questions = self._prompts(items)
                whole = [self._tokens[item.pictures] for item in items]
                inputs = downscaled(self.network, self.processor, pictures, questions, arm.budget, whole)
                return self._generate(inputs), [float(n) for n in visual_tokens(self.network, inputs)]
            means = [float(sum(self._tokens[item.pictures])) for item in items]
            return self._generate(self._inputs(arm, items)), means
        handle = self._attached(arm.name, items)
        given, means = self._generate(self._inputs(arm, items)), [0.0] * len(items)
        for image in handle.report.images:
            means[image.row] += image.mean_alive
        return given, means

    def _scout(self, items: list[Item]) -> None:
        """Count the tokens of these pictures; what is encoded for it serves the arms that follow."""
        handle = self._attached(SCOUT, items)
        self.network.generate(**self._inputs(FULL, items), max_new_tokens=1, do_sample=False)
        counts: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for image in handle.report.images:
            counts[items[image.row].pictures].append(image.tokens)
        self._tokens |= counts

    def _attached(self, spec: str, items: list[Item]) -> foveate.Handle:
        pictures = tuple(item.pictures for item in items)
        if self._handle is not None and self._encoded == pictures:
            try:
                self._handle.reselect(spec)
                return self._handle
            except UnsupportedCall:  # it reads of the encoder what has not been recorded
                pass
        self._detach()
        self._handle, self._encoded = foveate.compress(self.network, spec), pictures
        return self._handle

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _prompts(self, items: list[Item]) -> tuple[list[list[Media]], list[str]]:
        return [[self._open[key] for key in item.pictures] for item in items], [item.question for item in items]

    def _inputs(self, arm: Arm, items: list[Item]) -> Any:
        """Return what the model reads; it is made once for all arms that see the pictures as they are."""
        names = tuple(item.name for item in items)
        if arm is not BLIND and names in self._prepared:
            return self._prepared[names]
        pictures, questions = self._prompts(items)
        if arm is BLIND:
            return prepare(self.network, self.processor, [[grey(one) for one in row] for row in pictures], questions)
        inputs = self._prepared[names] = prepare(self.network, self.processor, pictures, questions)
        pixels = {name: value for name, value in inputs.items() if name.startswith("pixel_values")}
        inputs.update(
            self._pixels.setdefault(tuple(item.pictures for item in items), pixels)
        )  # kept once, not by round
        return inputs

    def _generate(self, inputs: Any) -> list[str]:
        output = self.network.generate(**inputs, max_new_tokens=self.limit, do_sample=False)
        return answers(self.processor, inputs, output)

    def _timed(self, arm: Arm, items: list[Item]) -> float:
        start = time.perf_counter()
        self._ask(arm, items)
        return time.perf_counter() - start


def _size(shown: Sequence[Media]) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Return what may stand together in a batch (all pictures; videos of one shape), and how much there is to see."""
    shapes = {(len(one.frames), *one.size) for one in shown if isinstance(one, Video)}
    seen = sum(prod(one.size) * (len(one.frames) if isinstance(one, Video) else 1) for one in shown)
    return tuple(sorted(shapes)), seen


def mean_of(keep: Keep, tokens: int) -> float:
    """Return a budget in tokens."""
    return float(resolve_keep(keep, tokens))


def tokens_of(network: Any, processor: Any, task: Task) -> int:
    """Return the visual tokens of the first picture or video."""
    item = task.items[0]
    inputs = prepare(network, processor, [[task.open(key) for key in item.pictures]], [item.question])
    with foveate.compress(network, SCOUT) as handle:
        network.generate(**inputs, max_new_tokens=1, do_sample=False)
    return handle.report.images[0].tokens


def weights(network: Any) -> str:
    """Return a digest of a model's weights: of some 256 values of each parameter, evenly spread."""
    digest = hashlib.sha256()
    for name, parameter in network.named_parameters():
        flat = parameter.detach().flatten()
        digest.update(name.encode() + flat[:: flat.numel() // 256 + 1].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def identity(network: Any, task: Task, score: str, limit: int) -> dict[str, Any]:
    """Return what must not change while a file of answers grows."""
    asked = json.dumps([asdict(item) for item in task.items], sort_keys=True)
    return {
        "task": task.name,
        "asked": hashlib.sha256(asked.encode()).hexdigest()[:12],
        "n": len(task.items),
        "about": task.about,
        "score": score,
        "max_new_tokens": limit,
        "architecture": type(network).__name__,
        "weights": weights(network),
        "dtype": str(network.dtype).removeprefix("torch."),
        "attention": network.config._attn_implementation,
        "device": network.device.type,
    }


FIXED: tuple[str, ...] = ("model", "task", "asked", "score", "max_new_tokens", "architecture", "weights", "dtype")
FIXED += ("attention", "device", "foveate", "torch", "transformers")


def _resume(log: Path, header: dict[str, Any]) -> set[tuple[str, str]]:
    """Return what has been answered."""
    if not log.exists():
        return set()
    before, given = read(log)
    differ = [name for name in FIXED if given and before.get(name) != header.get(name)]
    changed = [f"{name} was {before.get(name)}, is {header.get(name)}" for name in differ]
    if changed:
        raise TaskError(
            f"{log} holds the answers of another run: {'; '.join(changed)}",
            f"name another folder with --out, or delete the file: rm {log}",
        )
    return {(answer.arm, answer.item) for answer in given}


def _mend(log: Path) -> None:
    """Take off a last line that a kill has torn."""
    if log.exists() and (text := log.read_bytes()) and not text.endswith(b"\n"):
        with log.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)
