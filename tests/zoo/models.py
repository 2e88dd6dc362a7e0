"""Tiny random models of every supported family: made from configs in a moment, nothing is downloaded.

from tests.zoo.inputs import batch
from tests.zoo.models import GREEDY, placeholders, tiny

model = tiny("qwen3_vl")
output = model.generate(**batch("qwen3_vl"), max_new_tokens=4, suppress_tokens=placeholders(model), **GREEDY)

Each config holds what is special about its family: window blocks and full blocks, levels of deepstack, sliding
layers, shared keys and values, experts. Token ids are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from foveate.families import FAMILIES

PAD, BOS, EOS = 0, 1, 159
IMAGE, VIDEO_TOKEN, START, END, AUDIO, VIDEO_START, VIDEO_END = 150, 151, 152, 153, 154, 155, 156
BREAK, ROW_END = 157, 158  # of pixtral's rows
VOCABULARY, HIDDEN = 160, 64

#: Greedy generation that neither stops early nor hides its logits.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "return_dict_in_generate": True,
    "output_logits": True,
}

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_PACKED: dict[str, Any] = {  # towers that read patches of any number of images as one sequence
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": HIDDEN,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_IMAGE = {"image_token_id": IMAGE}
_BOTH = {"image_token_id": IMAGE, "video_token_id": VIDEO_TOKEN}
_FRAMED = {**_BOTH, "vision_start_token_id": START, "vision_end_token_id": END}

Config = dict[str, Any]


def _clip(side: int, patch: int) -> Config:
    layers = {"num_hidden_layers": 4, "projection_dim": 32}
    return {"model_type": "clip_vision_model", **_VISION, **layers, "image_size": side, "patch_size": patch}


def _siglip(side: int, patch: int, **more: Any) -> Config:
    return {"model_type": "siglip_vision_model", **_VISION, "image_size": side, "patch_size": patch} | more


def _text(layers: int, kind: str | None = None, **more: Any) -> Config:
    return {**({"model_type": kind} if kind else {}), **_TEXT, "num_hidden_layers": layers, **more}


def _mrope(*sections: int, **more: Any) -> Config:
    return {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 10000.0, **more}


def _cycle(layers: int, *kinds: str) -> list[str]:
    return [kinds[i % len(kinds)] for i in range(layers)]


#: Resolutions, height and width, into which pictures of the any-resolution families are cut; a tile has 16 pixels.
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]]


def _llava(layers: int) -> Config:
    return {"vision_config": _clip(16, 4), "text_config": _text(layers, "llama"), "image_seq_length": 16, **_IMAGE}


def _vipllava(layers: int) -> Config:
    return {**_llava(layers), "vision_feature_layers": [-2, -3, 1]}


def _llava_next(layers: int) -> Config:
    return {**_llava(layers), "image_grid_pinpoints": PINPOINTS}


def _llava_next_video(layers: int) -> Config:
    return {**_llava_next(layers), **_BOTH}


def _llava_onevision(layers: int) -> Config:
    text, vision = _text(layers, "qwen2"), _siglip(16, 4, num_hidden_layers=4, vision_use_head=False)
    return {"vision_config": vision, "text_config": text, "image_grid_pinpoints": PINPOINTS, **_BOTH}


def _video_llava(layers: int) -> Config:
    return {"vision_config": _clip(24, 8), "text_config": _text(layers, "llama"), "image_seq_length": 9, **_BOTH}


def _qwen2_vl(layers: int) -> Config:
    tower = {"depth": 4, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 4, "mlp_ratio": 2}
    tower |= {k: _PACKED[k] for k in ("patch_size", "spatial_merge_size", "temporal_patch_size", "in_channels")}
    return {"vision_config": tower, "text_config": _text(layers, rope_parameters=_mrope(2, 3, 3)), **_FRAMED}


def _qwen2_5_vl(layers: int) -> Config:  # windows of 2 x 2 tokens, full attention in two of four blocks
    tower = {**_PACKED, "window_size": 16, "fullatt_block_indexes": [1, 3]}
    return {"vision_config": tower, "text_config": _text(layers, rope_parameters=_mrope(2, 3, 3)), **_FRAMED}


def _qwen3_vl(layers: int) -> Config:  # features of two tower blocks are added after decoder layers 0 and 1
    tower = {**_PACKED, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
    text = _text(layers, head_dim=16, rope_parameters=_mrope(2, 3, 3, mrope_interleaved=True))
    return {"vision_config": tower, "text_config": text, **_FRAMED}


def _qwen3_vl_moe(layers: int) -> Config:
    config = _qwen3_vl(layers)
    return config | {"text_config": config["text_config"] | _EXPERTS}


def _qwen3_5(layers: int) -> Config:
    text = _text(
        layers,
        head_dim=16,
        layer_types=_cycle(layers, "linear_attention", "linear_attention", "full_attention"),
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=4,
        rope_parameters=_mrope(1, 1, 2, partial_rotary_factor=0.5, mrope_interleaved=True),
    )
    return {"vision_config": {**_PACKED, "num_position_embeddings": 64}, "text_config": text, **_FRAMED}


def _qwen3_5_moe(layers: int) -> Config:
    config = _qwen3_5(layers)
    text = config["text_config"] | _EXPERTS | {"shared_expert_intermediate_size": 48}
    return config | {"text_config": {k: v for k, v in text.items() if k != "intermediate_size"}}


def _internvl(layers: int) -> Config:
    tower = {**_VISION, "image_size": [24, 24], "patch_size": [4, 4]}
    return {"vision_config": tower, "text_config": _text(layers, "qwen2"), "image_seq_length": 9, **_IMAGE}


def _idefics3(layers: int) -> Config:
    tower = {**_VISION, "image_size": 24, "patch_size": 4}
    text = _text(layers, "llama")
    return {"vision_config": tower, "text_config": text, "scale_factor": 2, "pad_token_id": PAD, **_IMAGE}


def _gemma3(layers: int) -> Config:
    kinds = _cycle(layers, "sliding_attention", "sliding_attention", "full_attention")
    text = _text(layers, head_dim=16, query_pre_attn_scalar=16, sliding_window=24, layer_types=kinds)
    tower = _siglip(24, 3, vision_use_head=False)
    tokens = {"boi_token_index": START, "eoi_token_index": END}
    return {"vision_config": tower, "text_config": text, "mm_tokens_per_image": 16, **tokens, **_IMAGE}


def _gemma4(layers: int, shared: int = 0) -> Config:
    text = _text(
        layers,
        head_dim=16,
        global_head_dim=16,
        sliding_window=24,
        layer_types=_cycle(layers, "sliding_attention", "sliding_attention", "full_attention"),
        num_kv_shared_layers=shared,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        use_bidirectional_attention="vision",
    )
    tower = {**_VISION, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4}
    tower |= {"pooling_kernel_size": 2, "position_embedding_size": 64}
    tokens = {"audio_token_id": AUDIO, "boi_token_id": START, "eoi_token_id": END}
    return {"vision_config": tower, "audio_config": None, "text_config": text, **tokens, **_BOTH}


def _gemma4_shared(layers: int) -> Config:
    return _gemma4(layers, shared=2)


def _paligemma(layers: int) -> Config:
    tower = _siglip(16, 4, vision_use_head=False, projection_dim=HIDDEN)
    text = _text(layers, "gemma", head_dim=16)
    return {"vision_config": tower, "text_config": text, "projection_dim": HIDDEN, **_IMAGE}


def _mistral3(layers: int) -> Config:
    tower = {"model_type": "pixtral", **_VISION, "head_dim": 8, "image_size": 64, "patch_size": 4}
    text = _text(layers, "mistral", head_dim=16, sliding_window=None)
    return {"vision_config": tower, "text_config": text, "spatial_merge_size": 2, "vision_feature_layer": -1, **_IMAGE}


def _glm4v(layers: int) -> Config:
    rope = _mrope(1, 1, 2, partial_rotary_factor=0.5)
    marks = {"image_start_token_id": START, "image_end_token_id": END}
    marks |= {"video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END}
    tower = {**_PACKED, "depth": 3, "image_size": 32}
    return {"vision_config": tower, "text_config": _text(layers, rope_parameters=rope), **_BOTH, **marks}


def _mllama(layers: int) -> Config:  # text looks across at the image in layers 1, 4, ...
    tower = {k: v for k, v in _VISION.items() if k != "num_attention_heads"}
    tower |= {"attention_heads": 4, "image_size": 16, "patch_size": 4, "num_global_layers": 2, "max_num_tiles": 4}
    tower |= {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96}
    text = _text(layers, cross_attention_layers=list(range(1, layers, 3)))
    return {"vision_config": tower, "text_config": text, "image_token_index": IMAGE}


def _minicpmv4_6(layers: int) -> Config:  # patches are merged 2 x 2 within the tower, and again behind it
    tower = {**_VISION, "num_hidden_layers": 4, "image_size": 64, "patch_size": 4}
    text = {"model_type": "qwen3_5_text", **_qwen3_5(layers)["text_config"]}
    return {"vision_config": tower, "text_config": text, "insert_layer_id": 1, "image_size": 64, **_BOTH}


def _kimi_k25(layers: int) -> Config:  # latent attention, experts behind a first dense layer
    tower = {**_VISION, "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8}
    text = _text(
        layers,
        "deepseek_v3",
        num_key_value_heads=4,
        moe_intermediate_size=48,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_mtp_layers=0,
    )
    return {"vision_config": tower, "text_config": text, "projection_hidden_size": 32, **_FRAMED}


_CONFIGS: dict[str, Callable[[int], Config]] = {
    "llava": _llava,
    "vipllava": _vipllava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "llava_next_video": _llava_next_video,
    "video_llava": _video_llava,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gemma4_shared": _gemma4_shared,
    "paligemma": _paligemma,
    "mistral3": _mistral3,
    "glm4v": _glm4v,
    "glm46v": _glm4v,
    "mllama": _mllama,
    "minicpmv4_6": _minicpmv4_6,
    "kimi_k25": _kimi_k25,
}

#: Model types, each with its family.
_SERVED = {kind: family for family in FAMILIES for kind in family.model_types}


def model_type(name: str) -> str:
    """Return the ``config.model_type`` that a name stands for."""
    return name.removesuffix("_shared")


def reads(name: str, modality: str = "image") -> bool:
    """Whether the installed transformers reads images (or videos) with this model; older ones do not with some."""
    return _SERVED[model_type(name)].lacks(modality) is None


#: Every family; ``gemma4_shared`` is gemma4 whose last two layers use keys and values of earlier ones.
NAMES: tuple[str, ...] = tuple(filter(reads, _CONFIGS))

#: Those whose model takes videos. To internvl, idefics3 and smolvlm a video is a number of images.
VIDEO: tuple[str, ...] = tuple(
    name
    for name in (
        "llava_onevision",
        "llava_next_video",
        "video_llava",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_5",
        "qwen3_5_moe",
        "gemma4",
        "gemma4_shared",
        "glm4v",
        "glm46v",
        "minicpmv4_6",
    )
    if reads(name, "video")
)

#: Those that take an image and a video in one call; GLM gives both the same placeholder and counts them together.
MIXED: tuple[str, ...] = tuple(name for name in VIDEO if not name.startswith("glm"))

#: Those whose positions are one number per token, so that they can be packed.
FLAT: tuple[str, ...] = tuple(name for name in NAMES if not name.startswith(("qwen", "glm", "mllama")))


def tiny(name: str, impl: str = "sdpa", layers: int = 6, seed: int = 0) -> PreTrainedModel:
    """Return a random model in evaluation mode, with `vivid` weights; equal arguments give equal weights.

    Args:
        name: One of `NAMES`.
        impl: Attention implementation, ``sdpa`` or ``eager``.
        layers: Decoder layers.
        seed: Of the weights.
    """
    settings = _CONFIGS[name](layers)
    settings["text_config"]["tie_word_embeddings"] = False  # tied, each token would foretell itself
    config = AutoConfig.for_model(model_type(name), tie_word_embeddings=False, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=impl, dtype=torch.float32)
        return vivid(model.eval())


def vivid(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with larger weights behind its encoder, and none of them zero.

    Freshly made, attention is flat, features are faint and gates are shut: a wrong mask would hardly show.
    """
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "embed_scale"):  # gemma's words would drown out its images
                module.weight.div_(module.embed_scale)
        for name, weight in model.named_parameters():
            text = any(part in name for part in ("language_model", "text_model.", "lm_head"))
            if not weight.any() and weight.numel() == 1:
                weight.fill_(1.0)
            elif not weight.any() and weight.dim() > 1:
                nn.init.normal_(weight, std=0.2)
            elif text and weight.dim() > 1:
                sharp = "q_proj" in name or "k_proj" in name
                weight.mul_(10 if "embed_tokens" in name or "lm_head" in name else 6 if sharp else 3)
            elif weight.dim() > 1:
                weight.mul_(3)
        if model.config.model_type == "gemma4":
            for name, weight in text_stack(model).layers.named_parameters():
                # what a part of a layer adds is normed, and scores are not scaled: rounding would grow layer by layer
                if "post_" in name or "q_norm" in name:
                    weight.mul_(0.25)
    return model


def text_stack(model: PreTrainedModel) -> Any:
    """Return the decoder: embeddings, layers, final norm."""
    base = model.base_model
    return getattr(base, "language_model", None) or base.text_model


def image_token(model: PreTrainedModel) -> int:
    """Return the id that stands for one visual token of an image."""
    return int(model.config.image_token_id)


def placeholders(model: PreTrainedModel) -> list[int]:
    """Return the ids that stand for features; pass them as ``suppress_tokens``, lest a random model writes them."""
    keys = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
    return sorted({i for i in (getattr(model.config, key, None) for key in keys) if i is not None})
