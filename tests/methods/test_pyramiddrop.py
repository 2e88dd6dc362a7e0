from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import BudgetError, PyramidDrop
from foveate.budget import alive_per_layer
from tests.methods.helpers import array, gap, make_evidence, top, waves


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), words=st.integers(1, 6))
def test_each_stage_keeps_the_better_half(seed: int, n: int, words: int) -> None:
    method, evidence = PyramidDrop(), make_evidence(n, seed, words=words)
    wanted = array(evidence.relevance)[words - 1]
    assume(gap(wanted) > 1e-7)
    for site in method.sites(32):
        answer = method.select(evidence, site)
        assert answer.keep.tolist() == top(wanted, n // 2)


@given(n=st.integers(1, 3000))
def test_half_a_quarter_an_eighth_of_the_original_stay(n: int) -> None:
    method, alive, counts = PyramidDrop(), n, []
    for site in method.sites(32):
        alive = method.expected(alive, n, site, 32)
        counts.append(alive)
    assert counts == [int(n * 0.5), int(n * 0.25), int(n * 0.125)]


def test_the_papers_mean_is_270_of_576() -> None:
    layers = alive_per_layer(576, PyramidDrop().schedule(576, 32), 32)
    assert sorted(set(layers), reverse=True) == [576, 288, 144, 72]
    assert [layers.count(count) for count in (576, 288, 144, 72)] == [8, 8, 8, 8]
    assert sum(layers) / 32 == 270
    assert PyramidDrop(keep=270, start=0.25).schedule(576, 32) == ((8, 288), (16, 144), (24, 72))


@pytest.mark.parametrize(
    ("layers", "sites"), [(32, (8, 16, 24)), (40, (10, 20, 30)), (28, (7, 14, 21)), (4, (1, 2, 3))]
)
def test_stages_are_of_equal_depth(layers: int, sites: tuple[int, ...]) -> None:
    assert PyramidDrop().sites(layers) == PyramidDrop(keep=0.5, start=0.25).sites(layers) == sites


@pytest.mark.parametrize("mean", [192, 128, 64])
def test_an_early_start_reaches_small_means(mean: int) -> None:
    method = PyramidDrop(keep=mean)
    assert method.sites(32) == (2, 12, 22)
    layers = alive_per_layer(576, method.schedule(576, 32), 32)
    assert abs(sum(layers) / 32 - mean) <= 0.5
    assert list(layers) == sorted(layers, reverse=True)
    (_, first), (_, second), (_, third) = method.schedule(576, 32)
    share = first / 576
    assert abs(second - share * first) <= 1 and abs(third - share * second) <= 1


def test_a_mean_out_of_reach_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"8 of 32 layers run with all tokens, which alone makes 144\nhint: keep at"):
        PyramidDrop(keep=64, start=0.25).expected(576, 576, 8, 32)


def test_without_text_after_the_image_its_first_tokens_stay() -> None:
    assert PyramidDrop().select(make_evidence(6, relevance=torch.zeros(0, 6)), 8).keep.tolist() == [0, 1, 2]


def test_golden() -> None:
    evidence = make_evidence(12, relevance=waves(2, 12).softmax(1))
    assert PyramidDrop(stages=((4, 5),)).select(evidence, 4).keep.tolist() == [0, 3, 6, 10, 11]


@pytest.mark.parametrize(
    "options",
    [
        {"start": 0.0},
        {"start": 1.0},
        {"start": 0.5, "stages": ((8, 0.5),)},
        {"keep": 64, "stages": ((8, 0.5),)},
        {"stages": ()},
    ],
)
def test_bad_options_are_refused_with_a_hint(options: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        PyramidDrop(**options)
