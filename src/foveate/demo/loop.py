"""The training loop of the embedded models: timed stages, resumable, on one device or on several CPU workers."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from foveate.demo import build

CAREFUL = 0.3
"""Share of the learning rates for what has learned already."""
WORKERS = 1
"""Processes that paint pictures while another learns from them."""


@dataclass(frozen=True)
class Phase:
    """A part of a stage.

    Args:
        until: Fraction of the stage's time at which it ends.
        mix: What samples are made of.
        batch: Samples per step, over all workers.
    """

    until: float
    mix: Any
    batch: int


def _leave(_: int) -> None:
    """Lets a worker end when it is told to: it must not inherit what its parent does with the signal."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Loop(ABC):
    """One stage of a recipe.

    Args:
        out: Folder of checkpoints and log.
        stage: A key of `plan`.
        minutes: Length of the stage.
        device: "cpu" or "cuda".
        seed: Of weights and data.
    """

    plan: ClassVar[dict[str, tuple[Phase, ...]]]
    """The phases of each stage."""
    rates: ClassVar[dict[str, tuple[float, float]]]
    """Peak learning rates of Muon (matrices) and AdamW (all else) in each stage."""

    processor: Any
    tokens: Any
    model: Any
    heads: nn.ModuleList

    def __init__(self, out: Path, stage: str, minutes: float, device: str, seed: int = 0) -> None:
        self.out, self.stage, self.seconds, self.device, self.seed = out, stage, minutes * 60, device, seed
        self.build(seed)
        self.model, self.heads = self.model.to(device), self.heads.to(device)
        self.step, self.elapsed, self.best = 0, 0.0, 0.0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        named = {id(p): (n, p) for m in self.parts() for n, p in m.named_parameters()}
        matrix = [p for n, p in named.values() if p.ndim == 2 and ("layers." in n or "linear_" in n)]
        self.shares = [matrix[i :: self.world] for i in range(self.world)]
        rest = [p for _, p in named.values() if not any(p is q for q in matrix)]
        self.learning = [*matrix, *rest]
        fast, slow = self.rates[stage]
        careful = {id(p) for m in self.careful() for p in m.parameters()}

        def groups(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
            """The parameters with the share of the rate at which they learn."""
            parts = [(1.0, [p for p in parameters if id(p) not in careful])]
            parts += [(CAREFUL, [p for p in parameters if id(p) in careful])]
            return [{"params": part, "share": share} for share, part in parts if part]

        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                groups(self.shares[self.rank]), lr=fast, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(groups(rest), lr=slow, weight_decay=0.02, betas=(0.9, 0.98)),
        ]
        self._resume()

    # -- what a recipe says

    @abstractmethod
    def build(self, seed: int) -> None:
        """Sets `processor`, its `tokens`, `model` and `heads`, what is learned for training's sake only."""

    @abstractmethod
    def parts(self) -> Sequence[nn.Module]:
        """What this stage learns."""

    def careful(self) -> Sequence[nn.Module]:
        """What of it learns at `CAREFUL` of the rates only; nothing unless a recipe says so."""
        return ()

    @abstractmethod
    def stream(self, phase: Phase, batch: int, seed: int) -> Any:
        """Batches without end: an `IterableDataset` of dicts."""

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Loss and scores of one batch in this stage."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Scores on fixed samples of the validation seeds, their mean as "mean"."""

    # -- the loop

    def start(self, folder: Path) -> None:
        """Takes the weights of a saved model, unless there is a checkpoint to go on from."""
        if not (self.out / "state.pt").exists():
            saved = type(self.model).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            self.model.load_state_dict(saved.state_dict())

    def _resume(self) -> None:
        """Takes the weights of the checkpoint and, in its stage, goes on; several workers' optimizers begin anew."""
        path = self.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"], strict=False)
        if state["stage"] == self.stage:
            self.step, self.elapsed, self.best = state["step"], state["elapsed"], state["best"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"] if self.world == 1 else (), strict=False):
                optimizer.load_state_dict(saved)

    def checkpoint(self) -> None:
        """Writes everything that is needed to go on."""
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(), "heads": self.heads.state_dict(), "stage": self.stage, "step": self.step,
            "elapsed": self.elapsed, "best": self.best,
            "optimizers": [o.state_dict() for o in self.optimizers if self.world == 1],
        }  # fmt: skip
        torch.save(state, self.out / "state.new")
        (self.out / "state.new").rename(self.out / "state.pt")

    def save(self, folder: Path, reached: float) -> None:
        """Writes the model for its users where its mean is the best of this stage so far, or none is there yet."""
        if reached >= self.best or not (folder / "model.safetensors").exists():
            build.save(self.model, self.processor, folder)
            self.best = reached

    def write(self, **record: Any) -> None:
        """Adds a line to the log."""
        if self.rank:
            return
        record = {"stage": self.stage, "step": self.step, "minute": round(self.elapsed / 60, 2)} | record
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}) + "\n")

    def share(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """Averages the gradients of all workers; they also agree on the time spent and on whether to stop."""
        if self.world == 1:
            return seconds, stop
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.learning]
        flat = torch.cat([*(g.flatten() for g in grads), grads[0].new_tensor([seconds, float(stop)])])
        dist.all_reduce(flat)
        flat /= self.world
        for parameter, part in zip(self.learning, flat[:-2].split([g.numel() for g in grads]), strict=True):
            parameter.grad = part.view_as(parameter)
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

    def run(self, save: Path | None, every: float = 240) -> None:
        """Trains until the time is over; validates and checkpoints every so many seconds."""
        phase, stream, told = None, None, self.elapsed
        sums: dict[str, list[float]] = defaultdict(list)
        stopped: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        stop, mark = False, time.monotonic()
        while self.elapsed < self.seconds and not stop:
            done = self.elapsed / self.seconds
            now = next(p for p in self.plan[self.stage] if done < p.until)
            if now is not phase:
                phase = now
                seed = np.random.SeedSequence([self.seed, self.step, self.rank]).generate_state(1, np.uint64)[0]
                stream = iter(DataLoader(
                    self.stream(phase, phase.batch // self.world, int(seed)),
                    batch_size=None, num_workers=WORKERS, prefetch_factor=8 if WORKERS else None, worker_init_fn=_leave,
                ))  # fmt: skip
            assert stream is not None
            for optimizer, rate in zip(self.optimizers, self.rates[self.stage], strict=True):
                shape = min(1, done / 0.03 + 0.01) * (0.04 + 0.96 * (0.5 + 0.5 * math.cos(math.pi * done)))
                for group in optimizer.param_groups:
                    group["lr"] = rate * shape * group["share"]
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
            for name, value in ({"loss": loss.item()} | scores).items():
                sums[name].append(value)
            if self.step % 10 == 0:
                self.write(phase=self.plan[self.stage].index(phase), **{k: sum(v) / len(v) for k, v in sums.items()})
                sums.clear()
            if self.elapsed - told > every or self.elapsed >= self.seconds or stop:
                told = self.elapsed
                if self.rank == 0 and (self.elapsed >= self.seconds or not stop):
                    scores = self.validate()
                    self.write(validation=True, **scores)
                    if save is not None:
                        self.save(save, scores["mean"])
                self.checkpoint()
        signal.signal(signal.SIGTERM, before)


def command(loop: type[Loop], description: str | None) -> None:
    """The command line of a recipe."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and log")
    parser.add_argument("--stage", choices=sorted(loop.plan), required=True)
    parser.add_argument("--minutes", type=float, required=True, help="length of the stage")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, help="folder of the model to begin with, where there is no checkpoint")
    parser.add_argument("--save", type=Path, help="folder that gets the best model of the stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = loop(args.out, args.stage, args.minutes, args.device, args.seed)
    if args.weights:
        recipe.start(args.weights)
    if recipe.elapsed >= recipe.seconds:
        print(f"{args.stage} is finished\nhint: give it more --minutes, or another --stage or --out", file=sys.stderr)
    recipe.run(args.save)
