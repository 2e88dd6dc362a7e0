"""ToDRE: a diverse subset before the LLM, and an early exit of all visual tokens late in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch

from foveate.budget import Keep
from foveate.core import Composite, Evidence, Method, PromptMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import greedy_diversity, ranks
from foveate.registry import register

Diversity = Literal["max_sum", "k_center"]
PivotLayer = Literal["last", "feature"]


@dataclass(frozen=True, kw_only=True)
class ToDREDiversity(PromptMethod):
    """Stage 1: from the most attended token on, always add the token least like those already picked."""

    name: ClassVar[str] = "todre_diversity"
    needs: ClassVar[frozenset[str]] = frozenset({"encoder_saliency"})

    diversity: Diversity = "max_sum"
    pivot_layer: PivotLayer = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        for value, allowed in (self.diversity, ("max_sum", "k_center")), (self.pivot_layer, ("last", "feature")):
            if value not in allowed:
                raise BudgetError(f"{value!r} is none of {', '.join(allowed)}", f"the paper has {allowed[0]}")

    @property
    def saliency_layer(self) -> PivotLayer:
        return self.pivot_layer

    def select(self, evidence: Evidence, site: int) -> Selection:
        saliency = evidence.require("encoder_saliency").float()
        k, crops = self.count(evidence.n), evidence.by_crop()
        pool = torch.cat(crops) if evidence.thumbnail is None else crops[evidence.thumbnail]
        pivot = pool.gather(0, saliency[pool].argmax(0, keepdim=True))[0]
        picks = greedy_diversity(evidence.features, k, pivot, self.diversity)
        scores = 1.0 - ranks(picks, evidence.n, k).float() / k  # the order of picking; 0 where not picked
        return Selection(keep=picks.sort().values, scores=scores)


@dataclass(frozen=True, kw_only=True)
class ToDREExit(Method):
    """Stage 2: when text and image have stopped looking at each other, no visual token goes on."""

    name: ClassVar[str] = "todre_exit"
    needs: ClassVar[frozenset[str]] = frozenset({"relevance", "text_mass"})
    scope: ClassVar[Literal["image", "prompt"]] = "prompt"
    adaptive: ClassVar[bool] = True

    exit: float = 0.875
    tau: float = 0.10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 < self.exit <= 1.0 and 0.0 <= self.tau <= 1.0):
            raise BudgetError(f"exit is in (0, 1], tau in [0, 1]; got {self.exit}, {self.tau}", "exit=0.875, tau=0.1")

    def sites(self, n_layers: int) -> tuple[int, ...]:
        return (max(1, min(math.floor(self.exit * n_layers + 1e-9), n_layers - 2) + 1),)

    def select(self, evidence: Evidence, site: int) -> Selection:
        relevance, to_text = evidence.require("relevance").float(), evidence.require("text_mass").float()
        keep = torch.arange(evidence.n, device=relevance.device)
        a_vt = to_text.mean()
        a_tv = relevance.sum(dim=1).mean() if len(relevance) else torch.zeros_like(a_vt)
        leave = (a_tv < self.tau) & (a_vt < self.tau) & (len(relevance) > 0)
        return Selection(keep=keep, stay=~leave.expand(evidence.n), measures={"a_tv": a_tv, "a_vt": a_vt})


@register
@dataclass(frozen=True, kw_only=True)
class ToDRE(Composite):
    """Keep a diverse subset, and let even that leave once text and image have stopped looking at each other.

    Paper: ToDRE, arXiv 2505.18757 v2, both stages and the pseudocode of the supplement (no public code).

    Idea: Similar tokens say the same thing, so stage 1 picks tokens that are unlike each other, beginning at the one
        the encoder attends to most. Late in the LLM the answer is made from text; stage 2 measures there how much text
        and image still attend to each other. If both shares are below tau, all visual tokens leave.

    Sites: 0 and l* + 1, with l* = min(floor(exit L), L - 2).
    Keeps: k tokens, each next one j = argmin_i sum_{p picked} cos(x_i, x_p); after l* all of them or none:
        none when mean_{i text} sum_{j visual} A_ij < tau and mean_{i visual} sum_{j text} A_ij < tau.

    Differs from the paper: An encoder without CLS has its pivot at the largest column mean of attention (there:
        random). l* is clamped so that a layer is left to save. Attention is causal, so the second share is 0 with the
        image first. A prompt without text after the image never exits. All images of a prompt leave together.

    Args:
        keep: Tokens per image (int) or fraction that stays (float); the paper's 0.25 and 0.1; 1.0 leaves stage 2 only.
        exit: Depth of the measured layer as a fraction in (0, 1]; the paper's 7/8; None leaves stage 1 only.
        tau: Share of attention below which tokens leave, in [0, 1]; the paper's 0.10.
        diversity: ``max_sum`` (v2) or ``k_center`` (named in v1): c_i = max_{p picked} cos(x_i, x_p).
        pivot_layer: Encoder layer whose attention gives the pivot: ``last`` (the paper's) or ``feature``; with a
            thumbnail among the crops the pivot is in it.
        per: What the budget is for in a video: the whole ``video`` (the paper's), or each ``frame``.

    Raises:
        BudgetError: If an option is out of range.

    Example:
        >>> ToDRE(keep=0.1).sites(32), ToDRE(keep=0.1, exit=None).sites(32), ToDRE(keep=1.0).sites(28)
        ((0, 29), (0,), (25,))
    """

    name: ClassVar[str] = "todre"
    needs: ClassVar[frozenset[str]] = ToDREDiversity.needs | ToDREExit.needs
    adaptive: ClassVar[bool] = True

    keep: Keep
    exit: float | None = 0.875
    tau: float = 0.10
    diversity: Diversity = "max_sum"
    pivot_layer: PivotLayer = "last"
    per: Literal["video", "frame"] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.parts  # building them checks the options

    @cached_property
    def parts(self) -> tuple[Method, ...]:
        shared = {name: getattr(self, name) for name in ("keep", "diversity", "pivot_layer", "per", "positions")}
        first = ToDREDiversity(**shared)
        if self.exit is None:
            return (first,)
        second = ToDREExit(exit=self.exit, tau=self.tau)  # inside the LLM keys have their positions already
        return (second,) if isinstance(self.keep, float) and self.keep == 1.0 else (first, second)
