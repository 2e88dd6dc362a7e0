"""The statistics agree with what is worked out by other means, and intervals hold what they promise."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from foveate.demo.evaluate import Score
from foveate.errors import MissingDependency, TaskError
from foveate.lab import compare
from foveate.lab.answers import Answer, read
from foveate.lab.compare import FEWEST, Pair, Sheet, mcnemar
from foveate.lab.summary import Summary, summarise

Rights = Sequence[bool | int]


def answers(
    arm: str, rights: Rights, pictures: Sequence[int] | None = None, types: Sequence[str] = ("a",)
) -> list[Answer]:
    """Return an arm's answers to the first questions, a picture each unless told."""
    name, _, keep = arm.partition(":keep=")
    budget = None if not keep else float(keep) if "." in keep else int(keep)
    about = range(len(rights)) if pictures is None else pictures
    alive = float(budget or 576)
    return [
        Answer(arm, name, budget, str(i), f"{about[i]}.png", types[i % len(types)], "x", bool(right), alive)
        for i, right in enumerate(rights)
    ]


def arms(rights: dict[str, Rights], types: Sequence[str] = ("a",)) -> Summary:
    return summarise([answer for arm, right in rights.items() for answer in answers(arm, right, types=types)])


def clustered(seed: int, rounds: int, n: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw two arms on pictures, some of which suit the one and some the other; by 0.1 the one is better.

    Returns:
        Right answers of both, of shape [rounds, pictures, questions].
    """
    generator = np.random.default_rng(seed)
    easy = generator.uniform(0.35, 0.5, (rounds, n, 1))
    better = generator.uniform(-0.25, 0.45, (rounds, n, 1))
    return generator.random((rounds, n, each)) < easy + better, generator.random((rounds, n, each)) < easy


def test_mcnemar_by_hand() -> None:
    """Twice the smaller tail of fair coin tosses, at most 1."""
    for gained, lost in [(0, 1), (1, 8), (10, 3), (5, 5), (40, 22)]:
        n = gained + lost
        tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
        assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(0, 0) == 1.0


def test_false_discoveries_by_hand() -> None:
    """Each p times the number of comparisons by its rank, made monotone from the largest down."""
    p = [0.01, 0.04, 0.03, 0.005, 0.5]
    one = compare.Comparison(1, 1, 0.0, None, None, 0, 0, 0.0)
    found = compare.discoveries({i: compare.replace(one, p=value) for i, value in enumerate(p)})
    by_hand = [0.01 * 5 / 2, 0.04 * 5 / 4, 0.03 * 5 / 3, 0.005 * 5, 0.5]
    assert [found[i].q for i in range(5)] == pytest.approx(by_hand)


def test_a_comparison_counts_what_it_says() -> None:
    full, method = [1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1]
    found = arms({"full": full, "evocut:keep=8": method}).row("evocut:keep=8")
    assert found is not None and found.full is not None
    assert (found.full.n, found.full.gained, found.full.lost) == (6, 1, 2)
    assert found.full.difference == pytest.approx(-1 / 6)
    assert found.retention == pytest.approx(3 / 4)


def test_interval_agrees_with_the_theory_of_clusters() -> None:
    """Half its width is 1.96 standard errors of a mean over pictures."""
    one, other = (rights[0] for rights in clustered(1, 1, n=400, each=4))
    pictures = [i // 4 for i in range(one.size)]
    sheet = Sheet.of(
        answers("one", one.ravel().tolist(), pictures) + answers("other", other.ravel().tolist(), pictures)
    )
    found = compare.compare(sheet, [Pair(0, 1, np.ones(one.size, dtype=bool))], draws=4000)[0]
    by_picture = one.mean(1) - other.mean(1)
    error = by_picture.std(ddof=1) / np.sqrt(400)
    assert (found.n, found.pictures) == (1600, 400) and found.difference == pytest.approx(by_picture.mean())
    assert found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert (found.high + found.low) / 2 == pytest.approx(found.difference, abs=0.1 * error)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Drawing pictures holds it 95 times in 100; drawing single questions, as if independent, far less often."""
    one, other = clustered(2, 400, n=60, each=12)
    difference = (one.astype(float) - other).transpose(1, 2, 0)  # pictures, questions, rounds
    by_picture, alone = difference.sum(1), difference.reshape(-1, 400)
    held = []
    for totals, n in ((by_picture, 12.0), (alone, 1.0)):
        low, high = compare.bootstrap(totals, np.full_like(totals, n), draws=1000)
        held.append(float(((low <= 0.1) & (high >= 0.1)).mean()))
    assert 0.92 <= held[0] <= 0.97
    assert held[1] < 0.87


def test_unfinished_arms_are_compared_on_what_both_answered() -> None:
    full = [1, 0] * 20
    summary = arms({"full": full, "random:keep=8": full[:30], "evocut:keep=8": [1] * 10})
    row = summary.row("evocut:keep=8")
    assert row is not None and row.full is not None and row.random is not None
    assert (row.score.n, row.full.n, row.random.n) == (10, 10, 10)
    assert (row.full.gained, row.full.lost, row.retention) == (5, 0, 2.0)
    assert (summary.won(8)[None].best, summary.won(8)[None].lead.n) == ("evocut", 10)
    ahead = arms({"full": full[:10], "random:keep=8": full[:4], "evocut:keep=8": [1] * 40}).row("evocut:keep=8")
    assert ahead is not None and ahead.full is not None and ahead.random is not None
    assert (ahead.full.n, ahead.full.gained, ahead.random.n, ahead.random.gained) == (10, 5, 4, 2)


def test_too_few_pictures_have_no_interval() -> None:
    few = arms({"full": [1] * (FEWEST - 1), "random:keep=8": [0] * (FEWEST - 1)}).rows[1].full
    enough = arms({"full": [1] * FEWEST, "random:keep=8": [0] * FEWEST}).rows[1].full
    assert few is not None and few.low is None and not few.decided
    assert enough is not None and enough.low == -1.0 and enough.decided


def test_hard_questions_need_the_picture_and_its_details() -> None:
    summary = arms(
        {
            "full": [1, 1, 1, 1, 0],
            "blind": [1, 0, 0, 0, 0],
            "downscale:keep=64": [1, 1, 1, 0, 0],
            "downscale:keep=8": [1, 1, 0, 0, 0],
            "evocut:keep=8": [0, 0, 1, 0, 1],
        }
    )
    row = summary.row("evocut:keep=8")
    assert (summary.easy, summary.hard) == ("downscale:keep=8", 2)  # the third and the fourth
    assert row is not None and row.hard == Score(1, 2)


def test_hard_is_unknown_without_the_arms_it_is_made_of() -> None:
    summary = arms({"full": [1, 0], "blind": [0, 0], "evocut:keep=8": [1, 1]})
    assert summary.hard is None and all(row.hard is None for row in summary.rows)


def test_random_is_compared_at_the_same_budget_only() -> None:
    """One token (1) is not all of them (1.0)."""
    summary = arms({"random:keep=1": [1, 1], "evocut:keep=1": [1, 0], "evocut:keep=1.0": [1, 1], "grid:keep=2": [1, 1]})
    compared = {row.arm: row.random is not None for row in summary.rows}
    assert compared == {"random:keep=1": False, "evocut:keep=1": True, "evocut:keep=1.0": False, "grid:keep=2": False}
    assert summary.budgets == [2, 1, 1.0] and [row.arm for row in summary.at(1.0)] == ["evocut:keep=1.0"]


def test_who_leads_by_type() -> None:
    """On `a` evocut is best and surely so, on `b` nobody is."""
    evocut, random = [1, 1] * 30, [0, 1] * 30
    summary = arms({"random:keep=8": random, "evocut:keep=8": evocut}, types=("a", "b"))
    won = summary.won(8)
    assert list(won) == [None, "a", "b"]
    assert (won["a"].best, won["a"].second, won["a"].lead.decided) == ("evocut", "random", True)
    assert won["a"].score.n == 30 and won["a"].lead.difference == 1.0
    assert not won["b"].lead.decided


def test_answers_to_different_questions_are_not_compared() -> None:
    with pytest.raises(TaskError, match="question '0' is not the same for"):
        summarise(answers("full", [1]) + answers("blind", [1], types=("b",)))
    with pytest.raises(TaskError, match="no answers"):
        summarise([])


def test_a_log_is_read_whatever_the_kill_has_left(tmp_path: Path) -> None:
    log = tmp_path / "accuracy.jsonl"
    lines = [json.dumps({"run": {"model": "demo"}}), *(json.dumps(vars(answer)) for answer in answers("full", [1, 0]))]
    log.write_text("\n".join(lines) + '\n{"arm": "full", "met')
    assert read(log) == ({"model": "demo"}, answers("full", [1, 0]))


def test_a_log_tells_of_all_its_starts(tmp_path: Path) -> None:
    log = tmp_path / "accuracy.jsonl"
    starts = [{"commit": "a", "refused": {"x": "why"}}, {"commit": "b"}, {"commit": "a"}]
    lines = [json.dumps({"run": start}) for start in starts] + [json.dumps({"refused": {"y": "so"}})]
    log.write_text("\n".join(lines) + "\n")
    assert read(log) == ({"commit": "a, b", "refused": {"x": "why", "y": "so"}}, [])


@pytest.mark.parametrize("name", ["scipy", "matplotlib"])
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = {"scipy": "foveate.lab.compare", "matplotlib": "foveate.lab.plots"}[name]
    importlib.import_module(module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(MissingDependency) as error:
        importlib.import_module(module)
    assert error.value.hint == "pip install 'foveate[lab]'"
