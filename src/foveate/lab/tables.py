"""The tables of an evaluation: what the Markdown file and the page both show, in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foveate.demo.evaluate import Score
from foveate.lab.compare import DRAWS, FEWEST, LEVEL, Comparison
from foveate.lab.summary import BLIND, FULL, Budget, Row, Summary, Winner


@dataclass(frozen=True)
class Cell:
    """A field of a table.

    Args:
        text: What it says.
        value: What the column is sorted by; None sorts last.
        strong: Whether it stands out.
    """

    text: str
    value: float | str | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Columns and rows; the first column names the row."""

    columns: list[str]
    rows: list[list[Cell]]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        lines = ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        for row in self.rows:
            cells = [f"**{cell.text}**" if cell.strong else cell.text for cell in row]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(lines)


def overall(summary: Summary) -> Table:
    """Return accuracy by method and budget."""
    rows = [
        [_name(bound), *[_accuracy(row)] * len(summary.budgets)]
        for bound in (FULL, BLIND)
        if (row := summary.row(bound)) is not None
    ]
    for method in summary.methods():
        found = [next((row for row in summary.at(budget) if row.method == method), None) for budget in summary.budgets]
        rows.append([_name(method), *(_nothing() if row is None else _accuracy(row) for row in found)])
    return Table(["method", *map(tokens, summary.budgets)], rows)


def differences(summary: Summary, budget: Budget) -> Table:
    """Return how each method at a budget compares with ``full`` and ``random``."""
    columns = ["method", "tokens per layer", "n", "% right", "% of full"]
    columns += ["points to full", "+ / −", "p", "points to random", "+ / −", "p", "q"]
    return Table(columns, [[_name(row.method), *_measured(row)] for row in summary.at(budget)])


def everything(summary: Summary) -> Table:
    """Return all arms, one row each."""
    columns = ["arm", "budget", "tokens per layer", "n", "% right", "% of full"]
    columns += ["points to full", "+ / −", "p", "points to random", "+ / −", "p", "q"]
    columns += ["% of hard"] if summary.hard else []
    rows = []
    for row in summary.rows:
        budget = Cell("" if row.budget is None else f"{row.budget:g}", row.mean_alive)
        hard = [_score(row.hard)] if summary.hard else []
        rows.append([_name(row.arm), budget, *_measured(row), *hard])
    return Table(columns, rows)


def options(summary: Summary) -> Table:
    """Return how methods with options compare with themselves without, at the same budget."""
    columns = [
        "arm",
        "budget",
        "tokens per layer",
        "n",
        "% right",
        "points to the method without options",
        "+ / −",
        "p",
    ]
    rows = []
    for row in summary.rows:
        if row.plain is not None:
            alive, n = Cell(f"{row.mean_alive:.1f}", row.mean_alive), Cell(str(row.score.n), row.score.n)
            rows.append([_name(row.arm), _name(tokens(row.budget)), alive, n, _accuracy(row), *_compared(row.plain)])
    return Table(columns, rows)


def whole(summary: Summary) -> Table:
    """Return accuracy on all questions by type, of the arms that answered more of them than methods did."""
    kinds = list(dict.fromkeys(kind for row in summary.whole for kind in row.types))
    rows = []
    for row in summary.whole:
        scores = [_share(row.types.get(kind), False) for kind in kinds]
        rows.append([_name(row.arm), Cell(str(row.score.n), row.score.n), _accuracy(row), *scores])
    return Table(["arm", "n", "% right", *kinds], rows)


def by_type(summary: Summary, budget: Budget) -> Table:
    """Return accuracy by method and type of question at a budget; the best is strong."""
    won = summary.won(budget)
    rows = []
    for row in (summary.row(FULL), *summary.at(budget), summary.row(BLIND)):
        if row is not None:
            scores = [(kind, row.types.get(kind)) for kind in summary.types]
            rows.append([_name(row.method), *(_share(s, k in won and won[k].best == row.method) for k, s in scores)])
    counts = [Cell(str(n), n) for n in summary.types.values()]
    return Table(["method", *summary.types], [*rows, [_name("questions"), *counts]])


def winners(summary: Summary) -> Table:
    """Return the best method by type of question and budget, strong where its lead is sure."""
    kinds = list(dict.fromkeys(winner.type for winner in summary.winners))
    rows = []
    for kind in kinds:
        found = [summary.won(budget).get(kind) for budget in summary.budgets]
        rows.append([_name("all" if kind is None else kind), *map(_won, found)])
    return Table(["questions", *map(tokens, summary.budgets)], rows)


def hard(summary: Summary) -> Table:
    """Return accuracy on the hard questions by method and budget."""
    ranked: dict[str, float] = {}
    for row in summary.rows:
        if row.hard is not None and row.hard.n and row.arm not in (FULL, BLIND):
            ranked[row.method] = max(ranked.get(row.method, 0.0), row.hard.accuracy)
    rows = []
    for method in sorted(ranked, key=lambda name: -ranked[name]):
        found = [next((row for row in summary.at(budget) if row.method == method), None) for budget in summary.budgets]
        rows.append([_name(method), *(_nothing() if row is None else _score(row.hard) for row in found)])
    return Table(["method", *map(tokens, summary.budgets)], rows)


def verdicts(summary: Summary) -> list[str]:
    """Return a sentence for each budget: who leads, and whether that is sure."""
    said = []
    for budget in summary.budgets:
        if (winner := summary.won(budget).get(None)) is not None:
            lead, start = f"{difference(winner.lead)} points", f"{tokens(budget)}: {winner.best}"
            if winner.lead.decided:
                said.append(f"{start} leads with {percent(winner.score)} %, {lead} over {winner.second}.")
            else:
                said.append(
                    f"{start} has {percent(winner.score)} %; its lead over {winner.second}, {lead}, may be chance."
                )
    return said


def asked(summary: Summary, header: Mapping[str, Any]) -> str:
    """Return the sentences that say how much was asked."""
    about = f"{summary.items} questions about {summary.pictures} {header.get('about', 'pictures')}"
    said = f"{about}, put to {len(summary.rows)} arms."
    if len(summary.types) > 1:
        said += f" By type: {', '.join(f'{kind} {n}' for kind, n in summary.types.items())}."
    if summary.whole:
        every = ", ".join(f"{row.arm} {_score(row.score).text} % of {row.score.n}" for row in summary.whole)
        said += f" Two arms answered further questions as well; right over all of them: {every}."
    return said


def unfinished(summary: Summary, header: Mapping[str, Any]) -> str:
    """Return which arms have not answered everything yet; empty if all have."""
    told = [header[name] for name in ("first", "n") if isinstance(header.get(name), int)]
    n = max(summary.items, min(told, default=0))
    behind = [f"{row.arm} {row.score.n}" for row in summary.rows if row.score.n < n]
    return f"Unfinished: fewer than {n} questions were answered by {', '.join(behind)}." if behind else ""


def refused(header: Mapping[str, Any]) -> list[str]:
    """Return which arms could not run, and why."""
    by_reason: dict[str, list[str]] = {}
    for arm, reason in header.get("refused", {}).items():
        by_reason.setdefault(reason, []).append(arm)
    return [f"{', '.join(arms)} could not run: {reason}." for reason, arms in by_reason.items()]


def reading(summary: Summary) -> list[str]:
    """Return how the numbers are to be read."""
    against_random = sum(row.random is not None for row in summary.rows)
    said = [
        f"% right has Wilson's {LEVEL} % interval. It takes questions as independent; those about one picture are not "
        "quite, so that it is a little too narrow.",
        "Points are differences of % right, on the questions that both arms answered. For their "
        f"{LEVEL} % intervals the pictures were drawn anew {DRAWS:,} times, each with all its questions; where fewer "
        f"than {FEWEST} pictures are left, none is given.",
        "Two methods whose own intervals overlap may still differ for sure, because both answered the same questions: "
        "the interval of their difference tells.",
        "+ / − are the questions that only this arm got right, and those that only the other did. p is McNemar's exact "
        "test, two-sided, of whether the two are equally likely; like Wilson's interval it takes questions as "
        "independent.",
        "Tokens per layer are the visual tokens in each layer of the decoder, measured, and averaged over layers and "
        "questions. % of full is accuracy divided by that with all tokens.",
        "The best of many methods is partly lucky, and among many types some lead will seem sure by chance: leads say "
        "where to look.",
    ]
    if against_random:
        said.insert(
            4,
            f"q is p after Benjamini and Hochberg, over all {against_random} comparisons with random: among those with "
            "q up to some level, about that share is expected to be false alarms.",
        )
    if summary.hard is not None:
        said.append(
            f"Hard are the {summary.hard} questions that full gets right, and neither blind nor {summary.easy} does: "
            "the others do not need the details in which methods differ. By that, these two have none of them right."
        )
    return said


def conditions(header: Mapping[str, Any]) -> dict[str, str]:
    """Return a run's header, flat: one line for each condition."""
    flat: dict[str, str] = {}
    for name, value in header.items():
        if name == "refused" or value is None:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{name} {inner}": text for inner, text in conditions(value).items()}
        else:
            flat[name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return flat


def tokens(budget: Budget) -> str:
    """Return a budget in words.

    Example:
        >>> tokens(64), tokens(0.1), tokens(None)
        ('64 tokens', '10 % of tokens', 'own budget')
    """
    if budget is None:
        return "own budget"
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:g} % of tokens"


def percent(score: Score) -> str:
    """Return percent right, to a tenth."""
    return f"{100 * score.accuracy:.1f}"


def difference(comparison: Comparison) -> str:
    """Return a difference in points, with its interval if it has one."""
    middle = _signed(comparison.difference)
    if comparison.low is None or comparison.high is None:
        return middle
    return f"{middle} ({_signed(comparison.low)} .. {_signed(comparison.high)})"


# -- cells


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _probability(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _name(text: str) -> Cell:
    return Cell(text, text)


def _nothing() -> Cell:
    return Cell("")


def _share(score: Score | None, strong: bool) -> Cell:
    return _nothing() if score is None else Cell(f"{100 * score.accuracy:.0f}", score.accuracy, strong)


def _score(score: Score | None) -> Cell:
    if score is None or not score.n:
        return _nothing()
    low, high = score.interval
    return Cell(f"{percent(score)} ({100 * low:.1f} .. {100 * high:.1f})", score.accuracy)


def _accuracy(row: Row) -> Cell:
    return _score(row.score)


def _measured(row: Row) -> list[Cell]:
    kept = _nothing() if row.retention is None else Cell(f"{100 * row.retention:.1f}", row.retention)
    alive, n = Cell(f"{row.mean_alive:.1f}", row.mean_alive), Cell(str(row.score.n), row.score.n)
    q = row.random.q if row.random is not None else None
    more = _nothing() if q is None else Cell(_probability(q), q)
    return [alive, n, _accuracy(row), kept, *_compared(row.full), *_compared(row.random), more]


def _compared(comparison: Comparison | None) -> list[Cell]:
    if comparison is None:
        return [_nothing()] * 3
    return [
        Cell(difference(comparison), comparison.difference, comparison.decided),
        Cell(f"{comparison.gained} / {comparison.lost}", comparison.gained - comparison.lost),
        Cell(_probability(comparison.p), comparison.p),
    ]


def _won(winner: Winner | None) -> Cell:
    if winner is None:
        return _nothing()
    text = f"{winner.best} {percent(winner.score)}, {difference(winner.lead)} over {winner.second}"
    return Cell(text, winner.score.accuracy, winner.lead.decided)
