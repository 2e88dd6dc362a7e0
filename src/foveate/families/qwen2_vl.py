"""Qwen2-VL and Qwen2.5-VL; the tower of the latter reads its patches window by window."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from foveate.families.mrope import Mrope


class Qwen2VL(Mrope):
    """``qwen2_vl``: four patches make a token; frames of a video follow each other without text between."""

    name: ClassVar[str] = "qwen2_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)


class Qwen25VL(Mrope):
    """``qwen2_5_vl``: inside the tower units stand in windows; the tower puts back only what it hands out."""

    name: ClassVar[str] = "qwen2_5_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    def encoder_rows(self, model: nn.Module, modality: str, grids: Int[Tensor, "k 3"]) -> Int[Tensor, " p"]:
        tower: Any = self.tower(model, modality)
        windows, _ = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        patches = super().encoder_rows(model, modality, grids)
        shuffled = tower.permute_input_for_window_attn(patches[:, None], windows.cpu(), len(patches))
        return torch.argsort(shuffled[:, 0])
