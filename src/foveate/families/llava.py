"""LLaVA-1.5: CLIP (with CLS) or SigLIP (without), a row-wise MLP projector, one square grid per image."""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.errors import UnsupportedModel
from foveate.families.base import TOWERS, Family


class Llava(Family):
    """``llava``: every image is one encoder forward and one token per patch."""

    name: ClassVar[str] = "llava"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    def check(self, model: Any) -> None:
        tower, strategy = self.tower_type(model), model.config.vision_feature_select_strategy
        if tower not in TOWERS:
            raise UnsupportedModel(
                f"{self.name} with a {tower} tower is not served; towers served: {', '.join(sorted(TOWERS))}",
                "open an issue with the name of the checkpoint",
            )
        if (strategy == "default") != TOWERS[tower]:
            wanted = "default" if TOWERS[tower] else "full"
            raise UnsupportedModel(
                f"vision_feature_select_strategy={strategy!r} on a {tower} tower "
                f"{'makes the CLS token a visual token' if TOWERS[tower] else 'loses the first patch'}",
                f'set `model.config.vision_feature_select_strategy = "{wanted}"` if that is how it was trained',
            )
