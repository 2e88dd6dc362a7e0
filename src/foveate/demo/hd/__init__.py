"""Demo-hd: a small trained LLaVA-NeXT for large pictures and pairs of pictures, its world, its training."""

from __future__ import annotations

__all__ = ["EXAMPLES"]

EXAMPLES: tuple[tuple[int, str, str], ...] = ()
"""Scenes of the world by their seeds, each with a question and its true answer."""
