"""What a family knows of one image or video: what the LLM reads, where its tokens are, and what lies under them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image or video as the LLM reads it. Index tensors live on the host.

    Args:
        rows: What the LLM reads, one row per placeholder.
        grid: Frames (or crops), rows, columns of the visual tokens; of the whole image where crops lie side by side.
        patches: Encoder patches under each visual token, as indices into the flat list of all patches of the call;
            None where the encoder's evidence is not understood.
        weights: Share of each patch in its token, where a token is no plain mean of its patches.
        visual: Which rows are visual tokens; the others (row breaks) always stay. None: all.
        places: Where each visual token sits in the grid; None: the grid is filled in reading order.
        crops: Visual tokens of each encoder forward; ``()`` means one.
        crop_order: The visual tokens crop by crop; None where they stand so already.
        thumbnail: Which crop shows the whole image, where several crops do not.
        levels: More rows per placeholder, which decoder layers add later and which leave with the tokens.
    """

    rows: Float[Tensor, "r d"]
    grid: tuple[int, int, int]
    patches: Int[Tensor, "n m"] | None = None
    weights: Float[Tensor, "n m"] | None = None
    visual: Int[Tensor, " n"] | None = None
    places: Int[Tensor, "n 3"] | None = None
    crops: tuple[int, ...] = ()
    crop_order: Int[Tensor, " n"] | None = None
    thumbnail: int | None = None
    levels: tuple[Float[Tensor, "r d"], ...] = ()

    @property
    def features(self) -> Float[Tensor, "n d"]:
        """What the LLM reads of each visual token."""
        return self.rows if self.visual is None else self.rows[self.visual.to(self.rows.device)]

    @cached_property
    def fixed(self) -> Int[Tensor, " f"]:
        """The rows that always stay."""
        if self.visual is None:
            return torch.arange(0)
        other = torch.ones(len(self.rows), dtype=torch.bool)
        other[self.visual] = False
        return other.nonzero()[:, 0]

    @property
    def coordinates(self) -> Int[Tensor, "n 3"]:
        """Where each visual token sits: frame, row, column."""
        if self.places is not None:
            return self.places.to(self.rows.device)
        return torch.cartesian_prod(*[torch.arange(size, device=self.rows.device) for size in self.grid])

    def evidence(self, values: Float[Tensor, " p *v"]) -> Float[Tensor, " n *v"]:
        """Return per-patch values of the whole call as one value per visual token: the mean over its patches."""
        assert self.patches is not None
        under = values[self.patches.to(values.device)]
        if self.weights is None:
            return under[:, 0] if under.shape[1] == 1 else under.float().mean(1)
        weights = self.weights.to(values.device)
        return (under * weights.reshape(*weights.shape, *[1] * (under.dim() - 2))).sum(1)

    def kept(self, keep: Int[Tensor, " k"], features: Float[Tensor, "k d"]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the rows and the levels that go on when only the visual tokens ``keep`` do, with their features."""
        visual = keep if self.visual is None else self.visual.to(keep.device)[keep]
        if not len(self.fixed):
            return features, tuple(level[visual] for level in self.levels)
        index = torch.cat([visual, self.fixed.to(keep.device)])
        order = index.argsort(stable=True)
        rows = torch.cat([features, self.rows[index[len(visual) :]]])[order]
        return rows, tuple(level[index[order]] for level in self.levels)
