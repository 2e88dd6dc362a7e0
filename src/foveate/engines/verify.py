"""Measured proof on the user's own model: dropping a token equals masking it.

The compressed model generates; then the uncompressed one reads the same text at full length, without a cache, with
masks that hide each dropped token from the layer where it left. The logits of the answer must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate import registry
from foveate.core import Method, Selection
from foveate.engines.base import compress
from foveate.engines.masks import layer_kinds
from foveate.engines.prompt import find_pictures
from foveate.engines.state import Frame
from foveate.engines.turns import PER_TOKEN
from foveate.errors import UnsupportedCall, UnsupportedMethod, UnsupportedModel
from foveate.families import CrossFamily, Family, Picture, family_of

#: Largest logit difference that rounding explains, by dtype.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-1, torch.bfloat16: 5e-1}


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`.

    Args:
        method: Spec of the method.
        model: Class of the model.
        difference: Largest absolute logit difference between dropped and masked.
        effect: Largest absolute logit difference that compression makes at the first new token; so that a test which
            compares a model with itself is seen.
        tolerance: What rounding explains in the model's dtype.
        tokens: Visual tokens before and after site 0.
        new_tokens: Tokens compared, per prompt.
    """

    method: str
    model: str
    difference: float
    effect: float
    tolerance: float
    tokens: tuple[int, int]
    new_tokens: int

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.method} on {self.model}: dropped {'==' if self.ok else '!='} masked, largest logit difference "
            f"{self.difference:.1e} (allowed {self.tolerance:.0e}; compression itself changes logits by "
            f"{self.effect:.1e}), {self.tokens[0]} -> {self.tokens[1]} visual tokens, {self.new_tokens} new tokens"
        )


@torch.no_grad()
def verify(
    model: Any, method: Method | str, inputs: Mapping[str, Any] | None = None, new_tokens: int = 8
) -> Verification:
    """Prove on a model's own weights that dropping equals masking.

    Args:
        model: A vision-language model with its head, not compressed.
        method: A method, or its spec.
        inputs: What the processor gave, with at least one picture; left out: two random prompts with 1 and 2 pictures.
        new_tokens: Tokens to generate and compare.

    Returns:
        The largest logit difference and whether rounding explains it.

    Raises:
        UnsupportedModel: If it has recurrent layers: no mask hides a token from their state.
        UnsupportedMethod: If the method reads a row twice, which masking cannot imitate.
        UnsupportedCall: If the attention implementation takes no explicit masks, or there is no picture.
    """
    family = family_of(model)
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise UnsupportedCall(
            f"explicit masks need sdpa or eager attention, got {model.config._attn_implementation!r}",
            'load the model with attn_implementation="sdpa"',
        )
    if "linear_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or []):
        raise UnsupportedModel(
            f"{family.name} has recurrent layers, which read hidden tokens too: masking cannot imitate dropping",
            "`foveate families` shows how its results compare when tokens are cut off layer by layer instead",
        )
    inputs = dict(random_inputs(model, family) if inputs is None else inputs)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": [family.token_id(model, modality) for modality in family.modalities],
    }
    built = registry.from_spec(method)
    with compress(model, built) as handle:
        output = model.generate(**inputs, **options)
    frame, report = handle.frame, handle.report
    if frame is None:
        raise UnsupportedCall("there is no picture in the inputs", "pass what the processor gives, with pixel_values")
    if any(stage.selection.repeats for seen in frame.images for stage in seen.stages):
        raise UnsupportedMethod(
            f"`{registry.to_spec(built)}` reads rows twice, which masking cannot imitate",
            "verify the method without its released defect: compat=false",
        )
    if isinstance(family, CrossFamily):
        reference = _across_logits(model, family, inputs, frame, output.sequences)
    else:
        reference = masked_logits(model, family, inputs, frame, output.sequences, handle.positions == "packed")
    start = inputs["input_ids"].shape[1] - 1
    logits = torch.stack(output.logits, 1).to(reference.device)
    plain = model(**inputs, logits_to_keep=1).logits[:, -1]
    return Verification(
        method=report.method,
        model=report.model,
        difference=(logits - reference[:, start : start + new_tokens]).abs().max().item(),
        effect=(logits[:, 0] - plain).abs().max().item(),
        tolerance=TOLERANCE[model.dtype],
        tokens=(report.tokens, report.kept),
        new_tokens=new_tokens,
    )


def masked_logits(
    model: Any, family: Family, inputs: Mapping[str, Any], frame: Frame, sequences: Tensor, packed: bool
) -> Tensor:
    """Return the logits of full sequences in which dropped tokens are only hidden, layer by layer."""
    inputs = {family.former_names.get(name, name): value for name, value in inputs.items()}
    ids, device = inputs["input_ids"], sequences.device
    full, length = sequences[:, :-1], ids.shape[1]
    batch, total = full.shape
    given = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else given
    real = torch.cat([mask.bool(), mask.new_ones(batch, total - length, dtype=torch.bool)], 1).to(device)
    outputs = {m: family.encode(model, m, inputs)[0] for m in _media(family, inputs)}
    pictures = {m: list(family.pictures(model, m, output, inputs)) for m, output in outputs.items()}
    layout = find_pictures(family, model, pictures, mask, inputs)
    layers = family.layers(model)
    alive, each, merged = real.clone(), [], []
    for layer in range(len(layers)):
        alive, rows = alive.clone(), []
        for seen, span in zip(frame.images, layout.spans, strict=True):
            for stage in seen.stages:
                if stage.site == layer:
                    alive[span.row, span.positions.to(device)] = False
                    alive[span.row, span.positions.to(device)[stage.kept]] = True
                    if layer and stage.selection.features is not None:
                        rows.append((span.row, span.positions.to(device)[stage.kept], stage.selection))
        each.append(alive)
        merged.append(rows)
    text = model.config.get_text_config()
    near = _windows(text, each[0])
    hooks = [
        layer.register_forward_pre_hook(_hide(alive, near if kind == "sliding_attention" else None), with_kwargs=True)
        for layer, alive, kind in zip(layers, each, layer_kinds(text, len(layers)), strict=True)
    ]
    hooks += [
        layer.register_forward_pre_hook(_merge(rows), with_kwargs=True)
        for layer, rows in zip(layers, merged, strict=True)
        if rows
    ]
    tail = torch.ones_like(full[:, length:])
    if packed:
        positions = family.position_ids(model, full, each[0].long(), {})
    else:
        before = family.position_ids(model, ids, mask, inputs)
        positions = torch.cat([before, before[..., -1:] + tail.cumsum(-1)], -1)
    types = {
        name: torch.cat([inputs[name], tail * family.answer_type], 1)
        for name in PER_TOKEN
        if inputs.get(name) is not None
    }
    try:
        with _endless_windows(text, family.decoder(model).config):
            logits = model(
                input_ids=full,
                attention_mask=real.long(),
                position_ids=positions + family.first_position,
                mm_encoder_outputs={
                    m: _full_rows(family, output, pictures[m], frame, m) for m, output in outputs.items()
                },
                use_cache=False,
                **types,
            ).logits
    finally:
        for hook in hooks:
            hook.remove()
    assert isinstance(logits, Tensor)
    return logits


def _across_logits(
    model: Any, family: CrossFamily, inputs: Mapping[str, Any], frame: Frame, sequences: Tensor
) -> Tensor:
    """The same where text looks across at the pictures: all rows are there, and those that left are only hidden.

    A prompt without pictures looks at zeros: they add nothing to it, which is how it is read alone.
    """
    states, full = family.encode(model, "image", inputs)[0], sequences[:, :-1]
    alive = torch.zeros(states.shape[:3], dtype=torch.bool, device=states.device)
    slots = family.slots(inputs).tolist()
    for seen in frame.images:
        slot, picture = tuple(slots[seen.number]), seen.picture
        assert picture.visual is not None
        visual = picture.visual.to(states.device)[seen.origin]
        alive[slot][visual] = alive[slot][picture.fixed.to(states.device)] = True
        states[slot][visual] = seen.evidence.features.to(states)
    if any(len(seen.origin) < seen.tokens for seen in frame.images):
        states = states * alive.any(2).any(1)[:, None, None, None]
    else:
        alive[:] = True
    new = full.shape[1] - inputs["input_ids"].shape[1]
    given = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if given is None else given
    mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
    sights = inputs["cross_attention_mask"]
    sights = torch.cat([sights, sights[:, -1:].expand(-1, new, -1, -1)], 1)

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        seen = kwargs["cross_attention_mask"]
        dark = ~alive.flatten(1)[:, None, None].to(seen.device)
        return args, {**kwargs, "cross_attention_mask": seen.masked_fill(dark, torch.finfo(seen.dtype).min)}

    hook = family.decoder(model).register_forward_pre_hook(hide, with_kwargs=True)
    try:
        logits = model(
            input_ids=full,
            attention_mask=mask,
            position_ids=family.position_ids(model, full, mask, {}),
            cross_attention_states=states.flatten(1, 2),
            cross_attention_mask=sights,
            use_cache=False,
        ).logits
    finally:
        hook.remove()
    assert isinstance(logits, Tensor)
    return logits


def _media(family: Family, inputs: Mapping[str, Any]) -> list[str]:
    return [m for m, name in family.media_arguments.items() if inputs.get(name) is not None]


def _full_rows(family: Family, output: Any, pictures: list[Picture], frame: Frame, modality: str) -> Any:
    """All rows of all pictures, with the features that the LLM read where a method changed them."""
    rows, levels = [], []
    for seen in frame.images:
        if seen.modality == modality:
            picture = pictures[seen.number]
            features = picture.features.clone()
            features[seen.origin] = seen.evidence.features.to(features)
            all_of_them = picture.kept(torch.arange(len(features), device=features.device), features)
            rows.append(all_of_them[0])
            levels.append(all_of_them[1])
    return family.with_rows(output, rows, levels)


@contextmanager
def _endless_windows(*configs: Any) -> Iterator[None]:
    """Let the model make its masks without windows: it would count tokens that left before the LLM."""
    before = [(config, config.sliding_window) for config in configs if getattr(config, "sliding_window", None)]
    for config, _ in before:
        config.sliding_window = 1 << 30
    try:
        yield
    finally:
        for config, window in before:
            config.sliding_window = window


def _windows(config: Any, entered: Tensor) -> Tensor | None:
    """Which columns are within each row's window, [b, 1, s, s]; what is counted are tokens that entered the LLM."""
    if not getattr(config, "sliding_window", None):
        return None
    count, window = entered.cumsum(1), int(config.sliding_window)
    return (count[:, None, :] > count[:, :, None] - window)[:, None]


def _hide(alive: Tensor, near: Tensor | None) -> Any:
    """A hook that hides dead and distant columns in the mask that the model made for a layer."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask, n = kwargs["attention_mask"], alive.shape[1]
        if mask is None:
            mask = torch.ones(n, n, dtype=torch.bool, device=alive.device).tril()[None, None]
        visible = (mask if mask.dtype == torch.bool else mask == 0) & alive[:, None, None].to(mask.device)
        if near is not None:
            visible = visible & near.to(mask.device)
        visible = visible | (torch.eye(n, dtype=torch.bool, device=mask.device) & ~visible.any(-1, keepdim=True))
        dtype = (args[0] if args else kwargs["hidden_states"]).dtype
        return args, {**kwargs, "attention_mask": torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)}

    return hook


def _merge(rows: list[tuple[int, Tensor, Selection]]) -> Any:
    """A hook that puts what a method merged into the places of the tokens that carry it on; others stay as they are."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        hidden = given.clone()
        for row, positions, selection in rows:
            assert selection.features is not None
            several = torch.ones_like(selection.keep, dtype=torch.bool)
            if (into := selection.merged_into) is not None:
                several = torch.bincount(into[into >= 0], minlength=len(positions)) > 1
            hidden[row, positions[several]] = selection.features[several].to(hidden.dtype)
        return (hidden, *rest), {name: value for name, value in kwargs.items() if name != "hidden_states"}

    return hook


def random_inputs(model: Any, family: Family, seed: int = 0) -> dict[str, Any]:
    """Return a left-padded batch of two random prompts, with one and two random pictures."""
    generator = torch.Generator().manual_seed(seed)
    media, runs = family.example(model, 3, generator)
    text = model.config.get_text_config()
    reserved = {text.pad_token_id, *(token for run in runs for token in run)}
    words = [word for word in range(3, min(text.vocab_size, 1000)) if word not in reserved]

    def some(n: int) -> list[int]:
        return [words[i] for i in torch.randint(len(words), (n,), generator=generator).tolist()]

    rows = [[*some(5), *runs[0], *some(7)], [*some(3), *runs[1], *some(4), *runs[2], *some(9)]]
    length = max(map(len, rows))
    pad = text.pad_token_id or 0
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    media = family.lay_out(model, media, ids)
    return {"input_ids": ids, "attention_mask": mask, **media, **family.token_types(model, ids)}
