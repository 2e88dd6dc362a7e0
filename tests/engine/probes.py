"""Methods that exist for the tests: counts that depend on the image, evidence laid open, answers that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from foveate.core import Evidence, Method, Selection


@dataclass(frozen=True, kw_only=True)
class Coin(Method):
    """Keeps a share that differs from image to image: at each site a token stays or goes by its rank.

    Args:
        at: The sites, one digit each.
        share: About what stays.
        seed: Another number, another choice.
        least: How many stay at least.
    """

    name: ClassVar[str] = "coin"
    adaptive: ClassVar[bool] = True

    at: str = "0"
    share: float = 0.5
    seed: int = 0
    least: int = 1

    def sites(self, n_layers: int) -> tuple[int, ...]:
        return tuple(int(digit) for digit in self.at)

    def select(self, evidence: Evidence, site: int) -> Selection:
        rank = evidence.features[:, 0].argsort().argsort()
        number = (rank * 37 + rank.argmax() * 11 + self.seed * 53 + site * 29) % 101
        stay = (number < 101 * self.share) | (rank < self.least)
        return Selection(keep=torch.arange(evidence.n), stay=stay, scores=-number.float())


@dataclass(frozen=True, kw_only=True)
class SharedCoin(Coin):
    """The same for all images of a prompt together."""

    name: ClassVar[str] = "shared_coin"
    scope: ClassVar[Literal["image", "prompt"]] = "prompt"


@dataclass(frozen=True, kw_only=True)
class Wrong(Method):
    """Answers with what a function of n returns."""

    name: ClassVar[str] = "wrong"

    answer: Callable[[int], list[int]]
    at: int = 0

    def sites(self, n_layers: int) -> tuple[int, ...]:
        return (self.at,)

    def expected(self, alive: int, total: int, site: int, n_layers: int) -> int | None:
        return alive // 2

    def select(self, evidence: Evidence, site: int) -> Selection:
        return Selection(keep=torch.tensor(self.answer(evidence.n), dtype=torch.long))


def peek(at: int, *needs: str, together: bool = False, layer: Literal["feature", "last"] = "feature") -> Method:
    """Return a method that declares evidence and keeps everything; `watch` shows what it got."""

    @dataclass(frozen=True, kw_only=True)
    class Peek(Method):
        name: ClassVar[str] = "peek"
        scope: ClassVar[Literal["image", "prompt"]] = "prompt" if together else "image"

        @property
        def saliency_layer(self) -> Literal["feature", "last"]:
            return layer

        def shallow_layer(self, n_layers: int) -> int:
            return 1

        def sites(self, n_layers: int) -> tuple[int, ...]:
            return (at,)

        def encoder_layers(self, n_layers: int) -> range:
            return range(1, n_layers + 1)

        def fold(self, carry: Tensor | None, before: Tensor, after: Tensor) -> Tensor:
            return (0 if carry is None else 2 * carry) + (after - before).norm(dim=1)

        def select(self, evidence: Evidence, site: int) -> Selection:
            return Selection(keep=torch.arange(evidence.n))

    Peek.needs = frozenset(needs)
    return Peek()


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], list[Evidence]]:
    """Return a dict that fills with the evidence each method gets, by its name and site."""
    from foveate.engines import decoder, prompt

    seen: dict[tuple[str, int], list[Evidence]] = {}
    original: Any = prompt.select_all

    def spy(method: Method, evidences: list[Evidence], site: int) -> Any:
        seen[method.name, site] = list(evidences)
        return original(method, evidences, site)

    monkeypatch.setattr(prompt, "select_all", spy)
    monkeypatch.setattr(decoder, "select_all", spy)
    return seen
