"""PruMerge and PruMerge+: outliers of attention, each with its neighbours, and one token for all that leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core import Evidence, PromptMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import cells, descending, outlier_fence, ranks, unit
from foveate.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class PruMerge(PromptMethod):
    """Keep what CLS attends to most, and add to each what its neighbours say.

    Paper: LLaVA-PruMerge, ICCV 2025, arXiv 2403.15388, adaptive selection and token supplement.

    Idea: CLS attends to few tokens much more than to the others; these outliers stay. What leaves is not lost: each
        kept token takes in the tokens most like it, weighted by attention, and one more token holds all that leaves.

    Sites: 0.
    Keeps: the K - 1 largest a_i, or with ``fence`` those above Q3 + fence (Q3 - Q1), at most K - 1, as
        x_i + sum_{j in N_i} a_j x_j, N_i the 32 leaving tokens with the largest cos(key_i, key_j); and one token
        sum_{j leaving} a_j x_j, at the place of the most attended j.

    Differs from the paper: The number of tokens is fixed unless ``fence`` is given; ``keep=1.0,fence=1.5`` is the
        paper's. a_i is a mean over heads in the feature layer (there: one softmax over the channels of all heads), the
        column mean without CLS. Neighbours are sought among the leaving tokens, so that a full budget changes nothing.
        The extra token counts, and has a place of its own. Merging is after the projector (there: before it).

    Args:
        keep: Tokens per image (int) or fraction that stays (float); with ``fence`` the most that stay.
        fence: Keep only outliers, so many interquartile ranges above the third quartile, >= 0; the paper's 1.5.
        neighbours: Tokens that each kept token takes in, >= 0; the paper's 32.
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.

    Raises:
        BudgetError: If an option is out of range.

    Example:
        >>> PruMerge(keep=64).expected(576, 576, 0, 32), PruMerge(keep=1.0, fence=1.5).expected(576, 576, 0, 32)
        (64, None)
    """

    name: ClassVar[str] = "prumerge"
    needs: ClassVar[frozenset[str]] = frozenset({"encoder_saliency", "encoder_keys"})
    adaptive: ClassVar[bool] = True

    fence: float | None = None
    neighbours: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0 or not (self.fence is None or self.fence >= 0.0):
            found = f"fence={self.fence}, neighbours={self.neighbours}"
            raise BudgetError(f"fence and neighbours start at 0, got {found}", "the paper has fence=1.5, neighbours=32")

    def expected(self, alive: int, total: int, site: int, n_layers: int) -> int | None:
        return self.count(alive) if self.fence is None else None

    def sure(self, evidence: Evidence, k: int) -> tuple[int, ...]:
        """Return the tokens that stay whatever their attention, at most k - 1."""
        return ()

    def select(self, evidence: Evidence, site: int) -> Selection:
        n, k, rows = evidence.n, self.count(evidence.n), evidence.features.float()
        a, keys = evidence.require("encoder_saliency").float(), unit(evidence.require("encoder_keys"))
        sure = torch.tensor(self.sure(evidence, k), dtype=torch.long, device=a.device)
        stays = torch.zeros_like(a).index_fill(0, sure, 1.0) > 0
        order = descending(a.masked_fill(stays, float("inf")))[:k]  # those that are kept, then the extra token's place
        kept = torch.full_like(order[0], k - (k < n))
        if self.fence is not None:
            kept = (stays | (a > outlier_fence(a, self.fence))).sum().clamp(max=k - 1)
        place, rank = torch.arange(k, device=a.device)[:, None], ranks(order, n, k)
        leaves = rank >= kept
        like = (keys[order] @ keys.T).masked_fill(~leaves, float("-inf"))
        near = like.argsort(dim=1, descending=True, stable=True)[:, : self.neighbours]
        near_kept = (torch.zeros_like(like).scatter(1, near, 1.0) > 0) & (place < kept)
        takes = (near_kept | (place == kept)) & leaves
        features = torch.where(place == kept, 0.0, rows[order]) + (takes * a) @ rows
        keep, slots = order.sort()
        nearest = torch.where(place == kept, -2.0, like.masked_fill(~takes, float("-inf"))).argmax(dim=0)
        return Selection(
            keep=keep,
            stay=None if self.fence is None else (place[:, 0] <= kept)[slots],
            scores=a,
            features=features[slots].to(evidence.features.dtype),
            merged_into=slots.argsort()[torch.where(rank > kept, nearest, rank)],
        )


@register
@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """Keep what CLS attends to most and a uniform grid, and add to each what its neighbours say.

    Paper: LLaVA-PruMerge, ICCV 2025, arXiv 2403.15388, the variant with a plus.

    Idea: As `PruMerge`, but outliers leave whole regions bare. A uniform grid of tokens stays as well.

    Sites: 0.
    Keeps: the centre tokens of round(uniform K) cells of a grid, and of the others what `PruMerge` keeps, as it does.

    Differs from the paper: As `PruMerge`. The grid's share of the budget is our reading, also with ``fence``.

    Args:
        keep: Tokens per image (int) or fraction that stays (float); with ``fence`` the most that stay.
        fence: Keep the grid and only outliers besides, as in `PruMerge`; the paper's 1.5.
        neighbours: Tokens that each kept token takes in, >= 0; the paper's 32.
        uniform: Share of the budget that is the grid, in [0, 1].
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.

    Raises:
        BudgetError: If an option is out of range.

    Example:
        >>> PruMergePlus(keep=0.25).count(576)
        144
    """

    name: ClassVar[str] = "prumerge_plus"
    needs: ClassVar[frozenset[str]] = PruMerge.needs | {"coordinates"}

    uniform: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.uniform <= 1.0:
            raise BudgetError(f"uniform must be in [0, 1], got {self.uniform}", "uniform=0.75 leaves a quarter")

    def sure(self, evidence: Evidence, k: int) -> tuple[int, ...]:
        few = min(k - 1, math.floor(self.uniform * k + 0.5))
        return cells(evidence.filled_grid, few)[1] if few else ()
