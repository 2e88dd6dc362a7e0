"""Drawings in pixels, by Pillow."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageOps

from foveate.draw.scene import PAPER, SHADE, SHADED, Cells, Group, Photo, Rects, Scene, Text, font


def render(scene: Scene) -> Image.Image:
    """Return the drawing in RGB."""
    canvas = Image.new("RGB", (scene.width, scene.height), PAPER)
    pen = ImageDraw.Draw(canvas)
    for item in scene.items:
        match item:
            case Photo():
                canvas.paste(_toned(item), (0, 0), _mask(item))
            case Cells():
                _cells(canvas, item)
            case Rects():
                for left, top, right, bottom in item.rects:
                    pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), item.colour)
            case Text():
                pen.text((item.x, item.y), item.text, item.colour, font(item.size), anchor=item.anchor)
            case Group():
                inner = render(item.scene)
                if item.scale != 1:
                    size = round(inner.width * item.scale), round(inner.height * item.scale)
                    inner = inner.resize(size, Image.Resampling.LANCZOS)
                canvas.paste(inner, (item.x, item.y))
    return canvas


def _toned(photo: Photo) -> Image.Image:
    if photo.tone == "plain":
        return photo.picture
    grey = ImageOps.grayscale(photo.picture).convert("RGB")
    return grey if photo.tone == "grey" else Image.blend(grey, Image.new("RGB", grey.size, SHADE), SHADED)


def _mask(photo: Photo) -> Image.Image | None:
    if not photo.light:
        return None
    mask = Image.new("L", photo.picture.size)
    mask.paste(_enlarged(photo.light, photo.rows, photo.columns, photo.box), photo.box[:2])
    return mask


def _cells(canvas: Image.Image, cells: Cells) -> None:
    small = Image.new("RGB", (cells.columns, cells.rows))
    small.putdata([colour or PAPER for colour in cells.colours])
    size = cells.box[2] - cells.box[0], cells.box[3] - cells.box[1]
    seen = [0.0 if colour is None else cells.opacity for colour in cells.colours]
    mask = _enlarged(seen, cells.rows, cells.columns, cells.box)
    canvas.paste(small.resize(size, Image.Resampling.NEAREST), cells.box[:2], mask)


def _enlarged(
    values: tuple[float, ...] | list[float], rows: int, columns: int, box: tuple[int, int, int, int]
) -> Image.Image:
    small = Image.new("L", (columns, rows))
    small.putdata([round(255 * value) for value in values])
    return small.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST)
