"""An independent reference: whole sequences, no cache, nothing dropped; a token that left is only hidden.

logits = reference_logits(model, inputs, sequences, kept)

What is measured against is the same model, uncompressed. It reads prompts and generated ids at once, under its own
masks, to which each decoder layer gets one thing added: columns of tokens that left before it are dark. The reference
knows nothing of the engine; all it is told of a selection is `Kept`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from tests.zoo.items import Item, items
from tests.zoo.models import text_stack

#: For each item a list of (layer, indices): from that decoder layer on only these of its tokens are visible. Layer 0
#: is before the LLM. An item from which nothing leaves has an empty list.
Kept = Sequence[Sequence[tuple[int, Sequence[int] | Tensor]]]

#: What is counted: tokens of the caller's prompt, or tokens that entered the LLM.
Numbers = Literal["original", "packed"]

_ENDLESS = 1 << 20


def reference_logits(
    model: Any,
    inputs: Mapping[str, Tensor],
    sequences: Tensor,
    kept: Kept = (),
    positions: Numbers = "original",
    *,
    window: Numbers = "original",
    features: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Return what follows each token of ``sequences``, [batch, sequence, vocabulary]; NaN on padding and on the dead.

    Args:
        model: The model, not compressed.
        inputs: The prompts, as the caller passed them.
        sequences: Prompts and generated ids. With several sequences per prompt they stand next to each other.
        kept: What is visible from which layer on, for each of `items`; empty where nothing left at all.
        positions: ``packed`` numbers anew what entered the LLM; only for families with one position per token.
        window: What sliding windows count.
        features: For some items what their tokens carry into the LLM: a row for each that entered.
    """
    found = items(model, inputs)
    kept = kept or [[] for _ in found]
    if len(kept) != len(found):
        raise ValueError(f"kept is for {len(kept)} items, the prompts have {len(found)}")
    if positions == "packed" and hasattr(model.model, "get_rope_index"):
        raise ValueError("positions in three axes cannot be packed")
    read = {"mllama": _across}.get(model.config.model_type, _cut if _recurrent(model) else _mask)
    many = len(sequences) // len(inputs["input_ids"])
    copies = []
    for copy in range(many):
        task = _Task(model, inputs, sequences[copy::many], found, kept, positions, window)
        with torch.no_grad(), task.carrying(features or {}):
            copies.append(read(task))
    return torch.stack(copies, 1).flatten(0, 1)


@dataclass
class _Task:
    """One sequence per prompt, to be read."""

    model: Any
    inputs: Mapping[str, Tensor]
    sequences: Tensor
    found: Sequence[Item]
    kept: Kept
    positions: Numbers
    window: Numbers

    def __post_init__(self) -> None:
        self.text = text_stack(self.model)
        mask = self.inputs.get("attention_mask")
        mask = torch.ones_like(self.inputs["input_ids"]) if mask is None else mask
        self.new = self.sequences.shape[1] - mask.shape[1]
        self.real = functional.pad(mask, (0, self.new), value=1).bool()

    def visible(self, columns: Tensor) -> Tensor:
        """Return which of ``columns``, [batch, columns], each layer sees, [layers, batch, columns]."""
        alive = columns.expand(len(self.text.layers), -1, -1).clone()
        for item, stages in zip(self.found, self.kept, strict=True):
            for layer, stay in stages:
                alive[layer:, item.row, _without(item.columns, stay)] = False
        return alive

    def forward(self) -> Tensor:
        """Run the model over whole sequences."""
        call: dict[str, Any] = {**self.inputs, "input_ids": self.sequences, "use_cache": False}
        call["attention_mask"] = self.real.long()
        call["position_ids"] = self.numbers()
        prefix = self.model.config.model_type == "paligemma"
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in call:  # what is generated is text; for paligemma 1 is what does not belong to the prefix
                call[key] = functional.pad(call[key], (0, self.new), value=int(prefix))
        if "cross_attention_mask" in call:  # what is generated looks where the last token of the prompt looks
            sights = call["cross_attention_mask"]
            call["cross_attention_mask"] = torch.cat([sights, sights[:, -1:].expand(-1, self.new, -1, -1)], 1)
        return self.model(**call).logits

    def numbers(self) -> Tensor:
        """Return position ids: one per token, or time, height and width."""
        if hasattr(self.model.model, "get_rope_index"):
            names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
            given = {name: self.inputs[name] for name in names if name in self.inputs}
            numbers, _ = self.model.model.get_rope_index(self.inputs["input_ids"], **given)
            return torch.cat([numbers, numbers[..., -1:] + torch.arange(1, self.new + 1)], -1)
        counted = self.real if self.positions == "original" else self.visible(self.real)[0]
        first = int(self.model.config.model_type == "paligemma")
        return (counted.long().cumsum(1) - 1).clamp(min=0) + first

    @contextmanager
    def carrying(self, features: Mapping[int, Tensor]) -> Iterator[None]:
        """Give items other features than those of the encoder."""

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            key = "cross_attention_states" if "cross_attention_states" in kwargs else "inputs_embeds"
            states = kwargs[key].clone()
            rows = states.view(len(self.sequences), -1, states.shape[-1])
            for index, carried in features.items():
                item, entry = self.found[index], [stay for layer, stay in self.kept[index] if layer == 0]
                columns = item.columns[torch.as_tensor(entry[0], dtype=torch.long)] if entry else item.columns
                rows[item.row, columns] = carried.to(rows)
            return args, {**kwargs, key: states}

        handle = self.text.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _mask(task: _Task) -> Tensor:
    """Run the model once; each layer sees only what is alive in it."""
    text, alive = task.text, task.visible(task.real)
    kinds = getattr(text.config, "layer_types", None) or ["full_attention"] * len(text.layers)
    count = alive[0].cumsum(1) if task.window == "packed" else torch.arange(alive.shape[-1]).expand_as(alive[0])
    size = getattr(text.config, "sliding_window", None)
    near = None if size is None else count[:, None, :] > count[:, :, None] - size  # [batch, query, key]
    eager = text.config._attn_implementation == "eager"

    def see(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            seen = _seen(kwargs.get("attention_mask"), alive.shape[-1]) & alive[layer][:, None, None, :]
            if near is not None and kinds[layer] == "sliding_attention":
                seen &= near[:, None]
            seen |= torch.eye(alive.shape[-1], dtype=torch.bool) & ~seen.any(-1, keepdim=True)  # nobody reads these
            return args, {**kwargs, "attention_mask": _bias(seen) if eager else seen}

        return hook

    with ExitStack() as stack:
        if near is not None:  # the model leaves windows out of its masks: it would count tokens in its own way
            for config in {id(c): c for c in (text.config, task.model.config.get_text_config())}.values():
                stack.enter_context(patch.object(config, "sliding_window", _ENDLESS))
        for layer, module in enumerate(text.layers):
            stack.callback(module.register_forward_pre_hook(see(layer), with_kwargs=True).remove)
        logits = task.forward()
    return logits.masked_fill(~alive[-1][..., None], float("nan"))


def _cut(task: _Task) -> Tensor:
    """Read each sequence alone, layer by layer; what leaves is cut off.

    For layers with a state that runs along the sequence: no mask can hide a token from it.
    """
    text, alive = task.text, task.visible(task.real)
    entry: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        entry.update(kwargs)

    handle = text.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        logits = torch.full_like(task.forward(), float("nan"))
    finally:
        handle.remove()
    numbers = entry["position_ids"].expand(3, -1, -1)
    for row in range(len(task.sequences)):
        here = alive[0, row].nonzero()[:, 0]
        hidden = entry["inputs_embeds"][row, here][None]
        for index, layer in enumerate(text.layers):
            left = alive[index, row, here]
            hidden, here = hidden[:, left], here[left]
            angles = text.rotary_emb(hidden, numbers[:, row : row + 1, here])
            causal = _bias(torch.ones(1, 1, len(here), len(here), dtype=torch.bool).tril())
            mask = causal if text.config.layer_types[index] == "full_attention" else None
            hidden = layer(hidden, position_embeddings=angles, attention_mask=mask, past_key_values=None)
        logits[row, here] = task.model.lm_head(text.norm(hidden))[0]
    return logits


def _across(task: _Task) -> Tensor:
    """Hide tokens from the layers that look across at the image.

    Slots without a tile hold no token, and text that sees an image does not see them. They leave with the first token
    that leaves before the LLM, from every prompt of whose images a selection is told; a prompt without images then
    looks at zeros, which add nothing to it. Else they stay as the model has them.
    """
    text, ratios, tiles = task.text, task.inputs["aspect_ratio_ids"], task.inputs["aspect_ratio_mask"]
    taken = ((tiles > 0) & (ratios > 0)[..., None]).flatten(1)
    taken = taken.repeat_interleave(task.model.model.vision_model.num_patches, 1)
    told = [(item, stay) for item, stages in zip(task.found, task.kept, strict=True) for at, stay in stages if at == 0]
    seen, lone = torch.ones_like(taken), torch.zeros(len(taken), dtype=torch.bool)
    if any(len(_without(item.columns, stay)) for item, stay in told):
        rows = [item.row for item, _ in told]
        seen[rows] = taken[rows]
        lone = ~taken.any(1)
    alive = task.visible(seen)
    if not alive.any(-1).all():
        raise ValueError("a layer that looks across at nothing")

    def darken(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        states = kwargs["cross_attention_states"].unflatten(0, (len(lone), -1))
        states = states.masked_fill(lone[:, None, None, None], 0.0).flatten(0, 1)
        return args, {**kwargs, "cross_attention_states": states}

    def see(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            dark = ~alive[layer][:, None, None, :]
            mask = kwargs["cross_attention_mask"]
            return args, {**kwargs, "cross_attention_mask": mask.masked_fill(dark, torch.finfo(mask.dtype).min)}

        return hook

    with ExitStack() as stack:
        stack.callback(text.register_forward_pre_hook(darken, with_kwargs=True).remove)
        for layer in text.cross_attention_layers:
            hook = text.layers[layer].register_forward_pre_hook(see(layer), with_kwargs=True)
            stack.callback(hook.remove)
        return task.forward().masked_fill(~task.real[..., None], float("nan"))


def _recurrent(model: Any) -> bool:
    return "linear_attention" in (getattr(text_stack(model).config, "layer_types", None) or ())


def _without(columns: Tensor, stay: Sequence[int] | Tensor) -> Tensor:
    gone = torch.ones(len(columns), dtype=torch.bool)
    gone[torch.as_tensor(stay, dtype=torch.long)] = False
    return columns[gone]


def _seen(mask: Tensor | None, length: int) -> Tensor:
    """What a mask of the model lets through; no mask is a causal one."""
    if mask is None:
        return torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return mask if mask.dtype == torch.bool else mask == 0


def _bias(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
