"""Model families: one file each, found by ``config.model_type``."""

from __future__ import annotations

from typing import Any

from foveate.errors import UnsupportedModel, did_you_mean
from foveate.families.base import Family
from foveate.families.cross import CrossFamily
from foveate.families.gemma3 import Gemma3
from foveate.families.gemma4 import Gemma4
from foveate.families.glm4v import Glm4v
from foveate.families.idefics3 import Idefics3, SmolVLM
from foveate.families.internvl import InternVL
from foveate.families.kimi_k25 import KimiK25
from foveate.families.llava import Llava
from foveate.families.llava_next import LlavaNext
from foveate.families.llava_next_video import LlavaNextVideo
from foveate.families.llava_onevision import LlavaOnevision
from foveate.families.minicpmv4_6 import MiniCPMV46
from foveate.families.mistral3 import Mistral3
from foveate.families.mllama import Mllama
from foveate.families.paligemma import PaliGemma
from foveate.families.picture import Picture
from foveate.families.qwen2_vl import Qwen2VL, Qwen25VL
from foveate.families.qwen3_5 import Qwen35
from foveate.families.qwen3_vl import Qwen3VL
from foveate.families.releases import installed, upgrade
from foveate.families.video_llava import VideoLlava
from foveate.families.vipllava import VipLlava

FAMILIES: tuple[Family, ...] = (
    Llava(),
    VipLlava(),
    LlavaNext(),
    LlavaNextVideo(),
    LlavaOnevision(),
    VideoLlava(),
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    Qwen35(),
    Glm4v(),
    InternVL(),
    Idefics3(),
    SmolVLM(),
    Gemma3(),
    Gemma4(),
    PaliGemma(),
    Mistral3(),
    Mllama(),
    KimiK25(),
    MiniCPMV46(),
)

#: Models that cannot be served, and why.
REFUSED = {
    "gemma3n": "between its layers every token has several versions at once, and late layers share keys and values",
}

__all__ = [
    "FAMILIES",
    "CrossFamily",
    "Family",
    "Gemma3",
    "Gemma4",
    "Glm4v",
    "Idefics3",
    "InternVL",
    "KimiK25",
    "Llava",
    "LlavaNext",
    "LlavaNextVideo",
    "LlavaOnevision",
    "MiniCPMV46",
    "Mistral3",
    "Mllama",
    "PaliGemma",
    "Picture",
    "Qwen25VL",
    "Qwen2VL",
    "Qwen35",
    "Qwen3VL",
    "SmolVLM",
    "VideoLlava",
    "VipLlava",
    "family_of",
]


def family_of(model: Any) -> Family:
    """Return the family that serves a model.

    Raises:
        UnsupportedModel: If none does; names the families that exist, or the transformers that it needs.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        raise UnsupportedModel(
            f"expected a transformers model with a config, got {type(model).__name__}",
            "load it with `AutoModelForImageTextToText.from_pretrained(...)`",
        )
    known = {model_type: family for family in FAMILIES for model_type in family.model_types}
    if kind in REFUSED:
        raise UnsupportedModel(f"{kind} is not served: {REFUSED[kind]}", "type `foveate families` to see what is")
    if kind not in known:
        raise UnsupportedModel(f"no family serves model_type {kind!r}", did_you_mean(kind, known))
    lacks = [known[kind].lacks(modality) for modality in known[kind].modalities]
    if all(lacks):
        raise UnsupportedModel(f"{kind} needs transformers >= {lacks[0]}, found {installed()}", upgrade(str(lacks[0])))
    if not hasattr(model, "generate"):
        raise UnsupportedModel(
            f"{type(model).__name__} has no language-model head", "pass the ...ForConditionalGeneration model"
        )
    family = known[kind].variant(model)
    family.check(model)
    return family
