"""Qwen3-VL: features of several tower blocks enter the first decoder layers (deepstack)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from foveate.families.mrope import Mrope
from foveate.families.picture import Picture


class Qwen3VL(Mrope):
    """``qwen3_vl``, ``qwen3_vl_moe``: tokens bring features for the first layers along; timestamps part the frames."""

    name: ClassVar[str] = "qwen3_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_moe")

    def first_site(self, model: Any) -> int:
        return max(super().first_site(model), len(model.config.vision_config.deepstack_visual_indexes))

    def pictures(self, model: Any, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        pictures = super().pictures(model, modality, output, arguments)
        each = zip(*output.deepstack_features, strict=True) if output.deepstack_features else [()] * len(pictures)
        return [replace(picture, levels=tuple(levels)) for picture, levels in zip(pictures, each, strict=True)]

    def with_rows(self, output: Any, rows: Sequence[Tensor], levels: Sequence[Sequence[Tensor]]) -> Any:
        features = [list(level) for level in zip(*levels, strict=True)]
        return type(output)(pooler_output=list(rows), deepstack_features=features)
