"""DART: a few pivots, and the tokens that duplicate them least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core import EarlyMethod, Evidence, Selection
from foveate.errors import BudgetError
from foveate.ops import descending, ranks, shares, unit
from foveate.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class DART(EarlyMethod):
    """Keep a few pivots, and the tokens that are least like them.

    Paper: DART, EMNLP 2025, arXiv 2502.11494, method section; counts from the code (ZichenWen1/DART).

    Idea: What matters is not how important a token is but whether another says the same. A few tokens with large keys,
        of the picture and of the text, are pivots. Each pivot in turn picks the tokens least similar to it; what is
        never picked duplicates one of them, and leaves.

    Sites: K = 2; 1 in an LLM of fewer than 24 layers.
    Keeps: the 4 visual tokens with the largest ||key||_1 over all heads in layer K - 1, and of the others, for each of
        these pivots and of the 4 text tokens chosen alike, an equal share with the lowest cosine to it, among the
        inputs of layer K.

    Differs from the paper: Exactly as many tokens stay as the budget says, the pivots among them (the code: about 4
        more). Pivots take their turns by falling norm, visual ones first (the code: in no certain order); the first
        ones take what cannot be shared. Text pivots come of the text after the image, and cosines of the states as
        they are (the code: after the final norm). With several images each keeps its own share.

    Args:
        pivots: Visual pivots, and text pivots, >= 1; the paper's 4 of each.
        layer: The layer K before which tokens leave where ``stages`` names none, >= 1; left out: see Sites.
        stages: (layer, what stays of the alive) pairs, rising layers >= 1; float = fraction, int = tokens, 0 = none;
            the paper's 128 of 576 before layer K when ``keep`` is left out too.
        keep: Mean of tokens per decoder layer instead: int = tokens, float = fraction of the image's tokens.

    Raises:
        BudgetError: If an option is out of range or excludes another, or a mean is out of reach.

    Example:
        >>> DART().expected(576, 576, 2, 32), DART(keep=64).expected(576, 576, 2, 32)
        (128, 30)
    """

    name: ClassVar[str] = "dart"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "keys", "text_hidden", "text_keys"})
    shares: ClassVar[tuple[float, ...]] = (128 / 576,)

    pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pivots < 1:
            raise BudgetError(f"pivots must be >= 1, got {self.pivots}", "the paper has 4")

    def select(self, evidence: Evidence, site: int) -> Selection:
        k = self.expected(evidence.n, evidence.total, site, evidence.depth)
        states, words = unit(evidence.require("hidden")), unit(evidence.require("text_hidden"))
        norms, word_norms = (evidence.require(name).float().abs().sum(dim=1) for name in ("keys", "text_keys"))
        picks = [descending(norms)[: min(self.pivots, k)]]
        pivots = torch.cat([states[picks[0]], words[descending(word_norms)[: self.pivots]]])
        taken = torch.zeros_like(norms, dtype=torch.bool).scatter(0, picks[0], True)
        rest = k - len(picks[0])
        for pivot, share in zip(pivots, shares(rest, [rest] * len(pivots)), strict=True):
            likeness = (states @ pivot).masked_fill(taken, float("inf"))
            picks.append(likeness.argsort(stable=True)[:share])
            taken = taken.scatter(0, picks[-1], True)
        order = torch.cat(picks)
        place = ranks(order, evidence.n, max(k, 1)).float()
        scores = 1.0 - place / max(k, 1)  # the order of picking; 0 where not picked
        return Selection(keep=order.sort().values, scores=scores)
