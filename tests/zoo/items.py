"""Where the images and videos of a prompt are: for each, the columns of its visual tokens.

An image is one item, whatever marks stand between its placeholders; to idefics3, smolvlm and minicpmv4_6 each of its
tiles is one. A video is one item, also when timestamps stand between its frames; minicpmv4_6 is not told which frames
belong together, to it each is one. Newlines between the rows of a packed picture are placeholders, but no visual
tokens; likewise the CLS token before each frame of video_llava.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["image", "video"]


@dataclass(frozen=True)
class Item:
    """One image or video, or one tile.

    Args:
        row: Of the batch.
        kind: Image or video.
        columns: Of its visual tokens, ascending: places in the prompt, padding counted; for mllama places among all
            that its row can look across at, in the order of its tokens.
    """

    row: int
    kind: Kind
    columns: Tensor


def items(model: Any, inputs: Mapping[str, Tensor]) -> list[Item]:
    """Return the items of all prompts, in their order, row by row."""
    if model.config.model_type == "mllama":
        return _across(model, inputs)
    images, videos = _placeholders(model, inputs)
    found = _cut(model, inputs, "image", images) + _cut(model, inputs, "video", videos)
    return sorted(found, key=lambda item: (item.row, int(item.columns[0])))


def _placeholders(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    kinds = inputs.get("mm_token_type_ids")
    if kinds is not None:
        return kinds == 1, kinds == 2
    ids = inputs["input_ids"]
    video = getattr(model.config, "video_token_id", None)
    return ids == model.config.image_token_id, ids == (-1 if video is None else video)


def _cut(model: Any, inputs: Mapping[str, Tensor], kind: Kind, marked: Tensor) -> list[Item]:
    """Cut the placeholders of one kind into items."""
    if not marked.any():
        return []
    lines = _newlines(model, inputs, kind)
    lengths = iter([len(line) for line in lines] if lines else _lengths(model, inputs, kind, marked))
    flags = iter(lines)
    found = []
    for row, marks in enumerate(marked):
        columns = marks.nonzero()[:, 0]
        while len(columns):
            length = next(lengths)
            columns, own = columns[length:], columns[:length]
            found.append(Item(row, kind, own[~next(flags)] if lines else own))
    return found


def _newlines(model: Any, inputs: Mapping[str, Tensor], kind: Kind) -> list[Tensor]:
    """For each item of a family that has newlines, which of its placeholders are one; else nothing.

    The CLS tokens in a video of video_llava are treated alike.
    """
    if model.config.model_type == "video_llava" and kind == "video":
        tower = model.config.vision_config
        first = torch.arange(1 + (tower.image_size // tower.patch_size) ** 2) == 0
        return [first.repeat(len(video)) for video in inputs["pixel_values_videos"]]
    if getattr(model.model, "image_newline", None) is None:
        return []
    encode = getattr(model.model, f"get_{kind}_features")
    known = {name: inputs[name] for name in inspect.signature(encode).parameters if name in inputs}
    with torch.no_grad():
        features = encode(**known, return_dict=True).pooler_output
    return [(rows.flatten(0, -2) == model.model.image_newline).all(-1) for rows in features]


def _lengths(model: Any, inputs: Mapping[str, Tensor], kind: Kind, marked: Tensor) -> list[int]:
    """How many placeholders each item has."""
    config, name = model.config, model.config.model_type
    if (grids := inputs.get(f"{kind}_grid_thw")) is not None:
        merged = 4 if name == "kimi_k25" else config.vision_config.spatial_merge_size**2
        return (grids.prod(-1) // merged).tolist()
    if name == "mistral3":
        side = config.vision_config.patch_size * config.spatial_merge_size
        return (inputs["image_sizes"] // side).prod(-1).tolist()
    if name == "gemma4" and kind == "video":
        patches = (inputs["video_position_ids"] >= 0).all(-1).sum(-1)
        frames = patches // config.vision_config.pooling_kernel_size**2
        return [int(f.sum()) for f in frames.split(inputs["num_frames_per_video"].tolist())]
    if name in ("gemma4", "internvl", "minicpmv4_6"):
        return _runs(marked)
    names = ("pixel_values", "pixel_values_images") if kind == "image" else ("pixel_values_videos",)
    pixels = next(inputs[name] for name in names if name in inputs)
    if name in ("idefics3", "smolvlm"):
        pixels = pixels.flatten(0, 1)
        pixels = pixels[pixels.flatten(1).any(1)]
    return [int(marked.sum()) // len(pixels)] * len(pixels)


def _runs(marked: Tensor) -> list[int]:
    lengths: list[int] = []
    for row in marked.tolist():
        before = False
        for mark in row:
            if mark and before:
                lengths[-1] += 1
            elif mark:
                lengths.append(1)
            before = mark
    return lengths


def _across(model: Any, inputs: Mapping[str, Tensor]) -> list[Item]:
    """The items of mllama: patches of an image's real tiles, in reading order of the image; class tokens are none."""
    tower = model.config.vision_config
    side, slots = tower.image_size // tower.patch_size, inputs["aspect_ratio_mask"].shape[-1]
    images: Sequence[int] = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    found = []
    for row, count in enumerate(images):
        for image in range(count):
            high, wide = tower.supported_aspect_ratios[int(inputs["aspect_ratio_ids"][row, image]) - 1]
            columns = [
                (image * slots + y // side * wide + x // side) * (side**2 + 1) + 1 + y % side * side + x % side
                for y in range(high * side)
                for x in range(wide * side)
            ]
            found.append(Item(row, "image", torch.tensor(columns)))
    return found
