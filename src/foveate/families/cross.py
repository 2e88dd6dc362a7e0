"""Families whose text looks across at visual tokens, which are not in its own sequence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Int
from torch import Tensor

from foveate.core import ENCODER_EVIDENCE
from foveate.families.base import Family


class CrossFamily(Family):
    """A prompt holds one mark per picture; some decoder layers attend from its text to the rows of its slots.

    All prompts of a batch have equally many slots, and all slots equally many rows: `encode` returns the tensor of all
    rows, [prompts, slots, rows, d]. A picture fills a slot from its first row on; what it leaves empty, and slots of
    prompts with fewer pictures, are padding.
    """

    positions: ClassVar[tuple[str, ...]] = ("original",)  # the text keeps its own, whatever leaves

    @abstractmethod
    def cross_layers(self, model: Any) -> list[int]:
        """The decoder layers that look across."""

    @abstractmethod
    def slots(self, arguments: Mapping[str, Any]) -> Int[Tensor, "n 2"]:
        """Prompt and slot of each picture of a call, in the order of `pictures`; on the host."""

    def reading_layers(self, model: Any) -> int:
        return len(self.cross_layers(model))

    def provides(self, model: Any) -> frozenset[str]:
        return frozenset({"coordinates", "text", "seed"}) | ENCODER_EVIDENCE
