"""Trains the demo model: `python -m foveate.demo.train --out DIR --stage see --minutes 30`.

Three stages, each resumable: `see` trains the vision tower on labels of every patch; `read` trains projector and
decoder behind the frozen tower, many questions behind one picture; `joint` trains everything. Visual tokens are never
dropped or masked: small windows of the canvas come first, the whole canvas last. With `--weights FOLDER` a run begins
with the weights of a saved model.
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
from foveate.demo.data import IGNORE, Mix, Stream, label, marks, pack
from foveate.demo.guide import Probes, together
from foveate.demo.loop import Loop, Phase, command
from foveate.demo.network import Heads, encode, judge, pixels, read
from foveate.demo.paint import paint
from foveate.demo.questions import TYPES, ask
from foveate.demo.world import SIDE, VALIDATION, layout

HARD = (*TYPES, "relation", "count", "number", "smallest", "place")
SHARES = {"naming": 0.1, "stray": 0.3, "sights": 0.7, "place": 1.0, "gap": 1.0, "tally": 0.5, "hints": 0.5}
"""Weights of the losses beside that of the answers."""
WEIGHTS = {"count": 2.0, "number": 2.0}
"""Weights of types of question; one where not given."""


class Trainer(Loop):
    """The demo model's recipe."""

    plan: ClassVar = {
        "see": (
            Phase(0.10, Mix(8, (1, 3), (2, 2), largest=60), 32),
            Phase(0.50, Mix(12, (2, 5), (4, 4), largest=90), 24),
            Phase(1.00, Mix(24, (5, 8), (4, 4)), 8),
        ),
        "read": (
            Phase(0.30, Mix(12, (3, 5), (2, 2), largest=60, per_type=2, types=HARD), 6),
            Phase(1.00, Mix(24, (4, 7), (2, 2), per_type=2, types=HARD), 4),
        ),
        "joint": (Phase(1.00, Mix(24, (4, 7), (2, 2), per_type=2, types=HARD), 6),),
    }
    rates: ClassVar = {"see": (2e-3, 1e-3), "read": (1.2e-3, 8e-4), "joint": (1e-3, 7e-4)}

    def build(self, seed: int) -> None:
        self.processor = build.processor()
        self.tokens = self.processor.tokenizer
        self.model = build.model(self.tokens, seed=seed)
        self.tower: Any = self.model.model.vision_tower
        self.probes = Probes(256)
        self.heads = nn.ModuleList([Heads(192), Heads(192), self.probes])

    def parts(self) -> Sequence[nn.Module]:
        model = self.model.model
        return {
            "see": [self.tower, self.heads],
            "read": [model.multi_modal_projector, model.language_model, self.probes],
            "joint": [self.model, self.heads],
        }[self.stage]

    def careful(self) -> Sequence[nn.Module]:
        """What of it learns slowly: a tower that has learned to see."""
        return [self.tower] if self.stage == "joint" else []

    def stream(self, phase: Phase, batch: int, seed: int) -> Any:
        return Stream(phase.mix, batch, seed, self.tokens)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Loss and scores of one batch in this stage."""
        batch = {name: value.to(self.device) for name, value in batch.items()}
        picture, corner = pixels(batch, self.device), batch["corner"]
        if self.stage == "read":
            with torch.no_grad():
                states = encode(self.tower, picture, corner, layers=7)
            return self._answers(states[-1][:, 1:], batch)
        stray: list[Tensor] = []
        states = encode(
            self.tower, picture, corner, watch=lambda layer, _, q, k: stray.append(together(layer, q, k, batch))
        )
        main, scores = self.heads[0](states[-2], batch)
        last, _ = self.heads[1](states[-1], batch)
        astray = torch.stack(stray).sum()
        total = main + 0.25 * last + 0.3 * astray
        scores["_stray"] = astray.item()
        if self.stage == "joint":
            answer, read = self._answers(states[-2][:, 1:], batch)
            seen = {f"_see_{name.removeprefix('_')}": value for name, value in scores.items()}
            return answer + 0.2 * total, seen | read
        return total, scores

    def _answers(self, features: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Loss of reading, and scores: the share of right answers by type."""
        logits, target, where, losses, scores = read(self.model, features, batch, self.tokens, self.probes)
        weights = torch.tensor([WEIGHTS.get(name, 1.0) for name in TYPES], device=target.device)
        hinted = weights[batch["type"][batch["hint"] != IGNORE]]
        losses["hints"] = (losses["hints"] * hinted).sum() / hinted.sum()
        kinds = batch["type"][where[:, 0], where[:, 1]]
        missed = F.cross_entropy(logits, target, reduction="none")
        loss = (missed * weights[kinds]).sum() / weights[kinds].sum()
        loss = loss + sum(SHARES[name] * part for name, part in losses.items())
        scores |= {f"_{name}_loss": part.item() for name, part in losses.items()}
        found = judge(logits, target, where, batch, TYPES)
        return loss, scores | {name: each.mean().item() for name, each in found.items()}

    @torch.no_grad()
    def validate(self, n: int = 40) -> dict[str, float]:
        """Scores on fixed scenes of the validation seeds, whole canvas; those of single losses begin with "_"."""
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
        main = [value for name, value in result.items() if not name.startswith("_")]
        return {"mean": sum(main) / len(main)} | result


if __name__ == "__main__":
    command(Trainer, __doc__)
