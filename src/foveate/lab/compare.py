"""How sure one can be that two arms differ: intervals that keep pictures together, and McNemar's exact test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from foveate.demo.evaluate import Score
from foveate.errors import MissingDependency, TaskError
from foveate.lab.answers import Answer

try:
    from scipy import stats
except ImportError as missing:  # raised on import: sooner than after hours of answers
    raise MissingDependency("answers are compared with scipy", "pip install 'foveate[lab]'") from missing

#: Times that the pictures are drawn anew for an interval.
DRAWS = 10_000
SEED = 0

#: Percent of intervals that hold the true value.
LEVEL = 95

#: Fewer pictures than this show too little of how pictures differ: no interval is made of them.
FEWEST = 20


@dataclass(frozen=True)
class Comparison:
    """An arm against another, on the questions that both answered.

    Args:
        n: Questions that both answered.
        pictures: Pictures these are about.
        difference: Accuracy minus the other's, a share.
        low: Lower end of its interval; None if there are too few pictures.
        high: Upper end.
        gained: Questions that only this arm got right.
        lost: Questions that only the other got right.
        p: McNemar's exact test of ``gained`` against ``lost``, two-sided.
        q: Its p under Benjamini and Hochberg's control of false discoveries, where there are many comparisons.
    """

    n: int
    pictures: int
    difference: float
    low: float | None
    high: float | None
    gained: int
    lost: int
    p: float
    q: float | None = None

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class Sheet:
    """Answers as a table of arms by items; of two answers to one question the later counts.

    Args:
        arms: An answer of each arm, for its names.
        types: The types of questions.
        kinds: The type of each item, an index into ``types``.
        pictures: The picture of each item, counted from 0.
        asked: Which arm answered what.
        right: Which of the answers are right.
        alive: Visual tokens per decoder layer behind each answer.
    """

    arms: list[Answer]
    types: list[str]
    kinds: Int[np.ndarray, " items"]
    pictures: Int[np.ndarray, " items"]
    asked: Bool[np.ndarray, "arms items"]
    right: Bool[np.ndarray, "arms items"]
    alive: Float[np.ndarray, "arms items"]

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Sheet:
        """Lay answers out.

        Raises:
            TaskError: If there are none, or two arms were not asked the same.
        """
        arms = {answer.arm: answer for answer in answers}
        items = {answer.item: answer for answer in answers}
        if not answers:
            raise TaskError("there are no answers to compare", "ask first: foveate eval")
        for answer in answers:
            known = items[answer.item]
            if (answer.picture, answer.type) != (known.picture, known.type):
                arms_at_odds = f"{answer.arm} and {known.arm}"
                raise TaskError(
                    f"question {answer.item!r} is not the same for {arms_at_odds}", "compare one task's answers"
                )
        places = {name: place for place, name in enumerate(arms)}
        columns = {name: place for place, name in enumerate(items)}
        types = list(dict.fromkeys(answer.type for answer in items.values()))
        pictures = list(dict.fromkeys(answer.picture for answer in items.values()))
        asked = np.zeros((len(arms), len(items)), dtype=bool)
        right, alive = np.zeros_like(asked), np.zeros(asked.shape)
        for answer in answers:
            cell = places[answer.arm], columns[answer.item]
            asked[cell], right[cell], alive[cell] = True, answer.right, answer.mean_alive
        kind_of = {kind: place for place, kind in enumerate(types)}
        picture_of = {picture: place for place, picture in enumerate(pictures)}
        return cls(
            list(arms.values()),
            types,
            np.array([kind_of[answer.type] for answer in items.values()]),
            np.array([picture_of[answer.picture] for answer in items.values()]),
            asked,
            right,
            alive,
        )

    def place(self, arm: str) -> int | None:
        """Return the row of an arm, if it answered anything."""
        return next((place for place, one in enumerate(self.arms) if one.arm == arm), None)

    def score(self, arm: int, among: Bool[np.ndarray, " items"] | bool = True) -> Score:
        """Return an arm's right answers among those it gave to some items."""
        given = self.asked[arm] & among
        return Score(int((self.right[arm] & given).sum()), int(given.sum()))


@dataclass(frozen=True)
class Pair:
    """Two arms, by their rows, and the items on which they are compared."""

    one: int
    other: int
    among: Bool[np.ndarray, " items"]


def compare(sheet: Sheet, pairs: Sequence[Pair], draws: int = DRAWS) -> list[Comparison]:
    """Compare pairs of arms on the items that both answered; each pair must have some."""
    if not pairs:
        return []
    n = int(sheet.pictures.max()) + 1
    totals, counts, tallies = np.zeros((n, len(pairs))), np.zeros((n, len(pairs))), []
    for column, pair in enumerate(pairs):
        both = sheet.asked[pair.one] & sheet.asked[pair.other] & pair.among
        one, other, about = sheet.right[pair.one][both], sheet.right[pair.other][both], sheet.pictures[both]
        totals[:, column] = np.bincount(about, one.astype(float) - other, minlength=n)
        counts[:, column] = np.bincount(about, minlength=n)
        tallies.append((int((one & ~other).sum()), int((other & ~one).sum())))
    low, high = bootstrap(totals, counts, draws)
    pictures, sizes = (counts > 0).sum(0), counts.sum(0)
    return [
        Comparison(
            n=int(sizes[column]),
            pictures=int(pictures[column]),
            difference=(gained - lost) / int(sizes[column]),
            low=float(low[column]) if pictures[column] >= FEWEST else None,
            high=float(high[column]) if pictures[column] >= FEWEST else None,
            gained=gained,
            lost=lost,
            p=mcnemar(gained, lost),
        )
        for column, (gained, lost) in enumerate(tallies)
    ]


def bootstrap(
    totals: Float[np.ndarray, "pictures k"], counts: Float[np.ndarray, "pictures k"], draws: int = DRAWS
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Return the percentile intervals of k means, under drawing the pictures anew.

    The questions of a picture stay together, because they are not independent. All k means see the same draws; a
    picture without a question for one of them adds nothing to it.

    Args:
        totals: What the questions of each picture add up to.
        counts: How many there are.
        draws: How often the pictures are drawn.
    """
    n, k = totals.shape
    both = np.hstack([totals, counts])
    generator = np.random.default_rng(SEED)
    means = np.empty((draws, k))
    step = max(1, 2**22 // n)  # the table of how often each draw has each picture stays below 32 MiB
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        sums = times @ both
        with np.errstate(invalid="ignore"):  # a draw without any question says nothing
            means[start : start + rows] = sums[:, :k] / sums[:, k:]
    rest = (100 - LEVEL) / 2
    low, high = np.nanpercentile(means, [rest, 100 - rest], axis=0)
    return low, high


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p of so uneven a split, if either were as likely.

    Example:
        >>> mcnemar(0, 5), mcnemar(3, 3), mcnemar(0, 0)
        (0.0625, 1.0, 1.0)
    """
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def discoveries(found: dict[int, Comparison]) -> dict[int, Comparison]:
    """Return the comparisons with their q, over all of them."""
    if not found:
        return {}
    q = stats.false_discovery_control([one.p for one in found.values()], method="bh")
    return {place: replace(one, q=float(value)) for (place, one), value in zip(found.items(), q, strict=True)}
