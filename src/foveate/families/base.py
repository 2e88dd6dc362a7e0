"""What a family is, and the generic path that most families share.

A family knows where the parts of a model are and how encoder rows map to the tokens the LLM sees. It knows no method.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.core import DECODER_EVIDENCE, ENCODER_EVIDENCE
from foveate.errors import UnsupportedModel

#: Vision towers whose encoder evidence is understood, and whether their first row is a CLS token.
TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}

LAYER_ARGUMENTS = frozenset(
    {"hidden_states", "attention_mask", "position_embeddings", "position_ids", "past_key_values", "use_cache", "kwargs"}
)


class Family:
    """One model family. Subclasses set `model_types` and override what differs.

    Class attributes:
        name: The word in tables.
        model_types: Values of ``config.model_type`` it serves.
        modalities: What it compresses.
        positions: Position policies that are legal; the first is the default where a method has no opinion.
        media_arguments: Names under which pixels are passed.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    positions: ClassVar[tuple[str, ...]] = ("original", "packed")
    media_arguments: ClassVar[Mapping[str, str]] = {"image": "pixel_values"}

    # -- where the parts are

    def base(self, model: nn.Module) -> nn.Module:
        """The model without its head: it merges the features into the prompt."""
        base = model.base_model
        assert isinstance(base, nn.Module)
        return base

    def decoder(self, model: nn.Module) -> nn.Module:
        """The language model."""
        decoder = self.base(model).language_model
        assert isinstance(decoder, nn.Module)
        return decoder

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers."""
        layers = self.decoder(model).layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision encoder."""
        tower = self.base(model).vision_tower
        assert isinstance(tower, nn.Module)
        return tower

    def encoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The layers of the vision encoder."""
        tower: Any = self.tower(model)
        layers = getattr(tower, "vision_model", tower).encoder.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def feature_layer(self, model: Any) -> int:
        """Index of the encoder layer whose output the LLM reads."""
        depth = len(self.encoder_layers(model))
        selected = model.config.vision_feature_layer
        hidden_state = max(s % (depth + 1) for s in (selected if isinstance(selected, list | tuple) else [selected]))
        return int(hidden_state) - 1

    # -- what it can tell

    def tower_type(self, model: Any) -> str:
        return str(model.config.vision_config.model_type)

    def has_cls(self, model: Any) -> bool:
        """Whether row 0 of the encoder is a CLS token."""
        return TOWERS[self.tower_type(model)]

    def provides(self, model: Any) -> frozenset[str]:
        """The evidence this model can give."""
        always = frozenset({"coordinates", "text", "seed"}) | DECODER_EVIDENCE
        return always | ENCODER_EVIDENCE if self.tower_type(model) in TOWERS else always

    def check(self, model: Any) -> None:
        """Refuse a model of the right type that this family cannot serve.

        Raises:
            UnsupportedModel: With the reason.
        """

    def check_layers(self, model: Any) -> None:
        """Refuse a decoder in which tokens cannot leave between layers.

        Raises:
            UnsupportedModel: With the reason.
        """
        text = model.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        if kinds != {"full_attention"} or window is not None:
            raise UnsupportedModel(
                f"tokens can leave inside the LLM only between full-attention layers, {text.model_type} has "
                f"{', '.join(sorted(kinds | ({'sliding_attention'} if window else set())))}",
                "use a method that selects before the LLM: evocut, adav, todre:keep=0.1,exit=none",
            )
        layer = type(self.layers(model)[0])
        unknown = set(inspect.signature(layer.forward).parameters) - LAYER_ARGUMENTS - {"self"}
        if unknown:
            raise UnsupportedModel(
                f"{layer.__name__} takes {', '.join(sorted(unknown))}, which may be one row per token"
            )

    # -- from pixels to tokens

    def token_id(self, model: Any, modality: str) -> int:
        """The placeholder of a modality in the prompt."""
        return int(getattr(model.config, f"{modality}_token_id"))

    def encode(self, model: nn.Module, modality: str, arguments: Mapping[str, Any]) -> tuple[Any, set[str]]:
        """Run the encoder as ``generate`` does; return its output and the names of the arguments it took."""
        function = getattr(self.base(model), f"get_{modality}_features")
        taken = {name: arguments[name] for name in inspect.signature(function).parameters if name in arguments}
        return function(**taken, return_dict=True), set(taken)

    def features(self, output: Any) -> list[Tensor]:
        """What the LLM reads: one [n, d] tensor per image."""
        return list(output.pooler_output)

    def with_features(self, output: Any, features: Sequence[Tensor]) -> Any:
        """Return a fresh output that carries ``features``; generation changes the object it is given."""
        return type(output)(pooler_output=list(features))

    def rows(self, model: nn.Module, states: Tensor) -> Tensor:
        """Encoder states [forwards, rows, ...] without the rows that are no patch."""
        return states[:, 1:] if self.has_cls(model) else states

    def tokens(self, model: nn.Module, values: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """Per-patch values [forwards, patches, ...] as one [n, ...] tensor per image."""
        return list(values)

    def grid(
        self, model: nn.Module, features: Tensor, index: int, arguments: Mapping[str, Any]
    ) -> tuple[int, int, int]:
        """Frames, rows, columns of image ``index``."""
        side = round(len(features) ** 0.5)
        if side * side != len(features):
            raise UnsupportedModel(f"{len(features)} tokens of an image form no square grid")
        return (1, side, side)

    def coordinates(self, grid: tuple[int, int, int], features: Tensor) -> Tensor:
        """Where each token sits in the grid: [n, 3] frame, row, column."""
        axes = [torch.arange(size, device=features.device) for size in grid]
        return torch.cartesian_prod(*axes)

    def crops(self, grid: tuple[int, int, int]) -> tuple[int, ...]:
        """Tokens per encoder forward of one image."""
        return (grid[1] * grid[2],) * grid[0]
