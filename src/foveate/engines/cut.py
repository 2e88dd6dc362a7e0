"""What a shortened call is: its arguments, what the cache remembers of it, and the caller's own prompt put back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.engines.sequence import Plan
from foveate.engines.state import Frame


@dataclass(frozen=True)
class Turn:
    """What a cache remembers of the prompt that filled it, so that the next turn is cut alike."""

    ids: Tensor
    plan: Plan

    def expand(self, batch: int) -> Turn:
        """Return the turn of a batch in which every row is repeated in place, as several returned answers do."""
        times, plan = batch // len(self.ids), self.plan
        if times == 1:
            return self
        valid = None if plan.valid is None else plan.valid.repeat_interleave(times, 0)
        return Turn(self.ids.repeat_interleave(times, 0), Plan(plan.index.repeat_interleave(times, 0), valid))


@dataclass(frozen=True)
class Cut:
    """A call's arguments with a shorter prompt.

    Args:
        arguments: What the model gets.
        ids: The prompt as the caller passed it.
        frame: None when the pictures are already in the cache.
        turn: What the cache must remember; None when nothing was cut.
    """

    arguments: dict[str, Any]
    ids: Tensor
    frame: Frame | None
    turn: Turn | None

    @property
    def removed(self) -> int:
        """Columns by which the prompt became shorter."""
        return self.ids.shape[1] - int(self.arguments["input_ids"].shape[1])


def count_positions(mask: Tensor) -> Tensor:
    """Positions as ``generate`` counts them: the number of real tokens before each one."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def infer_mask(ids: Tensor, pad: Any, eos: Any) -> Tensor:
    """The mask that ``generate`` makes when it gets none: padding is told by its id, unless that also ends a text."""
    ends = torch.as_tensor([] if eos is None else eos).flatten().tolist()
    return torch.ones_like(ids) if pad is None or int(pad) in ends else ids.ne(int(pad)).long()


def with_prompt(output: Any, cut: Cut) -> Any:
    """Put the caller's prompt back in front of the answer."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    prompt = cut.ids.repeat_interleave(len(sequences) // len(cut.ids), 0).to(sequences.device)
    whole = torch.cat([prompt, sequences[:, cut.arguments["input_ids"].shape[1] :]], 1)
    if isinstance(output, Tensor):
        return whole
    output.sequences = whole
    return output


class PromptFirst:
    """A streamer that is shown the caller's prompt instead of the short one."""

    def __init__(self, streamer: Any, ids: Tensor) -> None:
        self._streamer, self._prompt = streamer, ids

    def put(self, value: Tensor) -> None:
        if self._prompt is not None:
            value, self._prompt = self._prompt.cpu(), None  # type: ignore[assignment]
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()
