"""The embedded demo model: a small trained vision-language model, its world of pictures and questions, its training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["MODEL", "PICTURE", "QUESTIONS", "load"]

MODEL = Path(__file__).parent / "model"
"""Folder of the trained model, its tokenizer and its processor."""
PICTURE = Path(__file__).parent / "picture.png"
"""A bundled picture of the demo world: scene 20001112."""
QUESTIONS: tuple[tuple[str, str], ...] = (
    ("what colour is the circle?", "purple"),
    ("what word is written?", "dog"),
    ("is there a white heart?", "yes"),
)
"""Three questions about `PICTURE`, each with its true answer."""


def load(
    device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Loads the demo model from the package, without a network.

    Args:
        device: Where the weights go; the CPU unless told.
        dtype: Type of the weights; float32 unless told.

    Returns:
        The model in evaluation mode, and its processor.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=dtype or torch.float32, local_files_only=True)
    processor = AutoProcessor.from_pretrained(MODEL, local_files_only=True)
    return model.to(device or "cpu").eval(), processor
