from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate import BudgetError, Random
from foveate.selection import select_all
from tests.methods.helpers import make_evidence, permuted

MASK = (1 << 64) - 1


def splitmix64(z: int) -> int:
    """SplitMix64 on unsigned integers, from its published constants."""
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@given(
    prompt=st.integers(-(2**63), 2**63 - 1), seed=st.integers(0, 2**63 - 1), n=st.integers(1, 30), k=st.integers(1, 9)
)
def test_the_lot_is_a_hash_of_prompt_seed_and_place(prompt: int, seed: int, n: int, k: int) -> None:
    evidence = dataclasses.replace(make_evidence(n), seed=torch.tensor(prompt))
    lots = []
    for place in evidence.coordinates.tolist():
        state = splitmix64((prompt & MASK) ^ splitmix64(seed))
        for coordinate in place:
            state = splitmix64(state ^ coordinate)
        lots.append(state >> 1)
    wanted = sorted(sorted(range(n), key=lambda i: -lots[i])[:k])
    answer = Random(keep=k, seed=seed).select(evidence, 0)
    assert answer.keep.tolist() == wanted
    assert answer.scores is not None
    torch.testing.assert_close(answer.scores, torch.tensor([lot / 2**63 for lot in lots]), atol=1e-6, rtol=0)


def test_another_seed_or_prompt_draws_another_lot_and_the_same_draws_the_same() -> None:
    one, other = make_evidence(64, seed=1), make_evidence(64, seed=2)
    lots = {tuple(Random(keep=16, seed=s).select(e, 0).keep.tolist()) for s in (0, 1, 2) for e in (one, other)}
    assert len(lots) == 6
    alone = Random(keep=16).select(one, 0).keep
    together = select_all(Random(keep=16), [other, one, other], 0)[1].keep
    assert alone.tolist() == together.tolist()


def test_every_token_has_the_same_chance() -> None:
    counts: Counter[int] = Counter()
    evidence = make_evidence(16)
    for seed in range(400):
        counts.update(Random(keep=4, seed=seed).select(evidence, 0).keep.tolist())
    assert len(counts) == 16
    assert max(abs(counts[i] - 100) for i in range(16)) < 45  # five standard deviations


def test_a_token_takes_its_lot_along() -> None:
    evidence, order = make_evidence(20), torch.randperm(20)
    kept = Random(keep=6).select(evidence, 0).keep.tolist()
    moved = Random(keep=6).select(permuted(evidence, order), 0).keep
    assert sorted(order[moved].tolist()) == kept


def test_golden() -> None:
    assert Random(keep=6).select(make_evidence(24), 0).keep.tolist() == GOLDEN


GOLDEN = [4, 15, 16, 17, 18, 20]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        Random(keep=4, seed=seed)
