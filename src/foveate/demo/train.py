"""Trains the demo model: `python -m foveate.demo.train --out DIR --stage see --minutes 30`.

Three stages, each resumable: `see` trains the vision tower on labels of every patch; `read` trains projector and
decoder behind the frozen tower, many questions behind one picture; `joint` trains everything. Visual tokens are never
dropped or masked: small windows of the canvas come first, the whole canvas last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.demo import build
from foveate.demo.data import Mix, Stream, label, marks, pack
from foveate.demo.loop import Loop, Phase, command
from foveate.demo.network import Heads, encode, pixels, read
from foveate.demo.paint import paint
from foveate.demo.questions import TYPES, ask
from foveate.demo.world import SIDE, VALIDATION, layout

HARD = ("presence", "colour", "place", "count", "relation") * 2 + ("relation", "word", "number", "smallest")


class Trainer(Loop):
    """The demo model's recipe."""

    plan: ClassVar = {
        "see": (
            Phase(0.25, Mix(8, (1, 3), (2, 2), largest=60), 32),
            Phase(0.74, Mix(12, (2, 5), (4, 4), largest=90), 24),
            Phase(1.00, Mix(24, (5, 8), (4, 4)), 8),
        ),
        "read": (
            Phase(0.34, Mix(8, (2, 4), (1, 1), largest=34, per_type=2, types=HARD), 12),
            Phase(0.675, Mix(14, (3, 6), (1, 1), largest=70, per_type=2, types=HARD), 8),
            Phase(1.00, Mix(24, (4, 7), (2, 2), per_type=2, types=HARD), 6),
        ),
        "joint": (Phase(1.00, Mix(24, (4, 7), (2, 2), per_type=3, types=HARD), 8),),
    }
    rates: ClassVar = {"see": (2e-3, 1e-3), "read": (2e-3, 1e-3), "joint": (3e-4, 2e-4)}

    def build(self, seed: int) -> None:
        self.tokens = build.tokenizer()
        self.model = build.model(self.tokens, seed=seed)
        self.tower: Any = self.model.model.vision_tower
        self.where_is = nn.ModuleList([nn.Linear(256, 2), nn.Linear(256, 2)])
        self.heads = nn.ModuleList([Heads(192), Heads(192), *self.where_is])

    def parts(self) -> Sequence[nn.Module]:
        model = self.model.model
        return {
            "see": [self.tower, self.heads],
            "read": [model.multi_modal_projector, model.language_model, self.where_is],
            "joint": [self.model, self.heads],
        }[self.stage]

    def stream(self, phase: Phase, batch: int, seed: int) -> Any:
        return Stream(phase.mix, batch, seed, self.tokens)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        picture, corner = pixels(batch, self.device), batch["corner"].to(self.device)
        if self.stage == "read":
            with torch.no_grad():
                states = encode(self.tower, picture, corner, layers=7)
            return self._answers(states[-1][:, 1:], batch)
        states = encode(self.tower, picture, corner)
        main, scores = self.heads[0](states[-2], batch)
        last, _ = self.heads[1](states[-1], batch)
        total = main + 0.25 * last
        if self.stage == "joint":
            answer, scores = self._answers(states[-2][:, 1:], batch)
            total = answer + 0.1 * total
        return total, scores

    def _answers(self, features: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        logits, target, where, extra = read(self.model, features, batch, self.tokens, self.where_is)
        loss = F.cross_entropy(logits, target) + extra
        with torch.no_grad():
            right = (logits.argmax(1) == target).cpu()
        kinds = batch["type"][where[:, 0].cpu(), where[:, 1].cpu()]
        whole = batch["segment"][where[:, 0].cpu(), where[:, 1].cpu()] + 1000 * where[:, 0].cpu()
        _, index = whole.unique(return_inverse=True)
        wrong = torch.zeros(int(index.max()) + 1).index_add_(0, index, (~right).float())
        kind = torch.zeros(len(wrong), dtype=torch.long).index_put_((index,), kinds)
        scores = {TYPES[k]: (wrong[kind == k] == 0).float().mean().item() for k in kind.unique().tolist()}
        return loss, scores

    @torch.no_grad()
    def validate(self, n: int = 48) -> dict[str, float]:
        """Scores on fixed scenes of the validation seeds, whole canvas."""
        sums: dict[str, list[float]] = defaultdict(list)
        for start in range(0, n, 8):
            samples: list[dict[str, Any]] = []
            asked = []
            for seed in VALIDATION[start : start + 8]:
                objects, prints = layout(np.random.default_rng([seed, 1]))
                image, owner = paint(np.random.default_rng([seed, 2]), objects, prints)
                asked.append(ask(np.random.default_rng([seed, 3]), objects, prints, 2))
                samples.append(
                    {"pixels": image, "corner": np.zeros(2, np.int64)}
                    | label(objects, prints, owner, (0, 0, SIDE, SIDE)) | marks(objects, prints)
                )  # fmt: skip
            batch: dict[str, Any] = {k: torch.from_numpy(np.stack([s[k] for s in samples])) for k in samples[0]}
            batch |= pack(asked, self.tokens)
            with torch.autocast(self.device, torch.bfloat16):
                _, scores = self.loss(batch)
            for name, value in scores.items():
                sums[name].append(value)
        result = {name: sum(v) / len(v) for name, v in sums.items()}
        return {"mean": sum(result.values()) / len(result)} | result


if __name__ == "__main__":
    command(Trainer, __doc__)
