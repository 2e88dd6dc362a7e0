"""Kimi K2.5: one packed tower, and a projector that makes a token of four patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.families.base import Family
from foveate.families.picture import Picture


class KimiK25(Family):
    """``kimi_k25``: the processor cuts a video into clips of a few frames, each behind its time.

    Frames of a clip see each other in the tower, and a token is the mean over them, so that a clip is as many tokens
    as an image. The model is not told which clips belong together: to a budget each is a video of its own.
    """

    name: ClassVar[str] = "kimi_k25"
    model_types: ClassVar[tuple[str, ...]] = ("kimi_k25",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    encoder_path: ClassVar[str] = "layers"
    attention_path: ClassVar[str] = "attn"
    cls: ClassVar[bool | None] = False

    def segments(self, model: nn.Module, modality: str, arguments: Mapping[str, Any], states: Tensor) -> list[int]:
        sizes: list[int] = arguments[f"{modality}_grid_thw"].prod(-1).tolist()
        return sizes

    def pictures(self, model: Any, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        from transformers.models.kimi_k25.modeling_kimi_k25 import get_vision_temporal_merge_index

        high, wide = model.config.vision_config.merge_kernel_size
        pictures, start = [], 0
        for rows, grid in zip(output.pooler_output, arguments[f"{modality}_grid_thw"].cpu(), strict=True):
            under = start + get_vision_temporal_merge_index(grid[None], high, wide).flatten(1)
            place = (1, int(grid[1]) // high, int(grid[2]) // wide)
            pictures.append(Picture(rows=rows, grid=place, patches=under))
            start += under.numel()
        return pictures

    def example(self, model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
        config = model.config.vision_config
        high, wide = config.merge_kernel_size
        sizes = [(7 + i, 9 + i) for i in range(images)]  # in tokens
        grids = torch.tensor([[1, high * rows, wide * columns] for rows, columns in sizes])
        pixels = torch.randn(int(grids.prod(-1).sum()), 3, config.patch_size, config.patch_size, generator=generator)
        media = {"pixel_values": pixels.to(model.device, model.dtype), "image_grid_thw": grids.to(model.device)}
        return media, [[self.token_id(model, "image")] * (rows * columns) for rows, columns in sizes]
