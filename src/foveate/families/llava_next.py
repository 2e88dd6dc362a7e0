"""LLaVA-NeXT (LLaVA-1.6): LLaVA at any resolution."""

from __future__ import annotations

from typing import ClassVar

from foveate.families.anyres import AnyRes


class LlavaNext(AnyRes):
    """``llava_next``: the whole picture, then its tiles; one token per patch, and a newline after each row."""

    name: ClassVar[str] = "llava_next"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
