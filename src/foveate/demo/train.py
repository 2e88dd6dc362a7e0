"""Trains the demo model: `python -m foveate.demo.train --out DIR --stage see --minutes 30`.

Three stages, each resumable: `see` trains the vision tower on labels of every patch; `read` trains projector and
decoder behind the frozen tower, many questions behind one picture; `joint` trains everything. Visual tokens are never
dropped or masked: small windows of the canvas come first, the whole canvas last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from foveate.demo import build
from foveate.demo.data import Mix, Stream, label, marks, pack
from foveate.demo.network import Heads, encode, pixels, read
from foveate.demo.paint import paint
from foveate.demo.questions import TYPES, ask
from foveate.demo.world import SIDE, VALIDATION, layout

WORKERS = 1
"""Processes that paint pictures while another learns from them."""


@dataclass(frozen=True)
class Phase:
    """A part of a stage: until which fraction of its time, on what, in batches of how many."""

    until: float
    mix: Mix
    batch: int


HARD = ("presence", "colour", "place", "count", "relation") * 2 + ("relation", "word", "number", "smallest")
PLAN = {
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
RATES = {"see": (2e-3, 1e-3), "read": (2e-3, 1e-3), "joint": (3e-4, 2e-4)}
"""Peak learning rates of Muon (matrices) and AdamW (all else)."""


class Trainer:
    """One stage on one device.

    Args:
        out: Folder of checkpoints and log.
        stage: A key of `PLAN`.
        minutes: Length of the stage.
        device: "cpu" or "cuda".
        seed: Of weights and data.
    """

    def __init__(self, out: Path, stage: str, minutes: float, device: str, seed: int = 0) -> None:
        self.out, self.stage, self.seconds, self.device, self.seed = out, stage, minutes * 60, device, seed
        self.tokens = build.tokenizer()
        network: Any = build.model(self.tokens, seed=seed)
        self.model: Any = network.to(device)
        self.tower: Any = self.model.model.vision_tower
        self.where_is = nn.ModuleList([nn.Linear(256, 2), nn.Linear(256, 2)])
        self.heads = nn.ModuleList([Heads(192), Heads(192), *self.where_is]).to(device)
        self.step, self.elapsed, self.extra = 0, 0.0, 0.0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        part = {"see": [self.tower, self.heads], "read": [self.model.model.multi_modal_projector,
                self.model.model.language_model, self.where_is], "joint": [self.model, self.heads]}[stage]  # fmt: skip
        named = {id(p): (n, p) for m in part for n, p in m.named_parameters()}
        matrix = [p for n, p in named.values() if p.ndim == 2 and ("layers." in n or "linear_" in n)]
        self.shares = [matrix[i :: self.world] for i in range(self.world)]
        rest = [p for _, p in named.values() if not any(p is q for q in matrix)]
        self.learning = [*matrix, *rest]
        fast, slow = RATES[stage]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(self.shares[self.rank], lr=fast, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=slow, weight_decay=0.02, betas=(0.9, 0.98)),
        ]
        self._resume()

    def _resume(self) -> None:
        path = self.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"], strict=False)
        if state["stage"] == self.stage and state["elapsed"] < self.seconds:
            self.step, self.elapsed = state["step"], state["elapsed"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                if self.world == 1:
                    optimizer.load_state_dict(saved)

    def checkpoint(self) -> None:
        """Writes everything that is needed to go on."""
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(), "heads": self.heads.state_dict(), "stage": self.stage, "step": self.step,
            "elapsed": self.elapsed, "optimizers": [o.state_dict() for o in self.optimizers],
        }  # fmt: skip
        torch.save(state, self.out / "state.new")
        (self.out / "state.new").rename(self.out / "state.pt")

    def write(self, **record: Any) -> None:
        """Adds a line to the log."""
        if self.rank:
            return
        record = {"stage": self.stage, "step": self.step, "minute": round(self.elapsed / 60, 2)} | record
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}) + "\n")

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Loss and scores of one batch in this stage."""
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
        self.extra = extra.item()
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

    def share(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """Averages the gradients of all workers; they also agree on the time spent and on whether to stop."""
        if self.world == 1:
            return seconds, stop
        grads = [p.grad for p in self.learning if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in grads), torch.tensor([seconds, float(stop)])])
        dist.all_reduce(flat)
        flat /= self.world
        for grad, part in zip(grads, flat[:-2].split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        return float(flat[-2]), bool(flat[-1] > 0)

    @torch.no_grad()
    def gather(self) -> None:
        """Hands round the matrices: each worker has moved its own share of them."""
        for owner, share in enumerate(self.shares if self.world > 1 else []):
            flat = torch.cat([p.flatten() for p in share])
            dist.broadcast(flat, owner)
            if owner != self.rank:
                for parameter, part in zip(share, flat.split([p.numel() for p in share]), strict=True):
                    parameter.copy_(part.view_as(parameter))

    def run(self, save: Path | None, every: float = 150) -> None:
        """Trains until the time is over; validates and checkpoints every so many seconds."""
        phase, stream, told = None, None, self.elapsed
        sums: dict[str, list[float]] = defaultdict(list)
        stopped: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        stop, mark = False, time.monotonic()
        while self.elapsed < self.seconds and not stop:
            done = self.elapsed / self.seconds
            now = next(p for p in PLAN[self.stage] if done < p.until)
            if now is not phase:
                phase = now
                stream = iter(DataLoader(
                    Stream(phase.mix, phase.batch // self.world, 2 * self.step + self.rank, self.tokens),
                    batch_size=None, num_workers=WORKERS, prefetch_factor=8 if WORKERS else None,
                ))  # fmt: skip
            assert stream is not None
            for optimizer, rate in zip(self.optimizers, RATES[self.stage], strict=True):
                shape = min(1, done / 0.03 + 0.01) * (0.04 + 0.96 * (0.5 + 0.5 * math.cos(math.pi * done)))
                optimizer.param_groups[0]["lr"] = rate * shape
            with torch.autocast(self.device, torch.bfloat16):
                loss, scores = self.loss(next(stream))
            for parameter in self.learning:
                parameter.grad = None
            loss.backward()
            now_at = time.monotonic()
            spent, stop = self.share(min(now_at - mark, 10.0), bool(stopped))
            mark = now_at
            nn.utils.clip_grad_norm_(self.learning, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.gather()
            self.step += 1
            self.elapsed += spent
            for name, value in ({"loss": loss.item(), "extra": self.extra} | scores).items():
                sums[name].append(value)
            if self.step % 50 == 0:
                self.write(rows=phase.mix.rows, **{k: sum(v) / len(v) for k, v in sums.items()})
                sums.clear()
            if self.elapsed - told > every or self.elapsed >= self.seconds or stop:
                told = self.elapsed
                self.checkpoint()
                if stop:
                    break
                if self.rank == 0:
                    self.write(validation=True, **self.validate())
                if save is not None and self.rank == 0 and self.stage != "see":
                    build.save(self.model, save)
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and log")
    parser.add_argument("--stage", choices=sorted(PLAN), required=True)
    parser.add_argument("--minutes", type=float, required=True, help="length of the stage")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path, help="folder that gets the model at every checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    Trainer(args.out, args.stage, args.minutes, args.device, args.seed).run(args.save)


if __name__ == "__main__":
    main()
