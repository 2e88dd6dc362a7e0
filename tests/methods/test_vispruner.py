from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import BudgetError, Evidence, VisPruner
from foveate.selection import select_all
from tests.methods.helpers import array, gap, make_evidence, waves


def reference(evidence: Evidence, k: int, important: float, removed: int) -> tuple[list[int], float]:
    """Important and diverse tokens, crop by crop; also the narrowest decision taken on the way."""
    a, x, crops = array(evidence.encoder_saliency), array(evidence.features), evidence.by_crop()
    kept, margin = [], gap(a)

    def cosine(i: int, j: int) -> float:
        return float(x[i] @ x[j]) / math.sqrt(float(x[i] @ x[i]) * float(x[j] @ x[j]))

    for place, crop in enumerate(crops):
        share = k // len(crops) + (place < k % len(crops))
        sure = math.floor(important * share + 0.5)
        order = sorted(crop.tolist(), key=lambda i: (-a[i], i))
        left = order[sure:]
        while len(left) > share - sure:
            if share == sure:
                left = []
                break
            even, odd = left[::2], left[1::2]
            like = {i: max(cosine(i, j) for j in odd) for i in even}
            go = sorted(even, key=lambda i: like[i])[-min(removed, len(left) - share + sure, len(even)) :]
            margin = min(margin, gap(np.array(list(like.values()))))
            left = [i for i in left if i not in go]
        kept += order[:sure] + left
    return sorted(kept), margin


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 15),
    crops=st.integers(1, 3),
    share=st.floats(0.0, 1.0),
    important=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    removed=st.integers(1, 8),
)
def test_it_is_the_papers_rule(seed: int, size: int, crops: int, share: float, important: float, removed: int) -> None:
    n = size * crops
    evidence = make_evidence(n, seed, crops=(size,) * crops)
    k = max(1, round(share * n))
    kept, margin = reference(evidence, k, important, removed)
    assume(margin > 1e-6)
    assert VisPruner(keep=k, important=important, removed=removed).select(evidence, 0).keep.tolist() == kept


def test_by_hand() -> None:
    # By attention: 3 | 0 2 1 4. Round 1: of 0 and 1 the one nearer to 2 or 4 leaves, which is 1 (a copy of 4).
    # Round 2: 0 2 4 remain; 0 and 4 stand at even places, and 4 is nearer to 2.
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [9.0, 9.0], [0.6, 0.8]])
    saliency = torch.tensor([0.3, 0.1, 0.2, 0.35, 0.05])
    evidence = make_evidence(5, features=features, encoder_saliency=saliency)
    assert VisPruner(keep=4, important=0.25, removed=1).select(evidence, 0).keep.tolist() == [0, 2, 3, 4]
    assert VisPruner(keep=3, important=0.25, removed=1).select(evidence, 0).keep.tolist() == [0, 2, 3]
    assert VisPruner(keep=3, important=1.0).select(evidence, 0).keep.tolist() == [0, 2, 3]
    assert VisPruner(keep=1).select(evidence, 0).keep.tolist() == [3]


def test_half_of_the_usual_budget_is_attention() -> None:
    evidence = make_evidence(576)
    kept = set(VisPruner(keep=64).select(evidence, 0).keep.tolist())
    most = array(evidence.encoder_saliency).argsort()[::-1]
    assert len(kept) == 64 and set(most[:32].tolist()) <= kept


def test_stacked_images_with_crops_get_the_answers_they_get_alone() -> None:
    method, images = VisPruner(keep=9), [make_evidence(30, seed, crops=(10, 20)) for seed in range(4)]
    together = [answer.keep.tolist() for answer in select_all(method, images, 0)]
    assert together == [method.select(image, 0).keep.tolist() for image in images]


def test_golden() -> None:
    evidence = make_evidence(24, features=waves(24, 6), encoder_saliency=waves(24, step=0.3).softmax(0))
    assert VisPruner(keep=8).select(evidence, 0).keep.tolist() == GOLDEN


GOLDEN = [2, 5, 10, 12, 13, 19, 22, 23]


@pytest.mark.parametrize("options", [{"important": -0.1}, {"important": 1.1}, {"removed": 0}])
def test_bad_options_are_refused_with_a_hint(options: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        VisPruner(keep=4, **options)  # type: ignore[arg-type]
