"""What Qwen-VL and GLM-V share: one packed tower, units of merged patches, positions in three axes, videos by frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from foveate.errors import UnsupportedCall
from foveate.families.base import Family
from foveate.families.picture import Picture

#: What the model counts positions from, besides the ids and the mask.
_COUNTED = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class Mrope(Family):
    """A tower that reads the patches of all pictures as one sequence, and rotary positions in time, height and width.

    Attention in the tower stays within a frame, so that each frame is an encoder forward of its own. Positions of the
    full prompt cannot be counted from a shorter one: the tokens that stay keep theirs.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    positions: ClassVar[tuple[str, ...]] = ("original",)
    tower_path: ClassVar[str] = "visual"
    encoder_path: ClassVar[str] = "blocks"
    attention_path: ClassVar[str] = "attn"
    cls: ClassVar[bool | None] = False

    # -- from pixels to tokens; the merger reads the last block

    def encode(self, model: nn.Module, modality: str, arguments: Mapping[str, Any]) -> tuple[Any, set[str]]:
        output, taken = super().encode(model, modality, arguments)
        return output, taken - set(_COUNTED)  # the model counts positions from the grids, where nothing leaves

    def segments(self, model: nn.Module, modality: str, arguments: Mapping[str, Any], states: Tensor) -> list[int]:
        return [height * width for frames, height, width in _grids(modality, arguments) for _ in range(frames)]

    def pictures(self, model: Any, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        side = model.config.vision_config.spatial_merge_size
        grids = [(t, h // side, w // side) for t, h, w in _grids(modality, arguments)]
        units = self.encoder_rows(model, modality, arguments[f"{modality}_grid_thw"]).reshape(-1, side * side)
        pieces = units.split([t * h * w for t, h, w in grids])
        return [
            Picture(rows=rows, grid=grid, patches=patches, crops=(grid[1] * grid[2],) * grid[0] if grid[0] > 1 else ())
            for rows, grid, patches in zip(output.pooler_output, grids, pieces, strict=True)
        ]

    def encoder_rows(self, model: nn.Module, modality: str, grids: Int[Tensor, "k 3"]) -> Int[Tensor, " p"]:
        """Where in the tower's sequence each patch stands, unit by unit as the LLM reads them."""
        return torch.arange(int(grids.prod(-1).sum()))

    # -- what `verify` tries

    def example(self, model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
        config = model.config.vision_config
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        sizes = [(7 + i, 9 + i) for i in range(images)]  # in units; no window of the tower divides all of them
        grids = torch.tensor([[1, *(config.spatial_merge_size * side for side in size)] for size in sizes])
        pixels = torch.randn(int(grids.prod(-1).sum()), width, generator=generator)
        media = {"pixel_values": pixels.to(model.device, model.dtype), "image_grid_thw": grids.to(model.device)}
        return media, [[self.token_id(model, "image")] * (rows * columns) for rows, columns in sizes]

    def token_types(self, model: Any, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == self.token_id(model, "image")).long()}

    # -- positions

    def position_ids(self, model: Any, ids: Tensor, mask: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Positions as ``generate`` counts them: one row for the text, then time, height and width.

        Raises:
            UnsupportedCall: If nothing tells pictures from text; the model would count as if all were text.
        """
        if arguments.get("mm_token_type_ids") is None:
            raise UnsupportedCall(
                f"{self.name} counts positions by `mm_token_type_ids`, and the call has none",
                "pass all that the processor gives: `model.generate(**inputs)`",
            )
        counted = {name: arguments[name] for name in _COUNTED if arguments.get(name) is not None}
        positions = model._prepare_position_ids_for_generation(ids, {**counted, "attention_mask": mask})
        assert isinstance(positions, Tensor)
        return positions

    def last_position(self, positions: Tensor) -> Tensor:
        """A long video reaches further in time than the text behind it: later calls count on from its end."""
        if positions.dim() == 2:
            return positions[:, -1:]
        end = positions[-3:].amax((0, 2))[None, :, None]
        return torch.cat([positions[:-3, :, -1:], end.expand(3, -1, -1)])


def _grids(modality: str, arguments: Mapping[str, Any]) -> list[list[int]]:
    """Frames, rows and columns of each picture, in patches."""
    grids: list[list[int]] = arguments[f"{modality}_grid_thw"].tolist()
    return grids
