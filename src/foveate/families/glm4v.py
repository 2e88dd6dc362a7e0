"""GLM-4.1V and GLM-4.6V: frames of a video are marked by timestamps and filled with the placeholder of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.errors import UnsupportedCall
from foveate.families.mrope import Mrope


class Glm4v(Mrope):
    """``glm4v``, ``glm46v``: a convolution merges four patches; one placeholder serves images and videos."""

    name: ClassVar[str] = "glm4v"
    model_types: ClassVar[tuple[str, ...]] = ("glm4v", "glm46v")

    def token_id(self, model: Any, modality: str) -> int:
        return int(model.config.image_token_id)

    def encode(self, model: nn.Module, modality: str, arguments: Mapping[str, Any]) -> tuple[Any, set[str]]:
        """Run the encoder.

        Raises:
            UnsupportedCall: If images and videos come together; the model itself counts them as one.
        """
        if all(arguments.get(name) is not None for name in self.media_arguments.values()):
            raise UnsupportedCall(
                f"{self.name} reads images or videos in one call, not both: they share a placeholder",
                "pass the images and the videos in calls of their own",
            )
        return super().encode(model, modality, arguments)

    def placeholders(self, model: Any, modality: str, ids: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        found, types = super().placeholders(model, modality, ids, arguments), arguments.get("mm_token_type_ids")
        return found if types is None else found & (types == 1 + self.modalities.index(modality))
