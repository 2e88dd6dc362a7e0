"""Builds the video model from the weights of the demo model: its tokenizer with some more words, its saved form."""

from __future__ import annotations

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import foveate.demo as demo
from foveate.demo.video.processor import ClipProcessor
from foveate.demo.video.world import GRID, PATCH, SIDE

if TYPE_CHECKING:
    from transformers import LlavaNextVideoForConditionalGeneration, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'video' %}<video>\n{% endif %}"
    "{% if item['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'user' %} {% else %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
NEW = (
    "start", "end", "appears", "vanishes", "moves", "changes", "appear", "vanish", "move", "change", "first", "was",
    "way", "up", "down", "shapes", "video", "clip", "frame", "last", "happens",
)  # fmt: skip
"""Words that the demo's tokenizer cuts to pieces."""
CORNER = 6
"""Row and column of the demo's position table at which that of a frame begins."""


@lru_cache
def _vocabulary() -> str:
    """The demo's tokenizer, with a token and its merges behind the others for every new word."""
    from tokenizers import Tokenizer

    data = json.loads((demo.MODEL / "tokenizer.json").read_text())
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    for word in NEW:
        pieces = Tokenizer.from_str(json.dumps(data)).encode(f" {word}", add_special_tokens=False).tokens
        whole = pieces[0]
        for piece in pieces[1:]:
            merges.append([whole, piece])
            whole += piece
            vocabulary.setdefault(whole, len(vocabulary))
    return json.dumps(data)


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: what the demo's knows keeps its number."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_vocabulary()), pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        padding_side="left", clean_up_tokenization_spaces=False, model_max_length=2048,
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )  # fmt: skip


def processor() -> ClipProcessor:
    """The processor: 36 visual tokens for every frame of a clip."""
    return ClipProcessor.new(tokenizer(), CHAT_TEMPLATE)


def model(tokens: PreTrainedTokenizerFast, seed: int = 0) -> LlavaNextVideoForConditionalGeneration:
    """The video model with the weights of the demo model; only the rows of new words are random."""
    import torch
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    source, _ = demo.load("demo")
    torch.manual_seed(seed)
    vision, text = source.config.vision_config.to_dict(), source.config.text_config.to_dict()
    vision["image_size"], text["vocab_size"] = SIDE, len(tokens)
    number: Any = tokens.convert_tokens_to_ids
    ids: dict[str, Any] = {
        "bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id
    }  # fmt: skip
    config = LlavaNextVideoConfig(
        vision_config=vision, text_config=text, image_token_index=number("<image>"),
        video_token_index=number("<video>"), vision_feature_layer=-2, vision_feature_select_strategy="default",
        projector_hidden_act="gelu", image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
        image_seq_length=(SIDE // PATCH) ** 2, video_seq_length=8 * GRID**2, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    built = LlavaNextVideoForConditionalGeneration(config)
    built.generation_config.max_new_tokens = 8
    weights, old = built.state_dict(), source.state_dict()
    table, words = "model.vision_tower.embeddings.position_embedding.weight", "model.language_model.embed_tokens.weight"
    rows = range(CORNER, CORNER + SIDE // PATCH)
    kept = [0, *(1 + r * 24 + c for r in rows for c in rows)]
    for name, value in old.items():
        if name == table:
            weights[name].copy_(value[kept])
        elif name in (words, "lm_head.weight"):
            weights[name].normal_(std=0.1)[: len(value)] = value
        elif name in weights and "position_ids" not in name:
            weights[name].copy_(value)
    return built


def save(network: LlavaNextVideoForConditionalGeneration, folder: Path) -> None:
    """Writes model, tokenizer and processor to a folder in one step: readers see the old one or the new one.

    Args:
        network: The model; a bfloat16 copy of its weights is written.
        folder: Where to; an older model there is replaced, its card kept.
    """
    import torch

    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    small: Any = type(network)(network.config)
    small.load_state_dict(network.state_dict())
    small.generation_config = network.generation_config
    small.to(torch.bfloat16).save_pretrained(fresh)
    processor().save_pretrained(fresh)
    card = folder / "CARD.md"
    if card.exists():
        shutil.copy(card, fresh)
    for path in fresh.iterdir():
        path.chmod(0o644)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
