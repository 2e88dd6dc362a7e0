"""What the tasks of this folder read of a row of world.parquet: a picture as bytes, a question, its answer."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(doc["picture"])).convert("RGB")]


def text(doc: dict[str, Any]) -> str:
    return str(doc["question"])


def pair(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The picture, and a grey one after the question."""
    (picture,) = visual(doc)
    first, second = ({"type": "image", "url": one} for one in (picture, Image.new("RGB", picture.size, "grey")))
    return [{"role": "user", "content": [first, {"type": "text", "text": text(doc)}, second]}]


def results(doc: dict[str, Any], given: list[str]) -> dict[str, float]:
    return {"right": float(given[0].strip().lower() == doc["answer"])}
