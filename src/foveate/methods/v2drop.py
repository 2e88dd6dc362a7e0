"""V2Drop: visual tokens that a decoder layer hardly changes are lazy, and leave in three steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch

from foveate import budget
from foveate.budget import Keep, Stage
from foveate.core import Evidence, LayerMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import top_k, unit
from foveate.registry import register

#: The paper's stages by their mean of tokens per layer, for 576 tokens and 32 layers.
PUBLISHED: Mapping[int, tuple[Stage, ...]] = MappingProxyType(
    {
        192: ((3, 0.5), (17, 0.3), (22, 0)),
        128: ((3, 0.28), (17, 0.25), (22, 0)),
        64: ((3, 0.05), (17, 0.05), (22, 0)),
    }
)


@register
@dataclass(frozen=True, kw_only=True)
class V2Drop(LayerMethod):
    """Keep the tokens that the last decoder layer changed most.

    Paper: V2Drop, CVPR 2026, arXiv 2509.01552, method section; timing from the code (xuyang-liu16/V2Drop).

    Idea: A visual token that a layer leaves almost as it was adds nothing new. Before three layers of the LLM the
        tokens alive are ranked by how far the layer before moved them. The laziest leave; text never does.

    Sites: the layers of ``stages``: 3, 17, 22 of 32 (0-based), otherwise the same depths: L 3/32, L 17/32, L 22/32.
    Keeps: the floor(alive keep_l) largest v_i = ||input_l(i) - input_{l-1}(i)||_2 before each layer l.

    Differs from the paper: A stage of 0 keeps none, as the paper says (the code keeps max(1, .)). The 192 schedule
        is the paper's 0.3 at layer 17 (the code's 0.5 makes a mean of 202.8). With several images each keeps its own
        share. For other depths or token counts the schedule that meets the wanted mean is solved.

    Args:
        stages: (layer, what stays of the alive) pairs, rising layers >= 1; float = fraction, int = tokens, 0 = none;
            the paper's ((3, 0.5), (17, 0.3), (22, 0)) when ``keep`` is left out too.
        keep: Mean of tokens per decoder layer instead: int = tokens, float = fraction of the image's tokens. 192, 128
            and 64 of 576 in 32 layers are the published schedules.
        metric: ``l2`` (the paper's), ``l1`` or ``cosine`` (1 - cos).

    Raises:
        BudgetError: If both are given, a stage is malformed or outside the model, or a mean is out of reach.

    Example:
        >>> V2Drop().sites(32), V2Drop(keep=64).sites(28), V2Drop(keep=192).expected(576, 576, 3, 32)
        ((3, 17, 22), (3, 15, 19), 288)
    """

    name: ClassVar[str] = "v2drop"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "previous"})
    shares: ClassVar[tuple[Keep, ...]] = (0.5, 0.3, 0)

    metric: Literal["l2", "l1", "cosine"] = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in ("l2", "l1", "cosine"):
            raise BudgetError(f"metric must be l2, l1 or cosine, got {self.metric!r}", "l2 is the paper's")

    def layers(self, n_layers: int) -> tuple[int, ...]:
        return (3, 17, 22) if self.keep is None else budget.at_depths((3 / 32, 17 / 32, 22 / 32), n_layers)

    def schedule(self, total: int, n_layers: int) -> tuple[Stage, ...]:
        if self.keep is None:
            return super().schedule(total, n_layers)
        if isinstance(self.keep, int) and self.keep in PUBLISHED and (total, n_layers) == (576, 32):
            return PUBLISHED[self.keep]
        first, second, third = self.sites(n_layers)
        return budget.solve_schedule(total, self.keep, n_layers, (first, second, third))

    def select(self, evidence: Evidence, site: int) -> Selection:
        hidden, previous = evidence.require("hidden").float(), evidence.require("previous").float()
        if self.metric == "cosine":
            change = 1.0 - (unit(hidden) * unit(previous)).sum(dim=1)
        else:
            change = torch.linalg.vector_norm(hidden - previous, ord=2 if self.metric == "l2" else 1, dim=1)
        k = self.expected(evidence.n, evidence.total, site, evidence.depth)
        return Selection(keep=top_k(change, k), scores=change)
