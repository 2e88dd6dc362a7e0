"""Random: a baseline that looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core import Evidence, PromptMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import splitmix64, top_k
from foveate.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Random(PromptMethod):
    """Keep K tokens by lot; the same prompt draws the same lot.

    Paper: None; the baseline every paper should beat.

    Idea: A method that is not better than this has found nothing. A hash of prompt, seed and place gives each token
        a number. The K highest stay, whatever else is in the batch.

    Sites: 0.
    Keeps: the K largest h(prompt, seed, frame, row, column), h made of SplitMix64.

    Differs from the paper: Nothing.

    Args:
        keep: Tokens per image (int) or fraction that stays (float).
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.
        seed: Another number, another lot; 0 <= seed < 2^63.

    Raises:
        BudgetError: If an option is out of range.

    Example:
        >>> Random(keep=0.25, seed=1).count(576)
        144
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[str]] = frozenset({"seed", "coordinates"})

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 1 << 63:
            raise BudgetError(f"seed must be in 0 .. 2^63 - 1, got {self.seed}", "seed=1 draws another lot")

    def select(self, evidence: Evidence, site: int) -> Selection:
        seed = evidence.require("seed").long()
        state = splitmix64(seed ^ splitmix64(torch.full_like(seed, self.seed)))
        for place in evidence.coordinates.long().unbind(dim=1):
            state = splitmix64(state ^ place)
        bits = (state >> 1) & ((1 << 63) - 1)
        return Selection(keep=top_k(bits, self.count(evidence.n)), scores=(bits >> 39).float() / (1 << 24))
