from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import CDPruner
from foveate.selection import select_all
from tests.methods.helpers import Array, array, make_evidence, waves


def unit(rows: Array) -> Array:
    return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))


def kernel(features: Array, text: Array) -> Array:
    """L_ij = r_i cos(x_i, x_j) r_j with the relevance r brought to [0, 1]."""
    x = unit(features)
    r = np.array([np.mean([x_i @ e for e in unit(text)]) for x_i in x])
    r = (r - r.min()) / (r.max() - r.min())
    return np.array([[r[i] * (x[i] @ x[j]) * r[j] for j in range(len(x))] for i in range(len(x))])


def greedy(l_matrix: Array, k: int) -> tuple[list[int], float]:
    """Add the token that makes the determinant largest, k times; also the narrowest decision or smallest gain."""
    chosen: list[int] = []
    margin, volume = 1.0, 1.0
    for _ in range(k):
        sets = {i: np.ix_([*chosen, i], [*chosen, i]) for i in range(len(l_matrix)) if i not in chosen}
        gains = {i: float(np.linalg.det(l_matrix[index])) / volume for i, index in sets.items()}
        ordered = sorted(gains.values())
        margin = min(margin, ordered[-1], *([ordered[-1] - ordered[-2]] if len(ordered) > 1 else []))
        chosen.append(max(gains, key=lambda i: gains[i]))
        volume *= gains[chosen[-1]]
        if margin < 1e-5:
            break
    return chosen, margin


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 16),
    width=st.integers(2, 12),
    words=st.integers(1, 6),
    k=st.integers(1, 8),
)
def test_it_is_the_papers_rule(seed: int, n: int, width: int, words: int, k: int) -> None:
    evidence = make_evidence(n, seed, width, words)
    k = min(k, n - 1, width)
    picks, margin = greedy(kernel(array(evidence.features), array(evidence.text)), k)
    assume(margin > 1e-4)
    answer = CDPruner(keep=k).select(evidence, 0)
    assert answer.keep.tolist() == sorted(picks)
    assert answer.scores is not None
    assert answer.scores.argsort(descending=True, stable=True)[:k].tolist() == picks  # scores tell the order of picking


def test_by_hand() -> None:
    # Cosines with the question: 0.8, 0.8, 0.6, 0, so r = 1, 1, 0.75, 0. Token 1 is a copy of 0 and adds no volume;
    # token 2 adds 0.75^2 (1 - 0.96^2); token 3 has r = 0 and adds none.
    rows = torch.tensor([[0.8, 0.6, 0.0], [1.6, 1.2, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    evidence = make_evidence(4, features=rows, text=torch.tensor([[2.0, 0.0, 0.0]]))
    assert CDPruner(keep=1).select(evidence, 0).keep.tolist() == [0]
    assert CDPruner(keep=2).select(evidence, 0).keep.tolist() == [0, 2]
    assert CDPruner(keep=3).select(evidence, 0).keep.tolist() == [0, 1, 2]  # nothing adds volume: the more relevant


def test_without_text_only_diversity_decides() -> None:
    rows = torch.eye(4)[[0, 0, 0, 1, 2, 3]]
    evidence = make_evidence(6, features=rows, text=torch.zeros(0, 4))
    assert CDPruner(keep=4).select(evidence, 0).keep.tolist() == [0, 3, 4, 5]
    answers = select_all(CDPruner(keep=4), [evidence, evidence], 0)
    assert [answer.keep.tolist() for answer in answers] == [[0, 3, 4, 5]] * 2


def test_a_text_that_asks_for_all_alike_is_no_text() -> None:
    rows = torch.eye(3)[[0, 0, 1, 2]]
    evidence = make_evidence(4, features=rows, text=torch.ones(2, 3))
    assert CDPruner(keep=3).select(evidence, 0).keep.tolist() == [0, 2, 3]


def test_beyond_the_rank_the_most_relevant_go_first() -> None:
    # Eight tokens in a plane: two picks span it, the rest is relevance alone.
    angles = torch.linspace(0.0, 80.0, 8).deg2rad()
    evidence = make_evidence(8, features=torch.stack([angles.cos(), angles.sin()], dim=1), text=torch.eye(2)[:1])
    first = CDPruner(keep=2).select(evidence, 0).keep.tolist()
    for k in range(3, 8):
        kept = CDPruner(keep=k).select(evidence, 0).keep.tolist()
        assert kept == sorted([*first, *[i for i in range(8) if i not in first][: k - 2]])


def test_golden() -> None:
    evidence = make_evidence(16, features=waves(16, 6), text=waves(3, 6, step=0.4))
    assert CDPruner(keep=5).select(evidence, 0).keep.tolist() == GOLDEN


GOLDEN = [3, 5, 9, 10, 11]
