from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import BudgetError, EvoCut
from tests.methods.helpers import Array, array, gap, make_evidence, top, waves


def direction(row: Array) -> Array:
    return row / max(math.sqrt(sum(float(x) ** 2 for x in row)), 1e-12)


def deviation(before: Array, after: Array, groups: int, iterations: int) -> tuple[Array, float]:
    """Steps 2.1 to 2.4 of the algorithm for one transition; also the narrowest decision taken on the way."""
    n = len(before)
    moves = [direction(after[i] - before[i]) for i in range(n)]
    margin = 1.0

    def best(values: list[float]) -> int:
        nonlocal margin
        ordered = sorted(values, reverse=True)
        if len(ordered) > 1 and ordered[0] != ordered[1]:
            margin = min(margin, ordered[0] - ordered[1])
        return values.index(max(values))

    mean = sum(moves) / n
    chosen = [best([float(d @ mean) for d in moves])]
    while len(chosen) < groups:
        left = [-max(float(d @ moves[c]) for c in chosen) if i not in chosen else -9.0 for i, d in enumerate(moves)]
        chosen.append(best(left))
    centres = [moves[c] for c in chosen]
    for _ in range(iterations):
        member = [best([float(d @ c) for c in centres]) for d in moves]
        for m in range(groups):
            own = [d for d, group in zip(moves, member, strict=True) if group == m]
            if own:
                centres[m] = direction(np.sum(own, axis=0))
    return np.array([1.0 - max(float(d @ c) for c in centres) for d in moves]), margin


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(6, 20),
    width=st.integers(3, 8),
    groups=st.integers(1, 5),
    iterations=st.integers(0, 3),
    alpha=st.sampled_from([0.0, 0.5, 0.95]),
    transitions=st.integers(1, 4),
)
def test_the_fold_is_the_papers_algorithm(
    seed: int, n: int, width: int, groups: int, iterations: int, alpha: float, transitions: int
) -> None:
    states = np.random.default_rng(seed).normal(size=(transitions + 1, n, width)).astype(np.float32)
    method = EvoCut(keep=3, directions=groups, iterations=iterations, alpha=alpha)
    carry, wanted = None, np.zeros(n)
    for before, after in pairwise(states):
        r, margin = deviation(before.astype(np.float64), after.astype(np.float64), groups, iterations)
        assume(margin > 1e-5)
        wanted = alpha * wanted + (1 - alpha) * r
        carry = method.fold(carry, torch.from_numpy(before), torch.from_numpy(after))
    assert carry is not None
    np.testing.assert_allclose(carry.numpy(), wanted, atol=1e-5)
    assume(gap(wanted) > 1e-4)
    assert method.select(make_evidence(n, encoder_fold=carry), 0).keep.tolist() == top(wanted, 3)


@given(seed=st.integers(0, 10**6), alpha=st.floats(0.0, 0.99), transitions=st.integers(1, 13))
def test_the_moving_average_has_the_closed_form(seed: int, alpha: float, transitions: int) -> None:
    states = torch.from_numpy(np.random.default_rng(seed).normal(size=(transitions + 1, 10, 4)).astype(np.float32))
    method, memoryless = EvoCut(keep=3, alpha=alpha), EvoCut(keep=3, alpha=0.0)
    carry = None
    wanted = torch.zeros(10)
    for place in range(transitions):
        r = memoryless.fold(None, states[place], states[place + 1])
        wanted += (1 - alpha) * alpha ** (transitions - 1 - place) * r
        carry = method.fold(carry, states[place], states[place + 1])
    assert carry is not None
    torch.testing.assert_close(carry, wanted, atol=1e-5, rtol=1e-4)


def test_the_paper_reads_13_transitions_of_24_layers() -> None:
    assert list(EvoCut(keep=64).encoder_layers(24)) == list(range(12, 25))
    assert list(EvoCut(keep=64).encoder_layers(32)) == list(range(16, 33))
    assert list(EvoCut(keep=64, start=12, last=23).encoder_layers(24)) == list(range(12, 24))
    assert list(EvoCut(keep=64).encoder_layers(1)) == [1]


def test_a_token_that_moves_its_own_way_stays() -> None:
    before = torch.zeros(12, 4)
    after = torch.zeros(12, 4)
    after[:6, 0], after[6:, 1] = torch.rand(6) + 0.5, torch.rand(6) + 0.5  # two drifts, whatever the length of a step
    after[8] = torch.tensor([0.4, -0.5, 0.3, 0.7])
    method = EvoCut(keep=1, directions=2)
    scores = method.fold(None, before, after)
    assert method.select(make_evidence(12, encoder_fold=scores), 0).keep.tolist() == [8]


def test_each_crop_gets_its_share_and_global_ranks_all_together() -> None:
    scores = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    evidence = make_evidence(10, encoder_fold=scores, crops=(4, 3, 3))
    assert EvoCut(keep=5).select(evidence, 0).keep.tolist() == [0, 1, 4, 5, 7]
    assert EvoCut(keep=5, share="global").select(evidence, 0).keep.tolist() == [0, 1, 2, 3, 4]
    uneven = make_evidence(10, encoder_fold=scores, crops=(1, 3, 6))
    assert EvoCut(keep=7).select(uneven, 0).keep.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_the_fold_of_many_crops_is_the_fold_of_each() -> None:
    before, after = torch.randn(3, 12, 6), torch.randn(3, 12, 6)
    method = EvoCut(keep=4)
    together = torch.vmap(lambda b, a: method.fold(None, b, a))(before, after)
    alone = torch.stack([method.fold(None, b, a) for b, a in zip(before, after, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 5, 12])
def test_the_fold_survives_poor_inputs(n: int) -> None:
    method = EvoCut(keep=1)
    for move in (torch.zeros(n, 6), torch.ones(n, 6), torch.full((n, 6), 3e4)):
        scores = method.fold(None, torch.zeros(n, 6), move)
        assert scores.isfinite().all() and scores.min() >= -1e-5 and scores.max() <= 2.0
    half = method.fold(None, torch.randn(n, 6).bfloat16(), torch.randn(n, 6).bfloat16())
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_golden() -> None:
    states = waves(4, 16, 6)
    method, carry = EvoCut(keep=5, directions=3), None
    for before, after in pairwise(states):
        carry = method.fold(carry, before, after)
    assert carry is not None
    answer = method.select(make_evidence(16, encoder_fold=carry), 0)
    assert answer.keep.tolist() == GOLDEN_KEEP
    torch.testing.assert_close(answer.scores, torch.tensor(GOLDEN_SCORES), atol=1e-5, rtol=0)


GOLDEN_KEEP = [7, 12, 13, 14, 15]
GOLDEN_SCORES = [
    0.031409,
    0.033501,
    0.024375,
    0.039935,
    0.051142,
    0.033667,
    0.03418,
    0.070211,
    0.022809,
    0.052341,
    0.054796,
    0.050201,
    0.061695,
    0.078085,
    0.060993,
    0.058348,
]


@pytest.mark.parametrize(
    "options",
    [{"directions": 0}, {"iterations": -1}, {"alpha": 1.0}, {"alpha": -0.1}, {"start": 0}, {"start": 5, "last": 4}],
)
def test_bad_options_are_refused_with_a_hint(options: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        EvoCut(keep=4, **options)  # type: ignore[arg-type]


def test_transitions_that_the_encoder_lacks_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"an encoder of 12 layers has no transitions 13\.\.20"):
        EvoCut(keep=4, start=13, last=20).encoder_layers(12)
    with pytest.raises(BudgetError, match="start and last lie in"):
        EvoCut(keep=4, last=24).encoder_layers(12)


def test_tied_scores_keep_the_first(n: int = 6) -> None:
    assert EvoCut(keep=2).select(make_evidence(n, encoder_fold=torch.ones(n)), 0).keep.tolist() == [0, 1]
    assert array(EvoCut(keep=2).select(make_evidence(n, encoder_fold=torch.ones(n)), 0).scores).tolist() == [1.0] * n
