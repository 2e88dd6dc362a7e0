"""Paints the pictures of demo-hd: a cluttered ground, large and small shapes, a faint one, coloured signs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from foveate.demo.hd.world import Item, Size
from foveate.demo.paint import RGB, Pixels, _font, _stencil, background, stamp
from foveate.demo.world import Thing

DARK_ON = ("white", "yellow", "orange")
"""Colours of signs with dark print; the others have light print."""


def ground(rng: np.random.Generator, size: Size) -> Image.Image:
    """A cluttered background, coarse as that of a picture half as large."""
    return background(rng, size[0] // 2, size[1] // 2).resize(size, Image.Resampling.BILINEAR)


def _sign(rng: np.random.Generator, image: Image.Image, owner: Image.Image, item: Item, value: int) -> None:
    """Paints a plate and what is printed on it."""
    draw = ImageDraw.Draw(image)
    font, text = _font(item.size), item.name.upper()
    left, top, right, bottom = draw.textbbox((item.x, item.y), text, font=font, anchor="mm")
    pad = 3 + item.size // 8
    box = (int(left) - pad, int(top) - pad, int(right) + pad, int(bottom) + pad)
    r, g, b = (int(v) for v in np.clip(np.array(RGB[item.colour]) + rng.normal(0, 7, 3), 0, 255))
    ink = int(rng.integers(0, 30)) if item.colour in DARK_ON else int(rng.integers(225, 256))
    draw.rectangle(box, fill=(r, g, b))
    draw.text((item.x, item.y), text, fill=(ink, ink, ink), font=font, anchor="mm")
    owner.paste(value, box)


def _faint(rng: np.random.Generator, image: Image.Image, owner: Image.Image, item: Item, value: int) -> None:
    """Paints a shape that is a little lighter or darker than what is behind it."""
    strength = 0.28 + 0.14 * float(rng.random())
    mask = _stencil(item.name, item.size, float(rng.normal(0, 0.1)), 2 + item.size // 8)
    corner = (item.x - mask.size[0] // 2, item.y - mask.size[1] // 2)
    behind = np.asarray(image.crop((*corner, corner[0] + mask.size[0], corner[1] + mask.size[1]))).mean()
    tone = 0 if behind > 127 else 255
    image.paste((tone, tone, tone), corner, mask.point(lambda v: int(v * strength)))
    owner.paste(value, corner, mask.point(lambda v: 255 if v > 127 else 0))


@lru_cache
def _grain(seed: int) -> Pixels:
    """Noise from 0 to 255, cut from when a picture gets its grain."""
    return np.random.default_rng([seed, 25]).integers(0, 256, (1100, 1100, 3), np.uint8)


def paint(rng: np.random.Generator, base: Image.Image, items: Sequence[Item]) -> tuple[Pixels, Pixels]:
    """Paints items on a background.

    Args:
        rng: Source of chance.
        base: The background, see `ground`; it is not changed.
        items: What to paint.

    Returns:
        The picture (h, w, 3), and a map (h, w) that says what covers each pixel: 0 nothing, 1 + i the i-th item.
    """
    image, owner = base.copy(), Image.new("L", base.size)
    for i, item in enumerate(items, 1):
        if item.kind == "shape":
            stamp(rng, image, owner, Thing(item.name, item.colour, item.size, item.x, item.y), i)
        else:
            (_faint if item.kind == "faint" else _sign)(rng, image, owner, item, i)
    amount, (width, height) = int(rng.integers(1, 12)), image.size
    x, y = (int(v) for v in rng.integers(0, 90, 2))
    noise = _grain(int(rng.integers(4)))[y : y + height, x : x + width].astype(np.int16) * (2 * amount + 1) >> 8
    pixels = np.asarray(image).astype(np.int16) + noise - amount
    return np.clip(pixels, 0, 255).astype(np.uint8), np.array(owner)
