"""Mistral 3: Pixtral's encoder reads all images packed into one sequence, then patches are merged to tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.families.base import Family
from foveate.families.picture import Picture


class Mistral3(Family):
    """``mistral3``: images keep their sizes; the marks that end a row of tokens are text, and stay."""

    name: ClassVar[str] = "mistral3"
    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    encoder_path: ClassVar[str] = "transformer.layers"
    attention_path: ClassVar[str] = "attention"

    def patches(self, model: nn.Module, states: Tensor) -> Tensor:
        return states[0]

    def segments(self, model: nn.Module, modality: str, arguments: Mapping[str, Any], states: Tensor) -> list[int]:
        return [rows * columns for rows, columns in self._grids(model, arguments, 1)]

    def pictures(self, model: nn.Module, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        merger: Any = copy.copy(self.base(model).multi_modal_projector.patch_merger)  # type: ignore[union-attr]
        merger._modules = {"merging_layer": nn.Identity()}  # what is left is the order in which it gathers patches
        patches = sum(rows * columns for rows, columns in self._grids(model, arguments, 1))
        numbers = torch.arange(patches, dtype=torch.float64)[:, None]
        under: Tensor = type(merger).forward(merger, numbers, self._sizes(arguments)).long()
        pictures, start = [], 0
        grids = self._grids(model, arguments, merger.spatial_merge_size)
        for rows, grid in zip(output.pooler_output, grids, strict=True):
            pictures.append(Picture(rows=rows, grid=(1, *grid), patches=under[start : start + len(rows)]))
            start += len(rows)
        return pictures

    def _sizes(self, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Height and width of each image."""
        return [(height, width) for height, width in torch.as_tensor(arguments["image_sizes"]).tolist()]

    def _grids(self, model: Any, arguments: Mapping[str, Any], merged: int) -> list[tuple[int, int]]:
        """Rows and columns of each image in squares of ``merged`` x ``merged`` patches."""
        side = model.config.vision_config.patch_size * merged
        return [(height // side, width // side) for height, width in self._sizes(arguments)]

    def example(self, model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
        side = model.config.vision_config.patch_size * getattr(model.config, "spatial_merge_size", 1)
        sizes = torch.tensor([[4 * side, (6 - 2 * (image % 2)) * side] for image in range(images)])
        pixels = torch.randn(images, 3, *sizes.amax(0).tolist(), generator=generator).to(model.device, model.dtype)
        tokens = (sizes // side).prod(1).tolist()
        return {"pixel_values": pixels, "image_sizes": sizes.to(model.device)}, [
            [self.token_id(model, "image")] * n for n in tokens
        ]
