"""Pictures of a request: got as bytes, judged by their headers, and decoded only when the model is ready for them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from foveate.serve.fetch import fetch
from foveate.serve.limits import MIB, Limits
from foveate.serve.refusals import Refused

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_WHOLE = f"send a complete picture: {', '.join(FORMATS)}"


async def gather(urls: Sequence[str], limits: Limits) -> list[bytes]:
    """Return the files of a request's pictures, none of them decoded.

    Raises:
        Refused: If one cannot be had, is no picture, or all together are too much.
    """
    if len(urls) > limits.pictures:
        raise Refused(
            f"{len(urls)} pictures in one request, at most {limits.pictures} are read",
            "ask about fewer at once",
            code="too_many_pictures",
            param="messages",
        )
    files, room, pixels = [], limits.max_body, 0
    try:
        async with asyncio.timeout(limits.fetch_seconds):
            for url in urls:
                if url[:5].lower() == "data:":
                    file = from_data_url(url)
                else:
                    file = await fetch(url, limits, room)
                    room -= len(file)
                files.append(file)
                pixels += count_pixels(file, limits)
    except TimeoutError as error:
        raise Refused(
            f"the pictures did not arrive within {limits.fetch_seconds:g} seconds",
            "send them as data URLs: data:image/png;base64,...",
            code="timeout",
            param="messages",
        ) from error
    if pixels > limits.max_image_pixels:
        raise _too_many(pixels, limits)
    return files


def from_data_url(url: str) -> bytes:
    """Return the bytes of ``data:image/png;base64,...``.

    Raises:
        Refused: If it is no such URL.
    """
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _broken("a picture's data URL is not in base64", "write data:image/png;base64,iVBOR...")
    try:
        return base64.b64decode(data.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _broken(f"a picture's base64 is broken: {error}", "encode the whole file anew") from error


def count_pixels(file: bytes, limits: Limits) -> int:
    """Return the pixels that the header of a picture promises, and refuse too many before any is decoded."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as picture:
            width, height = picture.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many(None, limits) from error
    except Exception as error:  # Pillow raises whatever it meets in a broken file
        raise _broken("a picture cannot be read: its header is broken, or of another format", _WHOLE) from error
    if width * height > limits.max_image_pixels:
        raise _too_many(width * height, limits)
    return width * height


def decode(file: bytes) -> Image.Image:
    """Return a picture in RGB, upright.

    Raises:
        Refused: If the file is broken.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # as above
        raise _broken("a picture cannot be read to its end", _WHOLE) from error


def _broken(message: str, hint: str) -> Refused:
    return Refused(message, hint, code="invalid_image", param="messages")


def _too_many(pixels: int | None, limits: Limits) -> Refused:
    counted = "" if pixels is None else f", {pixels:,} pixels in all"
    return Refused(
        f"the pictures of the request are too large{counted}",
        f"make them smaller: at most {limits.max_image_pixels:,} pixels and {limits.max_body / MIB:g} MiB together",
        status=413,
        code="too_large",
        param="messages",
    )
