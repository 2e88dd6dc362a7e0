"""Idefics3 and SmolVLM: tiles of one size through a SigLIP-like encoder, pixel shuffle in the connector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.families.base import Family
from foveate.families.picture import Picture


class Idefics3(Family):
    """``idefics3``: every tile counts as an image of its own, with its own budget.

    A picture is cut into tiles, and text stands between them in the prompt; the model does not know which of them form
    one picture. Frames of a video are tiles too. Slots without a picture, which fill a sample up, are skipped by the
    model.
    """

    name: ClassVar[str] = "idefics3"
    model_types: ClassVar[tuple[str, ...]] = ("idefics3",)
    decoder_path: ClassVar[str] = "text_model"
    tower_path: ClassVar[str] = "vision_model"

    def pictures(self, model: nn.Module, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        connector: Any = self.base(model).connector
        tiles, patches = output.last_hidden_state.shape[:2]
        numbers = torch.arange(patches).view(1, patches, 1)
        under: Tensor = connector.pixel_shuffle(numbers, connector.scale_factor)[0]
        side = round(patches**0.5) // connector.scale_factor
        rows = torch.cat(list(output.pooler_output)).view(tiles, len(under), -1)
        return [
            Picture(rows=tile, grid=(1, side, side), patches=under + number * patches)
            for number, tile in enumerate(rows)
        ]

    def example(self, model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
        side = model.config.vision_config.image_size
        pixels = torch.randn(1, images, 3, side, side, generator=generator).to(model.device, model.dtype)
        output, _ = self.encode(model, "image", {"pixel_values": pixels})
        tiles = self.pictures(model, "image", output, {})
        return {"pixel_values": pixels}, [[self.token_id(model, "image")] * len(tile.rows) for tile in tiles]


class SmolVLM(Idefics3):
    """``smolvlm``: as Idefics3. Older releases refuse a tile of which tokens have left."""

    name: ClassVar[str] = "smolvlm"
    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)
    since: ClassVar[Mapping[str, str]] = {"image": "5.21"}
