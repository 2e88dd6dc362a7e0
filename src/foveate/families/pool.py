"""Which patches an average pooling puts under each token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def under_average(
    pool: Callable[[Float[Tensor, "p c"]], Float[Tensor, "n c"]], places: Int[Tensor, "p 2"], k: int
) -> Int[Tensor, "n m"]:
    """Return the patches under each token, by asking the model's own pooling.

    An average forgets what went into it. So each place within a cell of k x k patches gets a channel of its own, where
    its patch stands with its number and no other patch of the cell stands at all.

    Args:
        pool: Averages the patches of one image.
        places: Row and column of each patch.
        k: Side of a cell.
    """
    cell = places % k @ torch.tensor([k, 1])
    alone = torch.nn.functional.one_hot(cell, k * k).double()
    numbers = torch.arange(len(places), dtype=torch.float64)[:, None]
    share = pool(torch.cat([alone * numbers, alone], 1).float()).double()  # and that of each place in its token
    return (share[:, : k * k] / share[:, k * k :]).round().long()
