"""Models of a known shape with random weights, a prompt for them, and how many operations they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

_HEAD = 128


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaVA's measures: a CLIP tower, a two-layer projector, a Llama decoder, and the prompt it is asked with.

    Args:
        side: Edge of the picture in pixels.
        patch: Edge of a patch in pixels.
        vision_width: Width of the tower.
        vision_layers: Layers of the tower.
        layers: Decoder layers.
        width: Width of the decoder; heads are 128 wide (or the whole width, if that is less).
        vocabulary: Rows of the embedding; the last but 63 (or the last) is the picture's placeholder.
        before: Text tokens before the picture.
        after: Text tokens after the picture.
    """

    side: int
    patch: int
    vision_width: int
    vision_layers: int
    layers: int
    width: int
    vocabulary: int
    before: int
    after: int

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return (self.side // self.patch) ** 2

    @property
    def text(self) -> int:
        """Text tokens of the prompt."""
        return self.before + self.after

    @property
    def hidden(self) -> int:
        """Inner width of the decoder's MLP, in Llama-2's proportion: 11008 for 4096."""
        return self.width * 43 // 16

    @property
    def image_token(self) -> int:
        """Id of the placeholder."""
        return max(self.vocabulary - 64, self.vocabulary // 2)

    def encode_gflop(self) -> float:
        """Operations of tower and projector: 2 n (4 v^2 + 8 v^2) + 4 n^2 v per layer, and 2 n (v d + d^2)."""
        n, v, d = self.tokens + 1, self.vision_width, self.width
        tower = self.vision_layers * (2 * n * 12 * v * v + 4 * n * n * v) + 2 * n * 3 * self.patch**2 * v
        return (tower + 2 * self.tokens * (v * d + d * d)) / 1e9

    def prefill_gflop(self, visual: float | int) -> float:
        """Operations of the decoder over the prompt: 2 n (4 d^2 + 3 d h) + 4 n^2 d per layer, and one row of logits.

        Args:
            visual: Visual tokens alive, mean over the layers.
        """
        n, d, h = self.text + visual, self.width, self.hidden
        layer = 2 * n * (4 * d * d + 3 * d * h) + 4 * n * n * d
        return (self.layers * layer + 2 * d * self.vocabulary) / 1e9

    def first_token_gflop(self, visual: float | int) -> float:
        """Operations until the first token."""
        return self.encode_gflop() + self.prefill_gflop(visual)


#: LLaVA-1.5 has 32 decoder layers of width 4096; the shape here has a shrunk decoder, so that two CPU cores suffice.
SHAPES = {
    "llava-1.5-7b": Shape(
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
    "tiny": Shape(
        side=60, patch=10, vision_width=32, vision_layers=4, layers=6, width=64, vocabulary=256, before=5, after=4
    ),
}


def build(shape: Shape, dtype: torch.dtype, attention: str, seed: int) -> LlavaForConditionalGeneration:
    """Return a model of this shape with random weights that never ends an answer by itself."""
    heads = max(1, shape.width // _HEAD)
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=max(1, shape.vision_width // 64),
        image_size=shape.side,
        patch_size=shape.patch,
        projection_dim=shape.vision_width,
    )
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    config: Any = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=shape.image_token,  # type: ignore[call-arg,unused-ignore]  # the field as it is saved
        image_seq_length=shape.tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration._from_config(
        config, attn_implementation=attention, dtype=dtype
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(shape: Shape, visual: int, seed: int) -> Tensor:
    """Return prompt ids [1, s]: text, ``visual`` placeholders, text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, shape.image_token, (shape.text,), generator=generator)
    image = torch.full((visual,), shape.image_token)
    return torch.cat([text[: shape.before], image, text[shape.before :]])[None]


def picture(shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    """Return one random picture, as a processor would hand it over."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, shape.side, shape.side, generator=generator).to(dtype)
