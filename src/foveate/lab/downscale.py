"""The baseline that beats many: no method at all, but a smaller picture, or fewer frames, through the processor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate import budget
from foveate.budget import Keep
from foveate.errors import BudgetError, UnsupportedCall
from foveate.families import family_of
from foveate.lab.chat import prepare, visual_tokens, written
from foveate.lab.media import Media, Video, thinned


def downscaled(
    network: Any,
    processor: Any,
    pictures: Sequence[Sequence[Media]],
    questions: Sequence[str],
    keep: Keep,
    whole: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Return the inputs of a batch whose pictures make at most ``keep`` tokens each, because they are small.

    - Where the processor's tokens follow the picture's size, the picture is shrunk until it has few enough, with its
      proportions.
    - Where every picture is brought to one square (LLaVA-1.5), that square is made smaller, and the encoder's positions
      are interpolated to it: the encoder has seldom seen such pictures in training.
    - Where a picture is read as a whole and in tiles (LLaVA-NeXT), the tiles are left out; if the whole has still too
      many tokens, its square is made smaller.
    - A video has fewer frames, spread evenly, but at least one, even if that is more than ``keep``.

    Args:
        network: The model.
        processor: Its processor.
        pictures: One or more pictures, or a video, for each row; the videos of a batch have one length and one size.
        questions: One question for each row.
        keep: Tokens per picture or video, at most; a float is the fraction of what the whole one makes.
        whole: Tokens of each tiled picture, where they are known; else they are counted in the prompt, where the ends
            of its rows count as well.

    Returns:
        Inputs for ``generate``.

    Raises:
        BudgetError: If the smallest picture that the processor makes has more tokens.
        UnsupportedCall: If tokens cannot be counted in the prompt.
    """

    if any(isinstance(one, Video) for row in pictures for one in row):
        few = [[_fewer(network, processor, one, keep) for one in row] for row in pictures]
        return prepare(network, processor, few, questions)
    if hasattr(processor.image_processor, "image_grid_pinpoints"):
        if whole is None:
            whole = [[_tokens(network, processor, one) for one in row] for row in pictures]
        counts = [budget.resolve_keep(keep, n) for row in whole for n in row]
        return _untiled(network, processor, pictures, questions, counts)
    square = _square(processor)
    if square is None:
        small = [[_shrunk(network, processor, one, keep) for one in row] for row in pictures]
        return prepare(network, processor, small, questions)
    side, patch = square
    k = budget.resolve_keep(keep, (side // patch) ** 2)
    less = math.isqrt(k) * patch
    inputs = dict(prepare(network, processor, pictures, questions, size={"height": less, "width": less}))
    pixels = inputs.pop("pixel_values")
    features = network.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True, return_dict=True)
    return inputs | {"mm_encoder_outputs": {"image": features}}


def _tokens(network: Any, processor: Any, one: Media) -> int:
    return visual_tokens(network, prepare(network, processor, [[one]], [""]))[0]


def _square(processor: Any) -> tuple[int, int] | None:
    """Return side and patch of the one square that every picture becomes, None where sizes follow the picture."""
    size = dict(getattr(processor.image_processor, "size", None) or {})
    sides = {size.get(name) for name in ("height", "width", "shortest_edge")} - {None}
    patch = getattr(processor, "patch_size", None)
    if patch is None or len(sides) != 1 or size.get("longest_edge"):
        return None
    return int(sides.pop() or 0), int(patch)


def _fewer(network: Any, processor: Any, one: Media, keep: Keep) -> Media:
    """Return a video with fewer frames."""
    assert isinstance(one, Video), "a row shows pictures or a video"
    whole, frames = _tokens(network, processor, one), len(one.frames)
    if not whole:
        raise UnsupportedCall(
            "the prompts have no places for this video's tokens", "fewer frames cannot be counted here"
        )
    fitting = budget.resolve_keep(keep, whole) * frames // whole
    return Video(tuple(one.frames[place] for place in thinned(frames, max(1, fitting))))


def _untiled(
    network: Any,
    processor: Any,
    pictures: Sequence[Sequence[Media]],
    questions: Sequence[str],
    counts: Sequence[int],
) -> Any:
    """Return the inputs of a batch whose pictures are read as a whole only, in squares of at most so many tokens."""
    flat = [one for row in pictures for one in row]
    pixels = processor.image_processor(flat, return_tensors="pt")["pixel_values"][:, 0]
    pixels = pixels.to(network.device, network.dtype)
    config = network.config.vision_config
    sides = [min(math.isqrt(k), config.image_size // config.patch_size) for k in counts]
    rows: list[Tensor] = []
    for picture, side in zip(pixels, sides, strict=True):
        less = [side * config.patch_size] * 2
        square = picture[None].float()
        if list(square.shape[2:]) != less:
            square = interpolate(square, less, mode="bicubic", antialias=True)
        rows.append(_features(network, square.to(network.dtype)))
    mark, left = processor.image_token, iter(rows)
    texts = []
    for text in written(processor, pictures, questions):
        first, *others = text.split(mark)
        texts.append(first + "".join(mark * len(next(left)) + other for other in others))
    tokenizer = processor.tokenizer
    start = tokenizer.bos_token
    inputs = tokenizer(
        texts,
        padding=len(texts) > 1,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=not (start and texts[0].startswith(start)),
    )
    shown = {name: inputs[name].to(network.device) for name in ("input_ids", "attention_mask")}
    encoded: Any = rows  # a list, as this model's own encoder gives
    return shown | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=encoded)}}


def _features(network: Any, pixels: Float[Tensor, "1 c h w"]) -> Float[Tensor, "n d"]:
    """Return what the LLM reads of one square picture."""
    family, layers = family_of(network), network.config.vision_feature_layer
    tower: Any = family.tower(network, "image")
    hidden = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    chosen = torch.cat([hidden[layer] for layer in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    project: Any = family.base(network).get_submodule("multi_modal_projector")
    rows: Tensor = project(family.patches(network, chosen))[0]
    return rows


def _shrunk(network: Any, processor: Any, picture: Media, keep: Keep) -> Image.Image:
    assert isinstance(picture, Image.Image), "a row shows pictures or a video"
    whole = _tokens(network, processor, picture)
    k = budget.resolve_keep(keep, whole)
    if whole <= k:
        return picture
    low, high = 0.0, math.sqrt(k / whole) * 1.25  # shares of the side: few enough tokens, too many
    best: Image.Image | None = None
    for _ in range(8):
        share = (low + high) / 2
        small = picture.resize([max(1, round(side * share)) for side in picture.size])
        enough = _tokens(network, processor, small) <= k
        low, high, best = (share, high, small) if enough else (low, share, best)
    if best is None:
        raise BudgetError(
            f"a picture of {picture.size[0]} x {picture.size[1]} makes more than {k} tokens however small it is",
            "keep more; the processor has a smallest size",
        )
    return best
