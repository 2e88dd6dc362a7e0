"""What is asked of the model: one prompt with one picture, as often as a batch is large."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.budget import Keep, check_keep, resolve_keep
from foveate.errors import BudgetError
from foveate.families import CrossFamily, Family, family_of
from foveate.families.picture import Picture

#: Models whose pixels come in one tensor, each picture as a strip of patches beside the last.
_SIDE_BY_SIDE = frozenset({"minicpmv4_6"})


@dataclass(frozen=True)
class Work:
    """A model, and one prompt with one picture for it.

    Args:
        model: In evaluation mode, on its device, with its weights in their dtype.
        family: What serves it.
        inputs: What the processor gave.
        sizes: Visual tokens of the picture; some processors cut it into several images, each with a budget of its own.
        prompt: Tokens of the prompt, visual ones included.
        rows: Rows that the layers of the encoder read.
        forwards: Among how many encoder forwards they are shared; rows of one see each other.
        read: Opens the picture and prepares the inputs again; None where there is no processor.
    """

    model: Any
    family: Family
    inputs: Mapping[str, Any]
    sizes: tuple[int, ...]
    prompt: int
    rows: int
    forwards: int
    read: Callable[[], object] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Any], read: Callable[[], object] | None = None) -> Work:
        """Encode the picture once, and count.

        Raises:
            UnsupportedModel: If no family serves the model.
            UnsupportedCall: If the inputs hold no picture.
        """
        family, inputs = family_of(model), dict(inputs)
        shapes: list[torch.Size] = []
        layer = family.encoder_layers(model, "image")[0]
        hook = layer.register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append((args[0] if args else kwargs["hidden_states"]).shape),
            with_kwargs=True,
        )
        try:
            _, pictures = encoded(model, family, inputs)
        finally:
            hook.remove()
        return cls(
            model=model,
            family=family,
            inputs=inputs,
            sizes=tuple(len(picture.features) for picture in pictures),
            prompt=inputs["input_ids"].shape[1],
            rows=shapes[0][:-1].numel(),
            forwards=sum(max(len(picture.crops), 1) for picture in pictures),
            read=read,
        )

    @property
    def tokens(self) -> int:
        """Visual tokens of the picture."""
        return sum(self.sizes)

    @property
    def text(self) -> int:
        """Tokens of the prompt that are not visual: words, and the row breaks of a picture."""
        return self.prompt if isinstance(self.family, CrossFamily) else self.prompt - self.tokens

    def batch(self, size: int) -> dict[str, Any]:
        """Return the inputs of so many equal prompts."""
        beside = {"pixel_values"} if self.model.config.model_type in _SIDE_BY_SIDE else set()
        return {
            name: torch.cat([value] * size, -1 if name in beside else 0) if isinstance(value, Tensor) else value * size
            for name, value in self.inputs.items()
        }

    def budget(self, keep: Keep) -> int:
        """Return a budget in tokens of an image.

        Raises:
            BudgetError: If it would not shorten anything.
        """
        check_keep(keep)
        largest = max(self.sizes)
        count = resolve_keep(keep, largest)
        if count >= largest:
            raise BudgetError(
                f"keep={keep} of a picture that is {largest} visual tokens leaves nothing to compare",
                f"pass --keep {max(1, largest // 9)}, a ninth of them, or a larger picture",
            )
        return count


@torch.no_grad()
def encoded(model: Any, family: Family, inputs: Mapping[str, Any]) -> tuple[Any, list[Picture]]:
    """Return what the stock encoder gives for a batch, and its pictures."""
    output, _ = family.encode(model, "image", inputs)
    return output, list(family.pictures(model, "image", output, inputs))
