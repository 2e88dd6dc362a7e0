"""InternVL: tiles of one size through InternViT (with CLS), pixel shuffle, a row-wise projector."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.errors import UnsupportedCall, UnsupportedModel
from foveate.families.base import Family
from foveate.families.picture import Picture


class InternVL(Family):
    """``internvl``: an image is one unbroken run of placeholders in the prompt, and its tiles are its crops.

    The model gets tiles one after another and is not told which of them form an image. With several tiles the last one
    is taken for the thumbnail, as the processor makes it. Frames of a video come as tiles too, each behind text of its
    own: every frame is an image with its own budget.
    """

    name: ClassVar[str] = "internvl"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    encoder_path: ClassVar[str] = "encoder.layer"
    attention_path: ClassVar[str] = "attention"

    def check(self, model: Any) -> None:
        strategy = model.config.vision_feature_select_strategy
        if strategy != "default":
            raise UnsupportedModel(
                f"vision_feature_select_strategy={strategy!r} makes the CLS token a part of the picture",
                'set `model.config.vision_feature_select_strategy = "default"` if that is how it was trained',
            )

    def pictures(self, model: nn.Module, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        tiles: Tensor = output.pooler_output
        under, (rows, columns) = self._tile(model, tiles.shape[1])
        pictures, start = [], 0
        for count in self._tiles(model, tiles, arguments):
            first = start + torch.arange(count)
            pictures.append(
                Picture(
                    rows=tiles[start : start + count].flatten(0, 1),
                    grid=(count, rows, columns),
                    patches=(under + first[:, None, None] * under.numel()).flatten(0, 1),
                    crops=(len(under),) * count,
                    thumbnail=count - 1 if count > 1 else None,
                )
            )
            start += count
        return pictures

    def _tile(self, model: Any, tokens: int) -> tuple[Tensor, tuple[int, int]]:
        """Patches under each token of a tile, and the tile's rows and columns of tokens."""
        ratio = model.config.downsample_ratio
        side = round((tokens / ratio**2) ** 0.5)
        numbers = torch.arange(side * side).view(1, side, side, 1)
        shuffled: Tensor = self.base(model).pixel_shuffle(numbers, scale_factor=ratio)[0]  # type: ignore[operator]
        return shuffled.flatten(0, 1), (shuffled.shape[0], shuffled.shape[1])

    def _tiles(self, model: Any, tiles: Tensor, arguments: Mapping[str, Any]) -> list[int]:
        """Tiles of each image: every run of placeholders is one."""
        marks = self.placeholders(model, "image", arguments["input_ids"], arguments)
        mask = arguments.get("attention_mask")
        if mask is not None:
            marks = marks & mask.bool()
        runs = [len(list(run)) for row in marks.tolist() for here, run in groupby(row) if here]
        size = tiles.shape[1]
        if any(run % size for run in runs) or sum(runs) != size * len(tiles):
            raise UnsupportedCall(
                f"the prompts hold runs of {', '.join(map(str, runs)) or 'no'} image tokens, and the images make "
                f"{len(tiles)} tiles of {size}",
                "let the processor expand the placeholders: one image in the text for each image passed, in order",
            )
        return [run // size for run in runs]

    def example(self, model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
        height, width = model.config.vision_config.image_size
        counts = [3 if image == 1 else 1 for image in range(images)]
        pixels = torch.randn(sum(counts), 3, height, width, generator=generator).to(model.device, model.dtype)
        output, _ = self.encode(model, "image", {"pixel_values": pixels})
        tokens = output.pooler_output.shape[1]
        return {"pixel_values": pixels}, [[self.token_id(model, "image")] * tokens * count for count in counts]
