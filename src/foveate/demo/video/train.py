"""Trains the video model: `python -m foveate.demo.video.train --out DIR --stage read --minutes 59`.

It starts from the demo model and learns projector and decoder behind the frozen tower, with many questions behind one
clip. Visual tokens are never dropped or masked: short clips of few shapes come first, clips of all lengths last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.demo.loop import Loop, Phase, command
from foveate.demo.network import judge
from foveate.demo.video import build
from foveate.demo.video.data import Mix, Stream, collate, describe
from foveate.demo.video.network import LABELLED, Heads, features, read
from foveate.demo.video.questions import TYPES, ask
from foveate.demo.video.world import LENGTHS, VALIDATION, layout

SHARES = {"naming": 0.1, "astray": 0.3, "stray": 0.5, "early": 0.25, "late": 0.35, "hint": 0.5}
"""Weights of the losses beside that of the answers."""
HARD = (*TYPES, "vanishes", "appears", "there", "order", "count")


class Trainer(Loop):
    """The recipe of the video model."""

    plan: ClassVar = {
        "read": (
            Phase(0.19, Mix((4,), (2, 3), types=HARD), 4),
            Phase(0.48, Mix((8,), (3, 5), types=HARD), 4),
            Phase(1.00, Mix(LENGTHS, (3, 5), types=HARD), 4),
        ),
    }
    rates: ClassVar = {"read": (1.2e-3, 6e-4)}

    def build(self, seed: int) -> None:
        """Sets the tokenizer, the model with the demo model's weights, and the readers of labels."""
        self.processor = build.processor()
        self.tokens = self.processor.tokenizer
        self.model = build.model(self.tokens, seed)
        self.heads = nn.ModuleList([Heads(self.model.config.text_config.hidden_size) for _ in LABELLED])

    def parts(self) -> Sequence[nn.Module]:
        """What this stage learns."""
        inner = self.model.model
        return [inner.multi_modal_projector, inner.language_model, self.heads]

    def stream(self, phase: Phase, batch: int, seed: int) -> Any:
        """Batches without end."""
        return Stream(phase.mix, batch, seed, self.tokens)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Loss and scores of one batch."""
        with torch.no_grad():
            rows = features(self.model.model.vision_tower, batch, self.device)
        logits, target, where, losses, scores = read(self.model, rows, batch, self.tokens, self.heads)
        loss = F.cross_entropy(logits, target) + sum(SHARES[name] * part for name, part in losses.items())
        found = judge(logits, target, where, batch, TYPES)
        scores |= {f"_{name}": part.item() for name, part in losses.items()}
        return loss, scores | {name: each.mean().item() for name, each in found.items()}

    @torch.no_grad()
    def validate(self, n: int = 24) -> dict[str, float]:
        """Scores on fixed clips of the validation seeds, as many of each length."""
        sums: dict[str, list[float]] = defaultdict(list)
        for start in range(0, n, 4):
            frames = LENGTHS[start // 4 % len(LENGTHS)]
            samples = []
            for seed in VALIDATION[start : start + 4]:
                _, lives = layout(np.random.default_rng([seed, 11]), frames)
                questions = ask(np.random.default_rng([seed, 13]), frames, lives, 2)
                samples.append(describe(frames, lives, np.random.default_rng([seed, 12]), questions))
            with torch.autocast(self.device, torch.bfloat16):
                _, scores = self.loss(collate(samples, self.tokens))
            for name, value in scores.items():
                sums[name].append(value)
        result = {name: sum(v) / len(v) for name, v in sums.items()}
        return {"mean": sum(result[k] for k in TYPES) / len(TYPES)} | result


if __name__ == "__main__":
    command(Trainer, __doc__)
