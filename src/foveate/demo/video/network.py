"""The forward passes of training: the stock modules, called on clips and on packed questions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.demo.data import IGNORE
from foveate.demo.guide import astray, told
from foveate.demo.network import answers, encode, pixels, visible
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
RARE = {"kind": 0.15, "gone": 0.1, "state": 0.4}
"""Label -> weight of its class 0, which most visual tokens have."""


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
        for name, part in zip(LABELS, logits.split(list(LABELS.values()), 1), strict=True):
            target = batch[name].flatten().to(part.device)
            if (target != IGNORE).any():
                missed, right = told(part, target, RARE.get(name))
                loss = loss + WEIGHTS.get(name, 1.0) * missed
                if name != "first":
                    scores[f"_{name}"] = right
        return loss, scores


class Guide:
    """Watches a decoder: where its heads should look, and what its tokens know in the middle.

    Args:
        batch: Labels of the visual tokens.
        head: Tokens before the first visual token.
        goal: Which visual tokens each place of the questions should look at; none where it is free (b, t, n).
    """

    def __init__(self, batch: dict[str, Any], head: int, goal: Tensor) -> None:
        device = goal.device
        kind = batch["kind"].to(device)
        b, n = kind.shape
        self.head, self.prefix, self.goal, self.rows = head, head + n, goal, goal.any(-1)
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
        self.labelled = list[Tensor]()
        """Hidden states of the visual tokens after the `LABELLED` layers (b, n, d)."""
        self.hinted = torch.empty(0)
        """Hidden states of the questions after `HINTED` (b, t, d)."""
        self.astray = self.stray = torch.zeros((), device=device)
        """How far heads of the visual tokens, and of the questions, are from looking where they should."""

    def __call__(self, index: int, hidden: Tensor, q: Tensor, k: Tensor) -> None:
        """Looks at a layer, see `foveate.demo.network.Watch`."""
        visual = slice(self.head, self.prefix)
        if index - 1 in LABELLED:
            self.labelled.append(hidden[:, visual])
        if index - 1 == HINTED:
            self.hinted = hidden[:, self.prefix :]
        if index in GUIDED and self.rows.any():
            looks = (q[:, 0, self.prefix :] @ k[:, 0, visual].transpose(1, 2))[self.rows].float() * q.shape[-1] ** -0.5
            self.stray = self.stray + astray(looks, self.goal[self.rows]) / len(GUIDED)
        for heads, rows, goal in ((BACK, self.some, self.back), (FIRST, self.some, self.first),
                                  (SAME, self.covered, self.same)):  # fmt: skip
            if index in heads and len(rows):
                missed = self._missed(q[:, heads[index]], k[:, heads[index]], rows, goal)
                self.astray = self.astray + missed / (len(BACK) + len(FIRST) + len(SAME))

    def _missed(self, q: Tensor, k: Tensor, rows: Tensor, goal: Tensor) -> Tensor:
        """How far a head is from looking, from some tokens (as batch, place), only at each one's goal (m, prefix)."""
        scores = (q @ k[:, : self.prefix].transpose(1, 2))[rows[:, 0], rows[:, 1]].float() * q.shape[-1] ** -0.5
        later = torch.arange(self.prefix, device=q.device) > rows[:, 1:]
        return astray(scores.masked_fill(later, -1e4), goal)


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
    b = len(visual)
    head = torch.tensor(tokens("<s>USER: ", add_special_tokens=False).input_ids, device=device).expand(b, -1)
    start = torch.cat([embed(head), visual.to(embed.weight.dtype)], 1)
    segment = batch["segment"].to(device)
    goal = batch["goal"].to(device)[torch.arange(b, device=device)[:, None], segment]
    goal = goal & (batch["look"].to(device) == 1)[..., None]
    guide = Guide(batch, head.shape[1], goal)
    said = answers(model, start, batch, visible(segment, start.shape[1]), guide)
    early, late = guide.labelled
    hint = batch["hint"].to(device)
    middle = guide.hinted[hint != IGNORE]
    known = model.lm_head(F.rms_norm(middle, middle.shape[-1:])).float()
    first, _ = heads[0](early, batch)
    second, scores = heads[1](late, batch)
    losses = {
        "naming": naming(model, visual, batch, tokens), "astray": guide.astray, "stray": guide.stray, "early": first,
        "late": second, "hint": F.cross_entropy(known, hint[hint != IGNORE]),
    }  # fmt: skip
    return *said, losses, scores
