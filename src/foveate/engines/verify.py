"""Measured proof on the user's own model: dropping a token equals masking it.

The compressed model generates; then the uncompressed one reads the same text at full length, without a cache, with
masks that hide each dropped token from the layer where it left. The logits of the answer must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate import registry
from foveate.core import Method
from foveate.engines import sequence
from foveate.engines.base import compress
from foveate.engines.sequence import Layout
from foveate.engines.state import Frame
from foveate.errors import UnsupportedCall, UnsupportedMethod
from foveate.families import Family, family_of

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
        UnsupportedMethod: If the method reads a row twice, which masking cannot imitate.
        UnsupportedCall: If the attention implementation takes no explicit masks, or there is no picture.
    """
    family = family_of(model)
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise UnsupportedCall(
            f"explicit masks need sdpa or eager attention, got {model.config._attn_implementation!r}",
            'load the model with attn_implementation="sdpa"',
        )
    inputs = dict(random_inputs(model, family) if inputs is None else inputs)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    built = registry.from_spec(method)
    with compress(model, built) as handle:
        output = model.generate(**inputs, **options)
    frame, report = handle.frame, handle.report
    if frame is None:
        raise UnsupportedCall("there is no picture in the inputs", "pass what the processor gives, with pixel_values")
    if any(stage.selection.repeats for seen in frame.images for stage in seen.stages):
        raise UnsupportedMethod(f"`{registry.to_spec(built)}` reads rows twice, which masking cannot imitate")
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
    ids, device = inputs["input_ids"], sequences.device
    full, length = sequences[:, :-1], ids.shape[1]
    batch, total = full.shape
    given = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else given
    real = torch.cat([mask.bool(), mask.new_ones(batch, total - length, dtype=torch.bool)], 1).to(device)
    layout, embeds = _full_length(model, family, inputs, mask, full, frame)
    layers = family.layers(model)
    alive, masks = real.clone(), []
    causal = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    itself = torch.eye(total, dtype=torch.bool, device=device)
    entered = real
    for layer in range(len(layers)):
        alive = alive.clone()
        for seen, span in zip(frame.images, layout.spans, strict=True):
            for stage in seen.stages:
                if stage.site == layer:
                    alive[span.row, span.positions.to(device)] = False
                    alive[span.row, span.positions.to(device)[stage.kept]] = True
        entered = alive if layer == 0 else entered
        visible = causal & alive[:, None]
        visible = visible | (itself & ~visible.any(-1, keepdim=True))  # rows nobody reads must not be empty
        masks.append(torch.zeros_like(visible, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min))
    counted = entered if packed else real
    positions = (counted.long().cumsum(-1) - 1).clamp(min=0)
    hooks = [
        layer.register_forward_pre_hook(_hand_over(masks[index][:, None]), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        states = family.decoder(model)(
            inputs_embeds=embeds, attention_mask=real.long(), position_ids=positions, use_cache=False
        )
    finally:
        for hook in hooks:
            hook.remove()
    logits = model.get_output_embeddings()(states.last_hidden_state)
    assert isinstance(logits, Tensor)
    return logits


def _full_length(
    model: Any, family: Family, inputs: Mapping[str, Any], mask: Tensor, full: Tensor, frame: Frame
) -> tuple[Layout, Tensor]:
    """Return where the full prompt's tokens are, and its embeddings with the features that the LLM read."""
    media = [m for m, name in family.media_arguments.items() if inputs.get(name) is not None]
    features = {m: family.features(family.encode(model, m, inputs)[0]) for m in media}
    sizes = {m: [len(f) for f in each] for m, each in features.items()}
    layout = sequence.find(inputs["input_ids"], mask, {m: family.token_id(model, m) for m in media}, sizes)
    embeds = model.get_input_embeddings()(full)
    for seen, span in zip(frame.images, layout.spans, strict=True):
        rows = features[span.modality][span.number].to(embeds)
        embeds[span.row, span.positions] = rows
        embeds[span.row, span.positions.to(seen.origin.device)[seen.origin]] = seen.evidence.features.to(embeds)
    return layout, embeds


def _hand_over(mask: Tensor) -> Any:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    return hook


def random_inputs(model: Any, family: Family, seed: int = 0) -> dict[str, Any]:
    """Return a left-padded batch of two random prompts, with one and two random pictures."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.vision_config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    pixels = torch.randn(3, 3, height, width, generator=generator).to(model.device, model.dtype)
    output, _ = family.encode(model, "image", {"pixel_values": pixels})
    sizes = [len(f) for f in family.features(output)]
    image, vocabulary = family.token_id(model, "image"), model.config.get_text_config().vocab_size
    reserved = {image, model.config.get_text_config().pad_token_id}

    def words(n: int) -> list[int]:
        drawn = torch.randint(3, min(vocabulary, image if image > 64 else vocabulary), (n,), generator=generator)
        return [3 if word in reserved else word for word in drawn.tolist()]

    rows = [
        [*words(5), *[image] * sizes[0], *words(7)],
        [*words(3), *[image] * sizes[1], *words(4), *[image] * sizes[2], *words(9)],
    ]
    length = max(map(len, rows))
    pad = model.config.get_text_config().pad_token_id or 0
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
