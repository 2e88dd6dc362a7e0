"""Gemma 3: SigLIP without CLS, cells of patches averaged to tokens, images that see themselves in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.families.base import Family
from foveate.families.picture import Picture
from foveate.families.pool import under_average


class Gemma3(Family):
    """``gemma3``: every image (and every crop of pan and scan) is one encoder forward with a budget of its own."""

    name: ClassVar[str] = "gemma3"
    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)
    causal: ClassVar[bool] = False

    def pictures(self, model: nn.Module, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        projector: Any = self.base(model).multi_modal_projector
        side, k = projector.patches_per_image, projector.kernel_size

        def pool(states: Tensor) -> Tensor:
            pooled: Tensor = projector.avg_pool(states.T.reshape(1, -1, side, side))
            return pooled[0].flatten(1).T

        place = torch.arange(side)
        under = under_average(pool, torch.cartesian_prod(place, place), k)
        tokens = (1, side // k, side // k)
        return [
            Picture(rows=rows, grid=tokens, patches=under + number * side**2)
            for number, rows in enumerate(output.pooler_output)
        ]

    def token_types(self, model: Any, ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": self.placeholders(model, "image", ids, {}).long()}
