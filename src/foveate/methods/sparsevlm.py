"""SparseVLM: the words that speak of the picture rate its tokens, and what leaves is recycled into a few."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.budget import Stage, at_depths, resolve_keep, solve_decay, stage_keep
from foveate.core import Evidence, LayerMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import density_peaks, descending, group_means
from foveate.registry import register

#: The paper's counts by their mean of tokens per layer with what is recycled, for 576 tokens and 32 layers.
PUBLISHED: Mapping[int, tuple[Stage, ...]] = MappingProxyType(
    {192: ((2, 300), (6, 200), (15, 110)), 128: ((2, 303), (6, 110), (15, 36)), 64: ((2, 66), (6, 30), (15, 17))}
)


@register
@dataclass(frozen=True, kw_only=True)
class SparseVLM(LayerMethod):
    """Keep the tokens that the picture's own words attend to, and merge the best of the others into a few.

    Paper: SparseVLM, ICML 2025, arXiv 2410.04417, method section; counts from the code (Gumpest/SparseVLMs, v1.5).

    Idea: Most words of a question say nothing of the picture. Those that are more like it than the average are its
        raters, and tokens are ranked by the attention of the raters alone. Of what leaves, the better part is not
        lost: similar tokens are merged, and each group goes on as one.

    Sites: 2, 6, 15 of 32 layers (0-based), otherwise the same depths.
    Keeps: the k tokens with the largest mean of attention, over heads and raters, in the layer before, and
        floor(m / 10) + 1 groups of the m = floor(0.3 (alive - k)) best of the others. Text token j is a rater if
        mean_i softmax_j(x_i . e_j) over tokens x and words e, as they enter the LLM, is above 1 / t.

    Differs from the paper: The counts are the code's, not those of the rank of the attention map. Groups are those of
        density peaks (5 neighbours) among the layer's inputs, and go on as the mean of their inputs in the place of
        their peak; positions stay as they were (there: renumbered). Raters are chosen by the tokens alive, again at
        each site. With several images each keeps its own share. Where no text follows an image all scores are 0.

    Args:
        recycle: Share of what leaves that is merged, in [0, 1]; the paper's 0.3; 0 merges nothing.
        stages: (layer, what stays of the alive before recycling) pairs, rising layers >= 1; float = fraction, int =
            tokens, 0 = none.
        keep: Mean of tokens per decoder layer, with what is recycled: int = tokens, float = fraction of the image's
            tokens; a third when ``stages`` is left out too. 192, 128 and 64 of 576 in 32 layers are the published
            counts.

    Raises:
        BudgetError: If an option is out of range or excludes another, or a mean is out of reach.

    Example:
        >>> SparseVLM().schedule(576, 32), SparseVLM().expected(576, 576, 2, 32), SparseVLM(keep=64).sites(28)
        (((2, 300), (6, 200), (15, 110)), 309, (2, 5, 13))
    """

    name: ClassVar[str] = "sparsevlm"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "relevance", "text"})

    recycle: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.recycle <= 1.0:
            raise BudgetError(f"recycle must be in [0, 1], got {self.recycle}", "the paper has 0.3")

    def layers(self, n_layers: int) -> tuple[int, ...]:
        return at_depths((2 / 32, 6 / 32, 15 / 32), n_layers)

    def schedule(self, total: int, n_layers: int) -> tuple[Stage, ...]:
        sites = self.sites(n_layers)
        if self.stages is not None:
            return self.stages
        mean = resolve_keep(self.keep or 1 / 3, total)
        if mean in PUBLISHED and (total, n_layers, self.recycle) == (576, 32, 0.3):
            return PUBLISHED[mean]
        return solve_decay(total, mean, n_layers, sites, self._go_on)

    def _merged(self, left: int) -> tuple[int, int]:
        """Return how many of those left are merged, and into how many."""
        m = math.floor(self.recycle * left + 1e-9)
        return m, m // 10 + 1 if m else 0

    def _go_on(self, alive: int, k: int) -> int:
        return k + self._merged(alive - k)[1]

    def expected(self, alive: int, total: int, site: int, n_layers: int) -> int:
        return self._go_on(alive, stage_keep(dict(self.schedule(total, n_layers))[site], alive))

    def select(self, evidence: Evidence, site: int) -> Selection:
        relevance, hidden = evidence.require("relevance").float(), evidence.require("hidden")
        rates = _raters(evidence.features, evidence.require("text")).float()
        scores = rates @ relevance / rates.sum().clamp(min=1)
        n, order = evidence.n, descending(scores)
        k = stage_keep(dict(self.schedule(evidence.total, evidence.depth))[site], n)
        m, groups = self._merged(n - k)
        if not m:
            return Selection(keep=order[:k].sort().values, scores=scores)
        again = order[k : k + m]
        peaks, member = density_peaks(hidden[again], groups)
        chosen = torch.cat([order[:k], again[peaks]])
        slot = chosen.argsort().argsort()
        into = torch.full_like(order, -1).scatter(0, order[: k + m], torch.cat([slot[:k], slot[k:][member]]))
        rows = torch.cat([hidden[order[:k]], group_means(hidden[again], member, groups).to(hidden.dtype)])
        return Selection(keep=chosen.sort().values, scores=scores, features=rows[chosen.argsort()], merged_into=into)


def _raters(features: Float[Tensor, "n d"], text: Float[Tensor, "t d"]) -> Bool[Tensor, " t"]:
    """Which words are more like the tokens than the average word; all, where none is."""
    likeness = (features.float() @ text.float().T).softmax(dim=1).mean(dim=0)
    above = likeness > 1 / max(len(text), 1)
    return above | ~above.any()
