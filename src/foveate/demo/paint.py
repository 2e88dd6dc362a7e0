"""Paints a layout: backgrounds with clutter, shapes with a rim and shading, printed text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from foveate.demo.world import SIDE, Area, Print, Thing

Pixels = NDArray[np.uint8]
Field = NDArray[np.float32]

RGB = {
    "red": (215, 30, 35), "orange": (250, 130, 15), "yellow": (250, 225, 40), "green": (35, 160, 55),
    "blue": (35, 75, 220), "purple": (145, 45, 185), "white": (245, 245, 245), "black": (18, 18, 20),
}  # fmt: skip


def _arc(radius: float, x: float, y: float, start: float, end: float, steps: int) -> list[tuple[float, float]]:
    return [
        (x + radius * cos(start + (end - start) * i / steps), y + radius * sin(start + (end - start) * i / steps))
        for i in range(steps + 1)
    ]


@lru_cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape in the box from -1 to 1."""
    match shape:
        case "circle" | "ring":
            points = _arc(1, 0, 0, 0, 2 * pi, 36)
        case "square":
            points = [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
        case "triangle":
            points = [(0, -1), (1, 0.9), (-1, 0.9)]
        case "star":
            points = [
                ((1.08 if i % 2 == 0 else 0.45) * sin(i * pi / 5), -(1.08 if i % 2 == 0 else 0.45) * cos(i * pi / 5))
                for i in range(10)
            ]
        case "cross":
            a = 0.32
            points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a)]
            points += [(-1, -a), (-a, -a)]
        case "heart":
            turns = [2 * pi * i / 36 for i in range(36)]
            points = [
                (sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16 - 0.08) for t in turns
            ]
        case _:
            points = _arc(1, 0, 0, 0.30 * pi, 1.70 * pi, 30) + _arc(0.82, 0.42, 0, 1.58 * pi, 0.42 * pi, 24)
    return tuple(points)


def _stencil(shape: str, size: int, turn: float, margin: int) -> Image.Image:
    """An antialiased mask of the shape, size + 2 * margin px wide."""
    side, zoom = size + 2 * margin, 3
    mask = Image.new("L", (side * zoom, side * zoom))
    draw = ImageDraw.Draw(mask)
    c, s, middle, scale = cos(turn), sin(turn), side * zoom / 2, size * zoom / 2

    def spin(factor: float) -> list[tuple[float, float]]:
        return [
            (middle + scale * factor * (c * x - s * y), middle + scale * factor * (s * x + c * y))
            for x, y in _outline(shape)
        ]

    draw.polygon(spin(1.0), fill=255)
    if shape == "ring":
        draw.polygon(spin(0.55), fill=0)
    return mask.reduce(zoom)


def _cloud(rng: np.random.Generator, width: int, height: int, cell: int, octaves: int) -> Field:
    """Fractal noise from 0 to 1."""
    w, h = max(width // 2, 8), max(height // 2, 8)
    total = np.zeros((h, w), np.float32)
    weight = 1.0
    for octave in range(octaves):
        step = max(cell >> octave, 2)
        grid = rng.random((h // step + 3, w // step + 3), np.float32)
        box = (0.0, 0.0, grid.shape[1] * w / ((w // step + 3) * step), grid.shape[0] * h / ((h // step + 3) * step))
        total += weight * np.asarray(Image.fromarray(grid).resize((w, h), Image.Resampling.BICUBIC, box))
        weight *= 0.55
    total -= total.min()
    total /= max(float(total.max()), 1e-6)
    return np.asarray(Image.fromarray(total).resize((width, height), Image.Resampling.BILINEAR))


def _pattern(rng: np.random.Generator, width: int, height: int) -> Field:
    """A texture from about 0 to 1: clouds, wood, marble, grass, gradient or pixel noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    turn = rng.random() * 2 * pi
    along = x * np.float32(cos(turn)) + y * np.float32(sin(turn))
    field: Field
    match int(rng.integers(6)):
        case 0:
            field = _cloud(rng, width, height, 48, 5)
        case 1:
            cloud = _cloud(rng, width, height, 64, 3)
            field = np.float32(0.5) + np.float32(0.5) * np.sin(along * np.float32(0.05) + cloud * np.float32(18))
        case 2:
            cloud = _cloud(rng, width, height, 40, 5)
            field = np.abs(np.sin(along * np.float32(0.02) + cloud * np.float32(7)))
        case 3:
            blades = rng.random((height // 6 + 1, width), np.float32)
            grass = np.asarray(Image.fromarray(blades).resize((width, height), Image.Resampling.BICUBIC))
            field = np.float32(0.5) * grass + np.float32(0.5) * _cloud(rng, width, height, 32, 3)
        case 4:
            ramp = (along - along.min()) / np.float32(max(float(np.ptp(along)), 1.0))
            field = np.float32(0.7) * ramp + np.float32(0.3) * _cloud(rng, width, height, 64, 3)
        case _:
            speckle = rng.random((height // 3 + 1, width // 3 + 1), np.float32)
            rough = np.asarray(Image.fromarray(speckle).resize((width, height), Image.Resampling.BILINEAR))
            field = np.float32(0.5) * rough + np.float32(0.5) * _cloud(rng, width, height, 24, 3)
    return field


def _muted(rng: np.random.Generator) -> Field:
    """A colour as walls, wood, sand, grass and sky have it: never strong."""
    value = 55 + 160 * rng.random()
    tint = rng.random(3) * 2 - 1
    return np.asarray(np.clip(value * (1 + 0.22 * tint), 0, 255), np.float32)


def background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A cluttered background."""
    stops = np.stack([_muted(rng) for _ in range(3)])
    if rng.random() < 0.6:
        stops = stops.mean(0) + (stops - stops.mean(0)) * np.float32(0.55)
    ramp = np.linspace(0, 2, 256, dtype=np.float32)
    table = np.stack([np.interp(ramp, (0, 1, 2), stops[:, c]) for c in range(3)], 1).astype(np.float32)
    index = np.clip(_pattern(rng, width, height) * 255, 0, 255).astype(np.uint8)
    image = Image.fromarray(table.astype(np.uint8)[index])
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 1 + 22 * width * height // (SIDE * SIDE)))):
        x, y = float(rng.random()) * width, float(rng.random()) * height
        length, turn = 10 + 70 * float(rng.random()), 2 * pi * float(rng.random())
        end = (x + length * cos(turn), y + length * sin(turn))
        r, g, b = (int(v) for v in _muted(rng))
        draw.line([(x, y), end], fill=(r, g, b), width=int(rng.integers(1, 5)))
    return image


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _write(rng: np.random.Generator, image: Image.Image, item: Print, x: int, y: int) -> Area:
    """Prints a text around (x, y); returns the box it covers."""
    draw = ImageDraw.Draw(image)
    dark = rng.random() < 0.5
    ink = [int(v) for v in (rng.integers(0, 60, 3) if dark else rng.integers(200, 256, 3))]
    paper = [int(v) for v in (rng.integers(185, 256, 3) if dark else rng.integers(0, 75, 3))]
    plate = rng.random() < 0.4
    font, text = _font(item.height), item.text.upper()
    stroke = 0 if plate else 2
    left, top, right, bottom = draw.textbbox((x, y), text, font=font, anchor="mm", stroke_width=stroke)
    box = (int(left) - 3, int(top) - 3, int(right) + 3, int(bottom) + 3)
    if plate:
        draw.rectangle(box, fill=(paper[0], paper[1], paper[2]))
    draw.text(
        (x, y), text, fill=(ink[0], ink[1], ink[2]), font=font, anchor="mm",
        stroke_width=stroke, stroke_fill=(paper[0], paper[1], paper[2]),
    )  # fmt: skip
    return box


def stamp(
    rng: np.random.Generator,
    image: Image.Image,
    owner: Image.Image,
    thing: Thing,
    value: int,
    left: int = 0,
    top: int = 0,
) -> None:
    """Paints a shape, and its number into the map of owners.

    Args:
        rng: Source of chance.
        image: The picture, changed in place.
        owner: What covers each pixel, changed in place.
        thing: The shape.
        value: Its number in the map.
        left: Column of the canvas at the left edge of the picture.
        top: Row of the canvas at the upper edge of the picture.
    """
    fill = np.clip(np.array(RGB[thing.colour], np.float32) + rng.normal(0, 7, 3), 0, 255)
    rim = fill * 0.5 if fill.max() > 60 else fill + 75
    turn = float(rng.normal(0, 0.1))
    margin = 2 + thing.size // 8
    mask = _stencil(thing.shape, thing.size, turn, margin)
    side = mask.size[0]
    corner = (thing.x - left - side // 2, thing.y - top - side // 2)
    core = _stencil(thing.shape, thing.size - (2 if thing.size < 30 else 4), turn, (side - thing.size) // 2)
    shade = np.float32(1) + np.float32(0.12) * (np.linspace(-1, 1, side, dtype=np.float32)[:, None])
    body = np.clip(fill * np.broadcast_to(shade[..., None], (side, side, 3)), 0, 255).astype(np.uint8)
    r, g, b = (int(v) for v in rim)
    image.paste((r, g, b), corner, mask)
    inset = (side - core.size[0]) // 2
    image.paste(Image.fromarray(body[: core.size[1], : core.size[0]]), (corner[0] + inset, corner[1] + inset), core)
    owner.paste(value, corner, mask.point(lambda v: 255 if v > 127 else 0))


def paint(
    rng: np.random.Generator, objects: Sequence[Thing], prints: Sequence[Print], area: Area = (0, 0, SIDE, SIDE)
) -> tuple[Pixels, Pixels]:
    """Paints a part of the canvas.

    Args:
        rng: Source of chance.
        objects: The shapes.
        prints: The printed texts.
        area: The part of the canvas to paint: left, top, right, bottom in px.

    Returns:
        The picture (h, w, 3), and a map (h, w) that says what covers each pixel: 0 nothing, 1 + i the i-th of
        objects followed by prints.
    """
    width, height = area[2] - area[0], area[3] - area[1]
    image = background(rng, width, height)
    owner = Image.new("L", (width, height))
    for i, item in enumerate(prints):
        box = _write(rng, image, item, item.x - area[0], item.y - area[1])
        owner.paste(1 + len(objects) + i, box)
    for i, thing in enumerate(objects):
        stamp(rng, image, owner, thing, 1 + i, area[0], area[1])
    pixels = np.asarray(image).astype(np.int16)
    grain = int(rng.integers(1, 12))
    pixels += rng.integers(-grain, grain + 1, pixels.shape, np.int16)
    return np.clip(pixels, 0, 255).astype(np.uint8), np.array(owner)
