"""VisionZip: the tokens that the encoder attends to most, and the rest merged into a few more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core import Evidence, PromptMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import descending, ranks, shares, unit
from foveate.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class VisionZip(PromptMethod):
    """Keep what CLS attends to most, and merge the rest into a few evenly spaced tokens.

    Paper: VisionZip, CVPR 2025, arXiv 2412.04467, dominant and contextual tokens.

    Idea: Attention in the encoder gathers on few tokens, the dominant ones; they stay as they are. The others still
        hold the scene at large, so they are not thrown away: evenly spaced ones become contextual tokens, and every
        token that is left adds what it says to the contextual token whose key is most like its own.

    Sites: 0.
    Keeps: the K - C most attended tokens, and C = round(contextual K) targets t, every floor(R / C)-th of the R others
        in reading order, each x_t + mean of x_i over the tokens i with t = argmax_t' cos(key_i, key_t').

    Differs from the paper: CLS itself is no token here; its place goes to one more dominant token. Merging is after the
        projector (there: before it). Encoders without CLS give the column mean of attention. Crops and frames share the
        budget equally, each merges within itself, and what belongs to one too small for a contextual token leaves.

    Args:
        keep: Tokens per image (int) or fraction that stays (float); the paper's 192, 128 and 64.
        contextual: Share of the budget that is merged, in [0, 1]; the paper's 10 of 64, 20 of 128 and 30 of 192. One
            token of each crop is always dominant.
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.

    Raises:
        BudgetError: If an option is out of range.

    Example:
        >>> [VisionZip(keep=k).merged(k) for k in (192, 128, 64)]
        [30, 20, 10]
    """

    name: ClassVar[str] = "visionzip"
    needs: ClassVar[frozenset[str]] = frozenset({"encoder_saliency", "encoder_keys", "coordinates"})

    contextual: float = 0.15625

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.contextual <= 1.0:
            raise BudgetError(f"contextual must be in [0, 1], got {self.contextual}", "the paper has 10 of 64: 0.15625")

    def merged(self, k: int) -> int:
        """Return how many of ``k`` tokens are contextual ones."""
        return max(0, min(k - 1, math.floor(self.contextual * k + 0.5)))

    def select(self, evidence: Evidence, site: int) -> Selection:
        n, k, crops = evidence.n, self.count(evidence.n), evidence.by_crop()
        saliency, keys = evidence.require("encoder_saliency").float(), unit(evidence.require("encoder_keys"))
        picked, carrier = [], torch.full((n,), -1, device=saliency.device)
        for crop, share in zip(crops, shares(k, [len(crop) for crop in crops]), strict=True):
            few = self.merged(share)
            order = crop[descending(saliency[crop])]
            picked.append(order[: share - few])
            if few:
                rest = order[share - few :].sort().values
                step = len(rest) // few
                targets = rest[: few * step : step]
                carrier = carrier.scatter(0, rest, targets[(keys[rest] @ keys[targets].T).argmax(dim=1)])
                picked.append(targets)
        keep = torch.cat(picked).sort().values
        slot = ranks(keep, n, -1)
        into = torch.where((slot < 0) & (carrier >= 0), slot[carrier.clamp(min=0)], slot)
        member = (into == torch.arange(k, device=into.device)[:, None]) & (slot < 0)
        rows, weight = evidence.features.float(), member.float()
        rows = rows[keep] + weight @ rows / weight.sum(dim=1, keepdim=True).clamp(min=1.0)
        return Selection(keep=keep, scores=saliency, features=rows.to(evidence.features.dtype), merged_into=into)
