"""Shape-typed tensor functions that methods share: pure, float32, vmap-safe, deterministic.

None of them synchronises with the host, and none has control flow that depends on data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

#: Above so many tokens the n x n cosine matrix costs more memory than it saves time.
_GRAM_LIMIT = 8192


def unit(rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """x / max(||x||_2, 1e-12) in float32: each row on the unit sphere; a zero row stays zero."""
    rows = rows.float()
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / norm.clamp(min=1e-12)


def descending(scores: Num[Tensor, " n"]) -> Int[Tensor, " n"]:
    """argsort(-s): indices from the highest score to the lowest; of equal scores the lowest index first."""
    return scores.argsort(descending=True, stable=True)


def top_k(scores: Num[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """S = {the k largest s_i}: their indices, ascending; of equal scores the lowest index wins."""
    return descending(scores)[:k].sort().values


def ranks(order: Int[Tensor, " m"], n: int, missing: int) -> Int[Tensor, " n"]:
    """rank_i = j where order_j = i: the place of each of n tokens in a list; ``missing`` if it is not in it."""
    places = torch.arange(order.shape[0], device=order.device)
    return torch.full((n,), missing, device=order.device).scatter(0, order, places)


def shares(k: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """k_i = floor(k / g) + [i < k mod g], at most sizes_i: equal shares of k; what does not fit goes to the others.

    Example:
        >>> shares(10, (8, 8, 8)), shares(10, (2, 8, 8))
        ((4, 3, 3), (2, 4, 4))
    """
    assert 0 <= k <= sum(sizes)
    given = [0] * len(sizes)
    while left := k - sum(given):
        room = [i for i, size in enumerate(sizes) if given[i] < size]
        for i in room if left >= len(room) else room[:left]:
            given[i] += min(max(left // len(room), 1), sizes[i] - given[i])
    return tuple(given)


def spherical_kmeans(rows: Float[Tensor, "n d"], k: int, iterations: int) -> Float[Tensor, "k d"]:
    """u_m = unit(sum of the rows nearest u_m): k group directions of unit rows, by cosine.

    The first centre is the row nearest the mean direction, each next one the row least similar to its nearest centre.
    A group without rows keeps its centre. Of equal candidates the lowest index wins.
    """
    centre = rows.index_select(0, (rows @ rows.mean(0)).argmax()[None])[0]
    centres, likeness = [centre], [rows @ centre]
    nearest = likeness[0]
    for _ in range(k - 1):
        centre = rows.index_select(0, nearest.argmin()[None])[0]
        centres.append(centre)
        likeness.append(rows @ centre)
        nearest = torch.maximum(nearest, likeness[-1])
    directions, groups = torch.stack(centres), torch.arange(k, device=rows.device)[:, None]
    similar = torch.stack(likeness)  # of each row to the first centres: what the first iteration needs
    for iteration in range(iterations):
        similar = directions @ rows.T if iteration else similar
        member = similar.argmax(dim=0) == groups
        means = unit(member.to(rows.dtype) @ rows)
        directions = torch.where(member.any(dim=1)[:, None], means, directions)
    return directions


def greedy_diversity(
    rows: Float[Tensor, "n d"], k: int, first: Int[Tensor, ""], objective: Literal["max_sum", "k_center"] = "max_sum"
) -> Int[Tensor, " k"]:
    """j = argmin_i c_i, then c <- c + cos(x, x_j) (max_sum) or max(c, cos(x, x_j)) (k_center), c_j = +inf.

    Returns:
        k different row indices in the order in which they were picked, ``first`` first.
    """
    x = unit(rows)
    gram = x @ x.T if len(x) <= _GRAM_LIMIT else None
    index = torch.arange(len(x), device=x.device)
    pick = first.long()
    cost = torch.full_like(x[:, 0], 0.0 if objective == "max_sum" else float("-inf"))
    picks = [pick]
    for _ in range(k - 1):
        row = x @ x.index_select(0, pick[None])[0] if gram is None else gram.index_select(0, pick[None])[0]
        cost = cost + row if objective == "max_sum" else torch.maximum(cost, row)
        cost = cost.masked_fill(index == pick, float("inf"))
        pick = cost.argmin()
        picks.append(pick)
    return torch.stack(picks)


@lru_cache(maxsize=256)
def cells(grid: tuple[int, int, int], k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """cell(y, x) = (floor(y R / H), floor(x c / W)): a grid cut into exactly k cells, in raster order.

    Each frame gets an equal share of cells (with fewer cells than frames: consecutive whole frames share a cell). A
    frame is cut into R bands of rows and each band into floor(k / R) cells or one more. R makes the cells near-square;
    one that does not divide k counts as much as cells e times as long as wide.

    Args:
        grid: Frames, rows, columns.
        k: 1 .. number of tokens.

    Returns:
        The cell of each token, and of each cell the token nearest its centre (rising).

    Example:
        >>> cells((1, 2, 4), 2)
        ((0, 0, 1, 1, 0, 0, 1, 1), (0, 2))
    """
    frames, rows, columns = grid
    assert 1 <= k <= frames * rows * columns
    cell = [0] * (frames * rows * columns)
    centres: list[int] = []
    groups = min(k, frames)
    for members, share in zip(_parts(frames, groups), map(len, _parts(k, groups)), strict=True):
        bands = _bands(rows, columns, share)
        for band, per_band in zip(_parts(rows, bands), map(len, _parts(share, bands)), strict=True):
            for span in _parts(columns, per_band):
                for frame in members:
                    for y in band:
                        for x in span:
                            cell[(frame * rows + y) * columns + x] = len(centres)
                frame, y, x = (part[(len(part) - 1) // 2] for part in (members, band, span))
                centres.append((frame * rows + y) * columns + x)
    return tuple(cell), tuple(centres)


def cell_means(rows: Float[Tensor, "n d"], cell: Sequence[int]) -> Float[Tensor, "k d"]:
    """mean of x_i over the tokens i of each cell, summed in float32 in a fixed order; in the dtype of ``rows``."""
    members: list[list[int]] = [[] for _ in range(max(cell) + 1)]
    for token, place in enumerate(cell):
        members[place].append(token)
    size = max(map(len, members))
    index = torch.tensor([m + m[:1] * (size - len(m)) for m in members], device=rows.device)
    weight = torch.tensor([[1.0] * len(m) + [0.0] * (size - len(m)) for m in members], device=rows.device)
    total = (rows.float()[index] * weight[..., None]).sum(dim=1)
    return (total / weight.sum(dim=1, keepdim=True)).to(rows.dtype)


def splitmix64(state: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """One step of SplitMix64 (Steele, Lea, Flood 2014) on int64 that wraps: 64 well-mixed bits of each state."""
    z = state.long() + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros, as on unsigned integers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)  # all three constants have the top bit set


def _parts(n: int, k: int) -> list[range]:
    """Return k runs that cover range(n): i is in run floor(i k / n)."""
    return [range(-(-j * n // k), -(-(j + 1) * n // k)) for j in range(k)]


def _bands(rows: int, columns: int, k: int) -> int:
    """Return into how many bands of rows a frame of k cells is cut."""

    def cost(bands: int) -> tuple[float, int]:
        aspect = abs(math.log((rows / bands) / (columns * bands / k)))
        return round(aspect + (k % bands > 0), 9), bands

    return min((r for r in range(1, min(rows, k) + 1) if -(-k // r) <= columns), key=cost)
