"""Builds demo-hd: a LLaVA-NeXT on the weights of the demo model, its tokenizer and its processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from foveate.demo import MODEL, build
from foveate.demo.hd.world import CROP, PAIRS, SIZES

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor, PreTrainedTokenizerFast

PATCH = 28
PINPOINTS = sorted({(rows * CROP, columns * CROP) for columns, rows in (*SIZES.values(), *PAIRS.values())})
"""Heights and widths a picture is fitted to before it is cut into crops."""
NEW_WORDS = ("sign", "faint", "first", "second", "only", "has", "with", "on")
"""Words of this world that the demo's tokenizer knows in pieces only."""


def tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer, and a token for each new word; the numbers of the demo's tokens stay."""
    return build.tokenizer(NEW_WORDS, longest=4096)


def processor() -> LlavaNextProcessor:
    """A `LlavaNextProcessor` with crops of 336 px in patches of 28."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    images = LlavaNextImageProcessorPil(
        size={"height": CROP, "width": CROP}, crop_size={"height": CROP, "width": CROP}, do_center_crop=False,
        image_grid_pinpoints=[list(p) for p in PINPOINTS],
    )  # fmt: skip
    return LlavaNextProcessor(
        image_processor=images, tokenizer=tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=build.CHAT_TEMPLATE,
    )  # fmt: skip


def model(tokens: PreTrainedTokenizerFast, seed: int = 0) -> LlavaNextForConditionalGeneration:
    """Demo-hd as its training starts: the demo's weights.

    A patch of 28 px is embedded as the demo embeds its 14 px of the picture halved; positions are those of the middle
    12 x 12 of the demo's 24 x 24; new words start as the mean of their pieces.
    """
    import torch
    from transformers import (
        AutoModelForImageTextToText,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    torch.manual_seed(seed)
    old: Any = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True)
    vision = old.config.vision_config.to_dict() | {"patch_size": PATCH, "image_size": CROP}
    text = old.config.text_config.to_dict() | {"vocab_size": len(tokens)}
    ids: dict[str, Any] = {
        "bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id
    }  # fmt: skip
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text),
        image_grid_pinpoints=[list(p) for p in PINPOINTS], image_seq_length=(CROP // PATCH) ** 2,
        image_token_index=cast(int, tokens.convert_tokens_to_ids("<image>")), projector_hidden_act="gelu",
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=True, **ids,
    )  # fmt: skip
    network = LlavaNextForConditionalGeneration(config)
    network.generation_config.max_new_tokens = 8
    weights = old.state_dict()
    patch = "model.vision_tower.embeddings.patch_embedding.weight"
    weights[patch] = weights[patch].repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    place = "model.vision_tower.embeddings.position_embedding.weight"
    whole, side, start = weights[place], CROP // PATCH, (24 - CROP // PATCH) // 2
    middle = whole[1:].view(24, 24, -1)[start : start + side, start : start + side]
    weights[place] = torch.cat([whole[:1], middle.reshape(side * side, -1)])
    table = "model.language_model.embed_tokens.weight"
    fresh = torch.zeros(len(tokens), weights[table].shape[1])
    fresh[: len(weights[table])] = weights[table]
    names = build.tokenizer()
    for word in NEW_WORDS:
        (index,) = tokens(f" {word}", add_special_tokens=False).input_ids
        fresh[index] = weights[table][names(f" {word}", add_special_tokens=False).input_ids].mean(0)
    weights[table] = weights["lm_head.weight"] = fresh
    weights["model.image_newline"] = network.model.image_newline.detach() * 0 + weights[table].mean(0)
    network.load_state_dict(weights)
    return network
