"""MiniCPM-V 4.6: pictures packed into one sequence, merged 2 x 2 in the middle of the tower and again behind it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.families.base import Family
from foveate.families.picture import Picture


class MiniCPMV46(Family):
    """``minicpmv4_6``: slices of an image and frames of a video stand between marks of their own in the prompt.

    The model is not told which of them belong together: each has its own budget. Evidence is that of the layers behind
    the tower's own merger, where patches are as large as they will be until the LLM's tokens are made.
    """

    name: ClassVar[str] = "minicpmv4_6"
    model_types: ClassVar[tuple[str, ...]] = ("minicpmv4_6",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    since: ClassVar[Mapping[str, str]] = {"image": "5.19", "video": "5.19"}
    cls: ClassVar[bool | None] = False

    def encoder_layers(self, model: nn.Module, modality: str) -> nn.ModuleList:
        tower: Any = self.tower(model, modality)
        layers = tower.encoder.layers[tower.config.insert_layer_id + 1 :]
        assert isinstance(layers, nn.ModuleList)
        return layers

    def patches(self, model: nn.Module, states: Tensor) -> Tensor:
        return states[0]

    def segments(self, model: nn.Module, modality: str, arguments: Mapping[str, Any], states: Tensor) -> list[int]:
        sizes: list[int] = self._sizes(model, modality, arguments).prod(-1).tolist()
        return sizes

    def pictures(self, model: Any, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        merger: Any = copy.copy(self.base(model).merger)
        merger._modules = {"mlp": nn.ModuleList(nn.Identity() for _ in range(merger.merger_times))}
        sizes = self._sizes(model, modality, arguments)
        numbers = torch.arange(int(sizes.prod(-1).sum()))[None, :, None]
        pictures = []
        for rows, under, size in zip(
            output.pooler_output, type(merger).forward(merger, numbers, sizes), sizes.tolist(), strict=True
        ):
            high, wide = (n // k**merger.merger_times for n, k in zip(size, merger.merge_kernel_size, strict=True))
            pictures.append(Picture(rows=rows, grid=(1, high, wide), patches=under))
        return pictures

    def _sizes(self, model: Any, modality: str, arguments: Mapping[str, Any]) -> Tensor:
        """Rows and columns of each picture's patches, behind the tower's own merger."""
        sizes: Tensor = arguments["target_sizes" if modality == "image" else "target_sizes_videos"].cpu()
        if modality == "video":
            sizes = sizes.repeat(len(arguments["pixel_values_videos"]), 1)
        mode = arguments.get("downsample_mode") or model.config.downsample_mode
        return sizes if mode == "4x" else sizes // 2

    def example(self, model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
        config = model.config
        unit = 2 * config.merge_kernel_size[0] ** config.merger_times
        sizes = torch.tensor([[unit * (3 + i), unit * (5 + i)] for i in range(images)])
        side = config.vision_config.patch_size
        pixels = torch.randn(1, 3, side, side * int(sizes.prod(-1).sum()), generator=generator)
        media = {"pixel_values": pixels.to(model.device, model.dtype), "target_sizes": sizes.to(model.device)}
        output, _ = self.encode(model, "image", media)
        return media, [[self.token_id(model, "image")] * len(rows) for rows in output.pooler_output]
