"""Prompts for the models of `tests.zoo.models`, built by hand as the families' own processors would build them.

A prompt is a list of pieces: token ids, and media that bring their placeholders and their tensors along. Each row of
a batch has another length.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.video_llava.modeling_video_llava import VideoLlavaModel

from tests.zoo.media import Maker, Media
from tests.zoo.models import BOS, IMAGE, MIXED, PAD, VIDEO, VIDEO_TOKEN, model_type

Row = list[list[int] | Media]

_FORMER_NAME = "pixel_values_images"  # what older transformers call the images of video_llava


class Batch(dict[str, Tensor]):
    """Inputs of a call, which remember the rows they were made of."""

    def __init__(self, tensors: dict[str, Tensor], rows: list[Row]) -> None:
        super().__init__(tensors)
        self.rows = rows


def batch(name: str, rows: Sequence[int] = (1, 2), seed: int = 1, video: bool = False) -> Batch:
    """Return a left-padded batch of prompts with ``rows[i]`` images in row i, each row of another length.

    There is text between images, and every row ends in text. paligemma has its images in front and none between.

    Args:
        name: One of `NAMES`.
        rows: Images per row; at least one of them is not 0 for mllama.
        seed: Of the pictures.
        video: Videos of eight frames instead of images; only for a name in `VIDEO`.
    """
    if video and name not in VIDEO:
        raise ValueError(f"{name} reads no videos")
    maker = Maker(name, seed)
    made: list[Row] = []
    for row, count in enumerate(rows):
        media = [maker.video() if video else maker.image(alone=count == 1) for _ in range(count)]
        made.append(_front(row, media) if name == "paligemma" else _prompt(row, media))
    return _collate(name, made)


def mixed(name: str, seed: int = 1) -> Batch:
    """Return two prompts with an image and a video each, in either order; only for a name in `MIXED`."""
    if name not in MIXED:
        raise ValueError(f"{name} does not read images and videos in one call")
    maker = Maker(name, seed)
    first = [maker.image(alone=True), maker.video()]
    second = [maker.video(), maker.image(alone=True)]
    return _collate(name, [_prompt(0, first), _prompt(1, second)])


def one_row(name: str, inputs: Batch, row: int) -> Batch:
    """Return row ``row`` of a batch alone, without padding."""
    return _collate(name, [inputs.rows[row]])


def _prompt(row: int, media: Sequence[Media]) -> Row:
    made: Row = [[BOS, *range(5, 8 + row)]]
    for place, medium in enumerate(media):
        made += [medium, [20 + 2 * row + place] * (2 + row)]
    return [*made, list(range(40, 43 + 2 * row))]


def _front(row: int, media: Sequence[Media]) -> Row:
    return [*media, [BOS, *range(5, 10 + row)], list(range(40, 43 + 2 * row))]


def _collate(name: str, rows: list[Row]) -> Batch:
    """Join rows to a batch: ids padded on the left, tensors of all media one after another."""
    ids = [[i for piece in row for i in (piece.ids if isinstance(piece, Media) else piece)] for row in rows]
    kinds = [[k for piece in row for k in _kinds(piece)] for row in rows]
    length = max(map(len, ids))
    out = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    media = [[piece for piece in row if isinstance(piece, Media)] for row in rows]
    names = {key for row in media for medium in row for key in medium.tensors}
    for key in sorted(names):
        parts = [[medium.tensors[key] for medium in row if key in medium.tensors] for row in media]
        if _BY_ROW.get(name):
            empty = next(part[:0] for row in parts for part in row)
            out[key] = _join([_join(row or [empty], key)[None] for row in parts], key)
        elif name == "minicpmv4_6" and key.startswith("pixel"):
            out[key] = torch.cat([part for row in parts for part in row], -1)
        else:
            out[key] = _join([part for row in parts for part in row], key)
    types = torch.tensor([[0] * (length - len(row)) + row for row in kinds])
    if (key := _TYPES.get(model_type(name))) is not None:
        out[key] = torch.zeros_like(types) if name == "paligemma" else types
    if name == "llava_onevision" and "pixel_values" in out:
        images = [sum(medium.kind == 1 for medium in row) for row in media]
        out["batch_num_images"] = torch.tensor([count for count in images if count])
    if name == "video_llava" and _FORMER_NAME in inspect.signature(VideoLlavaModel.forward).parameters:
        out = {_FORMER_NAME if key == "pixel_values" else key: value for key, value in out.items()}
    if "aspect_ratio_mask" in out:
        out["aspect_ratio_mask"][..., 0] = 1  # also where a row has no image
        out["cross_attention_mask"] = _sights(out, media)
    return Batch(out, rows)


def _kinds(piece: list[int] | Media) -> list[int]:
    if not isinstance(piece, Media):
        return [0] * len(piece)
    return [piece.kind * (i in (IMAGE, VIDEO_TOKEN)) for i in piece.ids]


def _join(parts: Sequence[Tensor], key: str) -> Tensor:
    """Concatenate along the first axis; where other axes differ, fill up at their ends."""
    fill = -1 if key.endswith("position_ids") else 0
    sizes = torch.tensor([part.shape[1:] for part in parts]).amax(0).tolist()
    return torch.cat([functional.pad(part, _ends(part.shape[1:], sizes), value=fill) for part in parts])


def _ends(shape: Sequence[int], sizes: Sequence[int]) -> list[int]:
    return [n for have, want in zip(reversed(shape), reversed(sizes), strict=True) for n in (0, int(want) - have)]


def _sights(out: dict[str, Tensor], media: list[list[Media]]) -> Tensor:
    """Which tiles each token of mllama looks at: those of the last image before it."""
    length, most = out["input_ids"].shape[1], max(map(len, media))
    sights = torch.zeros(len(media), length, most, 4, dtype=torch.long)
    for row, ids in enumerate(out["input_ids"]):
        places = [*(ids == IMAGE).nonzero()[:, 0].tolist(), length]
        for image, medium in enumerate(media[row]):
            tiles = int(medium.tensors["aspect_ratio_mask"].sum())
            sights[row, places[image] : places[image + 1], image, :tiles] = 1
    return sights


#: Families whose tensors have an axis for the rows, filled up with empty slots.
_BY_ROW = {"idefics3": True, "smolvlm": True, "mllama": True}

#: What a family calls the kinds of its tokens, if it asks for them.
_TYPES = {name: "mm_token_type_ids" for name in VIDEO if name.startswith(("qwen", "glm", "gemma"))} | {
    "gemma3": "token_type_ids",
    "paligemma": "token_type_ids",
}
