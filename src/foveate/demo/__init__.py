"""The embedded demo models: small trained vision-language models, their worlds of pictures and questions, training.

`load` brings three of them: ``demo`` reads a picture, and lies in this package; ``demo-hd`` reads large pictures in
tiles, one or two of them, ``demo-video`` reads clips; both lie in the package ``foveate-demo-models``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import MissingDependency, UnsupportedModel, did_you_mean

if TYPE_CHECKING:
    import torch

__all__ = ["MODEL", "MODELS", "PICTURE", "QUESTIONS", "folder", "load", "load_processor"]

MODEL = Path(__file__).parent / "model"
"""Folder of the model ``demo``, its tokenizer and its processor."""
MODELS = ("demo", "demo-hd", "demo-video")
"""Names that `load` knows."""
PICTURE = Path(__file__).parent / "picture.png"
"""A bundled picture of the demo world: scene 20001112."""
QUESTIONS: tuple[tuple[str, str], ...] = (
    ("what colour is the circle?", "purple"),
    ("what word is written?", "dog"),
    ("is there a white heart?", "yes"),
)
"""Three questions about `PICTURE`, each with its true answer."""

_PACKAGE = "foveate_demo_models"
_CHECKOUT = Path(__file__).parents[3] / "demo-models" / "src" / _PACKAGE
"""Where the package lies beside this one in a source checkout."""


def folder(name: str = "demo") -> Path:
    """Return the folder of a demo model, its tokenizer and its processor.

    Args:
        name: One of `MODELS`.

    Raises:
        UnsupportedModel: If there is no such model.
        MissingDependency: If its weights are not installed.
    """
    if name not in MODELS:
        raise UnsupportedModel(f"no such demo model: {name!r}", did_you_mean(name, MODELS))
    if name == "demo":
        return MODEL
    found = find_spec(_PACKAGE)
    for package in [*(found.submodule_search_locations or () if found else ()), _CHECKOUT]:
        place = Path(package, name.removeprefix("demo-"))
        if (place / "config.json").is_file():
            return place
    raise MissingDependency(
        f"the weights of {name} are in a package of their own, foveate-demo-models",
        "in a checkout of foveate: pip install ./demo-models",
    )


def load(
    name: str = "demo", device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """Loads a demo model, without a network.

    Args:
        name: One of `MODELS`.
        device: Where the weights go; the CPU unless told.
        dtype: Type of the weights; float32 unless told.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        UnsupportedModel: If there is no such model.
        MissingDependency: If its weights are not installed.
    """
    place = folder(name)
    import torch
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype or torch.float32, local_files_only=True)
    return model.to(device or "cpu").eval(), load_processor(name)


def load_processor(name: str = "demo") -> Any:
    """Loads a demo model's processor alone.

    Args:
        name: One of `MODELS`.

    Raises:
        UnsupportedModel: If there is no such model.
        MissingDependency: If its weights are not installed.
    """
    place = folder(name)
    if name == "demo-video":  # a clip needs no torchvision there, as it does with the stock processor
        from foveate.demo.video.processor import load as read

        return read(place)
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(place, local_files_only=True)
