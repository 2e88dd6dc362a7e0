from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import BudgetError, Evidence, HoloV
from tests.methods.helpers import array, gap, make_evidence, waves


def reference(evidence: Evidence, k: int, chunks: int, alpha: float) -> tuple[list[int], list[int], float]:
    """Places and tokens of each run; also the narrowest decision taken on the way."""
    a, x, n = array(evidence.encoder_saliency), array(evidence.features), evidence.n
    x = x / np.sqrt((x**2).sum(axis=1, keepdims=True))
    chunks = min(chunks, n)
    runs, start = [], 0
    for c in range(chunks):
        size = n // chunks + (c < n % chunks)
        runs.append(list(range(start, start + size)))
        start += size
    variance = np.zeros(n)
    for run in runs:
        for i in run:
            cosines = [float(x[i] @ x[j]) for j in run]
            variance[i] = sum((c - sum(cosines) / len(cosines)) ** 2 for c in cosines) / len(cosines)
    attention = 1000 * a
    score = attention + alpha * (variance * (attention.mean() / variance.mean()) if variance.any() else 0.0)
    mean = np.array([score[run].mean() for run in runs])
    wanted = k * mean / mean.sum()
    margin = min(gap(a), gap(mean) / mean.sum(), float(np.abs(wanted - np.round(wanted)).min()))
    places = [min(math.floor(w), len(run)) for w, run in zip(wanted, runs, strict=True)]
    while sum(places) < k:
        best = max((c for c in range(chunks) if places[c] < len(runs[c])), key=lambda c: mean[c])
        places[best] += 1
    kept = [i for run, b in zip(runs, places, strict=True) for i in sorted(run, key=lambda i: -a[i])[:b]]
    return sorted(kept), places, margin


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(4, 40),
    share=st.floats(0.0, 1.0),
    chunks=st.integers(1, 20),
    alpha=st.sampled_from([0.0, 0.09, 3.0]),
    peak=st.sampled_from([1.0, 4.0]),
)
def test_it_is_the_papers_rule(seed: int, n: int, share: float, chunks: int, alpha: float, peak: float) -> None:
    chunks = min(chunks, n // 2)  # a run of one token has no variance
    saliency = (peak * torch.randn(n, generator=torch.Generator().manual_seed(seed))).softmax(0)
    evidence = make_evidence(n, seed, encoder_saliency=saliency)
    k = max(1, round(share * n))
    kept, _, margin = reference(evidence, k, chunks, alpha)
    assume(chunks == 1 or margin > 2e-4 or k == n)
    assert HoloV(keep=k, chunks=chunks, alpha=alpha).select(evidence, 0).keep.tolist() == kept


def test_by_hand() -> None:
    # Two runs, all tokens alike (no variance), so attention alone shares: 5 places by 0.7 to 0.3 are 3.5 and 1.5, of
    # which the floors are 3 and 1, and the place left over goes to the first run.
    saliency = torch.tensor([0.1, 0.3, 0.0, 0.2, 0.1, 0.0, 0.1, 0.0, 0.2, 0.0])
    evidence = make_evidence(10, features=torch.ones(10, 3), encoder_saliency=saliency)
    assert HoloV(keep=5, chunks=2).select(evidence, 0).keep.tolist() == [0, 1, 3, 4, 8]
    # 9 places are 6.3 and 2.7: a run of 5 is full at 5, and the other gets what is left.
    assert HoloV(keep=9, chunks=2).select(evidence, 0).keep.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_varied_run_gets_more_places() -> None:
    features = torch.cat([torch.ones(8, 4), torch.randn(8, 4)])
    evidence = make_evidence(16, features=features, encoder_saliency=torch.full((16,), 1 / 16))
    kept = HoloV(keep=8, chunks=2, alpha=1.0).select(evidence, 0).keep
    assert int((kept >= 8).sum()) == 6  # one of two parts is attention, shared evenly; the other all goes to the second
    assert int((HoloV(keep=8, chunks=2, alpha=0.0).select(evidence, 0).keep >= 8).sum()) == 4


def test_every_part_of_the_picture_is_seen() -> None:
    saliency = torch.full((576,), 1.0)
    saliency[:36] = 4.0
    evidence = make_evidence(576, encoder_saliency=saliency / saliency.sum())
    kept = HoloV(keep=64).select(evidence, 0).keep
    counts = [int(((kept >= 36 * c) & (kept < 36 * (c + 1))).sum()) for c in range(16)]
    assert counts[0] > max(counts[1:]) and min(counts) >= 2 and sum(counts) == 64


@pytest.mark.parametrize("n", [1, 5, 17])
def test_fewer_tokens_than_runs_are_runs_of_one(n: int) -> None:
    assert len(HoloV(keep=3).select(make_evidence(n), 0).keep) == min(3, n)


def test_golden() -> None:
    evidence = make_evidence(24, features=waves(24, 6), encoder_saliency=waves(24, step=0.3).softmax(0))
    assert HoloV(keep=9, chunks=4).select(evidence, 0).keep.tolist() == GOLDEN


GOLDEN = [0, 1, 2, 3, 8, 12, 16, 19, 22]


@pytest.mark.parametrize("options", [{"chunks": 0}, {"alpha": -0.1}, {"alpha": float("nan")}])
def test_bad_options_are_refused_with_a_hint(options: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        HoloV(keep=4, **options)  # type: ignore[arg-type]
