"""The forward passes of training: the stock modules, called on windows of the canvas and on packed questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.demo.data import IGNORE, LABELS, MARKS
from foveate.demo.guide import RARE, Guide, Probes, told
from foveate.demo.world import COLOURS, SHAPES, WORDS

HINTED = 9
"""Decoder layer before which a question should know its answer."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
WEIGHTS = {"row": 0.15, "column": 0.15, "smallest": 0.25, "ninth": 0.5}


def pixels(batch: dict[str, Any], device: str) -> Tensor:
    """Pictures as the image processor hands them over."""
    x: Tensor = batch["pixels"].to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
    return ((x - mean) / std).contiguous()


def precision(like: Tensor) -> torch.dtype:
    """The type in which matrices are multiplied now."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention; on a CPU in bfloat16 two plain products are nearly twice as fast as the fused kernel."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


Watch = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called in every layer with its number, the hidden states before it, its queries and keys (after rotation)."""


def encode(
    tower: Any, picture: Tensor, corner: Tensor, layers: int | None = None, watch: Watch | None = None
) -> list[Tensor]:
    """Runs the vision tower on windows: a patch gets the position embedding of its place on the canvas.

    Args:
        tower: A `CLIPVisionModel`.
        picture: Windows, normalised (b, 3, h, w).
        corner: Row and column of each window's first patch on the canvas (b, 2).
        layers: How many layers to run; all unless told.
        watch: Sees what goes on in every layer.

    Returns:
        What `hidden_states` would hold.
    """
    patch = tower.config.patch_size
    rows, columns, side = picture.shape[2] // patch, picture.shape[3] // patch, tower.config.image_size // patch
    r = corner[:, 0, None, None] + torch.arange(rows, device=picture.device)[None, :, None]
    c = corner[:, 1, None, None] + torch.arange(columns, device=picture.device)[None, None, :]
    place = (r * side + c).flatten(1) + 1
    table = tower.embeddings.position_embedding.weight
    patches = tower.embeddings.patch_embedding(picture).flatten(2).transpose(1, 2)
    start = (tower.embeddings.class_embedding + table[0]).expand(len(picture), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([start.to(patches.dtype), patches + table[place].to(patches.dtype)], 1))
    kind = precision(hidden)
    states = [hidden]
    for index, layer in enumerate(tower.encoder.layers[:layers]):
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight, bias = torch.cat([m.weight for m in parts]), torch.cat([m.bias for m in parts])
        mixed = F.linear(layer.layer_norm1(hidden).to(kind), weight, bias).unflatten(2, (3, -1, attention.head_dim))
        q, k, v = mixed.permute(2, 0, 3, 1, 4)
        if watch:
            watch(index, hidden, q, k)
        hidden = hidden + attention.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden).to(kind))
        states.append(hidden)
    return states


class Heads(nn.Module):
    """Reads the dense labels off one layer's hidden states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, sum(LABELS.values()) + 3)
        self.whole = nn.Linear(width, sum(MARKS.values()))
        for reader in (self.patch, self.whole):  # a tower that has learned is not disturbed before they read it
            nn.init.zeros_(reader.weight)

    def forward(self, hidden: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Loss, and accuracy per label; mean distances begin with "_"."""
        hidden = self.norm(hidden)
        logits = self.patch(hidden[:, 1:]).flatten(0, 1).float()
        parts = logits.split([*LABELS.values(), 2, 1], 1)
        loss, scores = logits.new_zeros(()), {}
        for name, part in zip(LABELS, parts, strict=False):
            target = batch[name].flatten().to(part.device)
            if name in ("row", "column"):
                part, target = part[::3], target[::3]
            if (target != IGNORE).any():
                missed, scores[name] = told(part, target, RARE.get(name))
                loss = loss + WEIGHTS.get(name, 1.0) * missed
        there = (batch["item"].flatten() > 0).to(logits.device)
        offset = batch["offset"].flatten(0, 1).to(logits.device).float() / 14
        miss = F.smooth_l1_loss(parts[-2], offset, reduction="none").sum(1)
        loss = loss + 0.3 * (miss * there).sum() / there.sum().clamp(1)
        share = batch["mass"].flatten().to(logits.device)
        miss = (parts[-1][:, 0] - share.clamp(1e-3).log())[share > 0]
        loss = loss + F.smooth_l1_loss(miss, torch.zeros_like(miss), beta=0.2)
        scores |= {"_offset": (parts[-2] - offset)[there].abs().mean().item(), "_mass": miss.abs().mean().item()}
        pairs, words, counts = self.whole(hidden[:, 0]).float().split(list(MARKS.values()), 1)
        for name, part in (("pairs", pairs), ("words", words)):
            target = batch[name].to(part.device).float()
            loss = loss + 4 * F.binary_cross_entropy_with_logits(part, target)
        tally = batch["counts"].flatten().to(counts.device)
        loss = loss + 0.3 * F.cross_entropy(counts.reshape(-1, 5), tally)
        scores["counts"] = (counts.reshape(-1, len(SHAPES), 5).argmax(-1).flatten() == tally).float().mean().item()
        return loss, scores


def decode(decoder: Any, inputs: Tensor, positions: Tensor, seen: Tensor, prefix: int, watch: Watch) -> Tensor:
    """Runs a `LlamaModel` on prefix and questions; the same numbers as its own forward with a block mask, in less time.

    The last layer of the prefix, which nothing reads, is left out.

    Args:
        decoder: The `LlamaModel`.
        inputs: Embeddings of prefix and questions (b, prefix + t, d).
        positions: Rotary positions (b, prefix + t).
        seen: What each place of the questions may attend to (b, 1, t, prefix + t).
        prefix: Length of the prefix.
        watch: Sees what goes on in every layer.

    Returns:
        Final hidden states of the questions (b, t, d).
    """
    kind = precision(inputs)
    cos, sin = (v.to(kind)[:, None] for v in decoder.rotary_emb(inputs, positions))
    size = decoder.layers[0].self_attn.head_dim
    sin = torch.cat([-sin[..., : size // 2], sin[..., size // 2 :]], -1)
    lowest = torch.finfo(kind).min
    mask = torch.zeros(seen.shape, dtype=kind, device=inputs.device).masked_fill_(~seen, lowest)
    causal = torch.full((prefix, prefix), lowest, dtype=kind, device=inputs.device).triu(1)
    pieces = max(2, prefix // 150)
    cuts = [prefix * i // pieces for i in range(pieces + 1)]
    hidden = inputs
    for index, layer in enumerate(decoder.layers):
        attention, norm = layer.self_attn, layer.input_layernorm
        weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        normed = F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon).to(kind)
        mixed = F.linear(normed, weight).unflatten(2, (3, -1, size)).permute(2, 0, 3, 1, 4)
        (q, k), v = mixed[:2] * cos + mixed[:2].roll(size // 2, -1) * sin, mixed[2]
        watch(index, hidden, q, k)
        heard = attend(q[:, :, prefix:], k, v, mask)
        if layer is decoder.layers[-1]:
            hidden = hidden[:, prefix:]
        else:
            parts = [attend(q[:, :, i:j], k[:, :, :j], v[:, :, :j], causal[i:j, :j]) for i, j in pairwise(cuts)]
            heard = torch.cat([*parts, heard], 2)
        hidden = hidden + attention.o_proj(heard.transpose(1, 2).flatten(2))
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        normed = F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon).to(kind)
        gate, up = F.linear(normed, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])).chunk(2, -1)
        hidden = hidden + mlp.down_proj(F.silu(gate) * up)
    norm = decoder.norm
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def visible(segment: Tensor, prefix: int) -> Tensor:
    """What each place of packed questions may attend to: the prefix, and its own question up to it (b, t, prefix + t).

    Args:
        segment: Number of the question that a place belongs to, from 1; 0 is padding (b, t).
        prefix: Length of what lies before the questions.
    """
    mine = F.pad(segment + (segment == 0) * 999, (prefix, 0))
    causal = torch.ones(segment.shape[1], mine.shape[1], dtype=torch.bool, device=segment.device).tril(prefix)
    return causal & ((mine[:, None] == 0) | (mine[:, None] == mine[:, prefix:, None]))


def answers(
    model: Any, start: Tensor, batch: dict[str, Any], seen: Tensor, watch: Watch
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the decoder on one prefix per row with many questions behind it, each blind to the others.

    Every question sees exactly what it would see alone: the prefix and itself, at the same rotary positions.

    Args:
        model: A model with a `LlamaModel`.
        start: Embeddings of the prefixes (b, prefix, d).
        batch: The packed questions: ids, step and target (b, t).
        seen: What `visible` returned.
        watch: Sees what goes on in every layer.

    Returns:
        Logits at the places where an answer is to be learned, the true tokens there, the place as (row, column).
    """
    decoder, device, prefix = model.model.language_model, start.device, start.shape[1]
    ids, step, target = (batch[name].to(device) for name in ("ids", "step", "target"))
    inputs = torch.cat([start, decoder.embed_tokens(ids)], 1)
    positions = torch.cat([torch.arange(prefix, device=device).expand(len(ids), -1), prefix + step], 1)
    hidden = decode(decoder, inputs, positions, seen[:, None], prefix, watch)
    where = (target != IGNORE).nonzero()
    row, column = where.T
    return model.lm_head(hidden[row, column]).float(), target[row, column], where


def judge(
    logits: Tensor, target: Tensor, where: Tensor, batch: dict[str, Any], types: Sequence[str]
) -> dict[str, Tensor]:
    """Of each question whether its whole answer is right, as 1.0 or 0.0, by type.

    Args:
        logits: With `target` and `where` what `answers` returned.
        target: See there.
        where: See there.
        batch: The packed questions: segment and type (b, t).
        types: Names of the types.
    """
    row, column = where.T
    segment, kinds = (batch[name].to(where.device)[row, column] for name in ("segment", "type"))
    _, index = (segment + 1000 * row).unique(return_inverse=True)
    wrong = logits.new_zeros(int(index.max()) + 1).index_add_(0, index, (logits.argmax(1) != target).float())
    kind = kinds.new_zeros(len(wrong)).index_put_((index,), kinds)
    return {types[k]: (wrong[kind == k] == 0).float() for k in kind.unique().tolist()}


def naming(model: Any, visual: Tensor, batch: dict[str, Any], tokens: Any) -> Tensor:
    """Loss of reading the words for what is in a patch straight off its projected token, with the tied output head.

    It puts pictures and words into one space from the start, so that "circle" in a question finds circles.
    """
    parts = {"kind": SHAPES, "colour": COLOURS, "word": WORDS, "tens": "0123456789", "ones": "0123456789"}
    logits: Tensor = model.lm_head(F.rms_norm(visual, visual.shape[-1:])).flatten(0, 1).float()
    loss = logits.new_zeros(())
    for name, words in parts.items():
        ids = [tokens(w if name in ("tens", "ones") else f" {w}", add_special_tokens=False).input_ids[0] for w in words]
        label = batch[name].flatten() - int(name == "kind")
        known = ((label >= 0) & (label < len(ids))).nonzero()[:, 0]
        if len(known):
            target = torch.tensor(ids, device=logits.device)[label[known]]
            loss = loss + F.cross_entropy(logits[known], target) * (0.5 if name in ("tens", "ones") else 1.0)
    return loss


def read(
    model: Any, features: Tensor, batch: dict[str, Tensor], tokens: Any, probes: Probes
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, float]]:
    """Runs the decoder on one picture per row with many questions behind it, each blind to the others.

    Args:
        model: A `LlavaForConditionalGeneration`.
        features: Hidden states of the picture's patches, without CLS (b, n, d).
        batch: Labels of patches, and what `data.pack` returned, on the device of the features.
        tokens: The tokenizer.
        probes: What hidden states are asked.

    Returns:
        Logits at the places where an answer is to be learned, the true tokens there, the place as (row, column), the
        other losses by name, with that of each hint as "hints", and how right what the probes read is.
    """
    device = features.device
    visual = model.model.multi_modal_projector(features)
    embed = model.model.language_model.embed_tokens
    head = torch.tensor(tokens("<s>USER: ", add_special_tokens=False).input_ids, device=device).expand(len(visual), -1)
    start = torch.cat([embed(head), visual.to(embed.weight.dtype)], 1)
    prefix = start.shape[1]
    seen = visible(batch["segment"], prefix)
    guide = Guide(batch, tokens, head.shape[1], seen)
    losses: dict[str, Tensor] = defaultdict(lambda: visual.new_zeros((), dtype=torch.float32))
    losses["naming"] = naming(model, visual, batch, tokens)
    scores: dict[str, float] = {}

    def watch(layer: int, hidden: Tensor, q: Tensor, k: Tensor) -> None:
        losses["stray"] = losses["stray"] + guide.stray(layer, q, k)
        missed, right = probes(layer, hidden, batch, guide)
        for name, part in missed.items():
            losses[name] = losses[name] + part
        scores.update(right)
        if layer == HINTED:
            known = batch["hint"] != IGNORE
            early = model.lm_head(F.rms_norm(hidden[:, prefix:][known], hidden.shape[-1:])).float()
            losses["hints"] = F.cross_entropy(early, batch["hint"][known], reduction="none")

    return *answers(model, start, batch, seen, watch), losses, scores
