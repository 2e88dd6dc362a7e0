from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import DART, BudgetError
from foveate.budget import alive_per_layer
from tests.methods.helpers import array, gap, make_evidence, top, waves


def duplication_aware(evidence: Any, k: int, pivots: int) -> tuple[list[int], float]:
    """The tokens in the order in which they are picked, by loops; and the narrowest decision on the way."""
    states, words = array(evidence.hidden), array(evidence.text_hidden)
    norms = [sum(abs(x) for x in key) for key in array(evidence.keys)]
    word_norms = [sum(abs(x) for x in key) for key in array(evidence.text_keys)]
    margin = min(gap(np.array(norms)), gap(np.array(word_norms)))
    visual = sorted(range(len(states)), key=lambda i: -norms[i])[: min(pivots, k)]
    spoken = sorted(range(len(words)), key=lambda i: -word_norms[i])[:pivots]
    picks = list(visual)
    turns = [states[i] for i in visual] + [words[j] for j in spoken]
    rest = k - len(picks)
    for turn, pivot in enumerate(turns):
        for _ in range(rest // len(turns) + (turn < rest % len(turns))):
            cosine = {
                i: float(x @ pivot) / math.sqrt(float(x @ x) * float(pivot @ pivot))
                for i, x in enumerate(states)
                if i not in picks
            }
            ordered = sorted(cosine.values())
            margin = min([margin, *[second - ordered[0] for second in ordered[1:2]]])
            picks.append(min(cosine, key=lambda i: cosine[i]))
    return picks, margin


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    words=st.integers(0, 6),
    pivots=st.integers(1, 5),
    k=st.integers(0, 30),
)
def test_pivots_in_turn_pick_what_is_least_like_them(seed: int, n: int, words: int, pivots: int, k: int) -> None:
    evidence = make_evidence(n, seed, words=words)
    picks, margin = duplication_aware(evidence, min(k, n), pivots)
    assume(margin > 1e-5)
    answer = DART(stages=((2, k),), pivots=pivots).select(evidence, 2)
    assert answer.keep.tolist() == sorted(picks)
    assert answer.scores is not None
    assert answer.scores.argsort(descending=True, stable=True)[: len(picks)].tolist() == picks  # the order of picking
    assert all(float(answer.scores[i]) == 0.0 for i in range(n) if i not in picks)


def test_by_hand() -> None:
    # Tokens at 0, 10, 90, 170, 200 and 350 degrees. The one at 10 has the largest key, the word at 90 the larger one.
    # The pivot at 10 takes what is opposite, 200; the word at 90 what is opposite of it of the rest, 350.
    degrees = torch.tensor([0.0, 10.0, 90.0, 170.0, 200.0, 350.0]).deg2rad()
    evidence = make_evidence(
        6,
        hidden=torch.stack([degrees.cos(), degrees.sin()], 1),
        keys=torch.tensor([[1.0, 1.0], [-2.0, 2.0], [0.0, 3.0], [1.0, 0.0], [0.0, -1.0], [0.5, 0.5]]),
        text_keys=torch.tensor([[1.0, -1.0], [0.0, 0.5]]),
        text_hidden=torch.tensor([[0.0, 2.0], [1.0, 0.0]]),
    )
    answer = DART(stages=((2, 3),), pivots=1).select(evidence, 2)
    assert answer.keep.tolist() == [1, 4, 5]
    assert array(answer.scores) == pytest.approx([0, 1, 0, 0, 2 / 3, 1 / 3])


def test_few_places_go_to_the_pivots_alone() -> None:
    evidence = make_evidence(24)
    norms = array(evidence.keys.abs().sum(1))  # type: ignore[union-attr]
    for k in (1, 3, 4):
        assert DART(stages=((2, k),)).select(evidence, 2).keep.tolist() == top(norms, k)


def test_the_default_is_128_of_576_before_layer_two() -> None:
    assert DART().sites(12) == (1,) and DART().sites(32) == DART().sites(80) == (2,)
    assert DART().expected(576, 576, 2, 32) == 128
    assert DART(keep=64).expected(576, 576, 2, 32) == 30
    layers = alive_per_layer(2880, DART(keep=320).schedule(2880, 32), 32)
    assert abs(sum(layers) / 32 - 320) <= 0.5


def test_text_takes_no_part_where_none_follows_the_image() -> None:
    evidence = make_evidence(24, words=0)
    picks, _ = duplication_aware(evidence, 12, 4)
    assert DART(stages=((2, 12),)).select(evidence, 2).keep.tolist() == sorted(picks)


def test_golden() -> None:
    evidence = make_evidence(
        16,
        hidden=waves(16, 6),
        keys=waves(16, 4, step=0.3),
        text_keys=waves(5, 4, step=0.4),
        text_hidden=waves(5, 6, step=0.5),
    )
    assert DART(stages=((2, 9),), pivots=2).select(evidence, 2).keep.tolist() == [2, 7, 8, 9, 10, 11, 13, 14, 15]


@pytest.mark.parametrize(
    "options",
    [
        {"pivots": 0},
        {"layer": 0},
        {"layer": 3, "stages": ((3, 0.5),)},
        {"keep": 64, "stages": ((3, 0.5),)},
        {"keep": 0},
    ],
)
def test_bad_options_are_refused_with_a_hint(options: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        DART(**options)
