"""Positions in three axes of shortened pictures: tokens that stay keep theirs, and text stands where it stood.

vLLM wants positions before it knows which tokens stay. So a picture's tokens get the first ones of its grid, the text
behind it is counted from the full grid, and each token brings its own place in the grid along with its features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_DIGIT = 256  # the largest base whose digits every floating type holds exactly
_CHANNELS = 6


def with_places(rows: Float[Tensor, "k d"], places: Int[Tensor, "k 3"]) -> Float[Tensor, "k c"]:
    """Return rows with their places in the grid behind them, each as two digits, so that bfloat16 holds them too."""
    digits = torch.stack([places // _DIGIT, places % _DIGIT], -1).flatten(1)
    return torch.cat([rows, digits.to(rows)], 1)


def split_places(rows: Float[Tensor, "k c"]) -> tuple[Float[Tensor, "k d"], Int[Tensor, "k 3"]]:
    """Return what `with_places` put together."""
    high, low = rows[:, -_CHANNELS:].long().unflatten(1, (3, 2)).unbind(-1)
    return rows[:, :-_CHANNELS], high * _DIGIT + low


def count(length: int, pictures: Sequence[tuple[int, int, tuple[int, int, int]]]) -> tuple[Int[Tensor, "3 n"], int]:
    """Count the positions of a prompt, and return the position that comes after it.

    Args:
        length: Of the prompt.
        pictures: Where each begins, how many tokens stay of it, and its full grid, in the order of the prompt.
    """
    pieces, end, after = [], 0, 0
    for start, kept, grid in [*pictures, (length, 0, (0, 0, 0))]:
        pieces.append(torch.arange(after, after + start - end).expand(3, -1))
        after, end = after + start - end, start + kept
        if kept:
            full = torch.cartesian_prod(*[torch.arange(size) for size in grid])
            pieces.append(after + full[:kept].T)
            after += max(grid)
    return torch.cat(pieces, 1), after


def move(
    positions: Int[Tensor, "3 n"], visual: Tensor, places: Int[Tensor, "k 3"], computed: int
) -> Int[Tensor, "3 n"]:
    """Return positions in which visual tokens of a chunk stand at their places; text and others stay where they are.

    Args:
        positions: Of the whole prompt.
        visual: Which of its tokens are visual, [n].
        places: In their grids, of the visual tokens that come next.
        computed: How many tokens of the prompt came before the chunk.
    """
    index = torch.arange(len(visual), device=visual.device)
    text = torch.cummax(torch.where(visual, -1, index), 0).values  # the last text before each token
    now = (visual & (index >= computed)).nonzero()[: len(places), 0]
    before = text[now]
    base = torch.where(before < 0, 0, positions[0, before.clamp(min=0)] + 1)
    moved = positions.clone()
    moved[:, now] = (base[:, None] + places.to(base)).T.to(moved)
    return moved
