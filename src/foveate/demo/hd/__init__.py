"""Demo-hd: a small trained LLaVA-NeXT for large pictures and pairs of pictures, its world, its training."""

from __future__ import annotations

__all__ = ["EXAMPLES"]

EXAMPLES: tuple[tuple[int, str, str], ...] = (
    (20_000_320, "which word is on the purple sign?", "tea"),
    (20_000_302, "what shape is faint?", "moon"),
    (20_000_304, "which picture has the word king?", "second"),
    (20_000_301, "what shape is only in the second picture?", "moon"),
)
"""Scenes of the world by their seeds, each with a question and its true answer."""
