"""What tokens are drawn on: a picture, the frames of a video, or plain ground."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from foveate.draw import panels as geometry
from foveate.draw.panels import Panel

if TYPE_CHECKING:
    from foveate.report import ImageReport

Picture = Image.Image | str | Path
Frames = Picture | Sequence[Picture]

_SHORTEST = 336  # pixels of the shorter side of what is drawn, at least
_CELL = 14  # pixels of a cell's shorter side, at least
_PLAIN = (128, 132, 140)  # ground where there is no picture


def upright(image: Picture) -> Image.Image:
    """Return the picture in RGB, upright."""
    if isinstance(image, str | Path):
        with Image.open(image) as opened:
            return upright(opened)
    return ImageOps.exif_transpose(image).convert("RGB")


def opened(image: Frames) -> list[Image.Image]:
    """Return the picture, or the frames of a video, in RGB and upright."""
    pictures = [image] if isinstance(image, Image.Image | str | Path) else list(image)
    if not pictures:
        raise ValueError("there is no picture to draw on, got an empty list")
    return [upright(picture) for picture in pictures]


def films(pictures: Sequence[Frames], reports: Sequence[ImageReport]) -> list[list[Image.Image]]:
    """Return what tokens are drawn on: the frames of each entry, or plain ground where there are not equally many."""
    if len(pictures) == len(reports):
        return [opened(each) for each in pictures]
    return [[Image.new("RGB", (512, 512), _PLAIN)] for _ in reports]


def frame(pictures: Sequence[Image.Image], panel: Panel, shown: Sequence[Panel]) -> Image.Image:
    """Return what a panel shows; where it shows several frames, the first of them."""
    frames = 1 + max(each.frame for each in shown)
    return pictures[panel.frame * len(pictures) // frames]


def enlarged(picture: Image.Image, shown: Sequence[Panel]) -> Image.Image:
    """Return the picture as it is, or enlarged where it or its cells would be too small to see."""
    width, height = picture.size
    scale = max(1.0, _SHORTEST / min(width, height), _CELL / geometry.finest(tuple(shown), picture.size))
    if scale == 1:
        return picture
    return picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
