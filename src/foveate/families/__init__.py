"""Model families: one file each, found by ``config.model_type``."""

from __future__ import annotations

from typing import Any

from foveate.errors import UnsupportedModel, did_you_mean
from foveate.families.base import Family
from foveate.families.llava import Llava
from foveate.families.picture import Picture

FAMILIES: tuple[Family, ...] = (Llava(),)

__all__ = ["FAMILIES", "Family", "Llava", "Picture", "family_of"]


def family_of(model: Any) -> Family:
    """Return the family that serves a model.

    Raises:
        UnsupportedModel: If none does; names the families that exist.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        raise UnsupportedModel(
            f"expected a transformers model with a config, got {type(model).__name__}",
            "load it with `AutoModelForImageTextToText.from_pretrained(...)`",
        )
    known = {model_type: family for family in FAMILIES for model_type in family.model_types}
    if kind not in known:
        raise UnsupportedModel(f"no family serves model_type {kind!r}", did_you_mean(kind, known))
    if not hasattr(model, "generate"):
        raise UnsupportedModel(
            f"{type(model).__name__} has no language-model head", "pass the ...ForConditionalGeneration model"
        )
    known[kind].check(model)
    return known[kind]
