"""Who takes part: each method runs once beforehand, is counted, and gets what it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

import foveate
from foveate import registry
from foveate.core import Method
from foveate.engines.base import Handle
from foveate.errors import FoveateError
from foveate.lab.speed.arms import Arms

#: In every table: the price of the plumbing.
RANDOM = "random"


@dataclass(frozen=True)
class Entrant:
    """A method at its budget.

    Args:
        spec: The method.
        keep: Tokens of an image that the ideal it is compared with keeps: the method's own mean per decoder layer.
        alive: Visual tokens in each decoder layer.
        before: Whether it selects before the LLM.
        reads: Decoder layers to whose attention it listens.
        kv_mib: Keys and values of the prompt, by its report.
        cuts: What a model cut by hand leaves out where; None where there is none.
    """

    spec: str
    keep: int
    alive: tuple[int, ...]
    before: bool
    reads: tuple[int, ...]
    kv_mib: float
    cuts: dict[int, Tensor] | None = None

    @property
    def mean(self) -> float:
        """Mean of visual tokens per decoder layer."""
        return sum(self.alive) / len(self.alive)

    @property
    def even(self) -> bool:
        """Whether all layers hold equally many."""
        return len(set(self.alive)) == 1


@dataclass
class Plan:
    """Who takes part, and who does not.

    Args:
        keep: The budget, in tokens of an image.
        sizes: Visual tokens of each image.
        entrants: By spec.
        refused: Why a method (or an arm) cannot take part, by its name.
    """

    keep: int
    sizes: tuple[int, ...]
    entrants: dict[str, Entrant] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, arms: Arms, methods: Sequence[str] | None, keep: int, say: Callable[[str], None]) -> Plan:
        """Run each method once.

        Args:
            arms: What runs them.
            methods: Specs; the budget is added where one has none. None: all that are registered.
            keep: The budget, in tokens.
            say: Told what cannot take part.

        Raises:
            FoveateError: If a method that was asked for by name cannot run; others are listed with the reason.
        """
        plan = cls(keep, arms.work.sizes)
        named = list(methods or [])
        specs = named if methods is not None else list(registry.names())
        if not any(spec.partition(":")[0] == RANDOM for spec in specs):
            specs = [*specs, RANDOM]
        steps, arms.steps = arms.steps, 0
        try:
            arms.full(1)
            for spec in specs:
                try:
                    whole = with_budget(spec, keep)
                    plan.entrants[whole] = _enter(arms, whole, keep, say)
                except FoveateError as error:
                    if spec in named:
                        raise
                    plan.refused[spec] = error.message
                    say(f"{spec} is refused: {error.message}")
            for count in plan.ideals.values():
                try:
                    arms.ideal(count, 1)
                except FoveateError as error:
                    plan.refused["ideal"] = error.message
        finally:
            arms.steps = steps
        return plan

    @property
    def ideals(self) -> dict[str, int]:
        """The tokens of each ideal, by its name."""
        if "ideal" in self.refused:
            return {}
        counts = dict.fromkeys((self.keep, *(entrant.keep for entrant in self.entrants.values())))
        return {self.ideal_name(count): count for count in counts}

    def kept(self, keep: int) -> int:
        """Return how many tokens of the whole picture stay, when so many of each image do."""
        return sum(min(keep, size) for size in self.sizes)

    def ideal_name(self, keep: int) -> str:
        return "ideal" if keep == self.keep else f"ideal:keep={keep}"

    def ideal_of(self, spec: str) -> str | None:
        """The ideal that a method is compared with; None where there is none."""
        return None if "ideal" in self.refused else self.ideal_name(self.entrants[spec].keep)

    def cut_of(self, spec: str) -> str | None:
        """The model cut by hand that a method is compared with; None where there is none."""
        return f"hand-cut {spec}" if self.entrants[spec].cuts is not None else None


def with_budget(spec: str, keep: int) -> str:
    """Return the spec with a budget, if its method takes one and the spec has none.

    Example:
        >>> with_budget("todre:exit=none", 64), with_budget("v2drop:stages=3@0.5", 64), with_budget("evocut:keep=9", 64)
        ('todre:keep=64,exit=none', 'v2drop:stages=3@0.5', 'evocut:keep=9')
    """
    name, _, options = spec.partition(":")
    given = any(piece.strip().startswith(("keep=", "stages=")) for piece in options.split(","))
    if not given and "+" not in spec:
        cls: type[Method] = registry.get(name.strip())
        if any(f.name == "keep" for f in dataclasses.fields(cls)):
            spec = f"{name}:keep={keep}" + (f",{options}" if options else "")
    return foveate.to_spec(foveate.from_spec(spec))


def _enter(arms: Arms, spec: str, keep: int, say: Callable[[str], None]) -> Entrant:
    sample, handle, reads = arms.method(spec, 1)
    report, work = handle.report, arms.work
    alive = tuple(map(sum, zip(*(image.alive for image in report.images), strict=True)))
    mean, wanted = sum(alive) / len(alive), sum(min(keep, size) for size in work.sizes)
    cuts = None
    if alive[0] == work.tokens and arms.can_cut and not _merges(handle):
        cuts = arms.columns(handle)
        if arms.hand_cut(cuts).answer != sample.answer:  # rounding may decide in half precision
            say(f"{spec}: the model cut by hand answers otherwise, and is left out")
            cuts = None
    return Entrant(
        spec=spec,
        keep=keep if abs(mean - wanted) <= max(1.0, 0.02 * wanted) else max(1, round(mean / len(work.sizes))),
        alive=alive,
        before=any(stage.site == 0 for stage in report.images[0].stages),
        reads=reads,
        kv_mib=report.kv_bytes_after / 2**20,
        cuts=cuts,
    )


def _merges(handle: Handle) -> bool:
    """Whether a method puts other rows into the places of those that stay, inside the LLM."""
    assert handle.frame is not None
    return any(
        stage.site > 0 and stage.selection.features is not None for seen in handle.frame.images for stage in seen.stages
    )
