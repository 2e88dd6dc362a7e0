"""What tower and decoder are shown while they learn: where heads should look, what hidden states should know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.demo.data import IGNORE, LABELS
from foveate.demo.world import COLOURS, GRID, PATCH, SHAPES

GROUPED = (2, 3, 4)
"""Tower layers whose first two heads look from a patch at the patches of its item, the second at CLS as well."""
GUIDED = (2, 4, 6)
"""Decoder layers whose first two heads look from the name of a shape at its patches, the second at each shape alike."""
OTHER = (5, 6)
"""Decoder layers whose third head learns to look from the second of two names at the first."""
ASKED = (4, 5)
"""Decoder layers whose fourth head learns to look from the second of two names at the word that relates them."""
SIGHTED = (2, 6)
"""Decoder layers before which a visual token should know `KNOWN`, its place, the middle of its item and its share."""
KNOWN = ("size", "ninth", "tens", "ones", "smallest")
"""Labels that a visual token should know in the decoder."""
PLACED = 5
"""Decoder layer before which the name of a shape should know where the shape is."""
COMPARED = 7
"""Decoder layer before which the second of two names should know how far the first is off, and a name how many."""
JUDGED = 8
"""Decoder layer before which the second of two names should know how far the first is off in the way that is asked."""
SINK = 3.0
"""Weight of the first token against one per shape, when a head counts shapes by where its attention goes."""
COUNTED, SEVERAL = 4.0, 3.0
"""Weights of how much goes to the first token, beside where the rest goes; of names of several shapes, beside one."""
REST = 4.0
"""Weight of CLS against one per covered patch, when a head measures an item by where its attention goes."""
WAYS = {"left": (0.0, 1.0), "right": (0.0, -1.0), "above": (1.0, 0.0), "below": (-1.0, 0.0)}
"""A word that relates two names -> the way from the first to the second as (down, right) where the answer is yes."""
UNIT = 6.0
"""Patches that make one unit of the places that are read off hidden states."""
CLEAR = 2.5
"""Least distance in patches at which two shapes count as one beside the other."""
RARE = {"kind": 0.15, "smallest": 1 / 3}
"""Label -> weight of its class 0, which most patches have."""


def told(logits: Tensor, target: Tensor, zero: float | None) -> tuple[Tensor, float]:
    """Loss and accuracy of reading a label off tokens.

    Args:
        logits: (m, classes).
        target: The label (m,), `IGNORE` where a token has none; some have one.
        zero: Weight of class 0 against one of any other, if most tokens have it: the accuracy leaves it out.
    """
    known = target != IGNORE
    logits, target = logits[known], target[known]
    weight = torch.ones(logits.shape[1], device=logits.device)
    weight[0] = 1.0 if zero is None else zero
    right = (logits.argmax(1) == target)[target >= (0 if zero is None else 1)].float()
    return F.cross_entropy(logits, target, weight), right.mean().item() if len(right) else 1.0


def astray(looks: Tensor, goal: Tensor) -> Tensor:
    """How far attention (m, keys), before the softmax, is from going anywhere but to the goal (m, keys)."""
    missed: Tensor = looks.logsumexp(1) - looks.masked_fill(~goal, -1e4).logsumexp(1)
    return missed.mean()


def uneven(looks: Tensor, goal: Tensor, weight: Tensor | None = None) -> Tensor:
    """How far attention (m, keys), before the softmax, is from being shared as the goal says (m, keys)."""
    share = goal / goal.sum(1, keepdim=True)
    missed: Tensor = (share * (share.clamp(1e-6).log() - looks.log_softmax(1))).sum(1)
    return missed.mean() if weight is None else (missed * weight).sum() / weight.sum().clamp(1e-6)


def plain(hidden: Tensor) -> Tensor:
    """Hidden states of one size, a large one: what reads them learns fast."""
    return 4 * F.rms_norm(hidden, hidden.shape[-1:])


def together(index: int, q: Tensor, k: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """How far the heads of a tower layer are from looking from every patch at its item (b, heads, 1 + n, head_dim)."""
    if index not in GROUPED:
        return q.new_zeros((), dtype=torch.float32)
    item, share = batch["item"], batch["mass"]
    row, patch = (share > 0).nonzero().T
    goal = F.pad((item[row] == item[row, patch][:, None]) * batch["cover"][row], (1, 0))
    total = q.new_zeros((), dtype=torch.float32)
    for head, rest in ((0, 0.0), (1, REST)):
        goal[:, 0] = rest
        looks = (q[:, head, 1:] @ k[:, head].transpose(1, 2))[row, patch].float() * q.shape[-1] ** -0.5
        total = total + uneven(looks, goal, share[row, patch])
    return total


class Sights(nn.Module):
    """Reads off a visual token in the decoder its place, the middle of its item, its share of it, and some labels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widths = [LABELS[name] for name in KNOWN]
        self.read = nn.Linear(width, 5 + sum(self.widths))
        nn.init.zeros_(self.read.weight)

    def forward(self, hidden: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss, and scores: the place and the middle as mean distances in patches, the share as a logarithm."""
        where, middle, part_of, *parts = self.read(plain(hidden)).float().split([2, 2, 1, *self.widths], -1)
        place, shown, share = places(batch), batch["item"] > 0, batch["mass"]
        loss = F.smooth_l1_loss(where, place, beta=0.1)
        miss = (middle - place - batch["offset"].flip(-1) / PATCH / UNIT)[shown]
        loss = loss + F.smooth_l1_loss(miss, torch.zeros_like(miss), beta=0.1)
        off = (part_of[..., 0] - share.clamp(1e-3).log())[share > 0]
        loss = loss + F.smooth_l1_loss(off, torch.zeros_like(off), beta=0.2)
        scores = {
            "place": (where - place).abs().mean().item() * UNIT, "middle": miss.abs().mean().item() * UNIT,
            "mass": off.abs().mean().item(),
        }  # fmt: skip
        for name, part in zip(KNOWN, parts, strict=True):
            target = batch[name]
            if (target != IGNORE).any():
                missed, scores[name] = told(part.flatten(0, 1), target.flatten(), RARE.get(name))
                loss = loss + 0.5 * missed
        return loss, scores


def places(batch: dict[str, Tensor]) -> Tensor:
    """Row and column of every patch on the canvas, from its middle, in `UNIT` (b, n, 2)."""
    return (torch.stack([batch["row"], batch["column"]], -1).float() - (GRID - 1) / 2) / UNIT


def point(batch: dict[str, Tensor], tokens: Any) -> tuple[Tensor, Tensor]:
    """Which patches a token of the questions is about.

    Returns:
        The patches of the shape that a token names, of the colour named just before it, if one is, and of the item
        that a question without names is about (b, t, n); and which tokens name a shape (b, t).
    """
    device = batch["ids"].device
    shape = torch.full((len(tokens),), -1, device=device)
    colour = torch.full((len(tokens),), -1, device=device)
    for i, word in enumerate(SHAPES):
        for name in (f" {word}", f" {word}{'es' if word == 'cross' else 's'}"):
            shape[tokens(name, add_special_tokens=False).input_ids[0]] = i
    for i, word in enumerate(COLOURS):
        colour[tokens(f" {word}", add_special_tokens=False).input_ids[0]] = i
    ids, kind = batch["ids"], batch["kind"][:, None]
    what = torch.where(batch["target"] == IGNORE, shape[ids], -1)[..., None]
    tint = colour[ids].roll(1, 1)[..., None]
    same = (what >= 0) & (what == kind - 1) & ((tint < 0) | (tint == batch["colour"][:, None]))
    about = batch["about"][..., None]
    sort = torch.where(kind > 0, (kind - len(SHAPES)).clamp(0), IGNORE)
    there = (sort >= 0) & ((3 * batch["ninth"][:, None] + sort == about) | ((sort > 0) & (27 + sort == about)))
    there |= (about == 27) & (batch["smallest"] == 1)[:, None]
    return same | there, what[..., 0] >= 0


class Guide:
    """Where heads of the decoder should look.

    Args:
        batch: Labels of patches, and what `data.pack` returned.
        tokens: The tokenizer.
        head: Tokens before the first visual token.
        seen: What each place of the questions may attend to (b, t, keys).
    """

    def __init__(self, batch: dict[str, Tensor], tokens: Any, head: int, seen: Tensor) -> None:
        n = batch["kind"].shape[1]
        self.visual, self.prefix, self.seen = slice(head, head + n), head + n, seen
        self.named, self.names = point(batch, tokens)
        self.rows = self.named.any(-1)
        share = self.named.float()
        self.place = (share / share.sum(-1, keepdim=True).clamp(1)) @ places(batch)
        shapes = (self.named * batch["mass"][:, None])[self.names]
        self.counts, self.count = F.pad(shapes, (1, 0), value=SINK), shapes.sum(-1).round().long().clamp(max=4)
        self.second = (batch["other"] >= 0).nonzero()
        row, name = self.second.T
        first = batch["other"][row, name]
        keys = torch.arange(seen.shape[2], device=seen.device) - self.prefix
        self.first, self.word = keys == first[:, None], keys == first[:, None] + 1  # a name, and the word behind it
        ways = torch.zeros(len(tokens), dtype=torch.long, device=seen.device)
        for i, word in enumerate(WAYS):
            ways[tokens(f" {word}", add_special_tokens=False).input_ids[0]] = i
        self.way = ways[batch["ids"][row, first + 1]]
        self.gap = self.place[row, name] - self.place[row, first]
        self.ahead = (self.gap * torch.tensor(list(WAYS.values()), device=seen.device)[self.way]).sum(1)

    def stray(self, index: int, q: Tensor, k: Tensor) -> Tensor:
        """How far the heads of a layer are from looking where they should."""
        total, scale = q.new_zeros((), dtype=torch.float32), q.shape[-1] ** -0.5
        q, first, visual = q[:, :, self.prefix :], k[:, :, :1], k[:, :, self.visual]
        if index in GUIDED and self.rows.any():
            looks = (q[:, 0] @ visual[:, 0].transpose(1, 2))[self.rows].float() * scale
            total = total + astray(looks, self.named[self.rows])
        if index in GUIDED and self.names.any():
            looks = (q[:, 1] @ torch.cat([first, visual], 2)[:, 1].transpose(1, 2))[self.names].float() * scale
            weight = 1.0 + SEVERAL * (self.count > 1)
            total = total + uneven(looks, self.counts, weight)
            looks = torch.stack([looks[:, 0], looks[:, 1:].logsumexp(1)], 1)
            both = torch.stack([self.counts[:, 0], self.counts[:, 1:].sum(1)], 1)
            total = total + COUNTED * uneven(looks, both, weight)
        for layers, head, goal in ((OTHER, 2, self.first), (ASKED, 3, self.word)):
            if index in layers and len(self.second):
                row, name = self.second.T
                looks = (q[:, head] @ k[:, head].transpose(1, 2))[row, name].float() * scale
                total = total + astray(looks.masked_fill(~self.seen[row, name], -1e4), goal)
        return total


class Probes(nn.Module):
    """What hidden states in the middle of the decoder are asked while training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sights = nn.ModuleDict({str(layer): Sights(width) for layer in SIGHTED})
        self.place, self.gap = nn.Linear(width, 2), nn.Linear(width, 4)
        self.way, self.ahead = nn.Linear(width, len(WAYS)), nn.Linear(width, 2)
        self.tally = nn.Linear(width, 5)
        for reader in (self.place, self.gap, self.way, self.ahead, self.tally):
            nn.init.zeros_(reader.weight)

    def forward(
        self, layer: int, hidden: Tensor, batch: dict[str, Tensor], guide: Guide
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Losses and scores of what the hidden states before a layer should tell (b, prefix + t, d)."""
        losses: dict[str, Tensor] = {}
        scores: dict[str, float] = {}
        if layer in SIGHTED:
            losses["sights"], right = self.sights[str(layer)](hidden[:, guide.visual], batch)
            scores = {f"_{name}{layer}": value for name, value in right.items()}
        asked = hidden[:, guide.prefix :]
        if layer == PLACED and guide.rows.any():
            miss = self.place(plain(asked[guide.rows])).float() - guide.place[guide.rows]
            losses["place"] = F.smooth_l1_loss(miss, torch.zeros_like(miss), beta=0.1)
            scores["_place"] = miss.abs().mean().item() * UNIT
        if layer == COMPARED and guide.names.any():
            found = self.tally(plain(asked[guide.names])).float()
            losses["tally"] = F.cross_entropy(found, guide.count)
            scores["_tally"] = (found.argmax(1) == guide.count).float().mean().item()
        if layer in (COMPARED, JUDGED) and len(guide.second):
            names = plain(asked[guide.second[:, 0], guide.second[:, 1]])
            gap, reader = (guide.gap, self.gap) if layer == COMPARED else (guide.ahead[:, None], self.ahead)
            found, side = reader(names).float().chunk(2, 1)
            clear = gap.abs() * UNIT >= CLEAR
            wrong = F.binary_cross_entropy_with_logits(side[clear], (gap[clear] > 0).float(), reduction="sum")
            losses["gap"] = F.smooth_l1_loss(found, gap, beta=0.1) + wrong / clear.sum().clamp(1)
            right = (((side > 0) == (gap > 0)) & clear).sum().item() / max(1, int(clear.sum()))
            scores["_gap" if layer == COMPARED else "_ahead"] = right
            if layer == COMPARED:
                losses["gap"] = losses["gap"] + F.cross_entropy(self.way(names).float(), guide.way)
        return losses, scores
