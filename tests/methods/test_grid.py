from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d

from foveate import Grid, Pool
from tests.methods.helpers import make_evidence, waves


@pytest.mark.parametrize(("keep", "rows", "columns"), [(192, 12, 16), (128, 8, 16), (64, 8, 8), (144, 12, 12)])
def test_the_usual_budgets_make_regular_grids(keep: int, rows: int, columns: int) -> None:
    kept = Grid(keep=keep).select(make_evidence(576), 0).keep
    ys, xs = (kept // 24).unique(), (kept % 24).unique()
    assert (len(ys), len(xs)) == (rows, columns)
    assert kept.tolist() == [24 * y + x for y in ys.tolist() for x in xs.tolist()]


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), share=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_pool_is_the_mean_of_the_tokens_nearest_in_the_grid(rows: int, columns: int, share: float, seed: int) -> None:
    n = rows * columns
    k = max(1, int(share * n))
    evidence = make_evidence(n, seed, grid=(1, rows, columns))
    answer = Pool(keep=k).select(evidence, 0)
    assert answer.merged_into is not None and answer.features is not None
    slots = answer.merged_into.tolist()
    for slot, token in enumerate(answer.keep.tolist()):
        members = [i for i in range(n) if slots[i] == slot]
        assert token in members
        ys, xs = {i // columns for i in members}, {i % columns for i in members}
        assert len(members) == len(ys) * len(xs)  # a cell is a full rectangle
        assert max(ys) - min(ys) == len(ys) - 1 and max(xs) - min(xs) == len(xs) - 1
        assert abs(token // columns - (min(ys) + max(ys)) / 2) <= 0.5
        assert abs(token % columns - (min(xs) + max(xs)) / 2) <= 0.5
        mean = sum(evidence.features[i].double() for i in members) / len(members)
        torch.testing.assert_close(answer.features[slot].double(), mean, atol=1e-6, rtol=1e-5)
    assert answer.keep.tolist() == Grid(keep=k).select(evidence, 0).keep.tolist()


def test_where_cells_divide_the_grid_it_is_average_pooling() -> None:
    evidence = make_evidence(576)
    answer = Pool(keep=64).select(evidence, 0)
    wanted = adaptive_avg_pool2d(evidence.features.T.reshape(-1, 24, 24), 8).flatten(1).T
    torch.testing.assert_close(answer.features, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_are_the_same_bits(dtype: torch.dtype) -> None:
    evidence = make_evidence(24, features=torch.randn(24, 8).to(dtype))
    answer = Pool(keep=1.0).select(evidence, 0)
    assert answer.keep.tolist() == list(range(24))
    assert answer.features is not None and torch.equal(answer.features, evidence.features)
    half = Pool(keep=0.5).select(evidence, 0)
    assert half.features is not None and half.features.dtype == dtype


def test_frames_share_equally() -> None:
    evidence = make_evidence(48, grid=(3, 4, 4))
    kept = Grid(keep=12).select(evidence, 0).keep
    assert [int((kept // 16 == frame).sum()) for frame in range(3)] == [4, 4, 4]
    few = Pool(keep=2).select(make_evidence(64, grid=(4, 4, 4)), 0)  # fewer cells than frames: frames 0-1, frames 2-3
    assert few.merged_into is not None and few.merged_into.tolist() == [0] * 32 + [1] * 32


def test_tokens_that_fill_no_grid_are_taken_at_a_stride() -> None:
    evidence = make_evidence(12, grid=(1, 24, 24))
    assert Grid(keep=4).select(evidence, 0).keep.tolist() == [1, 4, 7, 10]


def test_golden() -> None:
    evidence = make_evidence(20, features=waves(20, 2))
    assert Grid(keep=7).select(evidence, 0).keep.tolist() == GOLDEN_KEEP
    answer = Pool(keep=7).select(evidence, 0).features
    torch.testing.assert_close(answer, torch.tensor(GOLDEN_FEATURES), atol=1e-5, rtol=0)


GOLDEN_KEEP = [0, 2, 3, 4, 10, 12, 14]
GOLDEN_FEATURES = [
    [0.386835, -0.326371],
    [0.586556, -0.015136],
    [-0.272414, -0.090514],
    [0.519884, -0.182211],
    [0.41539, 0.498386],
    [-0.078206, -0.016754],
    [0.670487, 0.927139],
]
