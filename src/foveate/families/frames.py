"""Videos whose frames are encoder forwards of one size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.families.picture import Picture


def films(
    videos: Iterable[Float[Tensor, "r d"]],
    frames: int,
    size: int,
    patches: Int[Tensor, "k m"],
    weights: Float[Tensor, "k m"] | None = None,
    before: int = 0,
) -> list[Picture]:
    """Return the videos of a call: frame after frame, ``k`` tokens each, on a square grid.

    Args:
        videos: Rows of each video.
        frames: Of each video.
        size: Patches of one frame.
        patches: Patches of the frame under each of its tokens.
        weights: Share of each patch in its token, where a token is no plain mean.
        before: Rows of each frame that stand before its tokens and come from no patch; they always stay. So do rows
            after the last frame.
    """
    k, pictures = len(patches), []
    visual = torch.arange(frames * (before + k)).view(frames, -1)[:, before:].flatten()
    for number, rows in enumerate(videos):
        starts = size * (number * frames + torch.arange(frames))
        pictures.append(
            Picture(
                rows=rows,
                grid=(frames, round(k**0.5), round(k**0.5)),
                patches=(starts[:, None, None] + patches).flatten(0, 1),
                weights=None if weights is None else weights.repeat(frames, 1),
                visual=None if len(visual) == len(rows) else visual,
                crops=(k,) * frames,
            )
        )
    return pictures
