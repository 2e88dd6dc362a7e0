from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import ops
from tests.methods.helpers import array, clusters


def test_unit_rows_have_length_one_and_a_zero_row_stays_zero() -> None:
    rows = ops.unit(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]]))
    assert rows.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0], [0.0, -1.0]]


def test_unit_is_float32_and_does_not_overflow_in_half_precision() -> None:
    rows = ops.unit(torch.full((2, 400), 6e4, dtype=torch.float16))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, torch.full((2, 400), 0.05))


def test_top_k_is_sorted_and_the_lowest_index_wins_a_tie() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert ops.top_k(scores, 3).tolist() == [1, 2, 3]
    assert ops.top_k(scores, 0).tolist() == []
    assert ops.top_k(scores, 9).tolist() == [0, 1, 2, 3, 4, 5]
    assert ops.top_k(torch.tensor([-5, 7, 7, 2**62]), 2).tolist() == [1, 3]
    assert ops.descending(scores).tolist() == [1, 3, 2, 4, 5, 0]


@given(scores=st.lists(st.integers(-4, 4), min_size=1, max_size=30), k=st.integers(0, 30))
def test_top_k_keeps_no_score_below_one_that_left(scores: list[int], k: int) -> None:
    kept = ops.top_k(torch.tensor(scores), k).tolist()
    assert kept == sorted(set(kept)) and len(kept) == min(k, len(scores))
    left = [scores[i] for i in range(len(scores)) if i not in kept]
    assert not (kept and left) or min(scores[i] for i in kept) >= max(left)


def test_ranks_are_the_places_in_a_list() -> None:
    assert ops.ranks(torch.tensor([2, 0]), 4, missing=9).tolist() == [1, 9, 0, 9]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_shares_spend_all_and_differ_by_one_where_there_is_room(sizes: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, sum(sizes)))
    given_to = ops.shares(k, sizes)
    assert sum(given_to) == k
    assert all(0 <= part <= size for part, size in zip(given_to, sizes, strict=True))
    most = max(given_to)
    assert all(part >= most - 1 or part == size for part, size in zip(given_to, sizes, strict=True))


def test_shares_give_the_remainder_to_the_first() -> None:
    assert ops.shares(11, (5, 5, 5)) == (4, 4, 3)
    assert ops.shares(64, (576,)) == (64,)


def test_kmeans_finds_well_separated_directions() -> None:
    angles = torch.tensor([0.0, 2.0, -2.0, 120.0, 121.0, 239.0, 240.0, 241.0]).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    centres = ops.spherical_kmeans(rows, 3, 2)
    found = sorted(round(math.degrees(math.atan2(y, x)) % 360, 2) % 360 for x, y in centres.tolist())
    assert found == pytest.approx([0.0, 120.5, 240.0], abs=0.02)


def test_kmeans_without_iterations_is_farthest_point_from_the_row_nearest_the_mean() -> None:
    angles = torch.tensor([0.0, 80.0, 10.0, 170.0]).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)  # their sum points to 49 degrees: row 1 is nearest
    assert torch.equal(ops.spherical_kmeans(rows, 3, 0), rows[[1, 3, 0]])


def test_kmeans_with_more_groups_than_rows_keeps_empty_groups_finite() -> None:
    for rows in (torch.zeros(2, 3), torch.eye(3)[:1], torch.eye(3)[[0, 0, 0]]):
        assert torch.equal(ops.spherical_kmeans(rows, 5, 3), rows[:1].expand(5, 3))


@given(n=st.integers(1, 40), k=st.integers(1, 9), seed=st.integers(0, 999))
def test_group_sums_are_the_product_with_the_one_hot_matrix(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, group = torch.randn(n, 5, generator=generator), torch.randint(k, (n,), generator=generator)
    one_hot = (group == torch.arange(k)[:, None]).float()
    torch.testing.assert_close(ops.group_sums(rows, group, k), one_hot @ rows, atol=1e-5, rtol=1e-5)
    assert ops.group_sums(rows.to("meta"), group.to("meta"), k).shape == (k, 5)


@given(n=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 999), poor=st.booleans())
def test_greedy_diversity_picks_different_tokens(n: int, k: int, seed: int, poor: bool) -> None:
    rows = torch.ones(n, 3) if poor else torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    first = torch.tensor(seed % n)
    for objective in ("max_sum", "k_center"):
        picks = ops.greedy_diversity(rows, min(k, n), first, objective).tolist()
        assert picks[0] == seed % n and len(set(picks)) == min(k, n)


@pytest.mark.parametrize("objective", ["max_sum", "k_center"])
def test_greedy_diversity_without_the_cosine_matrix_is_the_same(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, first = torch.randn(40, 6), torch.tensor(3)
    picks = ops.greedy_diversity(rows, 12, first, objective)  # type: ignore[arg-type]
    monkeypatch.setattr(ops, "_GRAM_LIMIT", 0)
    assert ops.greedy_diversity(rows, 12, first, objective).tolist() == picks.tolist()  # type: ignore[arg-type]


def test_the_loneliest_row_is_found_in_pieces_too() -> None:
    rows = torch.randn(1500, 3) + torch.tensor([9.0, 0.0, 0.0])
    for lonely in (3, 1300):
        moved = rows.clone()
        moved[lonely] = torch.tensor([-1.0, 0.0, 0.0])
        assert int(ops.loneliest(moved)) == lonely
    assert int(ops.loneliest(rows[:1])) == int(ops.loneliest(torch.zeros(4, 3))) == 0


@given(n=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 999), rank=st.integers(0, 6))
def test_greedy_volume_picks_different_rows_also_beyond_the_rank(n: int, k: int, seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, rank, generator=generator) @ torch.randn(rank, 7, generator=generator)
    picks = ops.greedy_volume(rows, min(k, n)).tolist()
    assert len(set(picks)) == min(k, n)
    lengths = torch.linalg.svdvals(rows)
    assume(rank == 0 or lengths[min(n, rank) - 1] > 0.02 * lengths[0])
    spanned = min(rank, n, k)
    assert int(torch.linalg.matrix_rank(rows[picks[:spanned]])) == spanned, "each pick adds volume while any can"
    left = rows[picks[spanned:]].norm(dim=1)
    assert (left.diff() <= 1e-6).all(), "then the longest go first"


def test_greedy_volume_without_the_gram_matrix_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(40, 20)
    picks = ops.greedy_volume(rows, 12)
    monkeypatch.setattr(ops, "_GRAM_LIMIT", 0)
    assert ops.greedy_volume(rows, 12).tolist() == picks.tolist()


@given(scores=st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=20), factor=st.floats(0, 3))
def test_the_outlier_fence_is_made_of_quartiles(scores: list[float], factor: float) -> None:
    low, high = np.quantile(np.array(scores), [0.25, 0.75])
    fence = float(ops.outlier_fence(torch.tensor(scores), factor))
    assert fence == pytest.approx(high + factor * (high - low), abs=1e-4)


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8), st.data())
def test_cells_are_a_partition_into_exactly_k(frames: int, rows: int, columns: int, data: st.DataObject) -> None:
    n = frames * rows * columns
    k = data.draw(st.integers(1, n))
    cell, centres = ops.cells((frames, rows, columns), k)
    assert len(cell) == n and set(cell) == set(range(k))
    assert list(centres) == sorted(set(centres))
    assert [cell[i] for i in centres] == list(range(k))
    sizes = [cell.count(j) for j in range(k)]
    assert k < n or sizes == [1] * n
    per_frame = [len({cell[f * rows * columns + i] for i in range(rows * columns)}) for f in range(frames)]
    assert max(per_frame) - min(per_frame) <= 1


def test_cells_by_hand() -> None:
    assert ops.cells((1, 4, 4), 4) == ((0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3), (0, 2, 8, 10))
    assert ops.cells((1, 1, 6), 4) == ((0, 0, 1, 2, 2, 3), (0, 2, 3, 5))
    assert ops.cells((1, 3, 3), 1) == ((0,) * 9, (4,))
    assert ops.cells((2, 1, 2), 1) == ((0, 0, 0, 0), (0,))


def test_a_prime_number_of_cells_is_spread_over_bands() -> None:
    cell, _ = ops.cells((1, 24, 24), 61)
    sizes = [cell.count(j) for j in range(61)]
    assert min(sizes) >= 6 and max(sizes) <= 16


def test_cell_means_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0], [7.0, 8.0], [0.0, 1.0]])
    assert ops.cell_means(rows, (0, 0, 1, 1, 1)).tolist() == [[2.0, 0.0], [4.0, 5.0]]
    assert ops.cell_means(rows.bfloat16(), (0, 0, 1, 1, 1)).dtype == torch.bfloat16


def test_splitmix64_gives_the_published_sequence() -> None:
    # The first outputs of the generator seeded with 1234567, as unsigned numbers.
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)
    steps = torch.arange(4) * (0x9E3779B97F4A7C15 - (1 << 64)) + 1234567
    assert [value % (1 << 64) for value in ops.splitmix64(steps).tolist()] == list(known)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (2, 3), (7, 1), (7, 3)])
def test_the_shared_functions_run_under_vmap(n: int, k: int) -> None:
    rows, scores = torch.randn(3, n, 4), torch.randn(3, n)
    k = min(k, n)
    assert torch.equal(torch.vmap(lambda s: ops.top_k(s, k))(scores), torch.stack([ops.top_k(s, k) for s in scores]))
    picks = torch.vmap(lambda x, s: ops.greedy_diversity(x, k, s.argmax()))(rows, scores)
    alone = [ops.greedy_diversity(x, k, s.argmax()) for x, s in zip(rows, scores, strict=True)]
    assert torch.equal(picks, torch.stack(alone))
    for pick in (ops.loneliest, lambda x: ops.greedy_volume(x, k), lambda x: ops.outlier_fence(x[:, 0], 1.5)):
        assert torch.equal(torch.vmap(pick)(rows), torch.stack([pick(x) for x in rows]))
    centres = torch.vmap(lambda x: ops.spherical_kmeans(ops.unit(x), k, 2))(rows)
    torch.testing.assert_close(centres, torch.stack([ops.spherical_kmeans(ops.unit(x), k, 2) for x in rows]))


@given(scores=st.lists(st.integers(0, 5), min_size=1, max_size=20), data=st.data())
def test_groups_take_turns(scores: list[int], data: st.DataObject) -> None:
    n = len(scores)
    group = data.draw(st.lists(st.integers(-2, 3), min_size=n, max_size=n))
    queues: dict[int, list[int]] = {}
    for i in sorted(range(n), key=lambda i: -scores[i]):
        queues.setdefault(group[i], []).append(i)
    wanted = []
    while any(queues.values()):
        turn = [queue.pop(0) for queue in queues.values() if queue]
        wanted += sorted(turn, key=lambda i: (-scores[i], i))
    assert ops.in_turns(torch.tensor(scores).float(), torch.tensor(group)).tolist() == wanted


def test_density_peaks_find_separate_clouds() -> None:
    generator = torch.Generator().manual_seed(0)
    clouds = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    rows = clouds.repeat_interleave(7, 0) + 0.3 * torch.randn(21, 2, generator=generator)
    peaks, member = ops.density_peaks(rows, 3)
    assert sorted((peaks // 7).tolist()) == [0, 1, 2]
    assert all(peaks[member[i]] // 7 == i // 7 for i in range(21))


@given(seed=st.integers(0, 10**6), n=st.integers(2, 24), width=st.integers(1, 5), k=st.integers(1, 5))
def test_density_peaks_are_those_of_the_loops(seed: int, n: int, width: int, k: int) -> None:
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    wanted, nearest, margin = clusters(array(rows), min(k, n))
    assume(margin > 1e-5)
    peaks, member = ops.density_peaks(rows, min(k, n))
    assert (peaks.tolist(), member.tolist()) == (wanted, nearest)


def test_density_peaks_of_equal_far_and_single_rows() -> None:
    peaks, member = ops.density_peaks(torch.ones(6, 3), 2)
    assert len(set(peaks.tolist())) == 2 and member[peaks].tolist() == [0, 1]
    far = torch.tensor([[0.0], [1e4], [3e4]])  # exp(-d^2) of any two is 0 in any precision
    assert ops.density_peaks(far, 2)[0].tolist() == [1, 0]
    assert [t.tolist() for t in ops.density_peaks(torch.zeros(1, 4), 1)] == [[0], [0]]


def test_group_means_are_float32_whatever_the_rows() -> None:
    rows = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]]).half()
    means = ops.group_means(rows, torch.tensor([1, 1, 0]), 2)
    assert means.dtype == torch.float32
    assert means.tolist() == [[5.0, 5.0], [2.0, 1.0]]


def test_the_last_row_of_nothing_is_zero() -> None:
    assert ops.last_row(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half()).tolist() == [3.0, 4.0]
    assert ops.last_row(torch.zeros(0, 3).half()).tolist() == [0.0, 0.0, 0.0]
    assert ops.last_row(torch.zeros(0, 3).half()).dtype == torch.float32
