"""The baseline that beats many: no method at all, but a smaller picture through the processor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from foveate import budget
from foveate.errors import BudgetError
from foveate.lab.chat import prepare, visual_tokens

if TYPE_CHECKING:
    from PIL import Image


def downscaled(
    network: Any, processor: Any, pictures: Sequence[Sequence[Image.Image]], questions: Sequence[str], keep: float | int
) -> Any:
    """Return the inputs of a batch whose pictures make at most ``keep`` tokens each, because they are small.

    Where the processor's tokens follow the picture's size, the picture is shrunk until it has few enough, with its
    proportions. Where every picture is brought to one square (LLaVA-1.5), that square is made smaller, and the
    encoder's positions are interpolated to it: the encoder has seldom seen such pictures in training.

    Args:
        network: The model.
        processor: Its processor.
        pictures: One or more pictures for each row.
        questions: One question for each row.
        keep: Tokens per picture, at most; a float is the fraction of what the whole picture makes.

    Returns:
        Inputs for ``generate``.

    Raises:
        BudgetError: If the smallest picture that the processor makes has more tokens.
    """
    square = _square(processor)
    if square is None:
        small = [[_shrunk(network, processor, picture, keep) for picture in row] for row in pictures]
        return prepare(network, processor, small, questions)
    side, patch = square
    k = budget.resolve_keep(keep, (side // patch) ** 2)
    less = math.isqrt(k) * patch
    inputs = dict(prepare(network, processor, pictures, questions, size={"height": less, "width": less}))
    pixels = inputs.pop("pixel_values")
    features = network.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True, return_dict=True)
    return inputs | {"mm_encoder_outputs": {"image": features}}


def _square(processor: Any) -> tuple[int, int] | None:
    """Return side and patch of the one square that every picture becomes, None where sizes follow the picture."""
    size = dict(getattr(processor.image_processor, "size", None) or {})
    sides = {size.get(name) for name in ("height", "width", "shortest_edge")} - {None}
    tiled = hasattr(processor.image_processor, "image_grid_pinpoints")
    patch = getattr(processor, "patch_size", None)
    if patch is None or tiled or len(sides) != 1 or size.get("longest_edge"):
        return None
    return int(sides.pop() or 0), int(patch)


def _shrunk(network: Any, processor: Any, picture: Image.Image, keep: float | int) -> Image.Image:
    def tokens(one: Image.Image) -> int:
        return visual_tokens(network, prepare(network, processor, [[one]], [""]))[0]

    whole = tokens(picture)
    k = budget.resolve_keep(keep, whole)
    if whole <= k:
        return picture
    low, high = 0.0, math.sqrt(k / whole) * 1.25  # shares of the side: few enough tokens, too many
    best: Image.Image | None = None
    for _ in range(8):
        share = (low + high) / 2
        small = picture.resize([max(1, round(side * share)) for side in picture.size])
        low, high, best = (share, high, small) if tokens(small) <= k else (low, share, best)
    if best is None:
        raise BudgetError(
            f"a picture of {picture.size[0]} x {picture.size[1]} makes more than {k} tokens however small it is",
            "keep more; the processor has a smallest size",
        )
    return best
