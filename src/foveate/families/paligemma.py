"""PaliGemma: SigLIP without CLS, a linear projector, a prompt that sees itself in both directions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.families.base import Family


class PaliGemma(Family):
    """``paligemma``: every image is one encoder forward and one token per patch; positions count from 1."""

    name: ClassVar[str] = "paligemma"
    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    causal: ClassVar[bool] = False
    first_position: ClassVar[int] = 1
    answer_type: ClassVar[int] = 1

    def provides(self, model: Any) -> frozenset[str]:
        capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
        return super().provides(model) - ({"relevance", "text_mass"} if capped else set())

    def token_types(self, model: Any, ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": torch.zeros_like(ids)}
