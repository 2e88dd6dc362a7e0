"""Rounds: every arm at every batch size, in a new random order each time; what is compared is compared by round."""

from __future__ import annotations

import functools
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from foveate.errors import FoveateError
from foveate.lab.environment import load
from foveate.lab.speed.arms import Arms, Sample
from foveate.lab.speed.plan import Plan

#: An arm and a batch size.
Place = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How much is measured.

    Args:
        repeats: Rounds that count.
        warmup: Rounds that do not, beside the run in which each method is counted.
        seconds: No round begins after so long; the first always does.
        seed: Of the order.
    """

    repeats: int = 7
    warmup: int = 1
    seconds: float = math.inf
    seed: int = 0


@dataclass
class Measured:
    """What the rounds so far gave.

    Args:
        samples: One per round, by arm and batch size.
        media: Milliseconds to read and prepare a picture, one per round.
        refused: Why there is nothing of an arm at a batch size.
        rounds: Rounds that are complete.
    """

    samples: dict[Place, list[Sample]] = field(default_factory=dict)
    media: list[float] = field(default_factory=list)
    refused: dict[Place, str] = field(default_factory=dict)
    rounds: int = 0


def rounds(
    arms: Arms, plan: Plan, batches: Sequence[int], pace: Pace, say: Callable[[str], None]
) -> Iterator[Measured]:
    """Yield what is measured after each complete round that counts; the object is the same each time."""
    runs = _runs(arms, plan, batches)
    measured, shuffle = Measured({place: [] for place in runs}), random.Random(pace.seed)
    begin = time.monotonic()
    gc.collect()
    gc.freeze()  # what is there now stays: only what a run leaves is looked through before the next
    try:
        for turn in range(pace.warmup + pace.repeats):
            number = turn - pace.warmup + 1
            if number > 1 and time.monotonic() - begin > pace.seconds:
                say(f"the time is up after {measured.rounds} rounds")
                return
            media, samples = _media(arms), _round(runs, measured, shuffle, say)
            if number < 1:
                say("warm-up round done")
                continue
            for place, sample in samples.items():
                measured.samples[place].append(sample)
            measured.media += media
            measured.rounds = number
            yield measured
            spent = time.monotonic() - begin
            left = min(spent / (turn + 1) * (pace.repeats - number), max(pace.seconds - spent, 0.0))
            say(f"round {number} of {pace.repeats}, load {load()}, about {left / 60:.1f} min of rounds to go")
    finally:
        gc.unfreeze()


def _round(
    runs: dict[Place, Callable[[], Sample]], measured: Measured, shuffle: random.Random, say: Callable[[str], None]
) -> dict[Place, Sample]:
    """Run every arm once; one that cannot be run takes part no more."""
    samples: dict[Place, Sample] = {}
    order = list(measured.samples)
    shuffle.shuffle(order)
    for place in order:
        gc.collect()
        try:
            samples[place] = runs[place]()
        except (FoveateError, torch.OutOfMemoryError) as error:
            why = error.message if isinstance(error, FoveateError) else "out of memory"
            measured.refused[place] = why
            measured.samples.pop(place)
            say(f"{place[0]} at batch {place[1]} is left out: {why}")
    return samples


def _runs(arms: Arms, plan: Plan, batches: Sequence[int]) -> dict[Place, Callable[[], Sample]]:
    runs: dict[Place, Callable[[], Sample]] = {}
    for batch in batches:
        runs["full", batch] = functools.partial(arms.full, batch)
        for name, keep in plan.ideals.items():
            runs[name, batch] = functools.partial(arms.ideal, keep, batch)
        for spec in plan.entrants:
            runs[spec, batch] = functools.partial(_method, arms, spec, batch)
    for spec, entrant in plan.entrants.items():
        cut = plan.cut_of(spec)
        if cut is not None and entrant.cuts is not None and 1 in batches:
            runs[cut, 1] = functools.partial(arms.hand_cut, entrant.cuts)
    return runs


def _method(arms: Arms, spec: str, batch: int) -> Sample:
    return arms.method(spec, batch)[0]


def _media(arms: Arms) -> list[float]:
    if arms.work.read is None:
        return []
    begin = time.perf_counter()
    arms.work.read()
    return [(time.perf_counter() - begin) * 1e3]
