from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import BudgetError, V2Drop
from foveate.budget import alive_per_layer
from tests.methods.helpers import Array, array, gap, make_evidence, top, waves


def variation(hidden: Array, previous: Array, metric: str) -> Array:
    values = []
    for f, g in zip(hidden, previous, strict=True):
        if metric == "l2":
            values.append(math.sqrt(sum((a - b) ** 2 for a, b in zip(f, g, strict=True))))
        elif metric == "l1":
            values.append(sum(abs(a - b) for a, b in zip(f, g, strict=True)))
        else:
            values.append(1 - float(f @ g) / math.sqrt(float(f @ f) * float(g @ g)))
    return np.array(values)


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    share=st.sampled_from([0.05, 0.3, 0.5, 1.0, 3, 0]),
    metric=st.sampled_from(["l2", "l1", "cosine"]),
)
def test_it_keeps_what_the_layer_before_moved_most(seed: int, n: int, share: float, metric: str) -> None:
    evidence = make_evidence(n, seed)
    wanted = variation(array(evidence.hidden), array(evidence.previous), metric)
    assume(gap(wanted) > 1e-5)
    method = V2Drop(stages=((2, share),), metric=metric)  # type: ignore[arg-type]
    answer = method.select(evidence, 2)
    np.testing.assert_allclose(array(answer.scores), wanted, atol=1e-5)
    k = min(share, n) if isinstance(share, int) else math.floor(share * n + 1e-9)
    assert answer.keep.tolist() == top(wanted, k)


@pytest.mark.parametrize(
    ("mean", "counts", "measured"),
    [(192, (288, 86, 0), 193.4375), (128, (161, 40, 0), 130.6875), (64, (28, 1, 0), 66.40625)],
)
def test_the_published_schedules(mean: int, counts: tuple[int, ...], measured: float) -> None:
    method = V2Drop(keep=mean)
    assert method.sites(32) == (3, 17, 22)
    alive, seen = 576, []
    for site in method.sites(32):
        alive = method.expected(alive, 576, site, 32)
        seen.append(alive)
    assert tuple(seen) == counts
    layers = alive_per_layer(576, method.schedule(576, 32), 32)
    assert sum(layers) / 32 == measured
    # The paper's means count the one token that the released code leaves in layers 22 to 31.
    assert round(measured + 10 / 32, 1) == {192: 193.8, 128: 131.0, 64: 66.7}[mean]


def test_the_default_is_the_papers_schedule() -> None:
    assert V2Drop().schedule(576, 32) == V2Drop(keep=192).schedule(576, 32) == ((3, 0.5), (17, 0.3), (22, 0))


@given(n=st.integers(16, 3000), layers=st.integers(4, 80), share=st.floats(0.12, 1.0))
def test_a_mean_is_met_at_any_depth(n: int, layers: int, share: float) -> None:
    method = V2Drop(keep=share)
    sites = method.sites(layers)
    assert sites == tuple(sorted(set(sites))) and sites[0] >= 1 and sites[-1] < layers
    target = max(1, math.floor(share * n + 0.5))
    assume(target * layers >= sites[0] * n)  # else the mean is out of reach, see below
    alive, total = n, 0
    for layer in range(layers):
        if layer in sites:
            alive = method.expected(alive, n, layer, layers)
        total += alive
    assert abs(total / layers - target) <= 0.5


@pytest.mark.parametrize(
    ("layers", "sites"), [(32, (3, 17, 22)), (40, (4, 21, 28)), (28, (3, 15, 19)), (8, (1, 4, 6)), (4, (1, 2, 3))]
)
def test_sites_scale_with_depth(layers: int, sites: tuple[int, ...]) -> None:
    assert V2Drop(keep=0.5).sites(layers) == sites


@pytest.mark.parametrize("n", [1, 7, 576])
@pytest.mark.parametrize("keep", [1.0, 4096])
def test_a_full_mean_drops_nothing_at_all(n: int, keep: float) -> None:
    method = V2Drop(keep=keep)
    assert [method.expected(n, n, site, 12) for site in method.sites(12)] == [n, n, n]
    evidence = make_evidence(n, depth=12)
    assert method.select(evidence, method.sites(12)[2]).keep.tolist() == list(range(n))


def test_a_mean_out_of_reach_is_refused() -> None:
    with pytest.raises(BudgetError, match="out of reach"):
        V2Drop(keep=0.01).expected(576, 576, 3, 32)


def test_stages_outside_the_model_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"do not fit a model of 12 layers\nhint: keep="):
        V2Drop().sites(12)
    with pytest.raises(BudgetError, match="do not fit a model of 3 layers"):
        V2Drop(keep=0.5).sites(3)


def test_golden() -> None:
    evidence = make_evidence(12, hidden=waves(12, 6), previous=waves(12, 6, step=0.4))
    assert {metric: kept(evidence, metric) for metric in ("l2", "l1", "cosine")} == GOLDEN


def kept(evidence: Any, metric: Any) -> list[int]:
    return V2Drop(stages=((3, 0.5),), metric=metric).select(evidence, 3).keep.tolist()


GOLDEN = {"l2": [0, 2, 5, 6, 8, 11], "l1": [0, 2, 5, 6, 8, 11], "cosine": [0, 2, 4, 5, 7, 11]}


@pytest.mark.parametrize("metric", ["l2", "l1", "cosine"])
def test_large_half_precision_states_do_not_overflow(metric: Any) -> None:
    hidden, previous = torch.full((4, 64), 6e4).half(), torch.zeros(4, 64).half()
    evidence = make_evidence(4, hidden=hidden, previous=previous)
    answer = V2Drop(stages=((1, 0.5),), metric=metric).select(evidence, 1)
    assert answer.scores is not None and answer.scores.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 64, "stages": ((3, 0.5),)},
        {"keep": 0},
        {"keep": 64.0},
        {"stages": ()},
        {"stages": ((0, 0.5),)},
        {"stages": ((3, 0.5), (3, 0.5))},
        {"stages": ((5, 0.5), (3, 0.5))},
        {"stages": ((3, 1.5),)},
    ],
)
def test_bad_options_are_refused_with_a_hint(options: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        V2Drop(**options)
