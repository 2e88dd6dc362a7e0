"""DivPrune: the most diverse subset, in which even the nearest two tokens are far apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import Evidence, PromptMethod, Selection
from foveate.ops import greedy_diversity, ranks
from foveate.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class DivPrune(PromptMethod):
    """Keep a subset in which even the nearest two tokens are far apart.

    Paper: DivPrune, CVPR 2025, arXiv 2503.02175, the greedy solution of the max-min diversity problem.

    Idea: Tokens that say the same are redundant, however much attention they get. So neither attention nor the question
        is asked: the first token is the one whose nearest neighbour is farthest, and each next one is the token whose
        nearest picked neighbour is farthest.

    Sites: 0.
    Keeps: K tokens: the first argmin_i max_{j != i} cos(x_i, x_j), each next one argmin_i max_{p picked} cos(x_i, x_p).

    Differs from the paper: Nothing that its text tells. Of equal candidates the first in reading order wins. All crops
        or frames of one picture are judged together.

    Args:
        keep: Tokens per image (int) or fraction that stays (float), which is rounded as in the paper.
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.

    Raises:
        BudgetError: If keep is out of range.

    Example:
        >>> DivPrune(keep=0.111).count(576)
        64
    """

    name: ClassVar[str] = "divprune"

    def select(self, evidence: Evidence, site: int) -> Selection:
        k = self.count(evidence.n)
        picks = greedy_diversity(evidence.features, k, objective="k_center")
        scores = 1.0 - ranks(picks, evidence.n, k).float() / k  # the order of picking; 0 where not picked
        return Selection(keep=picks.sort().values, scores=scores)
