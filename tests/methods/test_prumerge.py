from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import BudgetError, Evidence, Grid, PruMerge, PruMergePlus
from foveate.core import Selection, compose
from foveate.selection import select_all
from tests.methods.helpers import Array, array, gap, make_evidence, waves


def reference(
    evidence: Evidence, k: int, fence: float | None, neighbours: int, sure: list[int]
) -> tuple[dict[int, Array], float]:
    """Adaptive selection and token supplement by loops: the rows that stay, and the narrowest decision on the way."""
    a, x = array(evidence.encoder_saliency), array(evidence.features)
    keys, n = array(evidence.encoder_keys), evidence.n
    others = sorted((i for i in range(n) if i not in sure), key=lambda i: (-a[i], i))
    kept, margin = sure + others[: k - len(sure) - (k < n)], gap(a)
    if fence is not None:
        q1, q3 = np.quantile(a, 0.25), np.quantile(a, 0.75)
        margin = min(margin, float(np.abs(a - (q3 + fence * (q3 - q1))).min()))
        kept = sure + [i for i in others if a[i] > q3 + fence * (q3 - q1)][: k - 1 - len(sure)]
    leaving = [i for i in range(n) if i not in kept]
    rows = {}
    for i in kept:
        like = {j: float(keys[i] @ keys[j]) / math.sqrt(keys[i] @ keys[i] * (keys[j] @ keys[j])) for j in leaving}
        near = sorted(leaving, key=lambda j: -like[j])[:neighbours]
        margin = min(margin, gap(np.array(list(like.values()))))
        rows[i] = x[i] + sum(a[j] * x[j] for j in near)
    if leaving:
        rows[max(leaving, key=lambda j: a[j])] = np.sum([a[j] * x[j] for j in leaving], axis=0)
    return rows, margin


def staying(answer: Selection) -> Selection:
    """The tokens that really stay, as the engine takes them."""
    return answer if answer.stay is None else compose(answer, Selection(keep=answer.stay.nonzero()[:, 0]))


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    share=st.floats(0.0, 1.0),
    fence=st.sampled_from([None, 0.0, 0.5, 1.5]),
    neighbours=st.integers(0, 6),
    uniform=st.sampled_from([None, 0.3, 0.75]),
)
def test_it_is_the_papers_rule(
    seed: int, n: int, share: float, fence: float | None, neighbours: int, uniform: float | None
) -> None:
    evidence = make_evidence(n, seed)
    k = max(1, round(share * n))
    few = 0 if uniform is None else min(k - 1, math.floor(uniform * k + 0.5))
    sure = Grid(keep=few).select(evidence, 0).keep.tolist() if few else []
    rows, margin = reference(evidence, k, fence, neighbours, sure)
    assume(margin > 1e-6 or n == 1)
    cls = PruMerge if uniform is None else PruMergePlus
    more = {} if uniform is None else {"uniform": uniform}
    answer = staying(cls(keep=k, fence=fence, neighbours=neighbours, **more).select(evidence, 0))
    assert answer.keep.tolist() == sorted(rows)
    assert answer.features is not None
    np.testing.assert_allclose(answer.features.numpy(), [rows[i] for i in sorted(rows)], atol=1e-5)


def example() -> Evidence:
    return make_evidence(
        5,
        features=torch.tensor([[1.0, 0.0], [10.0, 0.0], [0.0, 20.0], [0.0, 1.0], [40.0, 40.0]]),
        encoder_keys=torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.1, 1.0], [0.0, 1.0], [1.0, 0.2]]),
        encoder_saliency=torch.tensor([0.4, 0.1, 0.05, 0.4, 0.05]),
    )


def test_by_hand() -> None:
    # 0 and 3 are kept. The nearest leaving token of 0 is 1, that of 3 is 2. The place of the most attended leaving
    # token, 1, holds 0.1 (10, 0) + 0.05 (0, 20) + 0.05 (40, 40).
    answer = PruMerge(keep=3, neighbours=1).select(example(), 0)
    assert answer.keep.tolist() == [0, 1, 3]
    assert answer.features is not None and answer.merged_into is not None
    torch.testing.assert_close(answer.features, torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 2.0]]))
    assert answer.merged_into.tolist() == [0, 1, 2, 2, 1]  # 4 is nobody's neighbour: only the extra token holds it


def test_outliers_by_hand() -> None:
    # Quartiles are 0.05 and 0.4. At fence 0 nothing is above 0.4; the extra token alone stays, at the first place.
    none = staying(PruMerge(keep=1.0, fence=0.0).select(example(), 0))
    assert none.keep.tolist() == [0] and none.features is not None
    torch.testing.assert_close(none.features, torch.tensor([[3.4, 3.4]]))
    peaks = torch.tensor([0.1, 0.9, 0.1, 0.8, 0.12, 0.1, 0.11, 0.1, 0.1])
    evidence = make_evidence(9, encoder_saliency=peaks)
    assert staying(PruMerge(keep=1.0, fence=1.5).select(evidence, 0)).keep.tolist() == [1, 3, 4]  # 4: the extra token
    assert staying(PruMerge(keep=2, fence=1.5).select(evidence, 0)).keep.tolist() == [1, 3]  # 3 is the extra token now


def test_the_number_of_outliers_follows_the_image_also_in_a_batch() -> None:
    method = PruMerge(keep=20, fence=0.5)
    images = [make_evidence(24, seed, encoder_saliency=(torch.randn(24) * (1 + seed)).softmax(0)) for seed in range(5)]
    answers = select_all(method, images, 0)
    counts = [len(staying(answer).keep) for answer in answers]
    assert len(set(counts)) > 1 and max(counts) <= 20
    for image, together in zip(images, answers, strict=True):
        torch.testing.assert_close(staying(together).features, staying(method.select(image, 0)).features)
    assert method.expected(24, 24, 0, 32) is None
    assert PruMerge(keep=20).expected(24, 24, 0, 32) == 20 and PruMerge(keep=20).select(images[0], 0).stay is None


def test_the_plus_keeps_a_grid() -> None:
    evidence = make_evidence(576)
    kept = set(PruMergePlus(keep=64).select(evidence, 0).keep.tolist())
    assert set(Grid(keep=48).select(evidence, 0).keep.tolist()) <= kept and len(kept) == 64
    by_attention = array(evidence.encoder_saliency).argsort()[::-1]
    assert set(by_attention[:12].tolist()) <= kept


@pytest.mark.parametrize("fence", [None, 1.5])
def test_a_single_token_is_left_alone_unless_it_is_to_be_an_outlier(fence: float | None) -> None:
    evidence = make_evidence(1, encoder_saliency=torch.tensor([0.5]))
    answer = staying(PruMerge(keep=1, fence=fence).select(evidence, 0))
    assert answer.keep.tolist() == [0] and answer.features is not None
    torch.testing.assert_close(answer.features, evidence.features * (1.0 if fence is None else 0.5))


def test_golden() -> None:
    evidence = make_evidence(
        16, features=waves(16, 2), encoder_keys=waves(16, 3, step=0.4), encoder_saliency=waves(16, step=0.3).softmax(0)
    )
    answer = PruMerge(keep=5, neighbours=3).select(evidence, 0)
    assert answer.keep.tolist() == GOLDEN_KEEP
    torch.testing.assert_close(answer.features, torch.tensor(GOLDEN_FEATURES), atol=1e-5, rtol=0)
    assert PruMergePlus(keep=5).select(evidence, 0).keep.tolist() == GOLDEN_PLUS


GOLDEN_KEEP = [1, 2, 3, 8, 12]
GOLDEN_FEATURES = [
    [-0.443038, -0.662837],
    [1.043338, -0.789944],
    [0.226952, 0.145806],
    [-0.855034, -0.043061],
    [-0.415438, -1.023746],
]
GOLDEN_PLUS = [0, 2, 8, 10, 12]


@pytest.mark.parametrize("options", [{"fence": -0.1}, {"fence": float("nan")}, {"neighbours": -1}])
def test_bad_options_are_refused_with_a_hint(options: dict[str, float]) -> None:
    for cls in (PruMerge, PruMergePlus):
        with pytest.raises(BudgetError, match="hint: "):
            cls(keep=4, **options)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="uniform must be in"):
        PruMergePlus(keep=4, uniform=1.5)
