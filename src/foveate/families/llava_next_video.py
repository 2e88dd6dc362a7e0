"""LLaVA-NeXT-Video: LLaVA-NeXT, and videos whose frames are pooled before the projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.nn.functional import unfold

from foveate.families.anyres import AnyRes
from foveate.families.frames import films
from foveate.families.picture import Picture


class LlavaNextVideo(AnyRes):
    """``llava_next_video``: images as in llava_next; of a video each frame is a crop and a layer of the grid.

    A token of a video lies over a square of patches, and its evidence is their mean, whichever way the model pools
    them. Patches beside the last whole square are under no token.
    """

    name: ClassVar[str] = "llava_next_video"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def pictures(self, model: Any, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        if modality == "image":
            return super().pictures(model, modality, output, arguments)
        side, stride = self.side(model), model.config.spatial_pool_stride
        numbers = torch.arange(side**2, dtype=torch.float64).view(1, 1, side, side)
        squares = unfold(numbers, stride, stride=stride)[0].T.long()
        videos = [rows.flatten(0, -2) for rows in output.pooler_output]  # some releases keep the frames apart
        return films(videos, arguments["pixel_values_videos"].shape[1], side**2, squares)
