"""The images and videos of a prompt: their placeholders, and the tensors that a model reads of them.

As the families' own processors make them, from noise. Pictures of a batch differ in size wherever a family can read
different sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.zoo.models import (
    BREAK,
    END,
    IMAGE,
    PINPOINTS,
    ROW_END,
    START,
    VIDEO_END,
    VIDEO_START,
    VIDEO_TOKEN,
    model_type,
)

FRAMES = 8  # of every video


@dataclass(frozen=True)
class Media:
    """One image or video of a prompt.

    Args:
        ids: Its part of the prompt: placeholders, and marks around and between them.
        tensors: What the model reads of it; media of one call are joined along the first axis, padded along others.
        kind: The value of ``mm_token_type_ids`` on its placeholders: 1 for an image, 2 for a video.
    """

    ids: list[int]
    tensors: dict[str, Tensor]
    kind: int = 1


@dataclass
class Maker:
    """Makes the media of one batch; each image differs in size from the one before, where a family allows it."""

    name: str
    seed: int
    made: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    def pixels(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def image(self, alone: bool) -> Media:
        """Return the next image; ``alone`` says that its row has no other."""
        self.made += 1
        return _IMAGES[model_type(self.name)](self, self.made - 1, alone)

    def video(self) -> Media:
        return _VIDEOS[model_type(self.name)](self)


def _fixed(side: int, tokens: int, *around: int) -> Callable[[Maker, int, bool], Media]:
    def make(maker: Maker, index: int, alone: bool) -> Media:
        ids = [*around[:1], *[IMAGE] * tokens, *around[1:]]
        return Media(ids, {"pixel_values": maker.pixels(1, 3, side, side)})

    return make


def _anyres(maker: Maker, index: int, alone: bool) -> Media:
    """A picture as a whole and in tiles of 16 pixels, 4 x 4 patches each; bars beside the picture are left out."""
    sizes = [(30, 14), (28, 32), (16, 40)]
    height, width = sizes[index % len(sizes)]
    tokens = tiles = 1
    if alone or maker.name != "llava_onevision":  # which cuts only a picture that is alone in its prompt
        high, wide = _best(height, width)
        rows, columns = high // 4, wide // 4
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
        tokens, tiles = rows * (columns + 1), 1 + high * wide // 256  # a newline ends each row
    tensors = {"pixel_values": maker.pixels(1, tiles, 3, 16, 16), "image_sizes": torch.tensor([[height, width]])}
    return Media([IMAGE] * (16 + tokens), tensors)


def _best(height: int, width: int) -> tuple[int, int]:
    """The resolution that keeps most of a picture's pixels, and of those the one with the least waste."""

    def score(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[0] / height, pinpoint[1] / width)
        kept = min(int(height * scale) * int(width * scale), height * width)
        return kept, kept - pinpoint[0] * pinpoint[1]

    high, wide = max(PINPOINTS, key=score)
    return high, wide


_GRIDS = [(8, 8), (4, 8), (8, 12)]  # patches, four of which make a token


def _grid(maker: Maker, index: int, alone: bool) -> Media:
    height, width = _GRIDS[index % len(_GRIDS)]
    tensors = {
        "pixel_values": maker.pixels(height * width, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }
    return Media([START, *[IMAGE] * (height * width // 4), END], tensors)


def _tiles(maker: Maker, index: int, alone: bool) -> Media:
    tiles = [3, 1, 4][index % 3]
    return Media([START, *[IMAGE] * 9 * tiles, END], {"pixel_values": maker.pixels(tiles, 3, 24, 24)})


def _patchwork(maker: Maker, index: int, alone: bool) -> Media:
    """Tiles by rows and columns, each behind a mark of its own, then the picture as a whole."""
    around, whole, line = 130, 131, 132
    rows, columns = [(1, 2), (0, 0), (2, 1)][index % 3]
    ids: list[int] = []
    for row in range(rows):
        for column in range(columns):
            ids += [around, 133 + 2 * row + column, *[IMAGE] * 9]
        ids.append(line)
    ids += [*([line] if rows else []), around, whole, *[IMAGE] * 9, around]
    tiles = rows * columns + 1
    seen = torch.ones(tiles, 24, 24, dtype=torch.long)
    return Media(ids, {"pixel_values": maker.pixels(tiles, 3, 24, 24), "pixel_attention_mask": seen})


def _coordinates(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows], -1).reshape(1, -1, 2)


def _gemma4(maker: Maker, index: int, alone: bool) -> Media:
    height, width = [(8, 8), (4, 8), (8, 6)][index % 3]
    pixels = maker.pixels(1, height * width, 3 * 4 * 4).sigmoid()
    tensors = {"pixel_values": pixels, "image_position_ids": _coordinates(height, width)}
    return Media([START, *[IMAGE] * (height * width // 4), END], tensors)


def _pixtral(maker: Maker, index: int, alone: bool) -> Media:
    """Tokens of 8 pixels by rows; each row ends in a mark, the last in another."""
    height, width = [(32, 32), (16, 48), (32, 24)][index % 3]
    ids = ([IMAGE] * (width // 8) + [BREAK]) * (height // 8)
    tensors = {"pixel_values": maker.pixels(1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}
    return Media([*ids[:-1], ROW_END], tensors)


def _slices(maker: Maker, index: int, alone: bool) -> Media:
    """The picture as a whole, then its slices, each with marks of its own; sixteen patches make a token."""
    sizes = [[(16, 16), (8, 16), (8, 16)], [(16, 12)], [(16, 16)]][index % 3]
    ids = [i for part, size in enumerate(sizes) for i in _slice(part, size, IMAGE)]
    return Media(ids, {"pixel_values": _strip(maker, sizes), "target_sizes": torch.tensor(sizes, dtype=torch.int32)})


def _slice(part: int, size: tuple[int, int], token: int) -> list[int]:
    around = (140, 141) if part else (START, END)
    return [*around[:1], *[token] * (size[0] * size[1] // 16), *around[1:]]


def _strip(maker: Maker, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Patches of any number of pictures side by side."""
    return maker.pixels(1, 3, 4, 4 * sum(height * width for height, width in sizes))


def _kimi(maker: Maker, index: int, alone: bool) -> Media:
    made = _grid(maker, index, alone)
    patches = made.tensors["pixel_values"][:, :48].reshape(-1, 3, 4, 4)
    return Media(made.ids, {**made.tensors, "pixel_values": patches})


def _mllama(maker: Maker, index: int, alone: bool) -> Media:
    """Up to four tiles; the ratio is a place among the supported ones: 1 x 1, 1 x 2, 1 x 3, 1 x 4, 2 x 1, 2 x 2."""
    tiles, ratio = [(2, 2), (1, 1), (4, 6)][index % 3]
    pixels = torch.zeros(1, 4, 3, 16, 16)
    pixels[:, :tiles] = maker.pixels(tiles, 3, 16, 16)
    seen = (torch.arange(4) < tiles).long()[None]
    tensors = {"pixel_values": pixels, "aspect_ratio_ids": torch.tensor([ratio]), "aspect_ratio_mask": seen}
    return Media([IMAGE], tensors)


_IMAGES: dict[str, Callable[[Maker, int, bool], Media]] = {
    "llava": _fixed(16, 16),
    "vipllava": _fixed(16, 16),
    "video_llava": _fixed(24, 9),
    "gemma3": _fixed(24, 16, START, END),
    "paligemma": _fixed(16, 16),
    **dict.fromkeys(("llava_next", "llava_onevision", "llava_next_video"), _anyres),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _grid),
    **dict.fromkeys(("glm4v", "glm46v"), _grid),
    **dict.fromkeys(("idefics3", "smolvlm"), _patchwork),
    "internvl": _tiles,
    "gemma4": _gemma4,
    "mistral3": _pixtral,
    "mllama": _mllama,
    "minicpmv4_6": _slices,
    "kimi_k25": _kimi,
}


def _frames(side: int, tokens: int) -> Callable[[Maker], Media]:
    def make(maker: Maker) -> Media:
        return Media([VIDEO_TOKEN] * tokens, {"pixel_values_videos": maker.pixels(1, FRAMES, 3, side, side)}, kind=2)

    return make


def _clip_of_patches(maker: Maker) -> dict[str, Tensor]:
    """Eight frames of 4 x 4 patches; two frames make one of the grid, which is four tokens."""
    pixels = maker.pixels(FRAMES // 2 * 16, 3 * 2 * 4 * 4)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[FRAMES // 2, 4, 4]])}


def _seconds(frame: int) -> list[int]:
    return [70 + frame, 80, 90 + frame]


def _plain_grid(maker: Maker) -> Media:
    tensors = _clip_of_patches(maker)
    if maker.name == "qwen2_5_vl":
        tensors["second_per_grid_ts"] = torch.tensor([1.0])
    return Media([START, *[VIDEO_TOKEN] * (FRAMES // 2 * 4), END], tensors, kind=2)


def _stamped_grid(maker: Maker) -> Media:
    """The time of each frame stands before it."""
    ids = [[*_seconds(frame), START, *[VIDEO_TOKEN] * 4, END] for frame in range(FRAMES // 2)]
    return Media([i for frame in ids for i in frame], _clip_of_patches(maker), kind=2)


def _glm(maker: Maker) -> Media:
    """The time of each frame stands behind it; the placeholder is that of images."""
    ids = [[START, *[IMAGE] * 4, END, *_seconds(frame)] for frame in range(FRAMES // 2)]
    return Media([VIDEO_START, *[i for frame in ids for i in frame], VIDEO_END], _clip_of_patches(maker), kind=2)


def _gemma4_video(maker: Maker) -> Media:
    ids = [[*_seconds(frame), START, *[VIDEO_TOKEN] * 4, END] for frame in range(FRAMES)]
    tensors: dict[str, Tensor] = {
        "pixel_values_videos": maker.pixels(FRAMES, 16, 3 * 4 * 4).sigmoid(),
        "video_position_ids": _coordinates(4, 4).repeat(FRAMES, 1, 1),
        "num_frames_per_video": torch.tensor([FRAMES]),
    }
    return Media([i for frame in ids for i in frame], tensors, kind=2)


def _slice_video(maker: Maker) -> Media:
    sizes = [(8, 16)] * FRAMES
    ids = [i for size in sizes for i in _slice(0, size, VIDEO_TOKEN)]
    targets = torch.tensor(sizes, dtype=torch.int32)
    tensors = {"pixel_values_videos": _strip(maker, sizes), "target_sizes_videos": targets}
    return Media(ids, tensors, kind=2)


_VIDEOS: dict[str, Callable[[Maker], Media]] = {
    "llava_onevision": _frames(16, FRAMES * 4 + 1),
    "llava_next_video": _frames(16, FRAMES * 4),
    "video_llava": _frames(24, FRAMES * 10),
    "qwen2_vl": _plain_grid,
    "qwen2_5_vl": _plain_grid,
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _stamped_grid),
    **dict.fromkeys(("glm4v", "glm46v"), _glm),
    "gemma4": _gemma4_video,
    "minicpmv4_6": _slice_video,
}
