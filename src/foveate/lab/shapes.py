"""Models of a known shape with random weights, and a prompt with one picture for them: nothing is downloaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from foveate.errors import UnsupportedModel

_HEAD = 128


@dataclass(frozen=True, kw_only=True)
class Shape(ABC):
    """The measures of a model: a vision tower, a decoder, and the prompt it is asked with.

    Class attributes:
        model_type: Of the config.

    Args:
        side: Edge of the picture in pixels.
        patch: Edge of a patch in pixels.
        vision_width: Width of the tower.
        vision_layers: Layers of the tower.
        layers: Decoder layers.
        width: Width of the decoder; heads are 128 wide (or the whole width, if that is less).
        vocabulary: Rows of the embedding; the last but 63 (or the last half) are never text.
        before: Text tokens before the picture.
        after: Text tokens after the picture.
    """

    model_type: ClassVar[str]

    side: int
    patch: int
    vision_width: int
    vision_layers: int
    layers: int
    width: int
    vocabulary: int
    before: int
    after: int

    def __post_init__(self) -> None:
        if self.side < self.unit or self.side % self.unit:
            raise UnsupportedModel(
                f"pictures of this shape have sides of a multiple of {self.unit} pixels, got {self.side}",
                f"pass --side {max(self.side // self.unit, 1) * self.unit}",
            )
        if self.width < 1 or self.layers < 1 or (self.width > _HEAD and self.width % _HEAD):
            raise UnsupportedModel(
                f"heads are {_HEAD} wide, so a decoder cannot have {self.layers} layers of width {self.width}",
                f"pass --width {max(self.width // _HEAD, 1) * _HEAD}, and --layers of at least 1",
            )

    @property
    @abstractmethod
    def unit(self) -> int:
        """What the edge of a picture is a multiple of."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Visual tokens of a picture."""

    @property
    def placeholders(self) -> int:
        """Tokens of the prompt that stand for the picture."""
        return self.tokens

    @property
    def text(self) -> int:
        """Text tokens of the prompt."""
        return self.before + self.after

    @property
    def heads(self) -> int:
        """Attention heads of the decoder."""
        return max(1, self.width // _HEAD)

    @property
    def image_token(self) -> int:
        """Id of the placeholder."""
        return max(self.vocabulary - 64, self.vocabulary // 2)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the fields of the config."""

    @abstractmethod
    def media(self, seed: int) -> dict[str, Tensor]:
        """Return one random picture, as a processor would hand it over."""

    def types(self, ids: Tensor) -> dict[str, Tensor]:
        """Return what the processor tells of each token besides its id."""
        return {}

    def decoder(self) -> dict[str, Any]:
        """Return what decoders of all kinds have."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        }


@dataclass(frozen=True, kw_only=True)
class Llava(Shape):
    """A LLaVA-1.5: a CLIP tower, a two-layer projector, a Llama decoder."""

    model_type: ClassVar[str] = "llava"

    @property
    def unit(self) -> int:
        return self.patch

    @property
    def tile(self) -> int:
        """Edge of what the tower reads at once."""
        return self.side

    @property
    def crops(self) -> int:
        """How often the tower reads."""
        return 1

    @property
    def tokens(self) -> int:
        return self.crops * (self.tile // self.patch) ** 2

    @property
    def hidden(self) -> int:
        """Inner width of the decoder's MLP, in Llama-2's proportion: 11008 for 4096."""
        return self.width * 43 // 16

    def settings(self) -> dict[str, Any]:
        vision = {
            "model_type": "clip_vision_model",
            "hidden_size": self.vision_width,
            "intermediate_size": 4 * self.vision_width,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": max(1, self.vision_width // 64),
            "image_size": self.tile,
            "patch_size": self.patch,
            "projection_dim": self.vision_width,
        }
        text = {
            "model_type": "llama",
            **self.decoder(),
            "intermediate_size": self.hidden,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": 4096,
        }
        return {
            "vision_config": vision,
            "text_config": text,
            "image_token_id": self.image_token,
            "image_seq_length": self.tokens,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }

    def media(self, seed: int) -> dict[str, Tensor]:
        return {"pixel_values": _noise(seed, 1, 3, self.side, self.side)}

    def encode_gflop(self) -> float:
        """Operations of tower and projector: 2 n (4 v^2 + 8 v^2) + 4 n^2 v per layer, and 2 n (v d + d^2)."""
        n, v, d = self.tokens // self.crops + 1, self.vision_width, self.width
        tower = self.vision_layers * (2 * n * 12 * v * v + 4 * n * n * v) + 2 * n * 3 * self.patch**2 * v
        return (self.crops * tower + 2 * self.tokens * (v * d + d * d)) / 1e9

    def prefill_gflop(self, visual: float | int) -> float:
        """Operations of the decoder over the prompt: 2 n (4 d^2 + 3 d h) + 4 n^2 d per layer, and one row of logits.

        Args:
            visual: Visual tokens alive, mean over the layers.
        """
        n, d, h = self.text + self.placeholders - self.tokens + visual, self.width, self.hidden
        layer = 2 * n * (4 * d * d + 3 * d * h) + 4 * n * n * d
        return (self.layers * layer + 2 * d * self.vocabulary) / 1e9

    def first_token_gflop(self, visual: float | int) -> float:
        """Operations until the first token."""
        return self.encode_gflop() + self.prefill_gflop(visual)


@dataclass(frozen=True, kw_only=True)
class LlavaNext(Llava):
    """A LLaVA-NeXT asked about a square picture: the tower reads it as a whole and in tiles.

    Args:
        tiles: Tiles along an edge.
    """

    model_type: ClassVar[str] = "llava_next"

    tiles: int = 2

    @property
    def unit(self) -> int:
        return self.patch * self.tiles

    @property
    def tile(self) -> int:
        return self.side // self.tiles

    @property
    def crops(self) -> int:
        return 1 + self.tiles**2

    @property
    def placeholders(self) -> int:
        return self.tokens + self.side // self.patch  # a newline ends each row of the tiled picture

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "image_grid_pinpoints": [[self.side, self.side]]}

    def media(self, seed: int) -> dict[str, Tensor]:
        pixels = _noise(seed, 1, self.crops, 3, self.tile, self.tile)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[self.side, self.side]])}


@dataclass(frozen=True, kw_only=True)
class Qwen25VL(Shape):
    """A Qwen2.5-VL: a tower with windows that merges four patches into a token, a decoder with grouped heads."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    merge: ClassVar[int] = 2

    @property
    def unit(self) -> int:
        return self.patch * self.merge

    @property
    def tokens(self) -> int:
        return (self.side // self.unit) ** 2

    def settings(self) -> dict[str, Any]:
        vision = {
            "depth": self.vision_layers,
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_width * 171 // 64,
            "num_heads": max(1, self.vision_width // 80),
            "out_hidden_size": self.width,
            "patch_size": self.patch,
            "spatial_merge_size": self.merge,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "window_size": 8 * self.patch,
            "fullatt_block_indexes": [
                i for i in range(self.vision_layers) if i % 8 == 7 or i == self.vision_layers - 1
            ],
        }
        half = min(self.width, _HEAD) // 2
        text = {
            **self.decoder(),
            "intermediate_size": self.width * 43 // 8,
            "num_key_value_heads": max(1, self.heads // 8),
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
            },
        }
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return {
            "vision_config": vision,
            "text_config": text,
            "tie_word_embeddings": False,
            **{name: self.image_token + i for i, name in enumerate(names)},
        }

    def media(self, seed: int) -> dict[str, Tensor]:
        rows = self.side // self.patch
        return {
            "pixel_values": _noise(seed, rows * rows, 3 * 2 * self.patch**2),
            "image_grid_thw": torch.tensor([[1, rows, rows]]),
        }

    def types(self, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == self.image_token).long()}


#: Towers and vocabularies are those of the models named; decoders are shrunk to 12 layers of width 2048 (LLaVA-1.5-7B
#: has 32 of 4096, Qwen2.5-VL-3B 36 of 2048), so that two CPU cores suffice.
SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": Llava(
        side=336,
        patch=14,
        vision_width=1024,
        vision_layers=24,
        layers=12,
        width=2048,
        vocabulary=32064,
        before=35,
        after=30,
    ),
    "llava-next-7b": LlavaNext(
        side=672,
        patch=14,
        vision_width=1024,
        vision_layers=24,
        layers=12,
        width=2048,
        vocabulary=32064,
        before=35,
        after=30,
    ),
    "qwen2.5-vl-3b": Qwen25VL(
        side=672,
        patch=14,
        vision_width=1280,
        vision_layers=32,
        layers=12,
        width=2048,
        vocabulary=151936,
        before=15,
        after=30,
    ),
    "tiny": Llava(
        side=60, patch=10, vision_width=32, vision_layers=4, layers=6, width=64, vocabulary=256, before=5, after=4
    ),
    "tiny-next": LlavaNext(
        side=48, patch=6, vision_width=32, vision_layers=4, layers=6, width=64, vocabulary=256, before=5, after=4
    ),
    "tiny-qwen": Qwen25VL(
        side=60, patch=5, vision_width=32, vision_layers=4, layers=6, width=64, vocabulary=256, before=5, after=4
    ),
}


def build(shape: Shape, dtype: torch.dtype, attention: str, seed: int) -> Any:
    """Return a model of this shape with random weights that never ends an answer by itself."""
    config = AutoConfig.for_model(shape.model_type, **shape.settings())
    with no_init_weights():  # drawing every weight would take longer than all else
        model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation=attention, dtype=dtype)
    _fill(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@torch.no_grad()
def _fill(model: Any, seed: int) -> None:
    """Set the weights: scales to one, biases to zero, all else to normal numbers that come again after a prime."""
    pool = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and name.endswith((".weight", ".bias")):
            weight.fill_(float(name.endswith(".weight")))
            continue
        for part in weight.view(-1).split(len(pool)):
            part.copy_(pool[: len(part)])
        pool = pool.roll(-7919)  # or all layers would be the same


def inputs(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Return one prompt with one picture, as a processor would hand it over."""
    ids = prompt(shape, shape.placeholders, seed)
    media = {name: value.to(dtype) if value.is_floating_point() else value for name, value in shape.media(seed).items()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media, **shape.types(ids)}


def prompt(shape: Shape, visual: int, seed: int) -> Tensor:
    """Return prompt ids [1, s]: text, ``visual`` placeholders, text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, shape.image_token, (shape.text,), generator=generator)
    image = torch.full((visual,), shape.image_token)
    return torch.cat([text[: shape.before], image, text[shape.before :]])[None]


def picture(shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    """Return the pixels of one random picture."""
    return shape.media(seed)["pixel_values"].to(dtype)


def _noise(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))
