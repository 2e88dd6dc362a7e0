"""Paints a clip: one still background, shapes pasted from stencils, new grain in every frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foveate.demo.paint import RGB, Pixels, _stencil, background
from foveate.demo.video.world import SIDE, Life


def _coat(rng: np.random.Generator, colour: str, side: int) -> tuple[tuple[int, int, int], Image.Image]:
    """The rim and the shaded body of a shape."""
    fill = np.clip(np.array(RGB[colour], np.float32) + rng.normal(0, 7, 3), 0, 255)
    rim = fill * 0.5 if fill.max() > 60 else fill + 75
    shade = 1 + 0.12 * np.linspace(-1, 1, side, dtype=np.float32)[:, None, None]
    body = np.clip(fill * shade, 0, 255).astype(np.uint8)
    r, g, b = (int(v) for v in rim)
    return (r, g, b), Image.fromarray(np.ascontiguousarray(np.broadcast_to(body, (side, side, 3))))


def film(rng: np.random.Generator, frames: int, lives: Sequence[Life]) -> tuple[Pixels, NDArray[np.uint8]]:
    """Paints every frame.

    Args:
        rng: Source of chance.
        frames: How many.
        lives: The shapes and what happens to each.

    Returns:
        The frames (n, h, w, 3), and maps (n, h, w) that say what covers each pixel: 0 nothing, 1 + i the i-th of lives.
    """
    scenery = background(rng, SIDE, SIDE)
    stencils = []
    for life in lives:
        turn, margin, rim = float(rng.normal(0, 0.1)), 2 + life.size // 8, 1 if life.size < 30 else 2
        mask = _stencil(life.shape, life.size, turn, margin)
        core = _stencil(life.shape, life.size - 2 * rim, turn, margin + rim)
        coats = [_coat(rng, colour, mask.size[0]) for colour in dict.fromkeys((life.colour, life.later))]
        stencils.append((mask, core, mask.point(lambda v: 255 if v > 127 else 0), coats))
    grain = int(rng.integers(1, 12))
    pictures, owners = np.empty((frames, SIDE, SIDE, 3), np.uint8), np.empty((frames, SIDE, SIDE), np.uint8)
    for frame in range(frames):
        image, owner = scenery.copy(), Image.new("L", (SIDE, SIDE))
        for i, (life, (mask, core, solid, coats)) in enumerate(zip(lives, stencils, strict=True), 1):
            if not life.there(frame):
                continue
            x, y = life.centre(frame)
            corner = (x - mask.size[0] // 2, y - mask.size[1] // 2)
            edge, body = coats[-1 if life.tint(frame) == life.later else 0]
            image.paste(edge, corner, mask)
            image.paste(body, corner, core)
            owner.paste(i, corner, solid)
        noise = rng.integers(-grain, grain + 1, (SIDE, SIDE, 3), np.int16)
        pictures[frame] = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        owners[frame] = np.asarray(owner)
    return pictures, owners
