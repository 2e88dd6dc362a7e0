from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate import ops


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
    centres = torch.vmap(lambda x: ops.spherical_kmeans(ops.unit(x), k, 2))(rows)
    torch.testing.assert_close(centres, torch.stack([ops.spherical_kmeans(ops.unit(x), k, 2) for x in rows]))
