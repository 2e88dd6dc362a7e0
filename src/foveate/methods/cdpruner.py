"""CDPruner: a diverse subset of what the question asks for, by a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import Evidence, PromptMethod, Selection
from foveate.ops import greedy_volume, ranks, unit
from foveate.registry import register

#: A spread of relevance below this is rounding: all tokens are equally relevant.
_EVEN = 1e-6


@register
@dataclass(frozen=True, kw_only=True)
class CDPruner(PromptMethod):
    """Keep tokens that span much volume when each is as long as it is relevant to the question.

    Paper: CDPruner, NeurIPS 2025, arXiv 2506.10967, conditional determinantal point process.

    Idea: The determinant of a set's cosine matrix is large when its tokens are unlike each other. Scaling each row by
        the token's relevance makes it large when they matter to the question as well. The best set of K is out of
        reach, so the token that adds the most volume is added K times.

    Sites: 0.
    Keeps: the greedy maximum of det L_S over sets of K, L_ij = r_i cos(x_i, x_j) r_j, with r the mean over text tokens
        e of cos(x_i, e), brought to [0, 1] by minimum and maximum.

    Differs from the paper: There, r is minus the mean cosine between the patches and the question in CLIP's common
        space. A CLIP text tower is no evidence here, so r reads the LLM's own embeddings of all text after the image,
        with the sign that a likeness has. Without text, or where all tokens are equally relevant, r = 1. Once no token
        adds volume (K above the rank of L, or r = 0), the most relevant go first. Crops and frames are judged together.

    Args:
        keep: Tokens per image (int) or fraction that stays (float); the paper's 128, 64 and 32.
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.

    Raises:
        BudgetError: If keep is out of range.

    Example:
        >>> CDPruner(keep=64).count(576)
        64
    """

    name: ClassVar[str] = "cdpruner"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def select(self, evidence: Evidence, site: int) -> Selection:
        k, rows = self.count(evidence.n), unit(evidence.features)
        picks = greedy_volume(rows * _relevance(rows, evidence.require("text"))[:, None], k)
        scores = 1.0 - ranks(picks, evidence.n, k).float() / k  # the order of picking; 0 where not picked
        return Selection(keep=picks.sort().values, scores=scores)


def _relevance(rows: Float[Tensor, "n d"], text: Float[Tensor, "t d"]) -> Float[Tensor, " n"]:
    """r_i = (m_i - min m) / (max m - min m), m_i = mean_e cos(x_i, e); 1 where that is nothing over nothing."""
    mean = rows @ unit(text).sum(dim=0) / max(len(text), 1)
    spread = mean.max() - mean.min()
    return torch.where(spread > _EVEN, (mean - mean.min()) / spread.clamp(min=_EVEN), 1.0)
