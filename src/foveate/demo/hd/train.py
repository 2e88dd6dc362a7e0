"""Trains demo-hd: `python -m foveate.demo.hd.train --out DIR --stage see --minutes 20`.

Two stages, each resumable, on the weights of the demo model: `see` trains the vision tower on labels of every patch
of crops and thumbnails; `read` trains projector, newline and decoder behind the frozen tower, many questions behind one
picture or two. Visual tokens are never dropped or masked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.demo.hd import build
from foveate.demo.hd.data import Mix, Stream, collate
from foveate.demo.hd.network import Heads, Probes, frames, read, see
from foveate.demo.hd.questions import TYPES
from foveate.demo.hd.world import PAIRS, SIZES, VALIDATION, Look, contents
from foveate.demo.loop import Loop, Phase, command
from foveate.demo.network import judge

FIRST = tuple(PAIRS.items())
"""The smallest pictures, two crops with a border."""
TALL = tuple((size, grid) for size, grid in SIZES.items() if grid[0] * grid[1] == 2)
"""Pictures of two crops."""


class Trainer(Loop):
    """The recipe of demo-hd."""

    plan: ClassVar[dict[str, tuple[Phase, ...]]] = {
        "see": (
            Phase(0.15, Mix(look=Look((34, 70), (80, 180), (38, 56))), 24),
            Phase(0.45, Mix(look=Look((24, 56), (80, 180), (26, 42))), 24),
            Phase(1.00, Mix(look=Look((19, 50), (80, 180), (19, 32))), 24),
        ),
        "read": (
            Phase(0.25, Mix(FIRST, pair=0.25, questions=18), 2200),
            Phase(0.53, Mix(TALL, pair=0.30, questions=18), 2200),
            Phase(1.00, Mix(pair=0.25, questions=18), 2200),
        ),
    }
    rates: ClassVar[dict[str, tuple[float, float]]] = {"see": (1.5e-3, 1e-3), "read": (1.5e-3, 1e-3)}

    def build(self, seed: int) -> None:
        """The model as training starts."""
        self.processor = build.processor()
        self.tokens = self.processor.tokenizer
        self.model = build.model(self.tokens, seed)
        self.tower: Any = self.model.model.vision_tower
        self.probes = Probes(256)
        self.heads = nn.ModuleList([Heads(192), Heads(192), self.probes])

    def parts(self) -> Sequence[nn.Module]:
        """What this stage learns."""
        inner = self.model.model
        if self.stage == "see":
            return [self.tower, self.heads]
        return [inner.multi_modal_projector, inner.language_model, self.probes, nn.ParameterList([inner.image_newline])]

    def stream(self, phase: Phase, batch: int, seed: int) -> Any:
        """Training data of a phase."""
        return Stream(phase.mix, batch, seed, self.tokens)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Loss and scores of one batch in this stage."""
        picture = frames(batch, self.device)
        if self.stage == "read":
            with torch.no_grad():
                states = see(self.tower, picture, layers=7)
            loss, found = self._answers(states[-1][:, 1:], batch)
            return loss, {name: each.mean().item() for name, each in found.items()}
        states = see(self.tower, picture)
        main, scores = self.heads[0](states[-2], batch)
        last, _ = self.heads[1](states[-1], batch)
        return main + 0.25 * last, scores

    def _answers(self, features: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of reading, and of each question whether its whole answer was right, by type."""
        logits, target, where, extra = read(self.model, features, batch, self.tokens, self.probes)
        return F.cross_entropy(logits, target) + extra, judge(logits, target, where, batch, TYPES)

    @torch.no_grad()
    def validate(self, n: int = 32) -> dict[str, float]:
        """Scores on fixed samples of the validation seeds."""
        sums: dict[str, list[float]] = defaultdict(list)
        with torch.autocast(self.device, torch.bfloat16):
            if self.stage == "see":
                for batch in islice(Stream(Mix(), 24, VALIDATION[0]), 6):
                    for name, value in self.loss(batch)[1].items():
                        sums[name].append(value)
            for seed in VALIDATION[:n] if self.stage != "see" else ():
                size, items = contents(seed)
                batch = collate(
                    np.random.default_rng([seed, 26]), size, (SIZES | PAIRS)[size], [items], 12, self.tokens
                )
                features = see(self.tower, frames(batch, self.device), layers=7)[-1][:, 1:]
                for name, each in self._answers(features, batch)[1].items():
                    sums[name] += each.tolist()
        result = {name: sum(v) / len(v) for name, v in sums.items()}
        return {"mean": sum(result.values()) / len(result)} | result


if __name__ == "__main__":
    command(Trainer, __doc__)
