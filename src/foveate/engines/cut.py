"""What a shortened call is: its arguments, what the cache remembers of it, and the caller's own prompt put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engines.sequence import Plan
from foveate.engines.state import Attachment, Frame
from foveate.errors import UnsupportedCall
from foveate.families.releases import CHUNKS, installed, older_than, upgrade


@dataclass(frozen=True)
class Kept:
    """What is in a cache of the prompt that filled it.

    Args:
        plan: Which of its tokens.
        positions: Positions of those, [b, s] or [axes, b, s].
        last: From where later positions count on, [b, 1] or [axes, b, 1].
    """

    plan: Plan
    positions: Tensor
    last: Tensor

    def expand(self, times: int) -> Kept:
        """Return what is kept of a batch in which every row is repeated in place, as several returned answers do."""
        if times == 1:
            return self
        positions, last = (t.repeat_interleave(times, -2) for t in (self.positions, self.last))
        return Kept(self.plan.expand(times), positions, last)


@dataclass(frozen=True)
class Turn:
    """What a cache remembers of the prompt that filled it, so that the next turn is cut alike.

    Args:
        ids: The prompt as the caller passed it.
        kept: What is in the cache; None when all of it is.
    """

    ids: Tensor
    kept: Kept | None


@dataclass(frozen=True)
class Cut:
    """A call's arguments with a shorter prompt.

    Args:
        arguments: What the model gets.
        ids: The prompt as the caller passed it.
        frame: None when the pictures are already in the cache.
        turn: What the cache must remember, if anything.
    """

    arguments: dict[str, Any]
    ids: Tensor
    frame: Frame | None
    turn: Turn | None

    @property
    def removed(self) -> int:
        """Columns by which the prompt became shorter."""
        return self.ids.shape[1] - int(self.arguments["input_ids"].shape[1])


def check_modes(arguments: Mapping[str, Any], config: Any) -> None:
    """Refuse what ``generate`` offers and no call with pictures can have."""
    if _option(arguments, config, "cache_implementation") == "paged":
        raise UnsupportedCall(
            'cache_implementation="paged" batches texts continuously and reads no pictures',
            "leave it out, or call generate_batch for texts alone",
        )
    if _option(arguments, config, "prefill_chunk_size") and older_than(CHUNKS):
        raise UnsupportedCall(
            f"prefill_chunk_size with pictures needs transformers >= {CHUNKS}, found {installed()}",
            f"leave it out, or {upgrade(CHUNKS)}",
        )
    if _option(arguments, config, "token_healing"):
        raise UnsupportedCall(
            "token_healing writes the prompt anew, without its placeholders for pictures", "leave out token_healing"
        )


def shorten_lengths(cut: Cut, config: Any) -> None:
    """Lengths that count the prompt count the caller's prompt: translate them."""
    if not cut.removed:
        return
    for bound in ("max", "min"):
        length = _option(cut.arguments, config, f"{bound}_length")
        if length and _option(cut.arguments, config, f"{bound}_new_tokens") is None:
            cut.arguments[f"{bound}_length"] = max(0, length - cut.removed)


def shift_positions(arguments: Mapping[str, Any], by: int) -> dict[str, Any]:
    """Renumber position ids: ``generate`` counts from 0 in every family, and some models count from 1."""
    given = arguments.get("position_ids")
    return {**arguments, "position_ids": given + by} if by and given is not None else {**arguments}


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


def guard_gaps(base: nn.Module, decoder: nn.Module, layers: nn.ModuleList, attachment: Attachment) -> None:
    """Keep transformers from taking gaps in the position ids for several prompts packed into one row.

    Without a mask and a cache it would cut attention at each gap, and flash attention looks at them in every layer:
    so there is always a mask, and the layers see no position ids (the rotary embeddings hold them already). Some
    models make their masks before the decoder.
    """

    def with_mask(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            tokens = next((t for name in ("inputs_embeds", "input_ids") if (t := kwargs.get(name)) is not None), None)
            bare = kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None
            if bare and kwargs.get("position_ids") is not None and tokens is not None:
                kwargs["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
            return original(*args, **kwargs)

        return forward

    def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": None}

    for module in dict.fromkeys((base, decoder)):
        attachment.wrap(module, "forward", with_mask(module.forward))
    for layer in layers:
        attachment.add(layer.register_forward_pre_hook(hide, with_kwargs=True).remove)
