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

#: Above so many tokens the n x n matrix of products costs more memory than it saves time.
_GRAM_LIMIT = 8192

#: Below so large a share of the rows, each row's products alone take less time than the matrix of all.
_GRAM_SHARE = 1 / 5


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


def in_turns(scores: Float[Tensor, " n"], group: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Indices of the best of each group, then of the second of each, and so on; in each turn by falling score."""
    order = descending(scores)
    together = order[group[order].argsort(stable=True)]
    place = torch.arange(len(order), device=order.device)
    begins = group[together].diff(prepend=group[together[:1]] - 1) != 0
    turn = place - torch.where(begins, place, 0).cummax(dim=0).values
    return order[torch.zeros_like(turn).scatter(0, together, turn)[order].argsort(stable=True)]


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
    centre = rows.index_select(0, (rows @ rows.mean(0)).argmax(0, keepdim=True))[0]
    centres, likeness = [centre], [rows @ centre]
    nearest = likeness[0]
    for _ in range(k - 1):
        centre = rows.index_select(0, nearest.argmin(0, keepdim=True))[0]
        centres.append(centre)
        likeness.append(rows @ centre)
        nearest = torch.maximum(nearest, likeness[-1])
    directions, groups = torch.stack(centres), torch.arange(k, device=rows.device)[:, None]
    similar = torch.stack(likeness)  # of each row to the first centres: what the first iteration needs
    for iteration in range(iterations):
        similar = directions @ rows.T if iteration else similar
        group = similar.max(dim=0).indices  # of ties the first, like argmax, which is slow down columns
        means = unit(group_sums(rows, group, k))
        directions = torch.where((group == groups).any(dim=1, keepdim=True), means, directions)
    return directions


def group_sums(rows: Float[Tensor, "n d"], group: Int[Tensor, " n"], k: int) -> Float[Tensor, "k d"]:
    """sum of x_i over the rows i of each of k groups, added in a fixed order.

    On a CPU row by row, in one pass. Elsewhere ``index_add`` has no fixed order: there it is a product with the one-hot
    matrix.
    """
    if rows.device.type == "cpu":
        return rows.new_zeros(k, rows.shape[1]).index_add(0, group, rows)
    return (group == torch.arange(k, device=rows.device)[:, None]).to(rows.dtype) @ rows


def density_peaks(
    rows: Float[Tensor, "n d"], k: int, neighbours: int = 5
) -> tuple[Int[Tensor, " k"], Int[Tensor, " n"]]:
    """The k largest rho_i delta_i, rho_i = exp(-mean of d_ij^2 over the nearest j), delta_i = min_{rho_j > rho_i} d_ij.

    d_ij^2 is the mean over columns of (x_i - x_j)^2; the densest row has delta = max_j d_ij. Of equal rows the lowest
    index counts as the denser one (Rodriguez, Laio 2014, with the neighbours of Du, Ding, Jia 2016).

    Returns:
        The rows that are peaks, and for each row which of them is nearest; a peak is nearest to itself.
    """
    n, x = len(rows), rows.float()
    x = x - x.mean(dim=0)
    square = x.square().sum(dim=1)
    distance = (square[:, None] + square - 2 * x @ x.T).clamp(min=0) / x.shape[1]
    index = torch.arange(n, device=x.device)
    others = distance.masked_fill(index[:, None] == index, float("inf")).sort(dim=1).values
    sparse = others[:, : min(neighbours, n - 1)].mean(dim=1) if n > 1 else torch.zeros_like(square)  # -log rho
    denser = (sparse < sparse[:, None]) | ((sparse == sparse[:, None]) & (index < index[:, None]))
    nearest = distance.masked_fill(~denser, float("inf")).amin(dim=1)
    nearest = torch.where(denser.any(dim=1), nearest, distance.amax(dim=1))
    peaks = descending(nearest.log() / 2 - sparse)[:k]
    member = distance[:, peaks].argmin(dim=1).scatter(0, peaks, index[:k])
    return peaks, member


def group_means(rows: Float[Tensor, "n d"], member: Int[Tensor, " n"], k: int) -> Float[Tensor, "k d"]:
    """mean of x_i over the rows i of each of k groups, none of them empty, in float32."""
    sizes = (member == torch.arange(k, device=rows.device)[:, None]).sum(dim=1, keepdim=True)
    return group_sums(rows.float(), member, k) / sizes


def last_row(rows: Float[Tensor, "r n"]) -> Float[Tensor, " n"]:
    """x_r in float32: the last row, zeros where there is none."""
    return rows[-1].float() if len(rows) else torch.zeros_like(rows.sum(dim=0), dtype=torch.float32)


def greedy_diversity(
    rows: Float[Tensor, "n d"],
    k: int,
    first: Int[Tensor, ""] | None = None,
    objective: Literal["max_sum", "k_center"] = "max_sum",
) -> Int[Tensor, " k"]:
    """j = argmin_i c_i, then c <- c + cos(x, x_j) (max_sum) or max(c, cos(x, x_j)) (k_center), c_j = +inf.

    Returns:
        k different row indices in the order in which they were picked, ``first`` first; left out, the loneliest.
    """
    x = unit(rows)
    gram = _gram(x, k if first is not None else len(x))
    index = torch.arange(len(x), device=x.device)
    pick = _loneliest(x, gram) if first is None else first.long()
    cost = torch.full_like(x[:, 0], 0.0 if objective == "max_sum" else float("-inf"))
    picks = [pick]
    for _ in range(k - 1):
        row = _products(x, gram, pick)
        cost = cost + row if objective == "max_sum" else torch.maximum(cost, row)
        cost = cost.masked_fill(index == pick, float("inf"))
        pick = cost.argmin()
        picks.append(pick)
    return torch.stack(picks)


def _gram(x: Float[Tensor, "n d"], asked: int) -> Float[Tensor, "n n"] | None:
    """The products of all rows with each other, where ``asked`` of them are worth it."""
    return x @ x.T if _GRAM_SHARE * len(x) < asked and len(x) <= _GRAM_LIMIT else None


def _products(x: Float[Tensor, "n d"], gram: Float[Tensor, "n n"] | None, j: Int[Tensor, ""]) -> Float[Tensor, " n"]:
    """<x_i, x_j> for every i."""
    row: Tensor = x @ x.index_select(0, j[None])[0] if gram is None else gram.index_select(0, j[None])[0]
    return row


def loneliest(rows: Float[Tensor, "n d"]) -> Int[Tensor, ""]:
    """argmin_i max_{j != i} cos(x_i, x_j): the row whose nearest neighbour is farthest; of equal ones the first.

    Two rows that are each other's nearest are equal, whatever rounding says.
    """
    x = unit(rows)
    return _loneliest(x, _gram(x, len(x)))


def _loneliest(x: Float[Tensor, "n d"], gram: Float[Tensor, "n n"] | None) -> Int[Tensor, ""]:
    index = torch.arange(len(x), device=x.device)
    found = [
        (x[part] @ x.T if gram is None else gram).masked_fill(index == part[:, None], float("-inf")).max(dim=1)
        for part in index.split(1024 if gram is None else len(x))
    ]
    nearest = torch.cat([part.indices for part in found])
    best = torch.cat([part.values for part in found]).argmin(0, keepdim=True)
    other = nearest.index_select(0, best)
    mutual = nearest.index_select(0, other) == best
    return torch.where(mutual, torch.minimum(best, other), best)[0]


def greedy_volume(rows: Float[Tensor, "n d"], k: int) -> Int[Tensor, " k"]:
    """j = argmax_i d_i^2, e_i = (<y_j, y_i> - <c_j, c_i>) / d_j, c_i <- (c_i, e_i), d_i^2 <- d_i^2 - e_i^2, d_j = 0.

    The greedy maximum of det(Y_S Y_S^T), as in Chen, Zhang and Zhou (2018): d_i is how far row i stands out of the span
    of those picked. Once none does (by a thousandth of the longest row), the longest rows go first.

    Returns:
        k different row indices in the order in which they were picked.
    """
    rows = rows.float()
    gram = _gram(rows, len(rows))  # rows one by one round otherwise, which decides near the rank
    index = torch.arange(len(rows), device=rows.device)
    gain = (rows * rows).sum(dim=1)
    least = 1e-6 * gain.max()
    by_length = -1.0 - ranks(descending(gain), len(rows), 0)
    basis = rows.new_zeros(k, len(rows))
    picks = []
    for step in range(k):
        pick = torch.where(gain > least, gain, by_length).argmax()
        picks.append(pick)
        row = _products(rows, gram, pick)
        length = gain.index_select(0, pick[None])
        rest = row - basis[:step].index_select(1, pick[None])[:, 0] @ basis[:step]
        basis[step] = torch.where(length > least, rest / length.clamp(min=1e-20).sqrt(), 0.0)
        gain = (gain - basis[step] ** 2).masked_fill(index == pick, float("-inf"))
        by_length = by_length.masked_fill(index == pick, float("-inf"))
    return torch.stack(picks)


def outlier_fence(scores: Float[Tensor, " n"], factor: float) -> Float[Tensor, ""]:
    """Q3 + factor (Q3 - Q1), quartiles interpolated linearly between the two nearest scores."""
    ordered, last = scores.sort().values, len(scores) - 1

    def quartile(q: float) -> Tensor:
        low = math.floor(q * last)
        return ordered[low] + (q * last - low) * (ordered[min(low + 1, last)] - ordered[low])

    return quartile(0.75) + factor * (quartile(0.75) - quartile(0.25))


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
