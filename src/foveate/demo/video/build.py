"""Builds the video model from the weights of the demo model: its tokenizer with some more words, its saved form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foveate.demo import build, load
from foveate.demo.video.processor import ClipProcessor
from foveate.demo.video.world import GRID, PATCH, SIDE

if TYPE_CHECKING:
    from transformers import LlavaNextVideoForConditionalGeneration, PreTrainedTokenizerFast

_PICTURE = "{% if item['type'] == 'image' %}<image>\n{% endif %}"
CHAT_TEMPLATE = build.CHAT_TEMPLATE.replace(_PICTURE, _PICTURE.replace("image", "video") + _PICTURE)
NEW = (
    "start", "end", "appears", "vanishes", "moves", "changes", "appear", "vanish", "move", "change", "first", "was",
    "way", "up", "down", "shapes", "video", "clip", "frame", "last", "happens",
)  # fmt: skip
"""Words that the demo's tokenizer cuts to pieces."""
CORNER = 6
"""Row and column of the demo's position table at which that of a frame begins."""


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: what the demo's knows keeps its number."""
    return build.tokenizer(*((word,) for word in NEW), video_token="<video>")


def processor() -> ClipProcessor:
    """The processor: 36 visual tokens for every frame of a clip."""
    return ClipProcessor.new(tokenizer(), CHAT_TEMPLATE)


def model(tokens: PreTrainedTokenizerFast, seed: int = 0) -> LlavaNextVideoForConditionalGeneration:
    """The video model with the weights of the demo model; only the rows of new words are random."""
    import torch
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    source, _ = load("demo")
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
