"""VScan: a local and a global look before the LLM, and a second cut half-way through it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch

from foveate.budget import Keep, at_depths, check_keep, resolve_keep, solve_decay
from foveate.core import Composite, Evidence, Method, Selection
from foveate.errors import BudgetError
from foveate.ops import descending, group_means, in_turns, last_row, ranks, top_k, unit
from foveate.registry import register


@dataclass(frozen=True, kw_only=True)
class VScanMerge(Method):
    """Stage 1: half by an early encoder layer, window by window, half by the last; the others are merged into them."""

    name: ClassVar[str] = "vscan_merge"
    needs: ClassVar[frozenset[str]] = frozenset({"coordinates", "encoder_saliency", "encoder_shallow"})
    paper_positions: ClassVar[Literal["original", "packed"]] = "packed"

    keep: Keep
    inner: float = 1 / 3
    window: int = 6
    shallow: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        if not 0.0 < self.inner <= 1.0 or self.window < 1 or (self.shallow or 0) < 0:
            found = f"got inner={self.inner}, window={self.window}, shallow={self.shallow}"
            raise BudgetError(f"inner is in (0, 1], window >= 1, shallow >= 0; {found}", "the paper has 1/3, 6 and 5")

    def shallow_layer(self, n_layers: int) -> int:
        layer = math.floor(n_layers * 5 / 24 + 0.5) if self.shallow is None else self.shallow
        if layer >= n_layers:
            raise BudgetError(f"an encoder of {n_layers} layers has no layer {layer}", "leave shallow out")
        return layer

    def sites(self, n_layers: int) -> tuple[int, ...]:
        return (0,)

    def expected(self, alive: int, total: int, site: int, n_layers: int) -> int:
        mean = resolve_keep(self.keep, alive)
        most = mean * n_layers // _cut(n_layers)  # with more, stage 2 could not bring the mean down again
        return min(alive, most, math.floor(mean * _rate(self.inner, n_layers) + 0.5))

    def select(self, evidence: Evidence, site: int) -> Selection:
        n, k = evidence.n, self.expected(evidence.n, evidence.n, site, evidence.depth)
        deep, shallow = (evidence.require(f"encoder_{name}").float() for name in ("saliency", "shallow"))
        down, across = (-(-side // self.window) for side in evidence.grid[1:])
        frame, row, column = evidence.coordinates.unbind(dim=1)
        windows = (frame * down + row // self.window) * across + column // self.window
        local = in_turns(shallow, windows)[: k // 2]
        others = deep.scatter(0, local, float("-inf"))
        keep = torch.cat([local, descending(others)[: k - k // 2]]).sort().values
        if k == n:
            return Selection(keep=keep, scores=deep)
        x, slot = unit(evidence.features), ranks(keep, n, -1)
        into = torch.where(slot < 0, (x @ x[keep].T).argmax(dim=1), slot)
        rows = group_means(evidence.features, into, k).to(evidence.features.dtype)
        return Selection(keep=keep, scores=deep, features=rows, merged_into=into)


@dataclass(frozen=True, kw_only=True)
class VScanCut(Method):
    """Stage 2: half-way through the LLM the tokens leave that the last prompt token hardly attends to."""

    name: ClassVar[str] = "vscan_cut"
    needs: ClassVar[frozenset[str]] = frozenset({"relevance"})

    keep: Keep
    inner: float = 1 / 3

    def sites(self, n_layers: int) -> tuple[int, ...]:
        return (_cut(n_layers),)

    def expected(self, alive: int, total: int, site: int, n_layers: int) -> int:
        mean = self.keep if isinstance(self.keep, int) else max(self.keep, 1 / _rate(self.inner, n_layers))
        ((_, k),) = solve_decay(total, mean, n_layers, (site,))
        return min(alive, int(k))

    def select(self, evidence: Evidence, site: int) -> Selection:
        scores = last_row(evidence.require("relevance"))
        k = self.expected(evidence.n, evidence.total, site, evidence.depth)
        return Selection(keep=top_k(scores, k), scores=scores)


@register
@dataclass(frozen=True, kw_only=True)
class VScan(Composite):
    """Keep what stands out in the picture as a whole and in each part of it, and half-way on only what is asked for.

    Paper: VScan, TMLR 2026, arXiv 2505.22654, method section.

    Idea: The last encoder layers see the picture as a whole and forget details that early ones still tell. Half of the
        budget goes to what CLS attends to late, half to what it attends to early, window by window; the others are
        merged into these. Half-way through the LLM the tokens leave that the last prompt token hardly attends to.

    Sites: 0 and L/2: 16 of 32 layers.
    Keeps: k tokens: floor(k / 2) by CLS attention in encoder layer 5 (0-based) of 24, the best of each 6 x 6 window,
        then the second, and so on; of the others the best by CLS attention in the feature layer. Each goes on as the
        mean of itself and those most like it by cosine. Before L/2 the best third stays: 96, then 32 for a mean of 64.

    Differs from the paper: Where the order of choice is open, local picks come first; what windows cannot share evenly
        goes by attention. Without CLS, saliency is the column mean of attention. After the second cut tokens stand
        where they stood (there: renumbered). Windows do not reach across frames; the budget is for all together.

    Args:
        keep: Mean of tokens per decoder layer: int = tokens, float = fraction of the image's tokens.
        inner: Share that stays at the second cut, in (0, 1]; the paper's 1/3; more where the mean asks for it; 1.0
            leaves stage 1 only.
        window: Side of the windows, in tokens, >= 1; the paper's 6.
        shallow: The early encoder layer, from 0; the paper's 5 of 24, otherwise the same depth.

    Raises:
        BudgetError: If an option is out of range, or the encoder has no such layer.

    Example:
        >>> method = VScan(keep=64)
        >>> method.sites(32), method.expected(576, 576, 0, 32), method.expected(96, 96, 16, 32)
        ((0, 16), 96, 32)
    """

    name: ClassVar[str] = "vscan"
    needs: ClassVar[frozenset[str]] = VScanMerge.needs | VScanCut.needs

    keep: Keep
    inner: float = 1 / 3
    window: int = 6
    shallow: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.parts  # building them checks the options

    @cached_property
    def parts(self) -> tuple[Method, ...]:
        shared = {name: getattr(self, name) for name in ("keep", "inner", "window", "shallow", "positions")}
        first = VScanMerge(**shared)
        return (first,) if self.inner == 1.0 else (first, VScanCut(keep=self.keep, inner=self.inner))


def _cut(n_layers: int) -> int:
    """The layer before which stage 2 cuts."""
    return at_depths([0.5], n_layers)[0]


def _rate(inner: float, n_layers: int) -> float:
    """How many tokens enter the LLM for each of the mean, where a share ``inner`` of them goes on half-way."""
    early = _cut(n_layers)
    return n_layers / (early + (n_layers - early) * inner)
