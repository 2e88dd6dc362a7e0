"""Llama 3.2 Vision: text looks across at the patches of up to four tiles per picture, each tile with a CLS row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from foveate.errors import UnsupportedCall
from foveate.families.cross import CrossFamily
from foveate.families.picture import Picture

#: What the processor tells of the pictures besides their pixels.
RATIOS, TILES = "aspect_ratio_ids", "aspect_ratio_mask"


class Mllama(CrossFamily):
    """``mllama``: a visual token is a patch of a real tile; the CLS row of a real tile always stays.

    The tower reads all tiles of a picture as one sequence, first in a local stack, then in a global one; the LLM gets
    the output of the last global layer beside those of some local ones. Evidence is that of the local stack: its
    layers are folded tile by tile, its feature layer is the deepest whose output the LLM gets, and a patch's saliency
    is what the CLS row of its own tile gives it. Tokens are in reading order of the whole picture, across tiles.
    """

    name: ClassVar[str] = "mllama"
    model_types: ClassVar[tuple[str, ...]] = ("mllama",)
    tower_path: ClassVar[str] = "vision_model"
    encoder_path: ClassVar[str] = "transformer.layers"
    cls: ClassVar[bool | None] = True

    def feature_layer(self, model: Any) -> int:
        depth, taken = len(self.encoder_layers(model, "image")), model.config.vision_config.intermediate_layers_indices
        return int(max(index % depth for index in taken))

    def cross_layers(self, model: Any) -> list[int]:
        return sorted(model.config.get_text_config().cross_attention_layers)

    def stretches(self, model: Any) -> int:
        return int(model.config.vision_config.max_num_tiles)

    def patches(self, model: Any, states: Tensor) -> Tensor:
        """Cut sequences of all tiles into tiles, without CLS and without the rows that fill each up to a round size."""
        tiles: Tensor = states.unflatten(1, (self.stretches(model), -1)).flatten(0, 1)
        return tiles[:, 1 : 1 + self.side(model) ** 2]

    def real(self, model: Any, modality: str, arguments: Mapping[str, Any]) -> Tensor:
        tiles: Tensor = (arguments[TILES] > 0) & (arguments[RATIOS] > 0)[..., None]
        return tiles.reshape(-1, 1).expand(-1, self.side(model) ** 2)

    def segments(self, model: Any, modality: str, arguments: Mapping[str, Any], states: Tensor) -> list[int]:
        size = self.side(model) ** 2
        return [size] * (len(states) // size)

    def side(self, model: Any) -> int:
        """Rows and columns of patches of one tile."""
        config = model.config.vision_config
        return int(config.image_size // config.patch_size)

    def slots(self, arguments: Mapping[str, Any]) -> Int[Tensor, "n 2"]:
        pictures: Tensor = arguments[RATIOS] > 0
        return pictures.nonzero().cpu()

    def encode(self, model: Any, modality: str, arguments: Mapping[str, Any]) -> tuple[Any, set[str]]:
        base: Any = self.base(model)
        taken = {name: arguments.get(name) for name in (self.media_arguments["image"], RATIOS, TILES)}
        states = base.vision_model(**taken).last_hidden_state
        return base.multi_modal_projector(states).flatten(2, 3), set(taken)

    def pictures(self, model: Any, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        ratios = model.config.vision_config.supported_aspect_ratios
        ids, masks = arguments[RATIOS].tolist(), arguments[TILES].tolist()
        pictures, start = [], 0
        for row, slot in self.slots(arguments).tolist():
            height, width = ratios[ids[row][slot] - 1]
            if masks[row][slot] != [1] * height * width + [0] * (len(masks[row][slot]) - height * width):
                raise UnsupportedCall(
                    f"aspect_ratio_mask {masks[row][slot]} for a picture of {height} x {width} tiles",
                    "pass what the processor gives",
                )
            picture = _picture(output[row, slot], height, width, self.side(model), start)
            pictures.append(picture)
            start += len(picture.features)
        return pictures

    def example(self, model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
        config = model.config.vision_config
        ids = 1 + torch.arange(images) * 2 % config.max_aspect_ratio_id
        tiles = torch.tensor([height * width for height, width in config.supported_aspect_ratios])[ids - 1]
        mask = (torch.arange(config.max_num_tiles) < tiles[:, None]).long()
        size = (config.num_channels, config.image_size, config.image_size)
        pixels = torch.randn(*mask.shape, *size, generator=generator) * mask[..., None, None, None]
        media = {"pixel_values": pixels.to(model.dtype), RATIOS: ids, TILES: mask}
        return {n: value.to(model.device) for n, value in media.items()}, [[self.token_id(model, "image")]] * images

    def lay_out(self, model: Any, media: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
        """Pictures by prompt and slot; every token of text sees the last picture before it."""
        marks = ids == self.token_id(model, "image")
        counts, seen = marks.sum(1).tolist(), marks.cumsum(1)
        most = max(counts)
        out = {
            name: torch.stack([pad(v, [0, 0] * (v.dim() - 1) + [0, most - len(v)]) for v in value.split(counts)])
            for name, value in media.items()
        }
        slots = seen[..., None] == 1 + torch.arange(most, device=ids.device)
        return {**out, "cross_attention_mask": (slots[..., None] & (out[TILES] > 0)[:, None]).long()}


def _picture(rows: Tensor, height: int, width: int, side: int, start: int) -> Picture:
    """One picture of ``height`` x ``width`` tiles, whose first patch has the number ``start`` among those of the call.

    Args:
        rows: All rows of its slot.
        height: Tiles from top to bottom.
        width: Tiles from left to right.
        side: Rows and columns of patches of a tile.
        start: Patches of the call's earlier pictures.
    """
    tiles, size = height * width, side**2
    order = torch.arange(tiles * size).view(height, width, side, side).transpose(1, 2).flatten()
    return Picture(
        rows=rows[: tiles * (1 + size)],
        grid=(1, height * side, width * side),
        patches=start + order[:, None],
        visual=order + order // size + 1,
        crops=(size,) * tiles,
        crop_order=order.argsort(),
    )
