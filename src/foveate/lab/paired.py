"""Ratios of times that were measured in turns: medians, spreads, intervals, and when to keep silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: A ratio whose 95 % interval is wider than this says nothing about targets of a few percent.
RESOLUTION = 0.10

#: The spread of fewer rounds than this is not known well enough to judge by.
ROUNDS = 5


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of some values.

        Example:
            >>> Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
            Spread(median=3.0, low=2.0, high=4.0)
        """
        low, median, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
        return cls(float(median), float(low), float(high))

    def overlaps(self, other: Spread) -> bool:
        """Whether the quartile ranges have a point in common."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Estimate:
    """A median over rounds with its 95 % interval."""

    value: float
    low: float
    high: float
    rounds: int = ROUNDS

    @classmethod
    def of(cls, values: Sequence[float], draws: int = 4000) -> Estimate:
        """Return the median of per-round values; the interval is a percentile bootstrap over rounds.

        Example:
            >>> Estimate.of([1.0, 1.0, 1.0])
            Estimate(value=1.0, low=1.0, high=1.0, rounds=3)
        """
        rounds = np.asarray(values, dtype=float)
        again = np.random.default_rng(0).choice(rounds, (draws, len(rounds)))
        low, high = np.percentile(np.median(again, axis=1), [2.5, 97.5])
        return cls(float(np.median(rounds)), float(low), float(high), len(rounds))

    @property
    def resolved(self) -> bool:
        """Whether the rounds agree well enough for the number to mean something."""
        return self.high - self.low <= RESOLUTION

    def meets(self, target: float) -> str:
        """Return yes, no, or unresolved: whether the whole interval lies on one side of the target.

        Fewer than `ROUNDS` rounds leave everything unresolved.

        Example:
            >>> [Estimate(v, v - 0.01, v + 0.01).meets(1.05) for v in (1.02, 1.045, 1.2)]
            ['yes', 'unresolved', 'no']
        """
        if not self.resolved or self.rounds < ROUNDS:
            return "unresolved"
        return "yes" if self.high <= target else "no" if self.low > target else "unresolved"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]
