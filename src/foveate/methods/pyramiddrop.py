"""PyramidDrop: at a quarter, a half and three quarters of the LLM, half of the tokens that are left leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.budget import at_depths
from foveate.core import Evidence, LayerMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import last_row, top_k
from foveate.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(LayerMethod):
    """Keep ever fewer tokens from stage to stage of the LLM, by the attention of the last prompt token.

    Paper: PyramidDrop, CVPR 2025, arXiv 2410.17247, method section.

    Idea: Shallow layers need the whole picture, deep ones only what the question is about. The LLM is cut into four
        stages of equal depth. At the end of each of the first three the tokens are ranked by the attention that the
        last token of the instruction gives them, and half of them leave.

    Sites: L/4, L/2, 3L/4: layers 8, 16, 24 of 32.
    Keeps: the floor(alive / 2) tokens with the largest a_j, the mean over heads of the attention of the last prompt
        token to j in the layer just run: 50, 25, 12.5 % of the image's tokens, 270 of 576 on average.

    Differs from the paper: Attention is that of the stage's last layer; the code compares queries and keys of the next
        layer. The tokens that stay have the positions they had (there: renumbered). Stages for another mean are not
        published: they begin early, and keep the same share each. With several images each keeps its own share. Where
        no text follows an image all its scores are 0, and its first tokens stay.

    Args:
        start: Depth of the first drop where ``stages`` names no layers, as a fraction in (0, 1); the others lie evenly
            between it and the end. Left out: the paper's 1/4; with ``keep`` 1/16, as means below 1/4 ask for.
        stages: (layer, what stays of the alive) pairs, rising layers >= 1; float = fraction, int = tokens, 0 = none;
            the paper's ((8, 0.5), (16, 0.5), (24, 0.5)) when ``keep`` is left out too.
        keep: Mean of tokens per decoder layer instead: int = tokens, float = fraction of the image's tokens.

    Raises:
        BudgetError: If an option is out of range or excludes another, or a mean is out of reach.

    Example:
        >>> PyramidDrop().sites(28), PyramidDrop(keep=64).schedule(576, 32)
        ((7, 14, 21), ((2, 78), (12, 10), (22, 2)))
    """

    name: ClassVar[str] = "pyramiddrop"
    needs: ClassVar[frozenset[str]] = frozenset({"relevance"})
    shares: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    start: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None and (self.stages is not None or not 0.0 < self.start < 1.0):
            raise BudgetError(f"start is in (0, 1) and goes without stages, got {self.start}", "the paper has 0.25")

    def layers(self, n_layers: int) -> tuple[int, ...]:
        start = self.start or (1 / 4 if self.keep is None else 1 / 16)
        return at_depths([start + (1.0 - start) * third / 3 for third in range(3)], n_layers)

    def select(self, evidence: Evidence, site: int) -> Selection:
        scores = last_row(evidence.require("relevance"))
        k = self.expected(evidence.n, evidence.total, site, evidence.depth)
        return Selection(keep=top_k(scores, k), scores=scores)
