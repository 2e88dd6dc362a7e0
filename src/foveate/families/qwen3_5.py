"""Qwen3.5: recurrent layers between those with attention."""

from __future__ import annotations

from typing import ClassVar

from foveate.families.mrope import Mrope


class Qwen35(Mrope):
    """``qwen3_5``, ``qwen3_5_moe``: pictures as in Qwen3-VL, without deepstack; the LLM's layers need no more."""

    name: ClassVar[str] = "qwen3_5"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5", "qwen3_5_moe")
