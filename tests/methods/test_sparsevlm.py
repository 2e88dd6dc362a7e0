from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import BudgetError, SparseVLM
from foveate.budget import resolve_keep
from tests.methods.helpers import Array, array, clusters, gap, make_evidence, top, waves


def raters(features: Array, text: Array) -> tuple[list[int], float]:
    """The words whose mean over tokens of softmax(H_v H_t^T) exceeds the average, and how clearly they do."""
    likeness = np.zeros(len(text))
    for x in features:
        logits = np.array([float(x @ e) for e in text])
        shares = np.exp(logits - logits.max())
        likeness += shares / shares.sum() / len(features)
    chosen = [j for j in range(len(text)) if likeness[j] > likeness.mean()]
    return chosen or list(range(len(text))), float(np.abs(likeness - likeness.mean()).min())


def scored(evidence: Any) -> tuple[Array, float]:
    chosen, margin = raters(array(evidence.features), array(evidence.text))
    return sum(array(evidence.relevance)[j] for j in chosen) / len(chosen), margin  # type: ignore[return-value]


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), words=st.integers(2, 7), k=st.integers(0, 30))
def test_raters_choose_by_their_mean_attention(seed: int, n: int, words: int, k: int) -> None:
    evidence = make_evidence(n, seed, words=words)
    wanted, margin = scored(evidence)
    assume(margin > 1e-5 and gap(wanted) > 1e-7)
    answer = SparseVLM(stages=((2, k),), recycle=0.0).select(evidence, 2)
    np.testing.assert_allclose(array(answer.scores), wanted, atol=1e-6)
    assert answer.keep.tolist() == top(wanted, k)
    assert answer.features is None


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 36),
    width=st.integers(1, 6),
    k=st.integers(0, 12),
    recycle=st.sampled_from([0.3, 0.7, 1.0]),
)
def test_the_best_of_what_leaves_is_merged_by_likeness(seed: int, n: int, width: int, k: int, recycle: float) -> None:
    evidence = make_evidence(n, seed, width)
    wanted, margin = scored(evidence)
    assume(margin > 1e-5 and gap(wanted) > 1e-7)
    order = sorted(range(n), key=lambda i: -wanted[i])
    kept, left = order[:k], order[k:]
    again = left[: math.floor(recycle * len(left) + 1e-9)]
    hidden = array(evidence.hidden)
    slots: dict[int, list[int]] = {token: [token] for token in kept}
    if again:
        peaks, nearest, narrow = clusters(hidden[again], len(again) // 10 + 1)
        assume(narrow > 1e-5)
        slots |= {again[p]: [again[i] for i in range(len(again)) if nearest[i] == g] for g, p in enumerate(peaks)}

    answer = SparseVLM(stages=((2, k),), recycle=recycle).select(evidence, 2)
    assert answer.keep.tolist() == sorted(slots)
    assert (answer.features is None) == (not again)
    if answer.features is not None and answer.merged_into is not None:
        for slot, token in enumerate(sorted(slots)):
            np.testing.assert_allclose(array(answer.features)[slot], hidden[slots[token]].mean(0), atol=1e-5)
            assert (answer.merged_into == slot).nonzero()[:, 0].tolist() == sorted(slots[token])
        assert (answer.merged_into < 0).sum() == n - k - len(again) if n > k else True


def test_by_hand() -> None:
    # Word 1 is nothing like the tokens, so word 0 rates alone: 0 and 1 stay. All others are recycled into one group;
    # 2 and 4 lie together, the lone 3 has the others farther away: the densest row is the only peak.
    evidence = make_evidence(
        5,
        features=torch.tensor([[1.0, 0.0]]).repeat(5, 1),
        text=torch.tensor([[2.0, 0.0], [-2.0, 0.0]]),
        relevance=torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0, 0.9]]),
        hidden=torch.tensor([[9.0, 9.0], [8.0, 8.0], [1.0, 0.0], [4.0, 3.0], [1.0, 1.5]]),
    )
    answer = SparseVLM(stages=((2, 2),), recycle=1.0).select(evidence, 2)
    assert answer.keep.tolist() == [0, 1, 4]
    assert answer.features is not None and answer.merged_into is not None
    assert answer.features.tolist() == [[9.0, 9.0], [8.0, 8.0], [2.0, 1.5]]
    assert answer.merged_into.tolist() == [0, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("mean", "alive", "measured"),
    [(192, (309, 204, 113), 192.03125), (128, (312, 117, 39), 128.625), (64, (82, 32, 18), 64.8125)],
)
def test_the_published_counts_make_their_mean_with_what_is_recycled(
    mean: int, alive: tuple[int, ...], measured: float
) -> None:
    method = SparseVLM(keep=mean)
    assert method.sites(32) == (2, 6, 15)
    assert per_layer(method, 576, 32)[[2, 6, 15]].tolist() == list(alive)
    assert per_layer(method, 576, 32).mean() == measured


def per_layer(method: SparseVLM, n: int, layers: int) -> Any:
    alive, counts = n, []
    for layer in range(layers):
        if layer in method.sites(layers):
            alive = method.expected(alive, n, layer, layers)
        counts.append(alive)
    return np.array(counts)


@given(
    n=st.integers(16, 3000),
    layers=st.integers(8, 80),
    share=st.floats(0.2, 1.0),
    recycle=st.sampled_from([0.0, 0.3, 0.5]),
)
def test_a_mean_is_met_with_what_is_recycled(n: int, layers: int, share: float, recycle: float) -> None:
    method = SparseVLM(keep=share, recycle=recycle)
    counts = per_layer(method, n, layers)
    assert list(counts) == sorted(counts, reverse=True)
    assert abs(counts.mean() - resolve_keep(share, n)) <= 0.5 or (n, layers) == (576, 32)


def test_the_default_is_the_mean_of_a_third() -> None:
    assert SparseVLM().schedule(576, 32) == SparseVLM(keep=192).schedule(576, 32) == ((2, 300), (6, 200), (15, 110))
    assert abs(per_layer(SparseVLM(), 1000, 28).mean() - 333) <= 0.5


def test_where_no_word_stands_out_all_rate() -> None:
    relevance = torch.tensor([[0.1, 0.2, 0.3], [0.2, 0.2, 0.0]])
    for text in (torch.zeros(2, 8), torch.ones(2, 8)):
        answer = SparseVLM(stages=((2, 1),), recycle=0.0).select(make_evidence(3, relevance=relevance, text=text), 2)
        assert array(answer.scores) == pytest.approx([0.15, 0.2, 0.15])
    alone = make_evidence(3, relevance=relevance[:1], text=torch.ones(1, 8))
    assert SparseVLM(stages=((2, 1),), recycle=0.0).select(alone, 2).keep.tolist() == [2]


def test_without_text_after_the_image_its_first_tokens_stay() -> None:
    evidence = make_evidence(6, relevance=torch.zeros(0, 6), text=torch.zeros(0, 8))
    answer = SparseVLM(stages=((2, 3),), recycle=0.0).select(evidence, 2)
    assert answer.keep.tolist() == [0, 1, 2]
    assert answer.scores is not None and answer.scores.tolist() == [0.0] * 6


def test_golden() -> None:
    evidence = make_evidence(
        24, features=waves(24, 6), text=waves(4, 6, step=0.3), relevance=waves(4, 24).softmax(1), hidden=waves(24, 6)
    )
    answer = SparseVLM(stages=((2, 6),), recycle=0.8).select(evidence, 2)
    assert (answer.keep.tolist(), answer.merged_into.tolist()) == GOLDEN  # type: ignore[union-attr]


GOLDEN = (
    [0, 1, 4, 5, 6, 10, 12, 19],
    [0, 1, 1, -1, 2, 3, 4, -1, 3, 1, 5, -1, 6, 1, 1, 1, 1, 1, 1, 7, -1, 3, 1, 1],
)


@pytest.mark.parametrize(
    "options", [{"recycle": -0.1}, {"recycle": 1.5}, {"keep": 64, "stages": ((3, 0.5),)}, {"keep": 0}, {"stages": ()}]
)
def test_bad_options_are_refused_with_a_hint(options: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        SparseVLM(**options)
