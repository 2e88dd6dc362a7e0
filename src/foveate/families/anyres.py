"""Pictures of any resolution: read once as a whole and once in tiles, which form one grid; a newline ends each row.

Where a token comes from is found by sending a map of patch numbers the way that features go: through the packing of the
model itself, which puts tiles side by side and cuts off the bars beside the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.families.llava import Llava
from foveate.families.picture import Picture

#: What stands for a newline in a map of patch numbers.
NEWLINE = torch.tensor([-1.0], dtype=torch.float64)


@dataclass(frozen=True)
class Packed:
    """How the patches of one picture are packed, numbered within it.

    Args:
        newlines: Which rows are newlines.
        patches: Patches under each visual token.
        weights: Their shares, where the picture was resized.
    """

    newlines: Tensor
    patches: Int[Tensor, "n m"]
    weights: Float[Tensor, "n m"] | None = None


class AnyRes(Llava):
    """What llava_next, llava_next_video and llava_onevision share.

    Frame 0 of a picture's grid is the whole picture as the encoder sees it at once, frame 1 the picture at high
    resolution, assembled from all tiles, without the bars that the processor added. The grid is as high and wide as the
    larger of both. Newlines come from no patch: they always stay and do not count.
    """

    def pack(self, model: Any, maps: list[Tensor], sizes: Any, arguments: Mapping[str, Any]) -> list[Packed]:
        """Send maps of patch numbers, [tiles, patches, 1] for each picture, through the packing of the model."""
        strategy = model.config.vision_feature_select_strategy
        pack: Any = self.base(model).pack_image_features
        made, _ = pack(maps, sizes, vision_feature_select_strategy=strategy, image_newline=NEWLINE)
        return [Packed(m[:, 0] < 0, m[m[:, 0] >= 0].long()) for m in made]

    def tiles(self, model: Any, sizes: Sequence[Any], arguments: Mapping[str, Any]) -> list[int]:
        """Encoder forwards of each picture: the whole, then its tiles."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = model.config
        side = config.vision_config.image_size
        return [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes]

    def pictures(self, model: Any, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
        counts, side = self.tiles(model, sizes, arguments), self.side(model)
        maps = [torch.arange(count * side**2, dtype=NEWLINE.dtype).view(count, -1, 1) for count in counts]
        pictures, start = [], 0
        packed = self.pack(model, maps, sizes, arguments)
        for rows, count, each in zip(output.pooler_output, counts, packed, strict=True):
            pictures.append(_picture(rows, each, start, side, tiled=count > 1))
            start += count * side**2
        return pictures

    def side(self, model: Any) -> int:
        """Rows and columns of patches of one encoder forward."""
        config = model.config.vision_config
        return int(config.image_size // config.patch_size)

    def example(self, model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
        config, tile = model.config, model.config.vision_config.image_size
        smallest = sorted(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
        chosen = [smallest[i % len(smallest)] for i in range(images)]
        sizes = torch.tensor([[height - height // 8 * (i % 2), width] for i, (height, width) in enumerate(chosen)])
        most = max(self.tiles(model, sizes.tolist(), {}))
        pixels = torch.randn(images, most, 3, tile, tile, generator=generator).to(model.device, model.dtype)
        media = {"pixel_values": pixels, "image_sizes": sizes.to(model.device)}
        output, _ = self.encode(model, "image", media)
        return media, [[self.token_id(model, "image")] * len(rows) for rows in output.pooler_output]


def _picture(rows: Tensor, packed: Packed, start: int, side: int, tiled: bool) -> Picture:
    """One picture whose first patch has the number ``start`` among those of the call."""
    visual = (~packed.newlines).nonzero()[:, 0]
    if not tiled:
        return Picture(rows=rows, grid=(1, side, side), patches=start + packed.patches, visual=visual)
    ends = packed.newlines.nonzero()[:, 0]
    height, width = len(ends), int(ends[0]) - side**2
    heaviest = packed.patches if packed.weights is None else packed.patches.gather(1, packed.weights.argmax(1)[:, None])
    tile = heaviest[:, 0] // side**2
    return Picture(
        rows=rows,
        grid=(2, max(side, height), max(side, width)),
        patches=start + packed.patches,
        weights=packed.weights,
        visual=visual,
        places=torch.cat([_grid(0, side, side), _grid(1, height, width)]),
        crops=tuple(tile.bincount().tolist()),
        crop_order=tile.argsort(stable=True),
        thumbnail=0,
    )


def _grid(frame: int, height: int, width: int) -> Tensor:
    return torch.cartesian_prod(torch.tensor([frame]), torch.arange(height), torch.arange(width))
