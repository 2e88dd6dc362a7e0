from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import BudgetError, ToDRE
from foveate.methods.todre import ToDREDiversity, ToDREExit
from foveate.selection import select_all
from tests.methods.helpers import Array, array, make_evidence, waves


def greedy(features: Array, pivot: int, k: int, objective: str) -> tuple[list[int], float]:
    """Steps 3 to 5 of stage 1 by loops over pairs; also the narrowest decision taken on the way."""
    n = len(features)

    def cosine(i: int, j: int) -> float:
        a, b = features[i], features[j]
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    chosen, margin = [pivot], 1.0
    while len(chosen) < k:
        cost = {}
        for i in range(n):
            if i not in chosen:
                similar = [cosine(i, p) for p in chosen]
                cost[i] = sum(similar) if objective == "max_sum" else max(similar)
        ordered = sorted(cost.values())
        if len(ordered) > 1:
            margin = min(margin, ordered[1] - ordered[0])
        chosen.append(min(cost, key=lambda i: cost[i]))
    return chosen, margin


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 24),
    width=st.integers(2, 8),
    share=st.floats(0.05, 1.0),
    objective=st.sampled_from(["max_sum", "k_center"]),
)
def test_stage_one_is_the_papers_algorithm(seed: int, n: int, width: int, share: float, objective: str) -> None:
    evidence = make_evidence(n, seed, width)
    k = max(1, int(share * n))
    pivot = int(np.argmax(array(evidence.encoder_saliency)))
    picks, margin = greedy(array(evidence.features), pivot, k, objective)
    assume(margin > 1e-5)
    answer = ToDRE(keep=k, exit=None, diversity=objective).select(evidence, 0)  # type: ignore[arg-type]
    assert answer.keep.tolist() == sorted(picks)
    assert answer.scores is not None
    assert answer.scores.argsort(descending=True, stable=True)[:k].tolist() == picks  # scores tell the order of picking


def test_max_sum_and_k_center_differ() -> None:
    # Both add token 1 (170 degrees from the pivot). Token 2 (210 degrees) is near 1 but far from the pivot: its sum of
    # cosines is -0.1, its maximum 0.77. Token 3 is at right angles to all: sum and maximum are 0.
    angles = torch.tensor([0.0, 170.0, 210.0]).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin(), torch.zeros(3)], dim=1)
    rows = torch.cat([rows, torch.tensor([[0.0, 0.0, 1.0]])])
    evidence = make_evidence(4, features=rows, encoder_saliency=torch.tensor([1.0, 0, 0, 0]))
    assert ToDRE(keep=3, exit=None).select(evidence, 0).keep.tolist() == [0, 1, 2]
    assert ToDRE(keep=3, exit=None, diversity="k_center").select(evidence, 0).keep.tolist() == [0, 1, 3]


def test_the_pivot_is_in_the_thumbnail_if_there_is_one() -> None:
    saliency = torch.tensor([0.1, 0.2, 0.1, 0.1, 0.9, 0.3])
    whole = make_evidence(6, encoder_saliency=saliency)
    crops = make_evidence(6, encoder_saliency=saliency, crops=(3, 3), thumbnail=0)
    frames = make_evidence(6, encoder_saliency=saliency, crops=(3, 3))
    assert ToDRE(keep=1, exit=None).select(whole, 0).keep.tolist() == [4]
    assert ToDRE(keep=1, exit=None).select(frames, 0).keep.tolist() == [4]
    assert ToDRE(keep=1, exit=None).select(crops, 0).keep.tolist() == [1]


@given(seed=st.integers(0, 10**6), tau=st.floats(0.0, 1.0), causal=st.booleans())
def test_stage_two_compares_both_masses_with_tau(seed: int, tau: float, causal: bool) -> None:
    system, visual, text = 3, 7, 4
    everything = system + visual + text
    logits = np.random.default_rng(seed).normal(size=(everything, everything)) * 2
    if causal:
        logits[np.triu_indices(everything, 1)] = -np.inf
    attention = np.exp(logits - logits.max(axis=1, keepdims=True))
    attention /= attention.sum(axis=1, keepdims=True)
    v, t = range(system, system + visual), range(system + visual, everything)
    rows = range(everything)
    a_tv = sum(attention[i, j] for i in t for j in v) / sum(attention[i, j] for i in t for j in rows)
    a_vt = sum(attention[i, j] for i in v for j in t) / sum(attention[i, j] for i in v for j in rows)
    assume(abs(a_tv - tau) > 1e-5 and abs(a_vt - tau) > 1e-5)

    evidence = make_evidence(
        visual,
        relevance=torch.from_numpy(attention[np.ix_(t, v)]).float(),
        text_mass=torch.from_numpy(attention[np.ix_(v, t)].sum(axis=1)).float(),
    )
    answer = ToDREExit(tau=tau).select(evidence, 29)
    assert float(answer.measures["a_tv"]) == pytest.approx(a_tv, abs=1e-5)
    assert float(answer.measures["a_vt"]) == pytest.approx(a_vt, abs=1e-5)
    assert answer.keep.tolist() == list(range(visual))
    assert answer.stay is not None
    assert answer.stay.tolist() == [not (a_tv < tau and a_vt < tau)] * visual
    if causal:
        assert a_vt == 0.0  # visual queries cannot see the text after them: the test is a_tv < tau


@pytest.mark.parametrize(
    ("a_tv", "a_vt", "stays"), [(0.05, 0.05, False), (0.2, 0.05, True), (0.05, 0.2, True), (0.2, 0.2, True)]
)
def test_all_leave_only_if_both_masses_are_small(a_tv: float, a_vt: float, stays: bool) -> None:
    evidence = make_evidence(4, relevance=torch.full((3, 4), a_tv / 4), text_mass=torch.full((4,), a_vt))
    answer = ToDREExit().select(evidence, 29)
    assert answer.stay is not None and answer.stay.tolist() == [stays] * 4


def test_without_text_after_the_image_nothing_leaves() -> None:
    evidence = make_evidence(4, relevance=torch.zeros(0, 4), text_mass=torch.zeros(4))
    answer = ToDREExit().select(evidence, 29)
    assert answer.stay is not None and bool(answer.stay.all())
    assert float(answer.measures["a_tv"]) == 0.0


@pytest.mark.parametrize(("layers", "site"), [(32, 29), (40, 36), (28, 25), (8, 7), (3, 2), (2, 1)])
def test_the_exit_is_after_the_measured_layer_and_before_the_last(layers: int, site: int) -> None:
    assert ToDRE(keep=0.1).sites(layers) == (0, site)
    assert ToDRE(keep=0.1, exit=1.0).sites(layers)[1] <= layers - 1


def test_each_stage_works_alone() -> None:
    assert [type(part) for part in ToDRE(keep=0.1).parts] == [ToDREDiversity, ToDREExit]
    assert [type(part) for part in ToDRE(keep=0.1, exit=None).parts] == [ToDREDiversity]
    assert [type(part) for part in ToDRE(keep=1.0).parts] == [ToDREExit]
    assert [type(part) for part in ToDRE(keep=1.0, exit=None).parts] == [ToDREDiversity]
    assert [type(part) for part in ToDRE(keep=1).parts] == [ToDREDiversity, ToDREExit]
    assert [part.positions for part in ToDRE(keep=0.1, positions="packed").parts] == ["packed", "paper"]
    assert ToDRE(keep=0.5, pivot_layer="feature").parts[0].saliency_layer == "feature"
    assert ToDRE(keep=0.5).parts[0].saliency_layer == "last"


def test_as_a_whole_it_selects_at_both_sites_and_announces_the_first_count() -> None:
    method, evidences = ToDRE(keep=5), [make_evidence(seed=seed) for seed in range(3)]
    assert [len(answer.keep) for answer in select_all(method, evidences, 0)] == [5, 5, 5]
    assert all(answer.stay is not None for answer in select_all(method, evidences, 29))
    assert method.expected(24, 24, 0, 32) == 5
    assert method.expected(5, 24, 29, 32) is None


def test_golden() -> None:
    evidence = make_evidence(16, features=waves(16, 6), encoder_saliency=waves(16, step=0.3).softmax(0))
    assert ToDRE(keep=6, exit=None).select(evidence, 0).keep.tolist() == GOLDEN_SUM
    assert ToDRE(keep=6, exit=None, diversity="k_center").select(evidence, 0).keep.tolist() == GOLDEN_CENTER


GOLDEN_SUM = [2, 4, 8, 11, 12, 15]
GOLDEN_CENTER = [2, 4, 6, 8, 13, 15]


@pytest.mark.parametrize(
    "options",
    [{"exit": 0.0}, {"exit": 1.5}, {"tau": -0.1}, {"tau": 2.0}, {"keep": 0}, {"keep": 2.0}],
)
def test_bad_options_are_refused_with_a_hint(options: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        ToDRE(**({"keep": 4} | options))  # type: ignore[arg-type]
