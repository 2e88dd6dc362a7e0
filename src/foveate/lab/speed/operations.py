"""How many operations and how many bytes of keys and values an answer takes, by formula.

A matrix product of n rows with W weights takes 2 n W operations; scores and their mix take 4 n s w, for n rows that
see s and heads of total width w (all pairs are counted, also those that a causal mask hides). So

    encoder   sum over layers of 2 r W + 4 r s v, r rows of width v, of which s see each other;
              and 2 W per patch for the patch embedding, per visual token for what brings features to the decoder
    prefill   sum over layers of 2 n W + 4 n^2 w, n the text and the visual tokens alive in that layer;
              and 2 d V for the logits of one row

with W read from the model itself (of experts, the share that a token is sent to). Norms, rotations, activations and
what a method computes are left out; windows of a decoder and keys that layers share are counted as if they were not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveate.families import CrossFamily
from foveate.lab.speed.work import Work


@dataclass(frozen=True)
class Operations:
    """What the formulas need of one prompt.

    Args:
        encode_gflop: Encoder and all that brings its features to the decoder.
        text: Tokens that are not visual.
        weights: Of each decoder layer, those a token meets.
        mixing: Width of all heads.
        head: Weights of the last product.
        kv_bytes: Keys and values of one token in one layer.
    """

    encode_gflop: float
    text: int
    weights: tuple[float, ...]
    mixing: int
    head: int
    kv_bytes: int

    @classmethod
    def of(cls, work: Work) -> Operations | None:
        """Count a model's weights; None where the formulas are others: recurrent layers, text that looks across."""
        model, family = work.model, work.family
        config, layers = model.config.get_text_config(), family.layers(model)
        if isinstance(family, CrossFamily) or not all(hasattr(layer, "self_attn") for layer in layers):
            return None
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        row = getattr(config, "kv_lora_rank", None)  # keys and values are made from one short row
        per_token = row + config.qk_rope_head_dim if row else 2 * keys * width
        return cls(
            encode_gflop=_encode(work) / 1e9,
            text=work.text,
            weights=tuple(_weights(layer, _share(config)) for layer in layers),
            mixing=config.num_attention_heads * width,
            head=model.get_output_embeddings().weight.numel(),
            kv_bytes=per_token * model.dtype.itemsize,
        )

    def prefill_gflop(self, alive: Sequence[float]) -> float:
        """Operations of the decoder, given the visual tokens alive in each layer."""
        layers = zip(self.weights, alive, strict=True)
        flop = sum(2 * (self.text + n) * w + 4 * (self.text + n) ** 2 * self.mixing for w, n in layers)
        return float(flop + 2 * self.head) / 1e9

    def first_token_gflop(self, alive: Sequence[float]) -> float:
        """Operations until the first token."""
        return self.encode_gflop + self.prefill_gflop(alive)

    def kv_mib(self, alive: Sequence[float]) -> float:
        """Keys and values of the prompt."""
        return self.kv_bytes * sum(self.text + n for n in alive) / 2**20


def _encode(work: Work) -> float:
    """Operations of everything but the language model."""
    model, family = work.model, work.family
    base: Any = family.base(model)
    layers, config = family.encoder_layers(model, "image"), model.config.vision_config
    inside = {module for layer in layers for module in layer.modules()}
    tower = family.tower(model, "image")
    towers = [family.tower(model, modality) for modality in family.modalities]
    others = [family.decoder(model), *(one for one in towers if one is not tower)]
    elsewhere = {module for one in others for module in one.modules()}
    patches = after = 0
    for name, module in base.named_modules():
        if module in inside or module in elsewhere or not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            continue
        embeds = "embed" in name or "patch_conv" in name
        patches += module.weight.numel() * embeds
        after += module.weight.numel() * (not embeds)
    rows, width = work.rows, int(getattr(config, "embed_dim", None) or config.hidden_size)
    seen = _seen(config, rows / work.forwards, len(layers))
    through = sum(2 * rows * _weights(layer, 1.0) + 4 * rows * s * width for layer, s in zip(layers, seen, strict=True))
    return through + 2 * rows * patches + 2 * work.tokens * after


def _seen(config: Any, forward: float, layers: int) -> list[float]:
    """How many rows each row sees in each layer of the encoder: those of its forward, or of its window."""
    everywhere, window = getattr(config, "fullatt_block_indexes", None), getattr(config, "window_size", None)
    if everywhere is None or window is None:
        return [forward] * layers
    return [forward if i in everywhere else min(forward, (window // config.patch_size) ** 2) for i in range(layers)]


def _weights(layer: nn.Module, share: float) -> float:
    """Weights of a layer's matrices that one row meets; experts are stacked in a third dimension."""
    return sum(p.numel() * (share if p.dim() == 3 else 1.0) for p in layer.parameters() if p.dim() >= 2)


def _share(config: Any) -> float:
    """The share of all experts that a token is sent to."""
    experts = getattr(config, "num_experts", None) or getattr(config, "n_routed_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0
