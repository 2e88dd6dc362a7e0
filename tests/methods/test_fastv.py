from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import BudgetError, FastV
from foveate.budget import alive_per_layer
from tests.methods.helpers import array, gap, make_evidence, top, waves


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    words=st.integers(1, 6),
    share=st.sampled_from([0.05, 0.5, 1.0, 3, 0]),
)
def test_it_keeps_what_the_last_prompt_token_attends_to(seed: int, n: int, words: int, share: float) -> None:
    evidence = make_evidence(n, seed, words=words)
    wanted = array(evidence.relevance)[words - 1]
    assume(gap(wanted) > 1e-7)
    answer = FastV(stages=((2, share),)).select(evidence, 2)
    k = min(share, n) if isinstance(share, int) else math.floor(share * n + 1e-9)
    assert answer.keep.tolist() == top(wanted, k)
    assert array(answer.scores) == pytest.approx(wanted)


def test_only_the_last_word_has_a_say() -> None:
    relevance = torch.tensor([[0.9, 0.0, 0.0, 0.1], [0.1, 0.2, 0.4, 0.3]])
    assert FastV().select(make_evidence(4, relevance=relevance), 2).keep.tolist() == [2, 3]


def test_half_leaves_before_layer_two() -> None:
    method = FastV()
    assert [method.sites(layers) for layers in (12, 23, 24, 32, 80)] == [(1,), (1,), (2,), (2,), (2,)]
    assert method.schedule(576, 32) == ((2, 0.5),)
    assert method.expected(576, 576, 2, 32) == 288


@pytest.mark.parametrize(("mean", "stays"), [(192, 166), (128, 98), (64, 30)])
def test_counts_of_the_usual_budgets(mean: int, stays: int) -> None:
    method = FastV(keep=mean)
    assert method.expected(576, 576, 2, 32) == stays
    assert abs(sum(alive_per_layer(576, method.schedule(576, 32), 32)) / 32 - mean) <= 0.5


def test_another_layer() -> None:
    assert FastV(keep=0.25, layer=3).sites(28) == (3,)
    assert FastV(stages=((3, 0.5), (9, 0))).sites(28) == (3, 9)
    with pytest.raises(BudgetError, match=r"do not fit a model of 6 layers\nhint: keep=64"):
        FastV(layer=6).sites(6)


def test_without_text_after_the_image_its_first_tokens_stay() -> None:
    answer = FastV().select(make_evidence(6, relevance=torch.zeros(0, 6)), 2)
    assert answer.keep.tolist() == [0, 1, 2]
    assert answer.scores is not None and answer.scores.tolist() == [0.0] * 6


def test_golden() -> None:
    evidence = make_evidence(12, relevance=waves(3, 12).softmax(1))
    assert FastV().select(evidence, 2).keep.tolist() == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "options",
    [
        {"layer": 0},
        {"layer": 3, "stages": ((3, 0.5),)},
        {"keep": 64, "stages": ((3, 0.5),)},
        {"keep": 64.0},
        {"stages": ((0, 0.5),)},
    ],
)
def test_bad_options_are_refused_with_a_hint(options: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        FastV(**options)


def test_a_mean_out_of_reach_is_refused() -> None:
    with pytest.raises(BudgetError, match="out of reach"):
        FastV(keep=0.05).expected(576, 576, 2, 32)
