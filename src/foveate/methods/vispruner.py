"""VisPruner: half of the tokens for the encoder's attention, half for what is left without its duplicates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import Evidence, PromptMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import descending, shares, top_k, unit
from foveate.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class VisPruner(PromptMethod):
    """Keep what CLS attends to most, and of the rest what remains when duplicates are taken away.

    Paper: VisPruner, ICCV 2025, arXiv 2412.01818, important and diverse tokens.

    Idea: Attention of the encoder finds the foreground, and leaves nothing of the background. So only half of the
        budget follows it. The other half is what is left of the remaining tokens when, round by round, those that have
        a near double among the others are removed.

    Sites: 0.
    Keeps: the round(important K) most attended tokens, and of the others, from the most attended down, what is left
        when every round removes up to ``removed`` of the tokens i at even places with the largest
        max_{j at odd places} cos(x_i, x_j).

    Differs from the paper: Similarity is between tokens after the projector. What is left stays in the order of
        attention from round to round. Encoders without CLS give the column mean of attention. Crops and frames share
        the budget equally, and each is judged alone.

    Args:
        keep: Tokens per image (int) or fraction that stays (float).
        important: Share of the budget that attention decides, in [0, 1]; the paper's 0.5.
        removed: Tokens that leave per round at most, >= 1; the released 8.
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.

    Raises:
        BudgetError: If an option is out of range.

    Example:
        >>> VisPruner(keep=64, important=0.75).count(576)
        64
    """

    name: ClassVar[str] = "vispruner"
    needs: ClassVar[frozenset[str]] = frozenset({"encoder_saliency"})

    important: float = 0.5
    removed: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.important <= 1.0:
            raise BudgetError(f"important must be in [0, 1], got {self.important}", "the paper has 0.5")
        if self.removed < 1:
            raise BudgetError(f"removed must be at least 1, got {self.removed}", "8 tokens per round are usual")

    def select(self, evidence: Evidence, site: int) -> Selection:
        saliency, crops = evidence.require("encoder_saliency").float(), evidence.by_crop()
        keep = []
        for crop, k in zip(crops, shares(self.count(evidence.n), [len(crop) for crop in crops]), strict=True):
            order = crop[descending(saliency[crop])]
            sure = math.floor(self.important * k + 0.5)
            others = order[sure:]
            keep += [order[:sure], others[_distinct(evidence.features[others], k - sure, self.removed)]]
        return Selection(keep=torch.cat(keep).sort().values, scores=saliency)


def _distinct(rows: Float[Tensor, "n d"], k: int, removed: int) -> Int[Tensor, " k"]:
    """Remove argmax_{i even} max_{j odd} cos(x_i, x_j), up to ``removed`` per round, until k rows are left."""
    x, left = unit(rows), torch.arange(len(rows), device=rows.device)
    if k == 0:
        return left[:0]
    gram = x @ x.T
    while len(left) > k:
        even, odd = left[::2], left[1::2]
        likeness = gram.index_select(0, even).index_select(1, odd).amax(dim=1)
        leave = min(removed, len(left) - k, len(even))
        left = torch.cat([even[top_k(-likeness, len(even) - leave)], odd]).sort().values
    return left
