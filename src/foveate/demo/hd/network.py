"""The forward passes of training: what the stock model computes, for many questions behind one picture or two."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.demo.data import IGNORE
from foveate.demo.guide import astray, told
from foveate.demo.hd.data import LABELS, MARKS
from foveate.demo.network import answers, encode, pixels, visible
from foveate.demo.world import COLOURS, SHAPES, WORDS

LETTERS = 36
GUIDED = (2, 4, 6)
"""Decoder layers whose first head learns to look from the end of a question at the patches that it is about."""
PLACED = 6
"""Decoder layer before which a visual token should know which picture it is of, and whether the first has its shape."""
HINTED = 8
"""Decoder layer after which the end of a question should know the answer."""
CLASS = {"faint": 2.0, "word": 1.5}
"""Weights of labels in the loss; one where not given."""
RARE = {"kind": 0.15, "faint": 1.0}
"""Label -> weight of its class 0, which most patches have."""


def frames(batch: dict[str, Any], device: str) -> Tensor:
    """All frames of a batch as the image processor hands them over (n, 3, 336, 336)."""
    return pixels({"pixels": batch["pixels"].flatten(0, -4)}, device)


def see(tower: Any, picture: Tensor, layers: int | None = None) -> list[Tensor]:
    """Hidden states of the tower, see `foveate.demo.network.encode`."""
    return encode(tower, picture, torch.zeros(len(picture), 2, dtype=torch.long, device=picture.device), layers)


class Heads(nn.Module):
    """Reads the labels of patches and crops off one layer's hidden states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, sum(LABELS.values()) + LETTERS)
        self.whole = nn.Linear(width, sum(MARKS.values()))

    def forward(self, hidden: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Loss, and accuracy per label."""
        hidden = self.norm(hidden)
        logits = self.patch(hidden[:, 1:]).flatten(0, 1).float()
        parts = logits.split([*LABELS.values(), LETTERS], 1)
        loss, scores = logits.new_zeros(()), {}
        for name, part in zip(LABELS, parts, strict=False):
            target = batch[name].flatten().to(part.device)
            if (target != IGNORE).any():
                missed, scores[name] = told(part, target, RARE.get(name))
                loss = loss + CLASS.get(name, 1.0) * missed
        letters = batch["letters"].flatten(0, -2).to(logits.device)
        read = (letters.sum(1) > 0).nonzero()[:, 0]
        if len(read):
            goal = letters[read].float() / letters[read].sum(1, keepdim=True)
            loss = loss + F.cross_entropy(parts[-1][read], goal)
        pairs, words = self.whole(hidden[:, 0]).float().split(list(MARKS.values()), 1)
        for name, part in (("pairs", pairs), ("words", words)):
            target = batch[name].flatten(0, -2).to(part.device)
            known = target != IGNORE
            if known.any():
                loss = loss + 4 * F.binary_cross_entropy_with_logits(part[known], target[known].float())
        return loss, scores


def order(model: Any, size: Sequence[int], count: int) -> Tensor:
    """Which patch of a picture each of its visual tokens shows, pushed through the stock model's own packing.

    Args:
        model: A `LlavaNextForConditionalGeneration`.
        size: Width and height of the picture.
        count: Patches of all frames of the picture.

    Returns:
        Indices into the patches of all frames; `count` where the token is a newline.
    """
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    index = torch.arange(count, dtype=torch.float64).view(-1, patches, 1)
    newline = torch.tensor([float(count)], dtype=torch.float64)
    packed, _ = model.model.pack_image_features([index], torch.tensor([[size[1], size[0]]]), "default", newline)
    tokens: Tensor = packed[0][:, 0].long()
    return tokens


@lru_cache
def _names(tokens: Any) -> tuple[tuple[str, float, int, Tensor], ...]:
    """What a patch is to be called: label, weight, its first class that has a name, tokens of the names."""

    def first(words: Sequence[str]) -> Tensor:
        return torch.tensor([tokens(word, add_special_tokens=False).input_ids[0] for word in words])

    digits = first("0123456789")
    return (
        ("kind", 1.0, 1, first([*(f" {w}" for w in SHAPES), " sign", " sign"])),
        ("colour", 1.0, 0, first([f" {w}" for w in COLOURS])), ("faint", 1.0, 1, first([" faint"])),
        ("word", 1.0, 0, first([f" {w}" for w in WORDS])), ("tens", 0.5, 0, digits), ("ones", 0.5, 0, digits),
    )  # fmt: skip


def naming(model: Any, visual: Tensor, labels: dict[str, Tensor], tokens: Any) -> Tensor:
    """Loss of reading the words for what is in a patch straight off its projected token, with the tied output head.

    Args:
        model: The model.
        visual: Projected tokens (..., d).
        labels: What is in each, see `data.LABELS`.
        tokens: The tokenizer.

    Returns:
        The loss, a scalar.
    """
    shown = (labels["kind"].flatten() > 0).nonzero()[:, 0]
    token = visual.flatten(0, -2)[shown]
    logits: Tensor = model.lm_head(F.rms_norm(token, token.shape[-1:])).float()
    loss = logits.new_zeros(())
    for name, weight, start, names in _names(tokens):
        label = labels[name].flatten()[shown] - start
        known = (label >= 0).nonzero()[:, 0]
        if len(known):
            loss = loss + weight * F.cross_entropy(logits[known], names.to(logits.device)[label[known]])
    return loss


class Probes(nn.Module):
    """Reads off a visual token which of two pictures it is of, and whether its shape is new in the second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.whose, self.new = nn.Linear(width, 2), nn.Linear(width, 2)

    def forward(self, hidden: Tensor, picture: Tensor, other: Tensor) -> Tensor:
        """Loss for tokens (b, n, d), their picture and whether they are new, `IGNORE` where nothing is to be known."""
        hidden = F.rms_norm(hidden, hidden.shape[-1:])
        mine = F.cross_entropy(self.whose(hidden).flatten(0, 1).float(), picture.flatten(), ignore_index=IGNORE)
        known = other != IGNORE
        if not known.any():
            return mine
        return mine + 2 * F.cross_entropy(self.new(hidden[known]).float(), other[known])


def read(
    model: Any, features: Tensor, batch: dict[str, Any], tokens: Any, probes: Probes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the decoder on one picture or a pair per row with many questions behind, each blind to the others.

    Args:
        model: A `LlavaNextForConditionalGeneration`.
        features: Hidden states of the patches of all frames, without CLS (rows * pictures * frames, patches, d).
        batch: What `data.collate` returned.
        tokens: The tokenizer.
        probes: What visual tokens are asked in the middle of the decoder.

    Returns:
        Logits at the places where an answer is to be learned, the true tokens there, the place as (row, column), and
        the loss of `naming`, of looking astray, of `probes` and of knowing the answer early.
    """
    device = features.device
    embed = model.model.language_model.embed_tokens
    b, pictures, count, patches = batch["kind"].shape
    projected = model.model.multi_modal_projector(features).view(b, pictures, count * patches, -1)
    newline = model.model.image_newline.to(projected.dtype).expand(b, pictures, 1, -1)
    index = order(model, batch["size"], count * patches).to(device)
    visual = torch.cat([projected, newline], 2)[:, :, index]

    def spread(labels: Tensor, blank: int) -> Tensor:
        """Labels of patches as labels of the prefix from the first visual token on."""
        each = F.pad(labels.to(device).flatten(2), (0, 1), value=blank)[:, :, index]
        return F.pad(each, (0, 1), value=blank).flatten(1)[:, :-1]

    head = torch.tensor(tokens("<s>USER: ", add_special_tokens=False).input_ids, device=device).expand(b, -1)
    line = torch.tensor(tokens("\n", add_special_tokens=False).input_ids, device=device).expand(b, -1)
    rows = [embed(head)]
    for k in range(pictures):
        rows += [embed(line)] * (k > 0) + [visual[:, k].to(embed.weight.dtype)]
    start = torch.cat(rows, 1)
    prefix = start.shape[1]
    shown = slice(head.shape[1], prefix)

    item = spread(batch["item"], 0).clamp(0)
    width = len(index) + 1
    about = batch["about"].to(device)
    named = torch.cat(
        [
            about[:, :, k].gather(2, item[:, None, k * width : (k + 1) * width].expand(-1, about.shape[1], -1))
            for k in range(pictures)
        ],
        2,
    )
    looking = named.any(-1)
    extra = [0.1 * naming(model, projected, {n: batch[n].to(device) for n in LABELS}, tokens)]

    def watch(layer: int, hidden: Tensor, q: Tensor, k: Tensor) -> None:
        if layer in GUIDED and looking.any():
            looks = (q[:, 0, prefix:] @ k[:, 0, shown].transpose(1, 2))[looking].float() * q.shape[-1] ** -0.5
            extra.append(astray(looks, named[looking]) / len(GUIDED))
        if layer == PLACED and pictures == 2:
            of = torch.arange(2, device=device)[None, :, None, None].expand(batch["kind"].shape)
            there = spread(torch.where(batch["kind"].to(device) > 0, of, IGNORE), IGNORE)
            extra.append(probes(hidden[:, shown], there, spread(batch["other"], IGNORE)))
        if layer == HINTED + 1:
            hint = batch["hint"].to(device)
            early = hidden[:, prefix:][hint != IGNORE]
            known = model.lm_head(F.rms_norm(early, early.shape[-1:])).float()
            extra.append(0.5 * F.cross_entropy(known, hint[hint != IGNORE]))

    seen = visible(batch["segment"].to(device), prefix)
    return *answers(model, start, batch, seen, watch), torch.stack(extra).sum()
