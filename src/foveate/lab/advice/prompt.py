"""A prompt with one picture, made once and then repeated and lengthened at will: what the adviser measures with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.errors import UnsupportedModel
from foveate.families import CrossFamily, Family, family_of
from foveate.lab import shapes

#: Models whose pictures come in one tensor, each as a strip of patches beside the last.
_SIDE_BY_SIDE = frozenset({"minicpmv4_6"})


@dataclass(frozen=True)
class Prompt:
    """One prompt with one picture, and how to make others of the same kind.

    Args:
        base: What the processor gave for one prompt; it ends in text.
        filler: An ordinary word's id, of which questions are made.
        beside: Names of tensors that hold several pictures side by side, in their last dimension.
    """

    base: Mapping[str, Any]
    filler: int
    beside: frozenset[str] = frozenset()

    @property
    def length(self) -> int:
        """Tokens of the prompt without a question: the picture's, and what the template adds."""
        return int(self.base["input_ids"].shape[1])

    def inputs(self, question: int, batch: int = 1) -> dict[str, Any]:
        """Return the inputs of ``batch`` equal prompts whose question has so many tokens."""
        inputs = {}
        for name, value in self.base.items():
            if isinstance(value, Tensor) and value.shape[:2] == (1, self.length):
                longer = [value[:, :-1], value[:, -1:].repeat_interleave(question + 1, 1)]
                value = torch.cat(longer, 1)
                if name == "input_ids":
                    value[:, -1 - question : -1] = self.filler
            along = -1 if name in self.beside else 0
            inputs[name] = value * batch if isinstance(value, list) else torch.cat([value] * batch, along)
        return inputs

    def pixels(self, family: Family) -> int:
        """Numbers in the picture as the encoder gets it, tiles and all."""
        value = self.base[family.media_arguments["image"]]
        return sum(part.numel() for part in value) if isinstance(value, list) else int(value.numel())


def of_shape(shape: shapes.Shape, model: Any) -> Prompt:
    """Return the prompt of a random model: a random picture, and one token of text after it."""
    inputs = shapes.inputs(replace(shape, after=1), model.dtype, 0)
    return Prompt({name: value.to(model.device) for name, value in inputs.items()}, filler=5)


def of_inputs(model: Any, inputs: Mapping[str, Any], filler: int) -> Prompt:
    """Return the prompt of what a processor gave for one picture and next to no question."""
    packed = model.config.model_type in _SIDE_BY_SIDE
    return Prompt(dict(inputs), filler, frozenset({"pixel_values"} if packed else ()))


def served(model: Any) -> Family:
    """Return the family of a model whose prompts hold its visual tokens.

    Raises:
        UnsupportedModel: If no family serves it, or its text looks across at them.
    """
    family = family_of(model)
    if isinstance(family, CrossFamily):
        raise UnsupportedModel(
            f"{family.name} holds no visual tokens in its prompts, so what a shorter prompt saves says nothing here",
            "measure it: foveate bench MODEL",
        )
    return family
