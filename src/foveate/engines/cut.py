"""What a shortened call is: its arguments, what the cache remembers of it, and the caller's own prompt put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.engines.sequence import Plan
from foveate.engines.state import Frame


@dataclass(frozen=True)
class Turn:
    """What a cache remembers of the prompt that filled it, so that the next turn is cut alike.

    Args:
        ids: The prompt as the caller passed it.
        plan: Which of its tokens are in the cache.
        positions: Positions of those, [b, s] or [axes, b, s].
    """

    ids: Tensor
    plan: Plan
    positions: Tensor

    def expand(self, batch: int) -> Turn:
        """Return the turn of a batch in which every row is repeated in place, as several returned answers do."""
        times, plan = batch // len(self.ids), self.plan
        if times == 1:
            return self
        valid = None if plan.valid is None else plan.valid.repeat_interleave(times, 0)
        plan = Plan(plan.index.repeat_interleave(times, 0), valid)
        return Turn(self.ids.repeat_interleave(times, 0), plan, self.positions.repeat_interleave(times, -2))


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


def shorten_lengths(cut: Cut, config: Any) -> None:
    """Lengths that count the prompt count the caller's prompt: translate them."""
    if not cut.removed:
        return
    for bound in ("max", "min"):
        length = _option(cut.arguments, config, f"{bound}_length")
        if length and _option(cut.arguments, config, f"{bound}_new_tokens") is None:
            cut.arguments[f"{bound}_length"] = max(0, length - cut.removed)


def with_mask(arguments: Mapping[str, Any], config: Any) -> Mapping[str, Any]:
    """Add the mask that ``generate`` makes when it gets none: padding is told by its id, unless it ends a text too."""
    ids = arguments.get("input_ids")
    if ids is None or arguments.get("attention_mask") is not None:
        return arguments
    pad, eos = (_option(arguments, config, name) for name in ("pad_token_id", "eos_token_id"))
    ends = torch.as_tensor([] if eos is None else eos).flatten().tolist()
    plain = pad is None or int(pad) in ends
    return {**arguments, "attention_mask": torch.ones_like(ids) if plain else ids.ne(int(pad)).long()}


def _option(arguments: Mapping[str, Any], config: Any, name: str) -> Any:
    """What ``generate`` takes for an option: the first that is set of argument, given config, model's config."""
    given = (arguments.get("generation_config"), config)
    values = (arguments.get(name), *(getattr(each, name, None) for each in given))
    return next((value for value in values if value is not None), None)


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
