"""Small random models in folders, as vLLM and transformers both load them, and pictures and prompts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)

from foveate.demo import MODEL

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl")
SIDE, PATCH = 64, 8  # of the towers that read squares: 64 patches

_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_PINPOINTS = [[64, 128], [128, 64], [128, 128]]
_NAMES = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision", "qwen2_5_vl": "Qwen2_5_VL"}
_MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>", "<video>")


def architecture(family: str) -> str:
    return f"Foveate{_NAMES[family]}ForConditionalGeneration"


def folder(family: str, root: Path) -> Path:
    """Write a model with its processor, once."""
    path = root / family
    if (path / "config.json").exists():
        return path
    mark = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"} if family == "qwen2_5_vl" else {}
    tokenizer = AutoTokenizer.from_pretrained(MODEL, **mark)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_MARKS)})
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in ("<image>", *_MARKS)}
    text = _TEXT | {"vocab_size": len(tokenizer)}
    clip = _TOWER | {"model_type": "clip_vision_model", "projection_dim": 64}
    size, picture = {"height": SIDE, "width": SIDE}, {"do_center_crop": False, "crop_size": SIDE}
    config: dict[str, Any]
    processor: Any
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
        tower = {"depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128}
        tower |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1, 3]}
        config = {"text_config": text | {"rope_parameters": rope}, "vision_config": tower}
        config |= {"image_token_id": ids[_MARKS[1]], "video_token_id": ids[_MARKS[3]]}
        config |= {"vision_start_token_id": ids[_MARKS[0]], "vision_end_token_id": ids[_MARKS[2]]}
        sizes = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
        processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessorPil(size=sizes), tokenizer, Qwen2VLVideoProcessor())
    else:
        config = {"image_token_id": ids["<image>"], "image_seq_length": (SIDE // PATCH) ** 2}
        given: dict[str, Any] = {"patch_size": PATCH, "vision_feature_select_strategy": "default"}
        if family == "llava":
            config |= {"vision_config": clip, "text_config": text | {"model_type": "llama"}}
            processor = LlavaProcessor(
                CLIPImageProcessorPil(size=size, **picture), tokenizer, num_additional_image_tokens=1, **given
            )
        elif family == "llava_next":
            config |= {"vision_config": clip, "text_config": text | {"model_type": "llama"}}
            config |= {"image_grid_pinpoints": _PINPOINTS}
            pictures = LlavaNextImageProcessorPil(size=size, image_grid_pinpoints=_PINPOINTS, **picture)
            processor = LlavaNextProcessor(pictures, tokenizer, num_additional_image_tokens=1, **given)
        else:
            siglip = _TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
            config |= {"vision_config": siglip, "text_config": text | {"model_type": "qwen2"}}
            config |= {"image_grid_pinpoints": _PINPOINTS, "video_token_id": ids["<video>"]}
            pictures = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=_PINPOINTS)
            processor = LlavaOnevisionProcessor(
                pictures,
                tokenizer,
                LlavaOnevisionVideoProcessor(size=size),
                num_image_tokens=(SIDE // PATCH) ** 2,
                vision_feature_select_strategy="full",
            )
    torch.manual_seed(0)
    made = AutoConfig.for_model(family, **config, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForImageTextToText.from_config(made, dtype=torch.float32)
    for name, parameter in model.named_parameters():  # larger than usual, so that pictures matter to the answer
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15 if "embed" in name else 0.09)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def picture(seed: int, width: int = 96, height: int = 120) -> Image.Image:
    """Return coloured noise with large and small patterns."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((width, height))
    fine = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Image.blend(coarse, fine, 0.3)


def prompt(family: str, question: str, pictures: int = 1) -> str:
    place = "<|vision_start|><|image_pad|><|vision_end|>" if family == "qwen2_5_vl" else "<image>\n"
    return f"USER: {'and '.join([place] * pictures)} {question} ASSISTANT:"
