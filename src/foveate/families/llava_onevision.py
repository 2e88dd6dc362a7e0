"""LLaVA-OneVision: SigLIP at any resolution, large pictures made smaller, videos pooled to half their size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

from foveate.families.anyres import NEWLINE, AnyRes, Packed
from foveate.families.frames import films
from foveate.families.picture import Picture

_NO_LIMIT = "anyres_max_1000000"


class LlavaOnevision(AnyRes):
    """``llava_onevision``: a picture alone in its prompt is cut into tiles, several in one prompt are not.

    A picture of more than nine tiles or so is made smaller by bilinear interpolation, and so is each frame of a video:
    a token then has up to four patches, each with its exact share. A token between two tiles counts to the crop that
    has the larger share in it. The newline at the end of a video, or of a picture without tiles, always stays.
    """

    name: ClassVar[str] = "llava_onevision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def tiles(self, model: Any, sizes: Sequence[Any], arguments: Mapping[str, Any]) -> list[int]:
        counts = super().tiles(model, sizes, arguments)
        prompts = arguments.get("batch_num_images")
        if prompts is None:
            return counts
        alone = [n == 1 for n in torch.as_tensor(prompts).tolist() for _ in range(n)]
        return [count if cut else 1 for count, cut in zip(counts, alone, strict=True)]

    def pack(self, model: Any, maps: list[Tensor], sizes: Any, arguments: Mapping[str, Any]) -> list[Packed]:
        limit = arguments.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        pack: Any = self.base(model).pack_image_features
        smaller, _ = pack(maps, sizes, image_newline=NEWLINE, vision_aspect_ratio=limit)
        full, _ = pack(maps, sizes, image_newline=NEWLINE, vision_aspect_ratio=_NO_LIMIT)
        whole = self.side(model) ** 2
        return [_packed(s[:, 0], f[:, 0], whole) for s, f in zip(smaller, full, strict=True)]

    def pictures(self, model: Any, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        if modality == "image":
            return super().pictures(model, modality, output, arguments)
        side, frames = self.side(model), arguments["pixel_values_videos"].shape[1]
        pooled = round((output.pooler_output.shape[1] // frames) ** 0.5)
        patches, weights = bilinear(torch.arange(side**2).view(side, side), pooled, pooled)
        return films(output.pooler_output, frames, side**2, patches, weights)


def _packed(smaller: Tensor, full: Tensor, whole: int) -> Packed:
    """Compare a map that went through the packing with one that kept its size there."""
    newlines = smaller < 0
    if len(smaller) == len(full):
        return Packed(newlines, full[~newlines][:, None].long())
    (height, width), (new_height, new_width) = (_shape(packed[whole:] < 0) for packed in (full, smaller))
    numbers = full[full >= 0].long()
    patches, weights = bilinear(numbers[whole:].view(height, width), new_height, new_width)
    first = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(whole, 4)
    return Packed(newlines, torch.cat([numbers[:whole, None].expand(-1, 4), patches]), torch.cat([first, weights]))


def _shape(newlines: Tensor) -> tuple[int, int]:
    """Rows and columns of tokens, each row with a newline behind it."""
    height = int(newlines.sum())
    return height, len(newlines) // height - 1


def bilinear(numbers: Int[Tensor, "h w"], height: int, width: int) -> tuple[Int[Tensor, "n 4"], Float[Tensor, "n 4"]]:
    """Return for each cell of a grid of another size the four cells of ``numbers`` it is made of, and their shares."""
    (rows, up), (columns, across) = (_linear(*sizes) for sizes in zip(numbers.shape, (height, width), strict=True))
    patches = numbers[rows[:, None, :, None], columns[None, :, None, :]]
    weights = up[:, None, :, None] * across[None, :, None, :]
    return patches.reshape(-1, 4), weights.reshape(-1, 4)


def _linear(old: int, new: int) -> tuple[Int[Tensor, "n 2"], Float[Tensor, "n 2"]]:
    """The same along one axis: what interpolation does to each cell alone tells what each new cell is made of."""
    shares = interpolate(torch.eye(old)[None], new, mode="linear")[0].T
    weights, cells = shares.topk(2)
    return cells, weights
