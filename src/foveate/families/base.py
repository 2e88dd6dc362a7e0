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
from foveate.families.picture import Picture
from foveate.families.releases import older_than

#: Vision towers whose encoder evidence is understood, and whether their first row is a CLS token.
TOWERS = {
    "clip_vision_model": True,
    "gemma4_vision": False,
    "idefics3_vision": False,
    "internvl_vision": True,
    "pixtral": False,
    "siglip_vision_model": False,
    "smolvlm_vision": False,
}

#: What a decoder layer may take besides the hidden states; anything else could be one row per token.
LAYER_ARGUMENTS = frozenset(
    {"hidden_states", "attention_mask", "position_embeddings", "position_ids", "past_key_values", "use_cache", "kwargs"}
)

#: Names under which pixels are passed.
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}

LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "linear_attention"})

#: What to do where tokens cannot leave inside the LLM.
BEFORE_THE_LLM = "use a method that selects before the LLM: evocut, adav, todre:keep=0.1,exit=none"


class Family:
    """One model family. Subclasses set `model_types` and override what differs.

    Class attributes:
        name: The word in tables.
        model_types: Values of ``config.model_type`` it serves.
        modalities: What it compresses.
        positions: Position policies that are legal; the first is the default where a method has no opinion.
        since: The first transformers whose own model reads a modality, where the oldest that is served does not.
        decoder_path: Where the language model is in the base model.
        tower_path: Where the vision encoder is in the base model.
        encoder_path: Where the layers are in the vision encoder.
        attention_path: Where attention is in an encoder layer.
        cls: Whether row 0 of the encoder is a CLS token, where the family has one kind of tower; None: `TOWERS` tells.
        former_names: Older names of arguments, with those of today.
        row_arguments: Arguments of a decoder layer with one row per token, which leave with the tokens.
        other_arguments: Those that this family's layers take besides, and that say nothing of single tokens.
        first_position: What ``generate`` adds to its positions, which count from 0, before it calls ``forward``.
        answer_type: What token types call the tokens of an answer.
        causal: Whether nothing in a prompt sees what comes after it; else an image, or all of it, may.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    positions: ClassVar[tuple[str, ...]] = ("original", "packed")
    since: ClassVar[Mapping[str, str]] = {}
    decoder_path: ClassVar[str] = "language_model"
    tower_path: ClassVar[str] = "vision_tower"
    encoder_path: ClassVar[str] = "encoder.layers"
    attention_path: ClassVar[str] = "self_attn"
    cls: ClassVar[bool | None] = None
    former_names: ClassVar[Mapping[str, str]] = {}
    row_arguments: ClassVar[frozenset[str]] = frozenset()
    other_arguments: ClassVar[frozenset[str]] = frozenset()
    first_position: ClassVar[int] = 0
    answer_type: ClassVar[int] = 0
    causal: ClassVar[bool] = True

    @property
    def media_arguments(self) -> dict[str, str]:
        """Names under which pixels are passed, by modality."""
        return {modality: PIXELS[modality] for modality in self.modalities}

    def variant(self, model: Any) -> Family:
        """The family that serves a model of these types: this one, unless its encoder is another one's."""
        return self

    def lacks(self, modality: str) -> str | None:
        """The transformers that a modality needs, if an older one is installed."""
        wanted = self.since.get(modality)
        return wanted if wanted is not None and older_than(wanted) else None

    # -- where the parts are

    def base(self, model: nn.Module) -> nn.Module:
        """The model without its head: it merges the features into the prompt."""
        base = model.base_model
        assert isinstance(base, nn.Module)
        return base

    def decoder(self, model: nn.Module) -> nn.Module:
        """The language model."""
        return self.base(model).get_submodule(self.decoder_path)

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers."""
        layers = self.decoder(model).layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def reading_layers(self, model: Any) -> int:
        """In how many decoder layers visual tokens have keys and values."""
        return len(self.layers(model))

    def first_site(self, model: Any) -> int:
        """The first decoder layer before which tokens may leave inside the LLM.

        A cache counts its tokens in the first layer that holds keys, which has to see them all.
        """
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
        return 1 + next((i for i, kind in enumerate(kinds) if kind != "linear_attention"), 0)

    def tower(self, model: nn.Module, modality: str) -> nn.Module:
        """The vision encoder."""
        return self.base(model).get_submodule(self.tower_path)

    def encoder_layers(self, model: nn.Module, modality: str) -> nn.ModuleList:
        """The layers of the vision encoder."""
        tower: Any = self.tower(model, modality)
        layers = getattr(tower, "vision_model", tower).get_submodule(self.encoder_path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def encoder_attention(self, layer: nn.Module) -> nn.Module:
        """The attention module of an encoder layer."""
        return layer.get_submodule(self.attention_path)

    def feature_layer(self, model: Any) -> int:
        """Index of the encoder layer whose output the LLM reads."""
        depth = len(self.encoder_layers(model, self.modalities[0]))
        selected = getattr(model.config, "vision_feature_layer", -1)
        hidden_state = max(s % (depth + 1) for s in (selected if isinstance(selected, list | tuple) else [selected]))
        return int(hidden_state) - 1

    # -- what it can tell

    def tower_type(self, model: Any) -> str:
        return str(model.config.vision_config.model_type)

    def has_cls(self, model: Any) -> bool:
        """Whether row 0 of the encoder is a CLS token."""
        return TOWERS[self.tower_type(model)] if self.cls is None else self.cls

    def stretches(self, model: Any) -> int:
        """In how many equal stretches an encoder forward falls, each of which begins with a CLS token of its own."""
        return 1

    def provides(self, model: Any) -> frozenset[str]:
        """The evidence this model can give."""
        always = frozenset({"coordinates", "text", "seed"}) | DECODER_EVIDENCE
        understood = self.cls is not None or self.tower_type(model) in TOWERS
        return always | ENCODER_EVIDENCE if understood else always

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
        strange = set(getattr(text, "layer_types", None) or []) - LAYER_TYPES
        if strange:
            raise UnsupportedModel(
                f"tokens cannot leave between layers of type {', '.join(sorted(strange))} in {text.model_type}",
                BEFORE_THE_LLM,
            )
        if not self.causal and text._attn_implementation == "flex_attention":
            raise UnsupportedModel(
                f"flex attention hides from view what each token of {self.name} sees",
                'load the model with attn_implementation="sdpa"',
            )
        layer = type(self.layers(model)[0])
        known = LAYER_ARGUMENTS | self.row_arguments | self.other_arguments | {"self"}
        unknown = set(inspect.signature(layer.forward).parameters) - known
        if unknown:
            raise UnsupportedModel(
                f"{layer.__name__} takes {', '.join(sorted(unknown))}, which may be one row per token",
                BEFORE_THE_LLM,
            )

    # -- from pixels to tokens

    def token_id(self, model: Any, modality: str) -> int:
        """The placeholder of a modality in the prompt."""
        return int(getattr(model.config, f"{modality}_token_id"))

    def placeholders(self, model: Any, modality: str, ids: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Which tokens of the prompts are placeholders of a modality that this call passes: [b, s], bool."""
        return ids == self.token_id(model, modality)

    def encode(self, model: nn.Module, modality: str, arguments: Mapping[str, Any]) -> tuple[Any, set[str]]:
        """Run the encoder as ``generate`` does; return its output and the names of the arguments it took."""
        function = getattr(self.base(model), f"get_{modality}_features")
        taken = {name: arguments[name] for name in inspect.signature(function).parameters if name in arguments}
        return function(**taken, return_dict=True), set(taken)

    def patches(self, model: nn.Module, states: Tensor) -> Tensor:
        """Encoder states without CLS: [forwards, patches, ...], or [patches, ...] where forwards are packed."""
        return states[:, 1:] if self.has_cls(model) else states

    def real(self, model: nn.Module, modality: str, arguments: Mapping[str, Any]) -> Tensor | None:
        """Which rows of each forward are patches, [forwards, rows]; the others fill it up. None: all are."""
        return None

    def segments(self, model: nn.Module, modality: str, arguments: Mapping[str, Any], states: Tensor) -> list[int]:
        """Sizes of the forwards (image, crop, frame) that are packed into one: patches that see each other."""
        real = self.real(model, modality, arguments)
        return [len(states)] if real is None else [int(n) for n in real.sum(1)]

    def pictures(self, model: nn.Module, modality: str, output: Any, arguments: Mapping[str, Any]) -> list[Picture]:
        """What the LLM reads of each image (or video), in the order of the prompts' placeholders."""
        pictures, start = [], 0
        for rows in output.pooler_output:
            grid = square(len(rows))
            pictures.append(Picture(rows=rows, grid=grid, patches=start + torch.arange(len(rows))[:, None]))
            start += len(rows)
        return pictures

    def with_rows(self, output: Any, rows: Sequence[Tensor], levels: Sequence[Sequence[Tensor]]) -> Any:
        """Return a fresh output that carries other rows; generation changes the object it is given.

        Where the model expects one tensor, all rows go into it as if they were one picture's.

        Args:
            output: What the encoder gave.
            rows: What the LLM reads of each picture, [n, d].
            levels: For each picture the rows of `Picture.levels`.
        """
        joined = isinstance(output.pooler_output, Tensor)
        return type(output)(pooler_output=torch.cat(list(rows))[None] if joined else list(rows))

    # -- what `verify` tries

    def example(self, model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
        """Random pictures as the processor would pass them, and what stands for each in the prompt."""
        size = model.config.vision_config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.randn(images, 3, height, width, generator=generator).to(model.device, model.dtype)
        media = {self.media_arguments["image"]: pixels}
        output, _ = self.encode(model, "image", media)
        pictures = self.pictures(model, "image", output, media)
        return media, [[self.token_id(model, "image")] * len(picture.rows) for picture in pictures]

    def lay_out(self, model: Any, media: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
        """Arrange the pictures of `example` for a batch of prompts as the processor does."""
        return dict(media)

    def token_types(self, model: Any, ids: Tensor) -> dict[str, Tensor]:
        """What the processor tells of each token besides its id."""
        return {}

    # -- positions

    def position_ids(self, model: Any, ids: Tensor, mask: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Positions of the full prompts as the model counts them, [b, s] or [axes, b, s]."""
        return count_positions(mask)

    def last_position(self, positions: Tensor) -> Tensor:
        """From where a later call counts on, [b, 1] or [axes, b, 1], given positions of the full prompts."""
        return positions[..., -1:]


def square(n: int) -> tuple[int, int, int]:
    """Return the square grid of ``n`` tokens: one frame, rows, columns."""
    side = round(n**0.5)
    if side * side != n:
        raise UnsupportedModel(
            f"{n} tokens of an image form no square grid", "open an issue with the name of the checkpoint"
        )
    return (1, side, side)


def count_positions(mask: Tensor) -> Tensor:
    """Positions as ``generate`` counts them: the number of real tokens before each one."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
