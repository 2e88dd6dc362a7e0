"""Builds the demo model with random weights, its tokenizer and its processor."""

from __future__ import annotations

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from foveate.demo.questions import TYPES, ask
from foveate.demo.world import COLOURS, PLACES, SHAPES, SIDE, WORDS, layout

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'user' %} {% else %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")


def _corpus() -> list[str]:
    """What the tokenizer is made from: every word of the world many times, and a thousand scenes of questions."""
    lines = [f" {w} {w}s" for w in (*COLOURS, *SHAPES, *PLACES, *WORDS)] * 400
    lines += ["USER: what colour is it? ASSISTANT: yes", "ASSISTANT: no", "the and of a an it this picture image"] * 400
    starts = ("what", "which", "how", "is", "can", "are", "does", "do", "please", "read")
    lines += [f"\n{word} {word}" for word in starts] * 400
    for seed in range(300):
        rng = np.random.default_rng([seed, 9])
        objects, prints = layout(rng)
        lines += [f"USER: {q.text} ASSISTANT: {q.answer}" for q in ask(rng, objects, prints, 4, TYPES)]
    return lines


@lru_cache
def _vocabulary() -> str:
    """The trained tokenizer as JSON."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    model = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        min_frequency=50,
        special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=["\n", *"abcdefghijklmnopqrstuvwxyz0123456789?.,:!'-▁"],
        show_progress=False,
    )
    model.train_from_iterator(_corpus(), trainer)
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return model.to_str()


@lru_cache
def _extended(*words: tuple[str, ...]) -> str:
    """The trained tokenizer with a token and its merges behind the others for every further word."""
    from tokenizers import Tokenizer

    table = json.loads(_vocabulary())
    vocabulary, merges = table["model"]["vocab"], table["model"]["merges"]
    for group in words:
        known = Tokenizer.from_str(json.dumps(table))
        for word in group:
            whole, *rest = known.encode(f" {word}", add_special_tokens=False).tokens
            for piece in rest:
                merges.append([whole, piece])
                whole += piece
                vocabulary.setdefault(whole, len(vocabulary))
    return json.dumps(table)


def tokenizer(*words: tuple[str, ...], longest: int = 2048, **special: str) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE: words of the world are one token, numbers are digits, a text begins with `<s>`.

    Args:
        words: Groups of further words, each made of the pieces known before its group; all other tokens stay.
        longest: Most tokens of a prompt.
        special: Further special tokens by their names.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_extended(*words)), pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        padding_side="left", clean_up_tokenization_spaces=False, model_max_length=longest,
        extra_special_tokens={"image_token": "<image>"} | special,
    )  # fmt: skip


def processor() -> LlavaProcessor:
    """A `LlavaProcessor` that makes 576 image tokens of any picture; nothing is cropped away."""
    from transformers import LlavaProcessor
    from transformers.models.clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, do_resize=True, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer(), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def waves(side: int, width: int) -> NDArray[np.float32]:
    """Sines and cosines of row and column, (side * side, width): places that a tower need not learn to tell apart."""
    rates = 0.6 * 24.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    turns = np.arange(side)[:, None] * rates * 2 * np.pi / 1.5
    line = np.concatenate([np.sin(turns), np.cos(turns)], 1)
    both = np.concatenate([line[:, None].repeat(side, 1), line[None].repeat(side, 0)], 2)
    return both.reshape(side * side, width).astype(np.float32)


def model(tokens: PreTrainedTokenizerFast, side: int = SIDE, seed: int = 0) -> LlavaForConditionalGeneration:
    """The demo model with random weights: CLIP ViT 8 x 192, MLP projector, Llama 12 x 256."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=8, num_attention_heads=3, image_size=side,
        patch_size=14, hidden_act="gelu", projection_dim=192,
    )  # fmt: skip
    ids: dict[str, Any] = {
        "bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id
    }  # fmt: skip
    text = LlamaConfig(
        # 12 layers, so that a method that drops no earlier than layer 1 can reach a mean of 64 of 576 tokens
        vocab_size=len(tokens), hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=cast(int, tokens.convert_tokens_to_ids("<image>")),
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=(side // 14) ** 2,
        projector_hidden_act="gelu", tie_word_embeddings=True, **ids,
    )  # fmt: skip
    built = LlavaForConditionalGeneration(config)
    built.generation_config.max_new_tokens = 8
    table = built.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        table[1:] += 0.4 * torch.from_numpy(waves(side // 14, table.shape[1]))
    return built


def save(network: Any, processor: Any, folder: Path) -> None:
    """Writes a model and its processor to a folder in one step: readers see the old ones or the new ones.

    Args:
        network: The model; a bfloat16 copy of its weights is written.
        processor: Its processor.
        folder: Where to; a card that lies there is kept, as is any other file.
    """
    import torch

    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, fresh)
    small: Any = type(network)(network.config)
    small.load_state_dict(network.state_dict())
    small.generation_config = network.generation_config
    small.to(torch.bfloat16).save_pretrained(fresh)
    processor.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
