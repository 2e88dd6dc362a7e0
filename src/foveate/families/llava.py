"""LLaVA-1.5: CLIP (with CLS) or SigLIP (without), a row-wise MLP projector, one square grid per image; or Pixtral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from foveate.errors import UnsupportedCall, UnsupportedModel
from foveate.families.base import TOWERS, Family
from foveate.families.mistral3 import Mistral3
from foveate.families.picture import Picture


class Llava(Family):
    """``llava``: every image is one encoder forward and one token per patch.

    Class attributes:
        towers: Vision towers it is served with.
    """

    name: ClassVar[str] = "llava"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    towers: ClassVar[tuple[str, ...]] = ("clip_vision_model", "siglip_vision_model")

    def variant(self, model: Any) -> Family:
        pixtral = LlavaPixtral()
        return pixtral if self.name == pixtral.name and self.tower_type(model) in pixtral.towers else self

    def check(self, model: Any) -> None:
        check_tower(self.name, self.towers, self.tower_type(model), model.config)


class LlavaPixtral(Mistral3):
    """``llava`` with Pixtral's encoder: images keep their sizes, as in mistral3, but patches are not merged."""

    name: ClassVar[str] = "llava"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    towers: ClassVar[tuple[str, ...]] = ("pixtral",)

    def check(self, model: Any) -> None:
        check_tower(self.name, self.towers, self.tower_type(model), model.config)

    def encode(self, model: nn.Module, modality: str, arguments: Mapping[str, Any]) -> tuple[Any, set[str]]:
        if arguments.get("image_sizes") is None:
            raise UnsupportedCall(
                "without `image_sizes` a Pixtral encoder takes all images for one", "pass what the processor gives"
            )
        return super().encode(model, modality, arguments)

    def pictures(self, model: nn.Module, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        pictures, start = [], 0
        for rows, grid in zip(output.pooler_output, self._grids(model, arguments, 1), strict=True):
            pictures.append(Picture(rows=rows, grid=(1, *grid), patches=start + torch.arange(len(rows))[:, None]))
            start += len(rows)
        return pictures


def check_tower(name: str, towers: tuple[str, ...], tower: str, config: Any) -> None:
    """Refuse a vision tower that is not understood, or one whose patches and tokens do not pair."""
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    if tower not in towers:
        raise UnsupportedModel(
            f"{name} with a {tower} tower is not served; towers served: {', '.join(towers)}",
            "open an issue with the name of the checkpoint",
        )
    if (strategy == "default") != TOWERS[tower]:
        wanted = "default" if TOWERS[tower] else "full"
        raise UnsupportedModel(
            f"vision_feature_select_strategy={strategy!r} on a {tower} tower "
            f"{'makes the CLS token a visual token' if TOWERS[tower] else 'loses the first patch'}",
            f'set `model.config.vision_feature_select_strategy = "{wanted}"` if that is how it was trained',
        )
