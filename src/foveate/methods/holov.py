"""HoloV: every part of the picture gets a share of the budget, larger where it is attended to and varied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import Evidence, PromptMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import descending, ranks, shares, top_k, unit
from foveate.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class HoloV(PromptMethod):
    """Keep the most attended tokens of each part of the picture, more where a part is attended to and varied.

    Paper: HoloV, NeurIPS 2025, arXiv 2510.02912, holistic token allocation.

    Idea: The highest attention of a picture gathers in one place, and the tokens picked there repeat each other. So
        attention ranks tokens only within a part of the picture, a run of tokens in reading order. How many places a
        part gets follows from how much attention it draws and from how much its tokens differ in their likeness to
        each other.

    Sites: 0.
    Keeps: of each run c of n / chunks tokens the b_c most attended, b_c = floor(K m_c / sum m), and what is left of K
        goes to the largest m_c; m_c is the mean over the run of a_i + alpha v_i (mean a / mean v), a_i the attention
        received, v_i the variance of cos(x_i, x_j) over the run's tokens j.

    Differs from the paper: There the score is 1000 a_i plus 0.09 of a scaled v_i. How v is scaled is read as: to the
        mean of the first term, whose 1000 then cancels. Similarity is between tokens after the projector. A run that is
        full passes places on to the next largest m_c, so that exactly K tokens stay (the released code fills up with
        zero rows). Encoders without CLS give the column mean of attention.

    Args:
        keep: Tokens per image (int) or fraction that stays (float).
        chunks: Runs of tokens, >= 1; the paper's 16.
        alpha: Weight of the variance, >= 0; the paper's 0.09.
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.

    Raises:
        BudgetError: If an option is out of range.

    Example:
        >>> HoloV(keep=64).count(576)
        64
    """

    name: ClassVar[str] = "holov"
    needs: ClassVar[frozenset[str]] = frozenset({"encoder_saliency", "coordinates"})

    chunks: int = 16
    alpha: float = 0.09

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks < 1 or not self.alpha >= 0.0:
            raise BudgetError(
                f"holov needs chunks >= 1 and alpha >= 0, got {self.chunks} and {self.alpha}",
                "the paper has chunks=16, alpha=0.09",
            )

    def select(self, evidence: Evidence, site: int) -> Selection:
        n, k, saliency = evidence.n, self.count(evidence.n), evidence.require("encoder_saliency").float()
        runs = min(self.chunks, n)
        sizes = list(shares(n, [n] * runs))
        variance = torch.cat([(x @ x.T).var(dim=1, correction=0) for x in unit(evidence.features).split(sizes)])
        scores = saliency + self.alpha * variance * saliency.mean() / variance.mean().clamp(min=1e-12)
        quota = _quotas(torch.stack([run.mean() for run in scores.split(sizes)]), sizes, k)
        rank = torch.cat([ranks(descending(run), len(run), 0) for run in saliency.split(sizes)])
        member = torch.tensor([run for run, size in enumerate(sizes) for _ in range(size)], device=rank.device)
        return Selection(keep=top_k((rank < quota[member]).int(), k), scores=scores)


def _quotas(weights: Float[Tensor, " c"], sizes: Sequence[int], k: int) -> Int[Tensor, " c"]:
    """b_c = floor(k m_c / sum m), at most sizes_c; what is left of k goes to the largest m_c that have room."""
    weights = weights + 1e-12  # nothing anywhere: equal shares
    size = torch.tensor(sizes, device=weights.device)
    given = torch.minimum((k * weights / weights.sum() + 1e-4).long(), size)  # a whole number must not be rounded off
    order = descending(weights)
    room = (size - given)[order]
    more = torch.minimum((k - given.sum() - room.cumsum(0) + room).clamp(min=0), room)
    return given + more[order.argsort()]
