"""Demo-hd: a small trained LLaVA-NeXT for large pictures and pairs of pictures, its world, its training."""

from __future__ import annotations

from pathlib import Path

__all__ = ["EXAMPLES", "PICTURES"]

PICTURES = Path(__file__).parents[1] / "pictures"
"""A folder with a large picture and a pair: the first and the last of `EXAMPLES` as JPEG."""

EXAMPLES: tuple[tuple[int, str, str], ...] = (
    (20_000_320, "which word is on the purple sign?", "tea"),
    (20_000_302, "what shape is faint?", "moon"),
    (20_000_304, "which picture has the word king?", "second"),
    (20_000_301, "what shape is only in the second picture?", "moon"),
)
"""Scenes of the world by their seeds, each with a question and its true answer."""
