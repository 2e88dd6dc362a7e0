"""The video model: a small trained vision-language model for clips, its world, its training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["CLIP", "QUESTIONS", "frames"]

CLIP = Path(__file__).parents[1] / "clip"
"""A folder with the eight frames of a bundled clip of the model's world: clip 20005301."""
QUESTIONS: tuple[tuple[str, str], ...] = (
    ("what shape appears?", "triangle"),
    ("which way does the moon move?", "down"),
    ("what colour is the ring at the start?", "purple"),
)
"""Three questions about `CLIP`, each with its true answer."""


def frames() -> list[Image.Image]:
    """The frames of `CLIP`, in their order."""
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in sorted(CLIP.glob("*.jpg"))]
