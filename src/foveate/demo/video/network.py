"""The forward passes of training: the stock modules, called on clips and on packed questions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.demo.data import IGNORE
from foveate.demo.network import attend, encode, pixels, precision
from foveate.demo.video.data import CELLS, LABELS
from foveate.demo.world import COLOURS, SHAPES

BACK = {1: 3, 3: 3}
"""Decoder layer -> the head that learns to look at the same place one frame earlier."""
FIRST = {2: 2, 4: 2}
"""Decoder layer -> the head that learns to look at the same place in the first frame."""
SAME = {2: 3, 4: 3}
"""Decoder layer -> the head that learns to look at the same shape in the first frame, or else at the first token."""
LABELLED = (4, 7)
"""Decoder layers after which a visual token should know its labels."""
GUIDED = (6, 8)
"""Decoder layers whose first head learns to look from a question at the visual tokens that hold its answer."""
HINTED = 9
"""Decoder layer after which the question mark should know the answer."""
WEIGHTS = {"first": 0.2, "former": 0.5, "rank": 0.7}


def features(tower: Any, batch: dict[str, Any], device: str) -> Tensor:
    """What the projector gets for each visual token of a clip (b, n, d)."""
    b, frames = batch["pixels"].shape[:2]
    picture = pixels({"pixels": batch["pixels"].flatten(0, 1)}, device)
    corner = torch.zeros(len(picture), 2, dtype=torch.long, device=device)
    hidden = encode(tower, picture, corner, layers=7)[-1][:, 1:]
    side = picture.shape[2] // tower.config.patch_size
    pooled = hidden.unflatten(1, (side // 2, 2, side // 2, 2)).mean((2, 4))
    rows: Tensor = pooled.reshape(b, frames * CELLS, -1)
    return rows


class Heads(nn.Module):
    """Reads the labels off the visual tokens' hidden states after one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, sum(LABELS.values()))

    def forward(self, hidden: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Loss, and accuracy per label."""
        logits = self.read(F.rms_norm(hidden, hidden.shape[-1:])).flatten(0, 1).float()
        loss, scores = logits.new_zeros(()), {}
        for (name, classes), part in zip(LABELS.items(), logits.split(list(LABELS.values()), 1), strict=True):
            target = batch[name].flatten().to(part.device)
            known = (target != IGNORE).nonzero()[:, 0]
            if not len(known):
                continue
            weight = torch.ones(classes, device=part.device)
            weight[0] = {"kind": 0.15, "gone": 0.1, "state": 0.4}.get(name, 1.0)
            part, target = part[known], target[known]
            loss = loss + WEIGHTS.get(name, 1.0) * F.cross_entropy(part, target, weight)
            if name != "first":
                rare = target > 0 if name in ("kind", "gone", "state") else target >= 0
                scores[f"_{name}"] = (part.argmax(1) == target)[rare].float().mean().item() if rare.any() else 1.0
        return loss, scores


def _looks(q: Tensor, k: Tensor, head: int, rows: Tensor, goal: Tensor, causal: Tensor) -> Tensor:
    """How far a head is from looking, from some tokens (as batch, place), only at each one's goal (m, keys)."""
    scores = (q[:, head] @ k[:, head].transpose(1, 2))[rows[:, 0], rows[:, 1]].float() * q.shape[-1] ** -0.5
    scores = scores + causal[rows[:, 1]].float()
    missed: Tensor = scores.logsumexp(1) - scores.masked_fill(~goal, -1e4).logsumexp(1)
    return missed.mean()


class Guide:
    """Where the heads of the prefix should look.

    Args:
        batch: Labels of the visual tokens.
        head: Tokens before the first visual token.
        device: Where to compute.
    """

    def __init__(self, batch: dict[str, Any], head: int, device: torch.device) -> None:
        kind = batch["kind"].to(device)
        b, n = kind.shape
        some = torch.randint(CELLS, n, (64,), device=device)
        rows = torch.stack([torch.arange(b, device=device).repeat_interleave(64), some.repeat(b) + head], 1)
        place = torch.arange(n + head, device=device)
        self.some, self.back = rows, place == rows[:, 1:] - CELLS
        self.first = place == (rows[:, 1:] - head) % CELLS + head
        covered = (kind > 0).nonzero()
        self.covered = covered[covered[:, 1] >= CELLS]
        there = kind[self.covered[:, 0]] == kind[self.covered[:, 0], self.covered[:, 1], None]
        there[:, CELLS:] = False
        self.same = F.pad(there, (head, 0))
        self.same[:, 0] = ~there.any(1)
        self.covered = self.covered + torch.tensor([0, head], device=device)

    def stray(self, index: int, q: Tensor, k: Tensor, causal: Tensor) -> Tensor:
        """How far the heads of a layer are from looking where they should."""
        total = q.new_zeros((), dtype=torch.float32)
        if index in BACK:
            total = total + _looks(q, k, BACK[index], self.some, self.back, causal)
        if index in FIRST:
            total = total + _looks(q, k, FIRST[index], self.some, self.first, causal)
        if index in SAME and len(self.covered):
            total = total + _looks(q, k, SAME[index], self.covered, self.same, causal)
        return total


def decode(
    decoder: Any, inputs: Tensor, positions: Tensor, seen: Tensor, prefix: int, guide: Guide | None, goal: Tensor
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Runs a `LlamaModel` on prefix and questions; the same numbers as its own forward with a block mask, in less time.

    The last layer of the prefix, which nothing reads, is left out.

    Args:
        decoder: The `LlamaModel`.
        inputs: Embeddings of prefix and questions (b, prefix + t, d).
        positions: Rotary positions (b, prefix + t).
        seen: What each place of the questions may attend to (b, 1, t, prefix + t).
        prefix: Length of the prefix.
        guide: Where heads of the prefix should look.
        goal: Which visual tokens each place of the questions should look at; none where it is free (b, t, n).

    Returns:
        Final hidden states of the questions (b, t, d), those of the visual tokens after the `LABELLED` layers, those
        of the questions after `HINTED`, and how far heads of the prefix and of the questions look astray.
    """
    kind = precision(inputs)
    cos, sin = (v.to(kind)[:, None] for v in decoder.rotary_emb(inputs, positions))
    size = decoder.layers[0].self_attn.head_dim
    sin = torch.cat([-sin[..., : size // 2], sin[..., size // 2 :]], -1)
    mask = torch.zeros(seen.shape, dtype=kind, device=inputs.device).masked_fill_(~seen, torch.finfo(kind).min)
    causal = torch.full((prefix, prefix), torch.finfo(kind).min, dtype=kind, device=inputs.device).triu(1)
    hidden = inputs
    tapped, middle = [], hidden[:, prefix:]
    rows, visual = goal.any(-1), slice(prefix - goal.shape[2], prefix)
    astray = stray = hidden.new_zeros(())
    pieces = max(2, prefix // 150)
    cuts = [prefix * i // pieces for i in range(pieces + 1)]
    for index, layer in enumerate(decoder.layers):
        attention, norm = layer.self_attn, layer.input_layernorm
        weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        normed = F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon).to(kind)
        mixed = F.linear(normed, weight).unflatten(2, (3, -1, size)).permute(2, 0, 3, 1, 4)
        q, k = mixed[:2] * cos + mixed[:2].roll(size // 2, -1) * sin
        v = mixed[2]
        asked = attend(q[:, :, prefix:], k, v, mask)
        if index in GUIDED and rows.any():
            looks = (q[:, 0, prefix:] @ k[:, 0, visual].transpose(1, 2))[rows].float() * size**-0.5
            stray = stray - (looks.masked_fill(~goal[rows], -1e4).logsumexp(1) - looks.logsumexp(1)).mean()
        if guide is not None:
            astray = astray + guide.stray(index, q[:, :, :prefix], k[:, :, :prefix], causal)
        if layer is decoder.layers[-1]:
            hidden, heard = hidden[:, prefix:], asked
        else:
            parts = [attend(q[:, :, a:z], k[:, :, :z], v[:, :, :z], causal[a:z, :z]) for a, z in pairwise(cuts)]
            heard = torch.cat([*parts, asked], 2)
        hidden = hidden + attention.o_proj(heard.transpose(1, 2).flatten(2))
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        normed = F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon).to(kind)
        gate, up = F.linear(normed, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])).chunk(2, -1)
        hidden = hidden + mlp.down_proj(F.silu(gate) * up)
        if index in LABELLED:
            tapped.append(hidden[:, visual])
        if index == HINTED:
            middle = hidden[:, prefix:]
    norm = decoder.norm
    hidden = F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return hidden, [*tapped, middle], astray / (len(BACK) + len(FIRST) + len(SAME)), stray / len(GUIDED)


def naming(model: Any, visual: Tensor, batch: dict[str, Any], tokens: Any) -> Tensor:
    """Loss of reading the words for what is in a cell straight off its projected token, with the tied output head."""
    logits: Tensor = model.lm_head(F.rms_norm(visual, visual.shape[-1:])).flatten(0, 1).float()
    loss = logits.new_zeros(())
    for name, words in (("kind", SHAPES), ("colour", COLOURS)):
        ids = torch.tensor([tokens(f" {w}", add_special_tokens=False).input_ids[0] for w in words], device=loss.device)
        target = batch[name].flatten().to(loss.device) - int(name == "kind")
        known = (target >= 0).nonzero()[:, 0]
        loss = loss + F.cross_entropy(logits[known], ids[target[known]])
    return loss


def read(
    model: Any, rows: Tensor, batch: dict[str, Any], tokens: Any, heads: nn.ModuleList
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, float]]:
    """Runs the decoder on one clip per row with many questions behind it, each blind to the others.

    Every question sees exactly what it would see alone: the prefix and itself, at the same rotary positions.

    Args:
        model: A `LlavaNextVideoForConditionalGeneration`.
        rows: What `features` returned (b, n, d).
        batch: What `data.collate` returned.
        tokens: The tokenizer.
        heads: A `Heads` for each of `LABELLED`.

    Returns:
        Logits at the places where an answer is to be learned, the true tokens there, the place as (row, column), the
        other losses, and how often labels of the visual tokens are right.
    """
    device = rows.device
    visual = model.model.multi_modal_projector(rows)
    embed = model.model.language_model.embed_tokens
    ids, segment, step, target = (batch[name].to(device) for name in ("ids", "segment", "step", "target"))
    b, n, t = len(visual), visual.shape[1], ids.shape[1]
    head = torch.tensor(tokens("<s>USER: ", add_special_tokens=False).input_ids, device=device).expand(b, -1)
    prefix = head.shape[1] + n
    inputs = torch.cat([embed(head), visual.to(embed.weight.dtype), embed(ids)], 1)
    positions = torch.cat([torch.arange(prefix, device=device).expand(b, -1), prefix + step], 1)
    mine = torch.cat([torch.zeros(b, prefix, dtype=torch.long, device=device), segment + (segment == 0) * 999], 1)
    causal = torch.ones(t, prefix + t, dtype=torch.bool, device=device).tril(prefix)
    seen = causal & ((mine[:, None, :] == 0) | (mine[:, None, :] == mine[:, prefix:, None]))
    goal = batch["goal"].to(device)[torch.arange(b, device=device)[:, None], segment]
    goal = goal & (batch["look"].to(device) == 1)[..., None]
    guide = Guide(batch, head.shape[1], device)
    hidden, (early, late, middle), astray, stray = decode(
        model.model.language_model, inputs, positions, seen[:, None], prefix, guide, goal
    )
    where = (target != IGNORE).nonzero()
    logits = model.lm_head(hidden[where[:, 0], where[:, 1]]).float()
    hint = batch["hint"].to(device)
    known = model.lm_head(F.rms_norm(middle[hint != IGNORE], middle.shape[-1:])).float()
    first, _ = heads[0](early, batch)
    second, scores = heads[1](late, batch)
    losses = {
        "naming": naming(model, visual, batch, tokens), "astray": astray, "stray": stray, "early": first,
        "late": second, "hint": F.cross_entropy(known, hint[hint != IGNORE]),
    }  # fmt: skip
    return logits, target[where[:, 0], where[:, 1]], where, losses, scores
