from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import AdaV, BudgetError, Evidence
from foveate.selection import select_all
from tests.methods.helpers import Array, array, gap, make_evidence, waves


def text_scores(features: Array, text: Array, temperature: float) -> Array:
    """Step 3: t_i = the largest, over text tokens, of the softmax over image tokens of T cos."""
    best = np.zeros(len(features))
    for e in text:
        logits = [temperature * float(e @ x) / math.sqrt(float(e @ e) * float(x @ x)) for x in features]
        powers = [math.exp(v - max(logits)) for v in logits]
        best = np.maximum(best, np.array(powers) / sum(powers))
    return best


def split(a: list[float], b: list[float], free: int) -> tuple[int, float]:
    """Step 7: n* = argmax PA(n) PB(R - n); also by how much it is the best (relative)."""
    value = [sum(a[:n]) * sum(b[: free - n]) for n in range(free + 1)]
    best = max(range(free + 1), key=lambda n: (value[n], -n))
    rest = [v for n, v in enumerate(value) if n != best]
    return best, (value[best] - max(rest)) / max(value[best], 1e-300) if rest else 1.0


def falling(values: Array, of: list[int]) -> list[int]:
    return sorted(of, key=lambda i: (-values[i], i))


def reference(evidence: Evidence, k: int, fixed: float, temperature: float) -> tuple[list[int], float]:
    """Our reading without the defects: exactly k distinct tokens."""
    n, crops = evidence.n, evidence.crops or (evidence.n,)
    t = text_scores(array(evidence.features), array(evidence.text), temperature)
    c = array(evidence.encoder_saliency)
    by_text = falling(t, list(range(n)))
    candidates, start = [], 0
    for size in crops:
        candidates += falling(c, list(range(start, start + size)))[: math.ceil(k / len(crops))]
        start += size
    by_saliency = falling(c, candidates)
    sure = math.floor(fixed * k)
    more, margin = split([t[i] for i in by_text[sure:]], [c[i] for i in by_saliency[sure:]], k - 2 * sure)
    n_text, n_saliency = sure + more, k - sure - more
    keys = []
    for i in range(n):
        own = []
        if n_text:
            own.append((Fraction(2 * by_text.index(i) + 1, 2 * n_text), 0))
        if n_saliency and i in by_saliency:
            own.append((Fraction(2 * by_saliency.index(i) + 1, 2 * n_saliency), 1))
        keys.append(min(own, default=(Fraction(10**9), by_text.index(i))))
    kept = sorted(sorted(range(n), key=lambda i: keys[i])[:k])
    return kept, min(margin, gap(np.log(t + 1e-300)), gap(np.log(c)))


def released(evidence: Evidence, budget: int, temperature: float = 100.0) -> tuple[list[int], list[int], float]:
    """Steps 4 to 8 as the released code runs them; the CLS picks apart."""
    crops = evidence.crops or (evidence.n,)
    g = len(crops)
    k = budget // 2 // g
    total = 2 * k * g
    t = text_scores(array(evidence.features), array(evidence.text), temperature)
    c = array(evidence.encoder_saliency)
    by_text = falling(t, list(range(evidence.n)))[:total]
    values, index, start = [], [], 0
    for i, size in enumerate(crops):
        for j in falling(c, list(range(start, start + size)))[: 2 * k]:
            values.append(float(c[j]))
            index.append(j - start + i)
        start += size
    sure = int(total * 0.25)
    rest = sorted(range(sure, total), key=lambda place: (-values[place], place))
    more, margin = split([t[i] for i in by_text[sure:]], [values[p] for p in rest], total - 2 * sure)
    from_cls = [index[p] for p in [*range(sure), *rest[: total - 2 * sure - more]]]
    return sorted(by_text[: sure + more] + from_cls), from_cls, min(margin, gap(np.log(t + 1e-300)), gap(np.log(c)))


@given(
    seed=st.integers(0, 10**6),
    crops=st.sampled_from([(), (20,), (8, 8), (6, 6, 6), (3, 9, 6)]),
    share=st.floats(0.05, 1.0),
    fixed=st.sampled_from([0.0, 0.25, 0.5]),
    temperature=st.sampled_from([1.0, 10.0, 100.0]),
    text=st.integers(1, 6),
    alike=st.booleans(),
)
def test_it_is_the_algorithm_with_distinct_tokens(
    seed: int, crops: tuple[int, ...], share: float, fixed: float, temperature: float, text: int, alike: bool
) -> None:
    n = sum(crops) or 18
    evidence = make_evidence(n, seed, words=text, crops=crops)
    if alike:  # both lists nearly the same, so that many tokens are on both
        relevance = torch.from_numpy(text_scores(array(evidence.features), array(evidence.text), 10.0)).float()
        evidence = make_evidence(n, seed, words=text, crops=crops, encoder_saliency=relevance / relevance.sum())
    k = max(1, int(share * n))
    wanted, margin = reference(evidence, k, fixed, temperature)
    assume(margin > 1e-5)
    answer = AdaV(keep=k, fixed=fixed, temperature=temperature).select(evidence, 0)
    assert answer.keep.tolist() == wanted
    assert answer.scores is not None
    assert sorted(answer.scores.argsort(descending=True)[:k].tolist()) == wanted


@given(seed=st.integers(0, 10**6), budget=st.integers(2, 30), text=st.integers(1, 5))
def test_compat_is_the_released_code_on_one_crop(seed: int, budget: int, text: int) -> None:
    evidence = make_evidence(32, seed, words=text)
    wanted, _, margin = released(evidence, budget)
    assume(margin > 1e-5)
    answer = AdaV(keep=budget, compat=True).select(evidence, 0)
    assert answer.keep.tolist() == wanted
    assert answer.repeats and len(wanted) == budget // 2 * 2


@pytest.mark.parametrize("seed", range(8))
def test_compat_is_the_released_code_on_five_crops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.linspace(0.8, 1.0, 2880)[torch.randperm(2880, generator=generator)]
    saliency = (torch.linspace(0.0, 1.0 + seed, 2880)[torch.randperm(2880, generator=generator)]).softmax(0)
    features = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    evidence = make_evidence(
        2880, crops=(576,) * 5, features=features, text=torch.tensor([[1.0, 0.0]]), encoder_saliency=saliency
    )
    wanted, from_cls, margin = released(evidence, 144)
    assert margin > 1e-6
    (answer,) = select_all(AdaV(keep=144, compat=True), [evidence], 0)
    assert len(wanted) == 140  # two times floor(72 / 5) for each of five crops
    assert answer.keep.tolist() == wanted
    assert max(from_cls) < 576 + 5  # the defect: what was picked in the tiles is read from the thumbnail
    right = AdaV(keep=144).select(evidence, 0).keep
    assert len(right) == 144 and len(right.unique()) == 144 and int((right >= 581).sum()) > 60


@pytest.mark.parametrize(("budget", "crops", "total"), [(144, 5, 140), (288, 5, 280), (720, 5, 720), (58, 1, 58)])
def test_the_counts_of_the_released_code(budget: int, crops: int, total: int) -> None:
    method = AdaV(keep=budget, compat=True)
    assert method.count(576 * crops) == total == method.expected(576 * crops, 576 * crops, 0, 32)


def test_compat_keeps_repeats_where_both_lists_agree() -> None:
    features = torch.eye(8)
    evidence = make_evidence(8, features=features, text=features[2:3], encoder_saliency=torch.eye(8)[2] + 0.01)
    kept = AdaV(keep=4, compat=True).select(evidence, 0).keep.tolist()
    assert kept.count(2) == 2
    assert len(set(AdaV(keep=4).select(evidence, 0).keep.tolist())) == 4


def test_compat_has_the_defect_with_crops_of_any_size() -> None:
    saliency = torch.arange(60.0).softmax(0)
    evidence = make_evidence(60, crops=(12, 18, 30), text=torch.zeros(0, 8), encoder_saliency=saliency)
    kept = AdaV(keep=30, compat=True).select(evidence, 0).keep
    # The last ten of each crop, in the crop's own numbers, plus the number of the crop.
    assert kept.tolist() == sorted(i + place for i, end in enumerate((12, 18, 30)) for place in range(end - 10, end))
    assert len(AdaV(keep=59, compat=True).select(evidence, 0).keep) == 58, "crops with too few are read again"


def test_compat_refuses_what_the_released_code_cannot_serve() -> None:
    with pytest.raises(BudgetError, match="compat=true keeps nothing"):
        AdaV(keep=8, compat=True).count(2880)
    everything = AdaV(keep=1.0, compat=True).select(make_evidence(24), 0)
    assert everything.keep.tolist() == list(range(24)) and not everything.repeats


def test_a_flat_list_gets_more_of_the_open_places_than_one_with_a_peak() -> None:
    # Tokens 0 to 7 lead the text list, tokens 8 to 15 the saliency list; F = 2, so 4 of 8 places are open.
    features = torch.eye(16)
    steep, even = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.01, 0.001, 0, 0]), torch.linspace(1.0, 0.9, 8)
    low = torch.linspace(1e-4, 1e-5, 8)

    def from_text(words: torch.Tensor, seen: torch.Tensor) -> int:
        evidence = make_evidence(
            16,
            features=features,
            text=torch.cat([words, torch.zeros(8)])[None],
            encoder_saliency=torch.cat([low, seen]),
        )
        return int((AdaV(keep=8, temperature=10.0).select(evidence, 0).keep < 8).sum())

    assert from_text(words=steep, seen=even) < from_text(words=even, seen=steep)


def test_without_text_saliency_alone_decides() -> None:
    evidence = make_evidence(12, text=torch.zeros(0, 8), encoder_saliency=torch.arange(12.0))
    assert AdaV(keep=5).select(evidence, 0).keep.tolist() == [7, 8, 9, 10, 11]
    answers = select_all(AdaV(keep=5), [evidence, evidence], 0)
    assert [a.keep.tolist() for a in answers] == [[7, 8, 9, 10, 11]] * 2


def test_a_high_temperature_does_not_lose_the_order() -> None:
    # At T = 1000 all but the best softmax value underflow; the order of the text list must survive.
    cosines = torch.linspace(1.0, 0.1, 10)
    features = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    text = torch.tensor([[1.0, 0.0]])
    evidence = make_evidence(10, features=features, text=text, encoder_saliency=torch.zeros(10))
    assert AdaV(keep=4, temperature=1000.0, fixed=0.5).select(evidence, 0).keep.tolist()[:2] == [0, 1]


def test_golden() -> None:
    evidence = make_evidence(
        16, features=waves(16, 6), text=waves(3, 6, step=0.4), encoder_saliency=waves(16, step=0.3).softmax(0)
    )
    assert AdaV(keep=7, temperature=4.0).select(evidence, 0).keep.tolist() == GOLDEN
    assert AdaV(keep=7, temperature=4.0, compat=True).select(evidence, 0).keep.tolist() == GOLDEN_COMPAT


GOLDEN = [0, 2, 5, 8, 10, 12, 15]
GOLDEN_COMPAT = [2, 5, 8, 10, 12, 15]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"fixed": 0.6}, {"fixed": -0.1}])
def test_bad_options_are_refused_with_a_hint(options: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        AdaV(keep=4, **options)  # type: ignore[arg-type]
