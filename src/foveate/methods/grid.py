"""Grid and Pool: baselines that look at places only, a uniform subset and average pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.core import Evidence, PromptMethod, Selection
from foveate.ops import cell_means, cells
from foveate.registry import register


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
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.

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
        return cells(evidence.filled_grid, self.count(evidence.n))


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
        per: What the budget is for in a video: the whole ``video``, or each ``frame``.

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
