"""EvoCut: tokens whose direction of change in the image encoder is unlike everyone else's carry information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import Evidence, PromptMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import shares, spherical_kmeans, top_k
from foveate.registry import register

#: Rows per step where a transition is formed: what a step casts and normalises stays in the cache.
_BLOCK = 144


@register
@dataclass(frozen=True, kw_only=True)
class EvoCut(PromptMethod):
    """Keep the tokens that move through the encoder in their own direction.

    Paper: EvoCut, arXiv 2606.01756, method section (no public code).

    Idea: From one encoder layer to the next most patches move along a few common directions: background drifts
        together. A patch that moves along none of them is being worked on. EvoCut measures how far each patch's move
        is from the nearest common direction, averages that over half of the encoder, and keeps the highest.

    Sites: 0.
    Keeps: the K largest s^(L), with s^(l) = alpha s^(l-1) + (1 - alpha) (1 - max_m <D_i, u_m>), where D_i is the unit
        difference hidden_states[l] - hidden_states[l - 1] and u_m are the M k-means directions of transition l.

    Differs from the paper: The start of k-means is not stated there; here it is deterministic (farthest-point from the
        row nearest the mean direction, cosine assignment, an empty group keeps its direction). Selection is after the
        projector, so where the projector merges patches, scores are averaged over a merged unit. The count of
        transitions (13 of 24) implies a last transition one past the layer LLaVA reads; ``last`` moves it.

    Args:
        keep: Tokens per image (int) or fraction that stays (float); the paper's K.
        start: First transition, 1-based, 1..layers; the paper's l0; default half of the layers (12 of 24).
        last: Last transition, start..layers; default all layers.
        directions: Groups per transition, >= 1; the paper's M = 8.
        alpha: Memory of the moving average, in [0, 1); the paper's 0.95.
        iterations: k-means iterations, >= 0; the paper's I = 2.
        share: ``crop`` gives every crop or frame an equal share of the budget, ``global`` ranks all tokens together.
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.

    Raises:
        BudgetError: If an option is out of range, or the encoder has no such layers.

    Example:
        >>> EvoCut(keep=64).encoder_layers(24)
        range(12, 25)
    """

    name: ClassVar[str] = "evocut"
    needs: ClassVar[frozenset[str]] = frozenset({"encoder_fold"})

    start: int | None = None
    last: int | None = None
    directions: int = 8
    alpha: float = 0.95
    iterations: int = 2
    share: Literal["crop", "global"] = "crop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions < 1 or self.iterations < 0:
            raise BudgetError(
                f"evocut needs directions >= 1 and iterations >= 0, got {self.directions} and {self.iterations}",
                "the paper has directions=8, iterations=2",
            )
        if not 0.0 <= self.alpha < 1.0:
            raise BudgetError(f"alpha must be in [0, 1), got {self.alpha}", "the paper has alpha=0.95")
        if self.share not in ("crop", "global"):
            raise BudgetError(f"share must be crop or global, got {self.share!r}", "crop gives each an equal share")
        if (self.start is not None and self.start < 1) or (self.last is not None and self.last < (self.start or 1)):
            raise BudgetError(
                f"transitions are counted from 1 and rise, got start={self.start}, last={self.last}",
                "leave both out for the second half of the encoder",
            )

    def encoder_layers(self, n_layers: int) -> range:
        start = max(1, n_layers // 2) if self.start is None else self.start
        last = n_layers if self.last is None else self.last
        if not start <= last <= n_layers:
            raise BudgetError(
                f"an encoder of {n_layers} layers has no transitions {start}..{last}",
                f"start and last lie in 1..{n_layers}; leave both out for its second half",
            )
        return range(start, last + 1)

    def fold(
        self, carry: Float[Tensor, " n"] | None, before: Float[Tensor, "n v"], after: Float[Tensor, "n v"]
    ) -> Float[Tensor, " n"]:
        moves = torch.empty_like(after, dtype=torch.float32)
        for at in range(0, len(moves), _BLOCK):  # in place: fresh buffers cost more than the arithmetic
            part = moves[at : at + _BLOCK].copy_(after[at : at + _BLOCK]).sub_(before[at : at + _BLOCK])
            part.div_(torch.linalg.vector_norm(part, dim=1, keepdim=True).clamp(min=1e-12))
        centres = spherical_kmeans(moves, self.directions, self.iterations)
        deviation = 1.0 - (centres @ moves.T).amax(dim=0)
        memory = torch.zeros_like(deviation) if carry is None else carry
        return self.alpha * memory + (1.0 - self.alpha) * deviation

    def select(self, evidence: Evidence, site: int) -> Selection:
        scores = evidence.require("encoder_fold").float()
        crops = evidence.by_crop() if self.share == "crop" else (torch.arange(evidence.n, device=scores.device),)
        counts = shares(self.count(evidence.n), [len(crop) for crop in crops])
        keep = [crop[top_k(scores[crop], k)] for crop, k in zip(crops, counts, strict=True)]
        return Selection(keep=torch.cat(keep).sort().values, scores=scores)
