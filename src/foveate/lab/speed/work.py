"""What is asked of the model: one prompt with one picture, as often as a batch is large."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.budget import Keep, check_keep, resolve_keep
from foveate.errors import BudgetError
from foveate.families import Family, family_of
from foveate.families.picture import Picture


@dataclass(frozen=True)
class Work:
    """A model, and one prompt with one picture for it.

    Args:
        model: In evaluation mode, on its device, with its weights in their dtype.
        family: What serves it.
        inputs: What the processor gave.
        tokens: Visual tokens of the picture.
        prompt: Tokens of the prompt, visual ones included.
        rows: Rows that the layers of the encoder read.
        forwards: Among how many encoder forwards they are shared; rows of one see each other.
        read: Opens the picture and prepares the inputs again; None where there is no processor.
    """

    model: Any
    family: Family
    inputs: Mapping[str, Any]
    tokens: int
    prompt: int
    rows: int
    forwards: int
    read: Callable[[], object] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Any], read: Callable[[], object] | None = None) -> Work:
        """Encode the picture once, and count.

        Raises:
            UnsupportedModel: If no family serves the model.
            BudgetError: If the inputs hold no picture, or several.
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
        if len(pictures) != 1:
            raise BudgetError(f"a prompt with one picture is measured, got {len(pictures)}", "pass a single picture")
        picture, shape = pictures[0], shapes[0]
        return cls(
            model=model,
            family=family,
            inputs=inputs,
            tokens=len(picture.features),
            prompt=inputs["input_ids"].shape[1],
            rows=shape[:-1].numel(),
            forwards=max(len(picture.crops), 1),
            read=read,
        )

    @property
    def text(self) -> int:
        """Tokens of the prompt that are not visual: words, and the row breaks of a picture."""
        return self.prompt - self.tokens

    def batch(self, size: int) -> dict[str, Any]:
        """Return the inputs of so many equal prompts."""
        return {
            name: torch.cat([value] * size) if isinstance(value, Tensor) else value * size
            for name, value in self.inputs.items()
        }

    def budget(self, keep: Keep) -> int:
        """Return a budget in tokens.

        Raises:
            BudgetError: If it would not shorten anything.
        """
        check_keep(keep)
        count = resolve_keep(keep, self.tokens)
        if count >= self.tokens:
            raise BudgetError(
                f"keep={keep} of a picture that is {self.tokens} visual tokens leaves nothing to compare",
                f"pass --keep {max(1, self.tokens // 9)}, a ninth of them, or a larger picture",
            )
        return count


@torch.no_grad()
def encoded(model: Any, family: Family, inputs: Mapping[str, Any]) -> tuple[Any, list[Picture]]:
    """Return what the stock encoder gives for a batch, and its pictures."""
    output, _ = family.encode(model, "image", inputs)
    return output, list(family.pictures(model, "image", output, inputs))
