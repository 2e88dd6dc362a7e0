"""What a table of arms shows: accuracy, differences, and who leads at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from foveate.demo.evaluate import Score
from foveate.lab.answers import Answer
from foveate.lab.compare import Comparison, Pair, Sheet, compare, discoveries

FULL, BLIND, RANDOM, DOWNSCALE = "full", "blind", "random", "downscale"

Budget = float | int | None


@dataclass(frozen=True)
class Row:
    """One arm.

    Args:
        arm: Its name.
        method: The same without its budget.
        budget: Tokens per image, or their share; None for ``full`` and ``blind``.
        mean_alive: Visual tokens per decoder layer, measured.
        score: All its answers.
        types: Its answers by type of question.
        hard: Its answers to the hard questions; None if they cannot be told.
        retention: Accuracy by that of ``full``, on the questions that both answered.
        full: Against ``full``.
        random: Against ``random`` at the same budget.
        plain: Of a method with options against the same without them, at the same budget.
    """

    arm: str
    method: str
    budget: Budget
    mean_alive: float
    score: Score
    types: dict[str, Score]
    hard: Score | None = None
    retention: float | None = None
    full: Comparison | None = None
    random: Comparison | None = None
    plain: Comparison | None = None


@dataclass(frozen=True)
class Winner:
    """The best method at a budget, on the questions that every method at this budget answered.

    Args:
        budget: At which budget.
        type: Of which type of question; None for all.
        best: The method with the most right answers.
        score: Its answers.
        second: The method that comes next.
        second_score: Its answers.
        lead: The best against the next.
    """

    budget: Budget
    type: str | None
    best: str
    score: Score
    second: str
    second_score: Score
    lead: Comparison


@dataclass(frozen=True)
class Summary:
    """Everything that the tables show.

    Args:
        rows: The arms: ``full``, ``blind``, then each method from its largest budget to its smallest.
        winners: By budget and type.
        types: Questions of each type.
        items: Questions that any arm answered.
        pictures: Pictures these are about.
        hard: Questions that ``full`` gets right, and neither ``blind`` nor ``easy`` does; None if they cannot be told.
        easy: The arm with the most downscaled pictures, if there is one.
        whole: ``full`` and ``blind`` on all their questions, where they were asked more than the methods.
    """

    rows: tuple[Row, ...]
    winners: tuple[Winner, ...]
    types: dict[str, int]
    items: int
    pictures: int
    hard: int | None
    easy: str | None
    whole: tuple[Row, ...] = ()

    @property
    def budgets(self) -> list[Budget]:
        """Budgets from large to small: tokens, then shares, then methods that have a budget of their own."""
        found = {_size(row.budget): row.budget for row in self.rows if row.arm not in (FULL, BLIND)}
        return [found[size] for size in sorted(found, reverse=True)]

    def row(self, arm: str) -> Row | None:
        """Return an arm's row, if it answered anything."""
        return next((row for row in self.rows if row.arm == arm), None)

    def at(self, budget: Budget) -> list[Row]:
        """Return the methods' rows at a budget, the most accurate first."""
        rows = [row for row in self.rows if _size(row.budget) == _size(budget) and row.arm not in (FULL, BLIND)]
        return sorted(rows, key=lambda row: -row.score.accuracy)

    def won(self, budget: Budget) -> dict[str | None, Winner]:
        """Return who leads at a budget by type of question, None for all."""
        return {winner.type: winner for winner in self.winners if _size(winner.budget) == _size(budget)}

    def methods(self) -> list[str]:
        """Return the methods, the most accurate at its best budget first."""
        best: dict[str, float] = {}
        for budget in self.budgets:
            for row in self.at(budget):
                best[row.method] = max(best.get(row.method, 0.0), row.score.accuracy)
        return sorted(best, key=lambda method: -best[method])


def summarise(answers: Sequence[Answer], first: int | None = None) -> Summary:
    """Return the statistics of some answers; arms need not have answered everything.

    Args:
        answers: The answers of all arms.
        first: How many questions were put to methods, where ``full`` and ``blind`` were asked more. All is then about
            the questions that any method answered, but for `Summary.whole`.

    Raises:
        TaskError: If there are no answers, or two arms were not asked the same.
    """
    shared = {answer.item for answer in answers if answer.arm not in (FULL, BLIND)}
    if first is not None and shared:
        common = [answer for answer in answers if answer.item in shared]
        if len(common) < len(answers):
            bounds = summarise([answer for answer in answers if answer.arm in (FULL, BLIND)])
            return replace(summarise(common), whole=bounds.rows)
    sheet = Sheet.of(answers)
    places = sorted(range(len(sheet.arms)), key=lambda place: _order(sheet, place))
    full = sheet.place(FULL)
    to_full = {place: _pair(sheet, place, full) for place in places}
    to_random = {place: _pair(sheet, place, _random(sheet, place)) for place in places}
    to_plain = {place: _pair(sheet, place, _plain(sheet, place)) for place in places}
    leads = _leads(sheet)
    pairs = [*to_full.values(), *to_random.values(), *to_plain.values(), *(pair for _, _, pair in leads)]
    found = iter(compare(sheet, [pair for pair in pairs if pair is not None]))
    against_full = {place: next(found) for place, pair in to_full.items() if pair is not None}
    against_random = discoveries({place: next(found) for place, pair in to_random.items() if pair is not None})
    against_plain = {place: next(found) for place, pair in to_plain.items() if pair is not None}
    hard, easy = _hard(sheet)
    rows = []
    for place in places:
        arm = sheet.arms[place]
        types = {kind: sheet.score(place, sheet.kinds == number) for number, kind in enumerate(sheet.types)}
        rows.append(
            Row(
                arm=arm.arm,
                method=arm.method,
                budget=arm.budget,
                mean_alive=float(sheet.alive[place][sheet.asked[place]].mean()),
                score=sheet.score(place),
                types={kind: score for kind, score in types.items() if score.n},
                hard=None if hard is None else sheet.score(place, hard),
                retention=None if full is None else _retention(sheet, place, full),
                full=against_full.get(place),
                random=against_random.get(place),
                plain=against_plain.get(place),
            )
        )
    return Summary(
        rows=tuple(rows),
        winners=tuple(
            Winner(
                budget=budget,
                type=kind,
                best=sheet.arms[pair.one].method,
                score=sheet.score(pair.one, pair.among),
                second=sheet.arms[pair.other].method,
                second_score=sheet.score(pair.other, pair.among),
                lead=next(found),
            )
            for budget, kind, pair in leads
        ),
        types={kind: int((sheet.kinds == number).sum()) for number, kind in enumerate(sheet.types)},
        items=len(sheet.kinds),
        pictures=int(sheet.pictures.max()) + 1,
        hard=None if hard is None else int(hard.sum()),
        easy=None if easy is None else sheet.arms[easy].arm,
    )


# -- who is compared with whom, and on what


def _size(budget: Budget) -> tuple[int, float]:
    """Return what budgets sort by, in which one token (1) is not all of them (1.0)."""
    return (-1, 0.0) if budget is None else (int(isinstance(budget, int)), float(budget))


def _order(sheet: Sheet, place: int) -> tuple[float, ...]:
    """Sort full, blind, then methods as they came, from their largest budget down."""
    arm = sheet.arms[place]
    if arm.arm in (FULL, BLIND):
        return (float(arm.arm == BLIND),)
    first = min(i for i, other in enumerate(sheet.arms) if other.method == arm.method)
    kind, size = _size(arm.budget)
    return (2.0, float(first), -float(kind), -size)


def _pair(sheet: Sheet, one: int, other: int | None) -> Pair | None:
    """Return the two arms, unless they are one, or have no question in common."""
    if other is None or one == other or not (sheet.asked[one] & sheet.asked[other]).any():
        return None
    return Pair(one, other, np.ones(len(sheet.kinds), dtype=bool))


def _random(sheet: Sheet, place: int) -> int | None:
    """Return the row of ``random`` at the same budget."""
    size = _size(sheet.arms[place].budget)
    return next((i for i, arm in enumerate(sheet.arms) if arm.method == RANDOM and _size(arm.budget) == size), None)


def _plain(sheet: Sheet, place: int) -> int | None:
    """Return the row of the same method without options, at the same budget."""
    name, options, _ = sheet.arms[place].method.partition(":")
    size = _size(sheet.arms[place].budget)
    same = (i for i, arm in enumerate(sheet.arms) if arm.method == name and _size(arm.budget) == size)
    return next(same, None) if options else None


def _retention(sheet: Sheet, place: int, full: int) -> float | None:
    both = sheet.asked[place] & sheet.asked[full]
    before = int(sheet.right[full][both].sum())
    return int(sheet.right[place][both].sum()) / before if before else None


def _hard(sheet: Sheet) -> tuple[Bool[np.ndarray, " items"] | None, int | None]:
    """Return the items that need the picture, and its details; and the arm that sees the fewest of them."""
    small = [i for i, arm in enumerate(sheet.arms) if arm.method.partition(":")[0] == DOWNSCALE]
    means = {i: sheet.alive[i][sheet.asked[i]].mean() for i in small}
    easy = min(means, key=means.__getitem__, default=None)
    full, blind = sheet.place(FULL), sheet.place(BLIND)
    if full is None or blind is None or easy is None:
        return None, easy
    missed = [sheet.asked[i] & ~sheet.right[i] for i in (blind, easy)]
    return sheet.asked[full] & sheet.right[full] & missed[0] & missed[1], easy


def _leads(sheet: Sheet) -> list[tuple[Budget, str | None, Pair]]:
    """Return for each budget and type the best method and the next, on what all at this budget answered."""
    leads = []
    by_size: dict[tuple[int, float], list[int]] = {}
    for place, arm in enumerate(sheet.arms):
        if arm.arm not in (FULL, BLIND):
            by_size.setdefault(_size(arm.budget), []).append(place)
    for _, places in sorted(by_size.items(), reverse=True):
        every = sheet.asked[places].all(0)
        kinds = [(None, every), *((kind, every & (sheet.kinds == i)) for i, kind in enumerate(sheet.types))]
        for kind, among in kinds if len(sheet.types) > 1 else kinds[:1]:
            if len(places) > 1 and among.any():
                best, second = sorted(places, key=lambda place: -sheet.score(place, among).right)[:2]
                leads.append((sheet.arms[best].budget, kind, Pair(best, second, among)))
    return leads
