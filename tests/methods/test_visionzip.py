from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import BudgetError, Evidence, VisionZip
from foveate.selection import select_all
from tests.methods.helpers import Array, array, gap, make_evidence, waves


def reference(evidence: Evidence, k: int, contextual: float) -> tuple[dict[int, Array], list[int], float]:
    """Dominant and contextual tokens, crop by crop: the kept rows, who carries each token, the narrowest decision."""
    a, keys, x = array(evidence.encoder_saliency), array(evidence.encoder_keys), array(evidence.features)
    crops, rows, carrier, margin = evidence.by_crop(), {}, [-1] * evidence.n, gap(a)
    for place, crop in enumerate(crops):
        share = k // len(crops) + (place < k % len(crops))
        few = max(0, min(share - 1, math.floor(contextual * share + 0.5)))
        order = sorted(crop.tolist(), key=lambda i: (-a[i], i))
        rest = sorted(order[share - few :])
        for i in order[: share - few]:
            rows[i], carrier[i] = x[i], i
        if not few:
            continue
        targets = [rest[m * (len(rest) // few)] for m in range(few)]
        members: dict[int, list[int]] = {t: [] for t in targets}
        for i in rest:
            if i in targets:
                carrier[i] = i
                continue
            like = [float(keys[i] @ keys[t]) / math.sqrt(keys[i] @ keys[i] * (keys[t] @ keys[t])) for t in targets]
            carrier[i] = targets[like.index(max(like))]
            members[carrier[i]].append(i)
            margin = min(margin, gap(np.array(like)))
        for t in targets:
            rows[t] = x[t] + (sum(x[i] for i in members[t]) / len(members[t]) if members[t] else 0.0)
    return rows, carrier, margin


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 12),
    crops=st.integers(1, 3),
    share=st.floats(0.0, 1.0),
    contextual=st.sampled_from([0.0, 0.15625, 0.5, 1.0]),
    shuffled=st.booleans(),
)
def test_it_is_the_papers_rule(
    seed: int, size: int, crops: int, share: float, contextual: float, shuffled: bool
) -> None:
    n = size * crops
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n)) if shuffled else torch.arange(n)
    order = torch.cat([crop.sort().values for crop in order.split(size)])
    evidence = make_evidence(n, seed, crops=(size,) * crops, crop_order=order)
    k = max(1, round(share * n))
    rows, carrier, margin = reference(evidence, k, contextual)
    assume(margin > 1e-6)
    answer = VisionZip(keep=k, contextual=contextual).select(evidence, 0)
    assert answer.keep.tolist() == sorted(rows)
    assert answer.features is not None and answer.merged_into is not None
    np.testing.assert_allclose(answer.features.numpy(), [rows[i] for i in sorted(rows)], atol=1e-5)
    kept = answer.keep.tolist()
    assert [kept[slot] if slot >= 0 else -1 for slot in answer.merged_into.tolist()] == carrier


def test_by_hand() -> None:
    # Tokens 1 and 4 are dominant. Of 0, 2, 3, 5 every second is a target: 0 and 3. Token 2 looks like 3, 5 like 0.
    evidence = make_evidence(
        6,
        features=torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 4.0], [0.0, 1.0], [7.0, 7.0], [3.0, 2.0]]),
        encoder_keys=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.0, 2.0], [1.0, 0.0], [5.0, 1.0]]),
        encoder_saliency=torch.tensor([0.1, 0.4, 0.0, 0.1, 0.3, 0.1]),
    )
    answer = VisionZip(keep=4, contextual=0.5).select(evidence, 0)
    assert answer.keep.tolist() == [0, 1, 3, 4]
    assert answer.features is not None and answer.merged_into is not None
    assert answer.features.tolist() == [[4.0, 2.0], [9.0, 9.0], [0.0, 5.0], [7.0, 7.0]]
    assert answer.merged_into.tolist() == [0, 1, 2, 2, 3, 0]


@pytest.mark.parametrize(("k", "contextual"), [(192, 30), (128, 20), (64, 10), (3, 0), (2, 0), (1, 0)])
def test_the_published_counts(k: int, contextual: int) -> None:
    assert VisionZip(keep=k).merged(k) == contextual
    answer = VisionZip(keep=k).select(make_evidence(576), 0)
    assert answer.features is not None
    changed = (answer.features != make_evidence(576).features[answer.keep]).any(dim=1)
    assert int(changed.sum()) <= contextual and len(answer.keep) == k


def test_a_crop_too_small_for_a_contextual_token_throws_away() -> None:
    answer = VisionZip(keep=2).select(make_evidence(6, crops=(2, 2, 2)), 0)
    assert answer.merged_into is not None
    assert sorted(answer.merged_into.tolist()) == [-1, -1, -1, -1, 0, 1]


def test_stacked_images_with_crops_get_the_answers_they_get_alone() -> None:
    method, images = VisionZip(keep=7, contextual=0.4), [make_evidence(24, seed, crops=(8, 16)) for seed in range(4)]
    for image, together in zip(images, select_all(method, images, 0), strict=True):
        alone = method.select(image, 0)
        assert together.keep.tolist() == alone.keep.tolist()
        torch.testing.assert_close(together.features, alone.features)


def test_golden() -> None:
    evidence = make_evidence(
        16, features=waves(16, 2), encoder_keys=waves(16, 3, step=0.4), encoder_saliency=waves(16, step=0.3).softmax(0)
    )
    answer = VisionZip(keep=6, contextual=0.5).select(evidence, 0)
    assert answer.keep.tolist() == GOLDEN_KEEP
    torch.testing.assert_close(answer.features, torch.tensor(GOLDEN_FEATURES), atol=1e-5, rtol=0)


GOLDEN_KEEP = [0, 2, 5, 8, 10, 12]
GOLDEN_FEATURES = [
    [0.644218, 0.917478],
    [0.999615, -0.759848],
    [0.62741, -0.814999],
    [-0.932229, -0.050176],
    [-0.483143, 0.260273],
    [-0.44806, -0.992176],
]


@pytest.mark.parametrize("contextual", [-0.1, 1.5, float("nan")])
def test_bad_options_are_refused_with_a_hint(contextual: float) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        VisionZip(keep=4, contextual=contextual)
