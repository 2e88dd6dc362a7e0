"""Drawings as SVG: cells and lines are shapes, text is text, photos lie inside the file."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
from collections.abc import Iterator

from PIL import Image

from foveate.draw.scene import PAPER, SHADE, SHADED, Cells, Colour, Group, Photo, Rects, Scene, Text, edges

#: From this many pixels on photos are stored as JPEG.
_LARGE = 600 * 600
_GREY = (0.299, 0.587, 0.114)  # as Pillow weighs them
_ENDS = {"l": "start", "m": "middle", "r": "end"}
_DROPS = {"a": 0.95, "m": 0.35, "d": -0.2}  # from the anchor down to the baseline, in sizes of the font


def render(scene: Scene) -> str:
    """Return the drawing as the text of an SVG file."""
    body = "\n".join(_items(scene, {}, itertools.count()))
    size = f'width="{scene.width}" height="{scene.height}" viewBox="0 0 {scene.width} {scene.height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, Helvetica, Arial, sans-serif">\n'
        f"<defs>{_filter('grey', 1.0)}{_filter('dim', 1.0 - SHADED)}</defs>\n"
        f'<rect width="100%" height="100%" fill="{_hex(PAPER)}"/>\n{body}\n</svg>\n'
    )


def data_uri(picture: Image.Image) -> str:
    """Return a picture as a ``data:`` address: PNG, or JPEG where it is large."""
    file = io.BytesIO()
    kind = "jpeg" if picture.width * picture.height > _LARGE else "png"
    picture.save(file, kind, **({"quality": 90} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _items(scene: Scene, stored: dict[bytes, str], numbers: Iterator[int]) -> Iterator[str]:
    """The elements of a drawing; ``stored`` names the pictures that are in the file already."""
    for item in scene.items:
        match item:
            case Photo():
                yield _photo(item, stored, numbers)
            case Cells():
                for colour in dict.fromkeys(item.colours):
                    if colour is not None:
                        at = [cell for cell, mine in enumerate(item.colours) if mine == colour]
                        path = _cell_path(item.box, item.rows, item.columns, at)
                        yield f'<path d="{path}" fill="{_hex(colour)}" fill-opacity="{item.opacity:g}"/>'
            case Rects():
                yield f'<path d="{_path(item.rects)}" fill="{_hex(item.colour)}"/>'
            case Text():
                across, down = item.anchor
                y = item.y + _DROPS[down] * item.size
                place = f'x="{item.x:g}" y="{y:g}" font-size="{item.size}" text-anchor="{_ENDS[across]}"'
                yield f'<text {place} fill="{_hex(item.colour)}">{html.escape(item.text, quote=False)}</text>'
            case Group():
                inner = "\n".join(_items(item.scene, stored, numbers))
                width, height = item.scene.width, item.scene.height
                place = f'x="{item.x}" y="{item.y}" width="{width * item.scale:g}" height="{height * item.scale:g}"'
                yield f'<svg {place} viewBox="0 0 {width} {height}">\n{inner}\n</svg>'


def _photo(photo: Photo, stored: dict[bytes, str], numbers: Iterator[int]) -> str:
    tone = "" if photo.tone == "plain" else f' filter="url(#{photo.tone})"'
    mask = ""
    before = ""
    if photo.light:
        name = f"m{next(numbers)}"
        mask = f' mask="url(#{name})"'
        cells = {
            share: [i for i, mine in enumerate(photo.light) if mine == share] for share in sorted(set(photo.light))
        }
        paths = [
            f'<path d="{_cell_path(photo.box, photo.rows, photo.columns, at)}" fill="#fff" fill-opacity="{share:g}"/>'
            for share, at in cells.items()
            if share > 0
        ]
        extent = f'width="{photo.picture.width}" height="{photo.picture.height}"'
        before = f'<mask id="{name}" maskUnits="userSpaceOnUse" x="0" y="0" {extent}>{"".join(paths)}</mask>\n'
    key = hashlib.sha256(photo.picture.tobytes()).digest()
    if key in stored:
        return f'{before}<g{mask}><use href="#{stored[key]}"{tone}/></g>'
    stored[key] = f"p{next(numbers)}"
    size = f'width="{photo.picture.width}" height="{photo.picture.height}"'
    image = f'<image id="{stored[key]}" {size} href="{data_uri(photo.picture)}"/>'
    return f'{before}<defs>{image}</defs><g{mask}><use href="#{stored[key]}"{tone}/></g>'


def _filter(name: str, light: float) -> str:
    """A filter that makes grey, and mixes in the shade where ``light`` is below 1."""
    rows = [
        " ".join(f"{light * weight:.4g}" for weight in _GREY) + f" 0 {(1 - light) * shade / 255:.4g}" for shade in SHADE
    ]
    matrix = f'<feColorMatrix values="{"  ".join(rows)}  0 0 0 1 0"/>'
    return f'<filter id="{name}" x="0" y="0" width="1" height="1" color-interpolation-filters="sRGB">{matrix}</filter>'


def _cell_path(box: tuple[int, int, int, int], rows: int, columns: int, cells: list[int]) -> str:
    """The path of cells, neighbours in a row as one rectangle."""
    xs, ys = edges(box[0], box[2], columns), edges(box[1], box[3], rows)
    rects: list[tuple[float, float, float, float]] = []
    before = None
    for cell in cells:
        row, column = divmod(cell, columns)
        if before is not None and cell == before + 1 and column:
            rects[-1] = (rects[-1][0], ys[row], xs[column + 1], ys[row + 1])
        else:
            rects.append((xs[column], ys[row], xs[column + 1], ys[row + 1]))
        before = cell
    return _path(tuple(rects))


def _path(rects: tuple[tuple[float, float, float, float], ...]) -> str:
    return "".join(f"M{left:g} {top:g}H{right:g}V{bottom:g}H{left:g}z" for left, top, right, bottom in rects)


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
