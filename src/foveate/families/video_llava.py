"""Video-LLaVA: one tower for images, one for videos, both CLIP, with one projector."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from foveate.families.frames import films
from foveate.families.llava import Llava
from foveate.families.picture import Picture


class VideoLlava(Llava):
    """``video_llava``: one token per patch; of a video each frame is a crop and a layer of the grid.

    The LLM reads the CLS token of each frame, before its patches, but not that of an image. It comes from no patch, so
    it always stays and does not count: a video of 8 frames of 256 patches has 2048 visual tokens and 8 rows more.
    """

    name: ClassVar[str] = "video_llava"
    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    former_names: ClassVar[Mapping[str, str]] = {"pixel_values_images": "pixel_values"}

    def tower(self, model: nn.Module, modality: str) -> nn.Module:
        return self.base(model).get_submodule(f"{modality}_tower")

    def encode(self, model: nn.Module, modality: str, arguments: Mapping[str, Any]) -> tuple[Any, set[str]]:
        name = self._pixels(model)
        if modality == "image" and name != "pixel_values":
            arguments = {**arguments, name: arguments["pixel_values"]}
        output, taken = super().encode(model, modality, arguments)
        return output, {"pixel_values" if each == name else each for each in taken}

    def pictures(self, model: nn.Module, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        if modality == "image":
            return super().pictures(model, modality, output, arguments)
        frames, before = arguments["pixel_values_videos"].shape[1], int(self.has_cls(model))
        size = output.pooler_output.shape[1] - before
        videos = output.pooler_output.unflatten(0, (-1, frames)).flatten(1, 2)
        return films(videos, frames, size, torch.arange(size)[:, None], before=before)

    def example(self, model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
        media, runs = super().example(model, images, generator)
        return {self._pixels(model): media["pixel_values"]}, runs

    def _pixels(self, model: nn.Module) -> str:
        """What this release of transformers calls the pixels of images."""
        features: Any = self.base(model).get_image_features
        known = inspect.signature(features).parameters
        return next(name for name in ("pixel_values", "pixel_values_images") if name in known)
