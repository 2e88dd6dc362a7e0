"""AdaV: image saliency and text relevance share one budget, split where their collected masses balance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from foveate.core import Evidence, PromptMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import descending, ranks, top_k, unit
from foveate.registry import register

_NEVER = 1 << 40


@register
@dataclass(frozen=True, kw_only=True)
class AdaV(PromptMethod):
    """Keep tokens that stand out in the image and tokens the question asks for, in a share the input decides.

    Paper: AdaV, Findings of ACL 2025, 258; equations from the released code (JiayiV/AdaV, ``llava_llama.py``).

    Idea: One list ranks tokens by the encoder's own attention, the other by likeness to the words of the prompt.
        A quarter of the budget comes from the top of each list for certain. The open half is split so that both lists
        collect much of their mass: one whose mass sits in few tokens needs few places, a flat one gets the rest.

    Sites: 0.
    Keeps: F + n* from the text list and F + R - n* from the saliency list, with F = floor(fixed K), R = K - 2F,
        n* = argmax_n PA(n) PB(R - n) over the lists' prefix masses after F; t_i = max_text softmax_i(T cos(e, x_i)).

    Differs from the paper: A token on both lists counts once, and both lists are lengthened in proportion until K
        distinct tokens stay. With g crops the saliency list is the top ceil(K / g) of each, sorted by value. Without
        CLS, saliency is the column mean of attention. Without text after the image, t is flat (all zero) and saliency
        alone decides. ``compat`` brings back the released code: floor(floor(K / 2) / g) 2 g tokens, repeats kept,
        indices of crop i shifted by i instead of 576 i, the fixed quarter taken from the first crops.

    Args:
        keep: Tokens per image (int) or fraction that stays (float); the code's ``overall_tokens``.
        temperature: Factor T on the cosines, > 0; the code's 100.
        fixed: Share of the budget that each list has for certain, in [0, 0.5]; the code's 0.25.
        compat: Reproduce the released code, which is for crops of 576 tokens; others are shifted by i alike.
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.

    Raises:
        BudgetError: If an option is out of range, or ``compat`` meets a budget of which that code keeps nothing.

    Example:
        >>> AdaV(keep=64).count(576), AdaV(keep=144, compat=True).count(2880)
        (64, 140)
    """

    name: ClassVar[str] = "adav"
    needs: ClassVar[frozenset[str]] = frozenset({"encoder_saliency", "text"})

    temperature: float = 100.0
    fixed: float = 0.25
    compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise BudgetError(f"temperature must be positive, got {self.temperature}", "the released code has 100")
        if not 0.0 <= self.fixed <= 0.5:
            raise BudgetError(f"fixed must be in [0, 0.5], got {self.fixed}", "the released code has 0.25")

    def count(self, n: int) -> int:
        k = super().count(n)
        if not self.compat or k == n:
            return k
        crops = max(1, n // 576)
        if k < 2 * crops:
            raise BudgetError(f"compat=true keeps nothing of {n} tokens with keep={self.keep}", "use compat=false")
        return k // 2 // crops * 2 * crops

    def select(self, evidence: Evidence, site: int) -> Selection:
        n, k, crops = evidence.n, self.count(evidence.n), evidence.by_crop()
        saliency, text = evidence.require("encoder_saliency").float(), evidence.require("text")
        logits = self.temperature * unit(text) @ unit(evidence.features).T
        relevance = logits.log_softmax(dim=1).amax(dim=0) if len(text) else torch.full_like(saliency, float("-inf"))
        by_text = descending(relevance)
        tops = [descending(saliency[crop])[: -(-k // len(crops))] for crop in crops]
        listed = torch.cat([crop[top] for crop, top in zip(crops, tops, strict=True)])
        sure = math.floor(self.fixed * k + 1e-9) if len(text) else 0
        first = sure if self.compat else 0  # the released code does not sort its fixed part across crops
        order = torch.cat([torch.arange(first, device=text.device), first + descending(saliency[listed[first:]])])
        by_saliency = listed[order]
        n_text = sure + _split(relevance.exp()[by_text[sure:]], saliency[by_saliency[sure:]], k - 2 * sure)
        if self.compat and k < n:
            place = torch.arange(k, device=text.device)
            shifted = torch.cat([i + top for i, top in enumerate(tops)])[order]
            keep = torch.where(place < n_text, by_text[:k], shifted[(place - n_text).clamp(0, len(shifted) - 1)])
            return Selection(keep=keep.sort().values, repeats=True)
        rank = _lengthened(ranks(by_text, n, _NEVER), ranks(by_saliency, n, _NEVER), n_text, k - n_text)
        return Selection(keep=top_k(-rank, k), scores=1.0 - rank.float() / n)


def _split(a: Float[Tensor, " a"], b: Float[Tensor, " b"], free: int) -> Int[Tensor, ""]:
    """n* = argmax_{0 <= n <= R} PA(n) PB(R - n): how many of ``free`` slots go to list a; of equals the smallest."""
    mass_a, mass_b = (pad(m[:free], (1, free - len(m[:free]))).cumsum(dim=0) for m in (a, b))
    return (mass_a * mass_b.flip(0)).argmax()


def _lengthened(
    rank_a: Int[Tensor, " n"], rank_b: Int[Tensor, " n"], n_a: Int[Tensor, ""], n_b: Int[Tensor, ""]
) -> Int[Tensor, " n"]:
    """rank of min((rank_a + 1/2) / n_a, (rank_b + 1/2) / n_b), in whole numbers; a list with 0 slots comes last."""
    listed = torch.where(rank_b < _NEVER, (2 * rank_b + 1) * n_a.clamp(min=1), _NEVER)
    key_a = torch.where(n_a > 0, (2 * rank_a + 1) * n_b.clamp(min=1), _NEVER + rank_a)
    key_b = torch.where(n_b > 0, listed, 2 * _NEVER)
    return torch.minimum(2 * key_a, 2 * key_b + 1).argsort(stable=True).argsort()
