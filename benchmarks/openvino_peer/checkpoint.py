"""Makes the one random Qwen2.5-VL that both engines run, and exports it.

Runs in the peer's environment (transformers 4.57 writes checkpoints as the hub has them; 5.x reads those).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from benchmarks.openvino_peer.work import CONVERSATION, MERGE, PATCH, PROMPT, SIDE

VOCABULARY = 32000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
SPECIAL += ("<|image_pad|>", "<|video_pad|>")

#: Qwen's template, for one turn: text and pictures of a message in their order.
CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(folder: Path) -> Qwen2TokenizerFast:
    """Return a byte-level tokenizer that knows the words of the prompt; the other rows of the vocabulary are filler."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([CONVERSATION.format(prompt=PROMPT)] * 2, vocab_size=2000, min_frequency=2)
    folder.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(folder))
    words = json.loads((folder / "vocab.json").read_text())
    for row in range(len(words), VOCABULARY - len(SPECIAL)):
        words[f"filler{row}"] = row
    (folder / "vocab.json").write_text(json.dumps(words))
    made = Qwen2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    assert len(made) == VOCABULARY, f"{len(made)} tokens, {VOCABULARY} wanted"
    made.eos_token = "<|im_end|>"
    made.chat_template = CHAT
    return made


def config(ids: dict[str, int], layers: int, width: int) -> Qwen2_5_VLConfig:
    """Return the model's measures: a decoder of Qwen2.5's kind, and a tower that is nearly free."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 128,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_heads": 4,
            "out_hidden_size": width,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def save(folder: Path, layers: int, width: int, seed: int) -> None:
    """Write weights, tokenizer and processor in float32."""
    words = tokenizer(folder)
    ids = {word: words.convert_tokens_to_ids(word) for word in SPECIAL}
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config(ids, layers, width), dtype=torch.float32)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(folder)
    pixels = {"min_pixels": 28 * 28, "max_pixels": SIDE * SIDE}
    images, videos = Qwen2VLImageProcessor(**pixels), Qwen2VLVideoProcessor(**pixels)
    Qwen2_5_VLProcessor(images, words, videos, chat_template=CHAT).save_pretrained(folder)
    sys.stderr.write(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters in {folder}\n")


def export(folder: Path, out: Path) -> None:
    """Export to OpenVINO in float32 by the peer's own tool; a bfloat16 run converts when it compiles."""
    command = [Path(sys.executable).parent / "optimum-cli", "export", "openvino", "--model", folder]
    subprocess.run([*command, "--task", "image-text-to-text", "--weight-format", "fp32", out], check=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.openvino_peer.checkpoint", description=__doc__)
    parser.add_argument("folder", type=Path, help="gets torch/ and openvino/")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    save(options.folder / "torch", options.layers, options.width, options.seed)
    export(options.folder / "torch", options.folder / "openvino")


if __name__ == "__main__":
    main()
