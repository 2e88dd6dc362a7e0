"""Small random models and prompts: made from configs in a moment, nothing is downloaded.

from tests.models import IMAGE, tiny_inputs, tiny_llava

model = tiny_llava("eager", tower="siglip")
output = model.generate(**tiny_inputs(), max_new_tokens=4)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from foveate.families.releases import CHUNKS, older_than

PAD, BOS, EOS, IMAGE = 0, 1, 159, 150
SIDE, PATCH = 40, 10
TOKENS = (SIDE // PATCH) ** 2  # 16 visual tokens per picture, a 4 x 4 grid

Tower = Literal["clip", "siglip"]

#: Marks tests that read prompts with pictures in chunks.
chunked = pytest.mark.skipif(older_than(CHUNKS), reason=f"chunks with pictures need transformers >= {CHUNKS}")


def tiny_llava(
    impl: str = "sdpa", layers: int = 6, tower: Tower = "clip", seed: int = 0, dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """Return a random LLaVA in evaluation mode; equal arguments give equal weights.

    Args:
        impl: Attention implementation, ``sdpa`` or ``eager``.
        layers: Decoder layers.
        tower: ``clip`` has a CLS token and reads its second-last layer; ``siglip`` has none and reads the last.
        seed: Of the weights.
        dtype: Of the weights.
    """
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    if tower == "clip":
        vision_config, feature_layer, strategy = CLIPVisionConfig(**vision, projection_dim=32), -2, "default"
    else:
        vision_config, feature_layer, strategy = SiglipVisionConfig(**vision, vision_use_head=False), -1, "full"
    text_config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=impl, dtype=dtype).eval()


def tiny_inputs(rows: Sequence[int] = (0, 1, 2), seed: int = 1) -> dict[str, Tensor]:
    """Return a left-padded batch of prompts with ``rows[i]`` images in row i, each row of another length.

    Rows with two images have text between them; every row ends in text.

    Args:
        rows: Images per row.
        seed: Of the pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = [_prompt(i, images) for i, images in enumerate(rows)]
    length = max(map(len, prompts))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (length - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
    }
    if sum(rows):
        inputs["pixel_values"] = torch.randn(sum(rows), 3, SIDE, SIDE, generator=generator)
    return inputs


def one_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return row ``row`` of a batch of `tiny_inputs` alone, without padding."""
    real = inputs["attention_mask"][row].bool()
    single = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    images = (inputs["input_ids"] == IMAGE).sum(dim=1) // TOKENS
    first, count = int(images[:row].sum()), int(images[row])
    if count:
        single["pixel_values"] = inputs["pixel_values"][first : first + count]
    return single


def _prompt(row: int, images: int) -> list[int]:
    prompt = [BOS, *range(5, 8 + row)]
    for image in range(images):
        prompt += [IMAGE] * TOKENS + [20 + 2 * row + image] * (2 + row)
    return [*prompt, *range(40, 43 + 2 * row)]
