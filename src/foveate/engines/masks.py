"""What a decoder layer may see after tokens have left: masks of the survivors, by kind of layer.

The model makes its masks for the full prompt, and in decode steps for layer 0. Before a layer that runs shorter they
are replaced: in prefill by rows and columns gathered from the model's own, so that windows and blocks stay what they
were; in decode steps by a mask made for this layer's own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from foveate.engines import sequence
from foveate.engines.sequence import Plan
from foveate.errors import UnsupportedCall

_BUILDERS: dict[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


def layer_kinds(config: Any, depth: int) -> list[str]:
    """Which tokens each decoder layer looks back at: all, a window of them, or what its state holds."""
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None)
    return list(kinds or ["sliding_attention" if windowed else "full_attention"] * depth)


def columns_seen(
    mask: Any, row: int, columns: int, valid: Tensor | None, window: int | None, positions: Int[Tensor, " r"]
) -> Bool[Tensor, "r s"]:
    """Return which columns some tokens of a prompt see in a layer that gets ``mask``.

    Args:
        mask: What the layer's kernel gets; without rows in it, the kernel is causal.
        row: Of the batch.
        columns: Tokens of the prompt, as they stand in this layer.
        valid: Which of them are real; None: all.
        window: How far back a causal kernel looks; None: to the start.
        positions: Columns of the tokens that look.
    """
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask[row % len(mask), 0, positions, :columns]
        return seen if seen.dtype == torch.bool else seen == 0
    place = torch.arange(columns, device=positions.device)
    seen = place <= positions[:, None]
    if window is not None:
        seen = seen & (place > positions[:, None] - window)
    return seen if valid is None else seen & valid[:columns]


@dataclass(frozen=True)
class Cutting:
    """One drop: from layer ``first`` on, only the columns of ``plan`` are left of the first ``length`` ones."""

    first: int
    plan: Plan
    length: int


def for_rows(cuttings: list[Cutting], embeds: Tensor | None) -> list[Cutting]:
    """Return the drops for a batch in which rows may be repeated in place, as some decoding loops do.

    Raises:
        UnsupportedCall: If some prompts go on and others do not.
    """
    rows = len(cuttings[0].plan.index)
    if embeds is None or len(embeds) == rows:
        return cuttings
    if len(embeds) % rows:
        raise UnsupportedCall(
            f"the cache was filled by {rows} prompts, and {len(embeds)} go on from it",
            "go on with every prompt, or start a new cache",
        )
    return [replace(c, plan=c.plan.expand(len(embeds) // rows)) for c in cuttings]


class Masks:
    """Makes each mask once per call: ``memo`` is the call's."""

    def __init__(self, config: Any, depth: int) -> None:
        self._config = config
        self._kinds = layer_kinds(config, depth)

    def prefill(
        self, memo: dict[Any, Any], cutting: Cutting, hidden: Tensor, kwargs: Mapping[str, Any], index: int
    ) -> Any:
        """Return the mask of the survivors in layer ``index``, which gets ``kwargs``."""
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        kind, valid = self._kinds[index], cutting.plan.valid
        key = ("prefill", cutting.first, kind, id(mask))
        if key not in memo:
            made: Any
            if isinstance(mask, Tensor) and mask.dim() == 4:
                made = sequence.take_mask(mask, cutting.plan)
                if cache is not None:
                    made = _widened(made, int(cache.get_mask_sizes(hidden.shape[1], index)[0]))
            elif kind == "linear_attention":  # the 2-D mask, or None where nothing is padded
                made = valid if mask is None or valid is None else valid.to(mask.device, mask.dtype)
            else:
                made = _BUILDERS[kind](self._config, hidden, valid, cache, layer_idx=index)
            memo[key] = (mask, made)
        return memo[key][1]

    def decode(
        self, memo: dict[Any, Any], cutting: Cutting, mask: Tensor | None, hidden: Tensor, cache: Any, index: int
    ) -> Any:
        """Return the mask of a decode step in layer ``index``; ``mask`` is the 2-D one of all tokens so far, if any."""
        kind = self._kinds[index]
        if kind == "linear_attention":
            new = hidden.shape[1]  # its state carries all that is left; several new tokens may be padded
            return None if mask is None or new == 1 else mask[:, -new:]
        key = ("decode", cutting.first, kind)
        if key not in memo:
            valid = cutting.plan.valid
            windowed = kind == "sliding_attention" and self._config._attn_implementation in ("sdpa", "eager")
            both = None
            if valid is not None or mask is not None or windowed:
                if valid is None:
                    valid = torch.ones_like(cutting.plan.index, dtype=torch.bool)
                if mask is None:
                    new = hidden.shape[1]  # a static layer tells its whole size: what is empty yet, nobody sees
                    sizes = (int(cache.get_seq_length(index)), new) if windowed else cache.get_mask_sizes(new, index)
                    tail = valid.new_ones(len(valid), sum(sizes) - valid.shape[1])
                else:
                    tail = mask[:, cutting.length :].bool()
                both = torch.cat([valid.to(hidden.device), tail.to(hidden.device)], 1)
            if windowed:
                assert both is not None
                memo[key] = self._windowed(cutting, both, hidden, cache, index)
            else:
                memo[key] = _BUILDERS[kind](self._config, hidden, both, cache, layer_idx=index)
        return memo[key]

    def _windowed(self, cutting: Cutting, valid: Tensor, hidden: Tensor, cache: Any, index: int) -> Tensor:
        """A sliding window counts original positions, as in prefill; the kernel would count survivors."""
        rows = len(valid)
        late = torch.arange(valid.shape[1] - cutting.plan.index.shape[1], device=valid.device) + cutting.length
        where = torch.cat([cutting.plan.index.to(valid.device), late.expand(rows, -1)], 1)
        keys = int(cache.get_mask_sizes(hidden.shape[1], index)[0])
        key, query, seen = where[:, None, -keys:], where[:, -hidden.shape[1] :, None], valid[:, None, -keys:]
        visible = _widened((seen & (key <= query) & (key > query - self._config.sliding_window))[:, None], keys)
        if self._config._attn_implementation == "sdpa":
            return visible
        return torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(~visible, torch.finfo(hidden.dtype).min)


def _widened(mask: Tensor, columns: int) -> Tensor:
    """Hide the slots of a static window that are empty yet; all tokens before the drop may have filled it."""
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.nn.functional.pad(mask, (0, max(0, columns - mask.shape[-1])), value=hidden)
