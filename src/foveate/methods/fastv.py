"""FastV: after two layers of the LLM, the tokens that the end of the prompt hardly looks at leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import EarlyMethod, Evidence, Selection
from foveate.ops import last_row, top_k
from foveate.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class FastV(EarlyMethod):
    """Keep, from an early layer of the LLM on, the tokens that the last prompt token attends to.

    Paper: FastV, ECCV 2024, arXiv 2403.06764, method section.

    Idea: After two layers the LLM has read most of what it wants of a picture, and hardly looks at it again. The
        attention of the last prompt token, from which the answer begins, tells which tokens it still looks at.

    Sites: K = 2; 1 in an LLM of fewer than 24 layers.
    Keeps: the floor((1 - R) n) tokens with the largest a_j, the mean over heads of the attention of the last prompt
        token to j in layer K - 1; R = 50 %.

    Differs from the paper: With several images each keeps its own share. Where no text follows an image all its
        scores are 0, and its first tokens stay.

    Args:
        layer: The layer K before which tokens leave where ``stages`` names none, >= 1; left out: see Sites.
        stages: (layer, what stays of the alive) pairs, rising layers >= 1; float = fraction, int = tokens, 0 = none;
            half before layer K when ``keep`` is left out too.
        keep: Mean of tokens per decoder layer instead: int = tokens, float = fraction of the image's tokens. 192, 128
            and 64 of 576 in 32 layers keep 166, 98 and 30 from layer 2 on.

    Raises:
        BudgetError: If an option is out of range or excludes another, or a mean is out of reach.

    Example:
        >>> FastV().expected(576, 576, 2, 32), FastV(keep=64).expected(576, 576, 2, 32)
        (288, 30)
    """

    name: ClassVar[str] = "fastv"
    needs: ClassVar[frozenset[str]] = frozenset({"relevance"})
    shares: ClassVar[tuple[float, ...]] = (0.5,)

    def select(self, evidence: Evidence, site: int) -> Selection:
        scores = last_row(evidence.require("relevance"))
        k = self.expected(evidence.n, evidence.total, site, evidence.depth)
        return Selection(keep=top_k(scores, k), scores=scores)
