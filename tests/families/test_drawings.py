"""A drawing shows the pixels that a token was made of, from the processor's scissors to the drawing's cells.

A picture is flat but for one spot, and the encoder looks at each patch alone. The token that the spot changes most, as
the model itself has it, is the one to be drawn: the cell that shines must lie on the spot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    LlavaNextImageProcessorPil,
    Qwen2VLImageProcessorPil,
)

import foveate
from foveate import draw
from foveate.report import ImageReport
from tests.zoo.models import BOS, END, IMAGE, PINPOINTS, START, tiny

FLAT, SPOT = (200, 70, 40), (30, 80, 220)
Box = tuple[int, int, int, int]
Inputs = Callable[[Image.Image], dict[str, Any]]


@cache
def alone(name: str) -> Any:
    """A small model in whose encoder attention adds nothing."""
    model = tiny(name, "sdpa")
    for key, parameter in model.named_parameters():
        if "vis" in key and key.rsplit(".", 2)[1] in ("out_proj", "projection_layer", "proj") and "patch" not in key:
            parameter.data.zero_()
    return model


def llava(picture: Image.Image) -> dict[str, Any]:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return {**processor(picture, return_tensors="pt"), "input_ids": prompt(16)}


def llava_next(picture: Image.Image) -> dict[str, Any]:
    sides = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    media = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **sides)(picture, return_tensors="pt")
    base = alone("llava_next").model
    (rows,) = base.get_image_features(media["pixel_values"], media["image_sizes"]).pooler_output
    return {**media, "input_ids": prompt(len(rows))}


def internvl(picture: Image.Image) -> dict[str, Any]:
    processor = GotOcr2ImageProcessorPil(size={"height": 24, "width": 24}, crop_to_patches=True, max_patches=6)
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "input_ids": prompt(9 * len(pixels))}


def qwen2_vl(picture: Image.Image) -> dict[str, Any]:
    size = {"shortest_edge": 16, "longest_edge": 64 * 40}
    media = Qwen2VLImageProcessorPil(patch_size=4, size=size)(picture, return_tensors="pt")
    ids = prompt(int(media["image_grid_thw"].prod()) // 4)
    return {**media, "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long()}


def prompt(tokens: int) -> torch.Tensor:
    return torch.tensor([[BOS, 5, START, *[IMAGE] * tokens, END, 40, 41]])


def flat(size: tuple[int, int], spot: Box | None = None) -> Image.Image:
    picture = Image.new("RGB", size, FLAT)
    if spot is not None:
        ImageDraw.Draw(picture).rectangle((spot[0], spot[1], spot[2] - 1, spot[3] - 1), SPOT)
    return picture


@torch.no_grad()
def looked_at(name: str, inputs: dict[str, Any]) -> tuple[torch.Tensor, ImageReport]:
    """What the LLM reads of each token, and what the report says of the picture."""
    model = alone(name)
    with foveate.compress(model, "grid:keep=0.5") as handle:
        model.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=1)
    assert handle.frame is not None
    (seen,), (report,) = handle.frame.images, handle.report.images
    return seen.picture.features, report


def drawn(name: str, make: Inputs, size: tuple[int, int], spot: Box, first: int | None, crop: bool) -> np.ndarray:
    """Return the drawing of the token that the spot changes most: one of the ``first``, and one of the others."""
    (before, _), (after, report) = (looked_at(name, make(flat(size, where))) for where in (None, spot))
    change = (after - before).norm(dim=-1)
    kept = (int(change.argmax()),)
    if first is not None:
        start = first % len(change)
        kept = (int(change[:start].argmax()), start + int(change[start:].argmax()))
    stage = dataclasses.replace(report.stages[0], kept=kept)
    shown = dataclasses.replace(report, stages=(stage,), alive=(len(kept),) * len(report.alive))
    return np.asarray(draw.tokens(flat(size), shown, crop=crop)).astype(int)


def shining(picture: np.ndarray) -> Box:
    """Return the box around what is not dimmed; a drawing dims in grey, and both the flat and lines have colours."""
    ys, xs = np.nonzero(np.ptp(picture, axis=-1) > 60)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def near(found: Box, wanted: Box, pixels: int = 1) -> bool:
    return all(abs(a - b) <= pixels for a, b in zip(found, wanted, strict=True))


def test_a_cropped_picture_has_its_tokens_in_the_middle() -> None:
    """16 tokens on the central 400 x 400 of a picture of 600 x 400."""
    spot = (200, 100, 300, 200)
    assert near(shining(drawn("llava", llava, (600, 400), spot, None, crop=True)), spot)


@pytest.mark.parametrize("spot", [(0, 0, 80, 80), (400, 80, 480, 160), (240, 320, 320, 400), (560, 320, 640, 400)])
def test_two_by_two_merge_on_a_grid_that_is_not_square(spot: Box) -> None:
    """Five rows and eight columns of tokens, each of four patches."""
    size = (640, 400)
    assert near(shining(drawn("qwen2_vl", qwen2_vl, size, spot, None, crop=False)), spot)


@pytest.mark.parametrize("crop", [True, False], ids=["crop", "no crop"])
@pytest.mark.parametrize("spot", [(0, 0, 90, 90), (360, 180, 450, 270), (630, 90, 720, 180)])
def test_any_resolution_without_bars(spot: Box, crop: bool) -> None:
    """The whole in 4 x 4 tokens, and two tiles put together; its processor also cuts squares, but never the picture."""
    picture = drawn("llava_next", llava_next, (720, 360), spot, 16, crop)
    whole, tiles = picture[:, :720], picture[:, 728:]
    assert near(shining(tiles), spot)
    left, top, right, bottom = shining(whole)
    assert (right - left, bottom - top) == (180, 90)
    assert left <= spot[0] < spot[2] <= right
    assert top <= spot[1] < spot[3] <= bottom


@pytest.mark.parametrize("row", [0, 2, 4])
def test_any_resolution_with_bars(row: int) -> None:
    """A picture of 8 x 5 cells in the middle of 8 x 8 lies half a cell beside them: six rows of cells are left."""
    spot = (240, 80 * row + 10, 320, 80 * row + 30)  # within the upper half of a row of pixels
    picture = drawn("llava_next", llava_next, (640, 400), spot, 16, crop=False)
    tiles = shining(picture[:, 648:])
    assert near(tiles, (240, max(0, 80 * row - 40), 320, 80 * row + 40))


@pytest.mark.parametrize(
    ("size", "side", "spots"),
    [
        ((720, 480), 80, [(0, 0), (240, 0), (480, 240), (640, 400), (400, 160)]),  # three tiles by two
        ((400, 1200), 400 / 3, [(0, 0), (133, 400), (266, 1066)]),  # one by three
    ],
)
def test_pixel_shuffle_in_tiles(size: tuple[int, int], side: float, spots: list[tuple[int, int]]) -> None:
    """Tiles of 3 x 3 tokens; which of them lies where follows from the shape of the picture."""
    for x, y in spots:
        spot = (x, y, round(x + side), round(y + side))
        picture = drawn("internvl", internvl, size, spot, -9, crop=False)
        whole, tiles = picture[:, : size[0]], picture[:, size[0] + 8 :]
        assert near(shining(tiles), spot, 2)
        left, top, right, bottom = shining(whole)
        assert left - 2 <= spot[0] < spot[2] <= right + 2
        assert top - 2 <= spot[1] < spot[3] <= bottom + 2
