"""ViP-LLaVA: LLaVA whose projector reads several encoder layers side by side."""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.families.llava import Llava


class VipLlava(Llava):
    """``vipllava``: one token per patch of CLIP; saliency and keys are read in the deepest of its feature layers."""

    name: ClassVar[str] = "vipllava"
    model_types: ClassVar[tuple[str, ...]] = ("vipllava",)
    towers: ClassVar[tuple[str, ...]] = ("clip_vision_model",)  # it always cuts off the first row

    def feature_layer(self, model: Any) -> int:
        selected = model.config.vision_feature_layers  # the name in every release; the other one came later
        states = [selected] if isinstance(selected, int) else selected
        depth = len(self.encoder_layers(model, "image"))
        return max(state % (depth + 1) for state in states) - 1
