"""Baselines that look at nothing: a random subset, a uniform grid, average pooling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core import Evidence, PromptMethod, Selection
from foveate.errors import BudgetError
from foveate.ops import cell_means, cells, splitmix64, top_k
from foveate.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Random(PromptMethod):
    """Keep K tokens by lot; the same prompt draws the same lot.

    Paper: None; the baseline every paper should beat.
    Idea: A method that is not better than this has found nothing. A hash of prompt, seed and place gives each token
        a number. The K highest stay, whatever else is in the batch.
    Sites: 0.
    Keeps: the K largest h(prompt, seed, frame, row, column), h made of SplitMix64.
    Differs from the paper: Nothing.

    Args:
        keep: Tokens per image (int) or fraction that stays (float).
        seed: Another number, another lot; 0 <= seed < 2^63.
    Raises:
        BudgetError: If an option is out of range.
    Example:
        >>> Random(keep=0.25, seed=1).count(576)
        144
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[str]] = frozenset({"seed", "coordinates"})

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 1 << 63:
            raise BudgetError(f"seed must be in 0 .. 2^63 - 1, got {self.seed}", "seed=1 draws another lot")

    def select(self, evidence: Evidence, site: int) -> Selection:
        seed = evidence.require("seed").long()
        state = splitmix64(seed ^ splitmix64(torch.full_like(seed, self.seed)))
        for place in evidence.coordinates.long().unbind(dim=1):
            state = splitmix64(state ^ place)
        bits = (state >> 1) & ((1 << 63) - 1)
        return Selection(keep=top_k(bits, self.count(evidence.n)), scores=(bits >> 39).float() / (1 << 24))


@register
@dataclass(frozen=True, kw_only=True)
class Grid(PromptMethod):
    """Keep a uniform grid of tokens.

    Paper: None; the baseline every paper should beat.
    Idea: The image is cut into K cells of equal size, as square as they come. Of each cell the token nearest its centre
        stays. This is what reading a smaller picture without smoothing would do.
    Sites: 0.
    Keeps: the centre token of each of K cells (192, 128, 64 of 24 x 24: 12 x 16, 8 x 16, 8 x 8 cells); where tokens
        fill no grid, the middle of each of K runs.
    Differs from the paper: Nothing.

    Args:
        keep: Tokens per image (int) or fraction that stays (float).
    Raises:
        BudgetError: If keep is out of range.
    Example:
        >>> Grid(keep=64).count(576)
        64
    """

    name: ClassVar[str] = "grid"
    needs: ClassVar[frozenset[str]] = frozenset({"coordinates"})

    def select(self, evidence: Evidence, site: int) -> Selection:
        _, centres = self._cells(evidence)
        return Selection(keep=torch.tensor(centres, device=evidence.features.device))

    def _cells(self, evidence: Evidence) -> tuple[tuple[int, ...], tuple[int, ...]]:
        n = evidence.n
        return cells(evidence.grid if math.prod(evidence.grid) == n else (1, 1, n), self.count(n))


@register
@dataclass(frozen=True, kw_only=True)
class Pool(Grid):
    """Average the tokens of each cell of a uniform grid into one.

    Paper: None; the baseline every paper should beat.
    Idea: The same K cells as `Grid`, but nothing is thrown away. Each cell becomes the mean of its tokens. This is what
        reading a smaller picture would do.
    Sites: 0.
    Keeps: mean of x_i over each of K cells, at the place of the cell's centre token.
    Differs from the paper: Nothing. (Cells do not overlap, unlike those of adaptive pooling in torch.)

    Args:
        keep: Tokens per image (int) or fraction that stays (float).
    Raises:
        BudgetError: If keep is out of range.
    Example:
        >>> Pool(keep=64).count(576)
        64
    """

    name: ClassVar[str] = "pool"

    def select(self, evidence: Evidence, site: int) -> Selection:
        cell, centres = self._cells(evidence)
        device = evidence.features.device
        keep, merged = torch.tensor(centres, device=device), torch.tensor(cell, device=device)
        features = evidence.features if len(centres) == evidence.n else cell_means(evidence.features, cell)
        return Selection(keep=keep, features=features, merged_into=merged)
