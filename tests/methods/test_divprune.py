from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import DivPrune
from tests.methods.helpers import Array, array, make_evidence, waves


def max_min(features: Array, k: int) -> tuple[list[int], float]:
    """The paper's greedy selection on a matrix of cosine distances; also the narrowest decision taken on the way."""
    n, margin = len(features), 1.0

    def distance(i: int, j: int) -> float:
        a, b = features[i], features[j]
        return 0.0 if i == j else 1.0 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    def farthest(values: dict[int, float]) -> int:
        nonlocal margin
        ordered = sorted(set(values.values()))
        if len(ordered) > 1:
            margin = min(margin, ordered[-1] - ordered[-2])
        return max(values, key=lambda i: values[i])

    # Of a token's distances the smallest is the one to itself, the second smallest that to its nearest neighbour.
    first = {i: sorted(distance(i, j) for j in range(n))[1] if n > 1 else 0.0 for i in range(n)}
    chosen = [farthest(first)]
    while len(chosen) < k:
        chosen.append(farthest({i: min(distance(i, p) for p in chosen) for i in range(n) if i not in chosen}))
    return chosen, margin


@given(seed=st.integers(0, 10**6), n=st.integers(1, 24), width=st.integers(2, 8), share=st.floats(0.0, 1.0))
def test_it_is_the_papers_rule(seed: int, n: int, width: int, share: float) -> None:
    evidence = make_evidence(n, seed, width)
    k = max(1, round(share * n))
    picks, margin = max_min(array(evidence.features), k)
    assume(margin > 1e-5)
    answer = DivPrune(keep=k).select(evidence, 0)
    assert answer.keep.tolist() == sorted(picks)
    assert answer.scores is not None
    assert answer.scores.argsort(descending=True, stable=True)[:k].tolist() == picks  # scores tell the order of picking


def test_by_hand() -> None:
    # Nearest neighbours on the circle: 0 - 10 degrees (10 apart), 10 - 0, 100 - 150 (50), 150 - 100, 250 - 150 (100).
    angles = torch.tensor([0.0, 10.0, 100.0, 150.0, 250.0]).deg2rad()
    evidence = make_evidence(
        5, features=torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1.0, 6.0)[:, None]
    )
    assert DivPrune(keep=1).select(evidence, 0).keep.tolist() == [4]
    assert DivPrune(keep=2).select(evidence, 0).keep.tolist() == [2, 4]  # 150 degrees from 250; 10 is 120 away
    assert DivPrune(keep=3).select(evidence, 0).keep.tolist() == [0, 2, 4]  # 0: 100 and 110 away; 10: 90 and 120
    assert DivPrune(keep=4).select(evidence, 0).keep.tolist() == [0, 2, 3, 4]


@given(seed=st.integers(0, 10**6), far=st.integers(1, 7))
def test_of_two_that_are_each_others_nearest_the_first_is_the_first(seed: int, far: int) -> None:
    near = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) * 0.02 + torch.eye(6)[0]
    near[0], near[far] = torch.tensor([-1.0, 1, 0, 0, 0, 0]), torch.tensor([-1.0, -0.9, 0.1, 0, 0, 0])
    assert DivPrune(keep=1).select(make_evidence(8, features=near), 0).keep.tolist() == [0]


def test_copies_come_last() -> None:
    rows = torch.eye(4)[[0, 0, 1, 1, 2, 2, 3, 3]]
    kept = DivPrune(keep=4).select(make_evidence(8, features=rows), 0).keep
    assert kept.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(("keep", "count"), [(0.111, 64), (0.25, 144), (64, 64)])
def test_fractions_are_rounded(keep: float, count: int) -> None:
    assert DivPrune(keep=keep).count(576) == count


def test_golden() -> None:
    assert DivPrune(keep=6).select(make_evidence(16, features=waves(16, 6)), 0).keep.tolist() == GOLDEN


GOLDEN = [2, 3, 5, 7, 13, 15]
