"""The forward passes of training: the stock modules, called on windows of the canvas and on packed questions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.demo.data import IGNORE, LABELS, MARKS
from foveate.demo.world import COLOURS, SHAPES, WORDS

GUIDED = (2, 4, 6)
"""Decoder layers whose first head learns to look from the name of a shape at its patches."""
PLACED = 5
"""Decoder layer before which the name of a shape should know where the shape is."""
COMPARED = 7
"""Decoder layer before which the second of two names should know how far the first is off."""
SINK = 3.0
"""Weight of the first token against one per object, when a head counts objects by where its attention goes."""
HINTED = 8
"""Decoder layer after which the name of a shape should know the answer to a question about it."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
WEIGHTS = {"word": 1.0, "sign": 1.0, "row": 0.15, "column": 0.15, "centre": 0.5, "smallest": 0.25, "size": 0.5}


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


def encode(tower: Any, picture: Tensor, corner: Tensor, layers: int | None = None) -> list[Tensor]:
    """Runs the vision tower on windows: a patch gets the position embedding of its place on the canvas.

    Args:
        tower: A `CLIPVisionModel`.
        picture: Windows, normalised (b, 3, h, w).
        corner: Row and column of each window's first patch on the canvas (b, 2).
        layers: How many layers to run; all unless told.

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
    for layer in tower.encoder.layers[:layers]:
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight, bias = torch.cat([m.weight for m in parts]), torch.cat([m.bias for m in parts])
        mixed = F.linear(layer.layer_norm1(hidden).to(kind), weight, bias).unflatten(2, (3, -1, attention.head_dim))
        heard = attend(*mixed.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        hidden = hidden + attention.out_proj(heard)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden).to(kind))
        states.append(hidden)
    return states


class Heads(nn.Module):
    """Reads the dense labels off one layer's hidden states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, sum(LABELS.values()) + 2)
        self.whole = nn.Linear(width, sum(MARKS.values()))

    def forward(self, hidden: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Loss, and accuracy per label."""
        hidden = self.norm(hidden)
        logits = self.patch(hidden[:, 1:]).flatten(0, 1).float()
        parts = logits.split([*LABELS.values(), 2], 1)
        loss, scores = logits.new_zeros(()), {}
        for (name, classes), part in zip(LABELS.items(), parts, strict=False):
            target = batch[name].flatten().to(part.device)
            if name in ("row", "column"):
                part, target = part[::3], target[::3]
            weight = torch.ones(classes, device=part.device)
            if name == "kind":
                weight[0] = 0.15
            if name in ("centre", "smallest"):
                weight[1] = 3.0
            known = target != IGNORE
            if not known.any():
                continue
            loss = loss + WEIGHTS.get(name, 1.0) * F.cross_entropy(part, target, weight, ignore_index=IGNORE)
            rare = known & (target > 0) if name in ("kind", "centre", "smallest") else known
            scores[name] = (part.argmax(1) == target)[rare].float().mean().item()
        there = (batch["kind"].flatten() > 0).to(logits.device)
        offset = batch["offset"].flatten(0, 1).to(logits.device).float() / 14
        miss = F.smooth_l1_loss(parts[-1], offset, reduction="none").sum(1)
        loss = loss + 0.3 * (miss * there).sum() / there.sum().clamp(1)
        pairs, words, counts = self.whole(hidden[:, 0]).float().split(list(MARKS.values()), 1)
        for name, part in (("pairs", pairs), ("words", words)):
            target = batch[name].to(part.device).float()
            loss = loss + 4 * F.binary_cross_entropy_with_logits(part, target)
        tally = batch["counts"].flatten().to(counts.device)
        loss = loss + 0.3 * F.cross_entropy(counts.reshape(-1, 5), tally)
        scores["counts"] = (counts.reshape(-1, len(SHAPES), 5).argmax(-1).flatten() == tally).float().mean().item()
        return loss, scores


Watch = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called in every layer of a decoder with its number, the hidden states before it, its rotated queries and keys."""


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


def astray(q: Tensor, k: Tensor, prefix: int, named: Tensor, middles: Tensor) -> Tensor:
    """How far two heads are from looking, from the name of a shape, the first at its patches, the second at the middles
    of its objects and, for what is left, at the first token.

    Args:
        q: Rotated queries of a layer (b, heads, prefix + t, d).
        k: Its rotated keys (b, heads, prefix + t, d).
        prefix: Length of the prefix.
        named: Which patches show what a token names (b, t, n).
        middles: Which of these are the middle of their object; tokens that name no shape are -1 (b, t, n).

    Returns:
        The loss, a scalar.
    """
    size, rows, patches = q.shape[-1], named.any(-1), slice(prefix - named.shape[2], prefix)
    counted = middles[..., 0] >= 0
    goal = torch.cat([torch.full_like(middles[..., :1], SINK), middles], -1)[counted].float()
    goal = goal / goal.sum(1, keepdim=True)
    looks = (q[:, 0, prefix:] @ k[:, 0, patches].transpose(1, 2))[rows].float() * size**-0.5
    stray = -(looks.masked_fill(~named[rows], -1e4).logsumexp(1) - looks.logsumexp(1)).mean()
    keys = torch.cat([k[:, 1, :1], k[:, 1, patches]], 1)
    counts = (q[:, 1, prefix:] @ keys.transpose(1, 2))[counted].float() * size**-0.5
    total: Tensor = stray - (goal * (counts.log_softmax(1) - goal.clamp(1e-6).log())).sum(1).mean()
    return total


def point(batch: dict[str, Any], tokens: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which patches show the shape that a token names, of the colour named just before it, if one is (b, t, n).

    Returns:
        Those patches, and as 0 and 1 the middles of objects among them, -1 in the rows of tokens that name no shape.
    """
    shape = torch.full((len(tokens),), -1)
    colour = torch.full((len(tokens),), -1)
    for i, word in enumerate(SHAPES):
        for name in (f" {word}", f" {word}{'es' if word == 'cross' else 's'}"):
            shape[tokens(name, add_special_tokens=False).input_ids[0]] = i
    for i, word in enumerate(COLOURS):
        colour[tokens(f" {word}", add_special_tokens=False).input_ids[0]] = i
    ids = batch["ids"].cpu()
    what = torch.where(batch["target"].cpu() == IGNORE, shape[ids], -1)
    tint = colour[ids].roll(1, 1)
    kind, hue = batch["kind"].cpu() - 1, batch["colour"].cpu()
    same = (what[:, :, None] == kind[:, None]) & ((tint[:, :, None] < 0) | (tint[:, :, None] == hue[:, None]))
    same &= (what >= 0)[:, :, None]
    about = batch["about"].cpu()[:, :, None]
    item = torch.stack([batch["column"], batch["row"]], -1).cpu() * 14 + 7 + batch["offset"].cpu()
    ninth = (item // 112).clamp(0, 2)
    sort = (batch["kind"].cpu() - len(SHAPES)).clamp(0) + (batch["kind"].cpu() <= 0) * 99
    there = (3 * (3 * ninth[..., 1] + ninth[..., 0]) + sort)[:, None] == about
    there |= (about == 27) & (batch["smallest"].cpu() == 1)[:, None]
    middles = (same & (batch["centre"].cpu() == 1)[:, None]).long() - (what < 0).long()[:, :, None]
    return (same | there).to(device), middles.to(device)


def naming(model: Any, visual: Tensor, batch: dict[str, Any], tokens: Any) -> Tensor:
    """Loss of reading the words for what is in a patch straight off its projected token, with the tied output head.

    It puts pictures and words into one space from the start, so that "circle" in a question finds circles.
    """
    parts = {"kind": SHAPES, "colour": COLOURS, "word": WORDS, "tens": "0123456789", "ones": "0123456789"}
    logits: Tensor = model.lm_head(F.rms_norm(visual, visual.shape[-1:])).flatten(0, 1).float()
    loss = logits.new_zeros(())
    for name, words in parts.items():
        ids = [tokens(w if name in ("tens", "ones") else f" {w}", add_special_tokens=False).input_ids[0] for w in words]
        label = batch[name].flatten().to(logits.device) - int(name == "kind")
        known = ((label >= 0) & (label < len(ids))).nonzero()[:, 0]
        if len(known):
            target = torch.tensor(ids, device=logits.device)[label[known]]
            loss = loss + F.cross_entropy(logits[known], target) * (0.5 if name in ("tens", "ones") else 1.0)
    return loss


def read(
    model: Any, features: Tensor, batch: dict[str, Any], tokens: Any, where_is: nn.ModuleList
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the decoder on one picture per row with many questions behind it, each blind to the others.

    Every question sees exactly what it would see alone: the prefix and itself, at the same rotary positions.

    Args:
        model: A `LlavaForConditionalGeneration`.
        features: Hidden states of the picture's patches, without CLS (b, n, d).
        batch: What `data.pack` returned.
        tokens: The tokenizer.
        where_is: Reads row and column of a named shape off the hidden state of its name, and how far two are apart.

    Returns:
        Logits at the places where an answer is to be learned, the true tokens there, the place as (row, column), and
        the loss of `naming` and of looking astray, see `astray`.
    """
    device = features.device
    visual = model.model.multi_modal_projector(features)
    embed = model.model.language_model.embed_tokens
    ids, segment, step, target = (batch[name].to(device) for name in ("ids", "segment", "step", "target"))
    b, n, t = len(visual), visual.shape[1], ids.shape[1]
    head = torch.tensor(tokens("<s>USER: ", add_special_tokens=False).input_ids, device=device).expand(b, -1)
    prefix = head.shape[1] + n
    inputs = torch.cat([embed(head), visual.to(embed.weight.dtype), embed(ids)], 1)
    positions = torch.cat([torch.arange(prefix, device=device).expand(b, -1), prefix + step], 1)
    mine = torch.cat([torch.zeros(b, prefix, dtype=torch.long, device=device), segment + (segment == 0) * 999], 1)
    causal = torch.ones(t, prefix + t, dtype=torch.bool, device=device).tril(prefix)
    asker = mine[:, prefix:, None]
    seen = causal & ((mine[:, None, :] == 0) | (mine[:, None, :] == asker))
    named, middles = point(batch, tokens, device)
    states: dict[int, Tensor] = {}
    strays: list[Tensor] = []

    def watch(layer: int, hidden: Tensor, q: Tensor, k: Tensor) -> None:
        states[layer] = hidden[:, prefix:]
        if layer in GUIDED:
            strays.append(astray(q, k, prefix, named, middles))

    hidden = decode(model.model.language_model, inputs, positions, seen[:, None], prefix, watch)
    early, late, middle = states[PLACED], states[COMPARED], states[HINTED + 1]
    stray = torch.stack(strays).mean()
    where = (target != IGNORE).nonzero()
    logits = model.lm_head(hidden[where[:, 0], where[:, 1]]).float()
    extra = 0.1 * naming(model, visual, batch, tokens) + 1.0 * stray
    if named.any():
        patches = torch.stack([batch["row"], batch["column"]], -1).to(device).float() / 24
        share = named.float() / named.sum(-1, keepdim=True).clamp(1)
        place = share @ patches
        found = where_is[0](F.rms_norm(early[named.any(-1)], early.shape[-1:])).float()
        extra = extra + 3 * F.smooth_l1_loss(found, place[named.any(-1)], beta=0.1)
        i, j = (batch["other"].to(device) >= 0).nonzero(as_tuple=True)
        if len(i):
            gap = place[i, j] - place[i, batch["other"].to(device)[i, j]]
            found = where_is[1](F.rms_norm(late[i, j], late.shape[-1:])).float()
            extra = extra + 3 * F.smooth_l1_loss(found, gap, beta=0.1)
    hint = batch["hint"].to(device)
    if (hint != IGNORE).any():
        known = model.lm_head(F.rms_norm(middle[hint != IGNORE], middle.shape[-1:])).float()
        extra = extra + F.cross_entropy(known, hint[hint != IGNORE])
    return logits, target[where[:, 0], where[:, 1]], where, extra
