"""Gemma 4: an encoder of its own with patches of any layout, filled up to one size, averaged in cells to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.errors import UnsupportedModel
from foveate.families.base import BEFORE_THE_LLM, Family
from foveate.families.picture import Picture
from foveate.families.pool import under_average

_POSITIONS = {"image": "image_position_ids", "video": "video_position_ids"}


class Gemma4(Family):
    """``gemma4``: an image is one encoder forward; so is each frame of a video, whose budget is for all of them."""

    name: ClassVar[str] = "gemma4"
    model_types: ClassVar[tuple[str, ...]] = ("gemma4",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    since: ClassVar[Mapping[str, str]] = {"video": "5.23"}
    row_arguments: ClassVar[frozenset[str]] = frozenset({"per_layer_input"})
    other_arguments: ClassVar[frozenset[str]] = frozenset({"shared_kv_states"})
    causal: ClassVar[bool] = False

    def check_layers(self, model: Any) -> None:
        shared = model.config.get_text_config().num_kv_shared_layers
        if shared:
            raise UnsupportedModel(
                f"the last {shared} layers of this {self.name} read keys and values of earlier layers, and run for the "
                "last token of a prompt alone, so that no token can leave between them",
                BEFORE_THE_LLM,
            )
        super().check_layers(model)

    def real(self, model: nn.Module, modality: str, arguments: Mapping[str, Any]) -> Tensor:
        places: Tensor = arguments[_POSITIONS[modality]]
        return ~(places == -1).all(-1)

    def pictures(self, model: nn.Module, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        real = self.real(model, modality, arguments).cpu()
        places = arguments[_POSITIONS[modality]].cpu().unbind()
        frames = [1] * len(real) if modality == "image" else arguments["num_frames_per_video"].tolist()
        made: dict[bytes, tuple[Tensor, tuple[int, int]]] = {}
        pictures, forward, start = [], 0, 0
        for rows, count in zip(output.pooler_output, frames, strict=True):
            under = []
            for here, mask in zip(places[forward : forward + count], real[forward : forward + count], strict=True):
                key = here.numpy().tobytes()
                if key not in made:  # frames of a video are alike
                    made[key] = self._tokens(model, here, mask)
                tokens, grid = made[key]
                under.append(start + tokens)
                start += int(mask.sum())
            forward += count
            crops = tuple(map(len, under)) if modality == "video" else ()
            pictures.append(Picture(rows=rows, grid=(count, *grid), patches=torch.cat(under), crops=crops))
        return pictures

    def _tokens(self, model: nn.Module, places: Tensor, real: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches under each token of one forward, and its rows and columns of tokens."""
        tower: Any = self.tower(model, "image")
        k = tower.config.pooling_kernel_size

        def pool(states: Tensor) -> Tensor:
            filled = states.new_zeros(1, len(places), states.shape[1])
            filled[0, real] = states
            pooled, kept = tower.pooler(
                hidden_states=filled,
                pixel_position_ids=places[None],
                padding_positions=~real[None],
                output_length=len(places) // k**2,
            )
            tokens: Tensor = pooled[kept]
            return tokens

        columns, rows = places[real].amax(0).tolist()
        return under_average(pool, places[real].flip(-1), k), ((rows + 1) // k, (columns + 1) // k)

    def example(self, model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
        vision = model.config.vision_config
        k = vision.pooling_kernel_size
        grids = [(4 * k, (6 - 2 * (image % 2)) * k) for image in range(images)]
        most = max(rows * columns for rows, columns in grids)
        pixels = torch.rand(images, most, 3 * vision.patch_size**2, generator=generator)
        places = torch.full((images, most, 2), -1)
        for image, (rows, columns) in enumerate(grids):
            grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
            places[image, : len(grid)] = grid
            pixels[image, len(grid) :] = 0
        media = {"pixel_values": pixels.to(model.device, model.dtype), "image_position_ids": places.to(model.device)}
        return media, [[self.token_id(model, "image")] * (rows * columns // k**2) for rows, columns in grids]

    def token_types(self, model: Any, ids: Tensor) -> dict[str, Tensor]:
        image, video = (self.placeholders(model, modality, ids, {}).long() for modality in self.modalities)
        return {"mm_token_type_ids": image + 2 * video}
