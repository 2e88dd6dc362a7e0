"""Who takes part: every method at every budget, and the rows that no table does without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import foveate
from foveate import registry
from foveate.budget import Keep
from foveate.core import Method
from foveate.errors import BudgetError, UnsupportedMethod

#: Methods that are in every contest: differences are taken to them.
ALWAYS = ("random",)


@dataclass(frozen=True)
class Arm:
    """One way of answering.

    Args:
        name: ``full``, ``blind`` (a grey picture), ``downscale:keep=64``, or a method's spec.
        method: The same without its budget.
        budget: Mean of visual tokens per decoder layer and image: int = tokens, float = fraction; None: all of them.
    """

    name: str
    method: str
    budget: Keep | None = None


FULL, BLIND = Arm("full", "full"), Arm("blind", "blind")


def with_keep(method: str, keep: Keep) -> str:
    """Return the spec of a method at a budget.

    Raises:
        UnknownMethod, BudgetError: If the spec is wrong, or has a budget of its own.

    Example:
        >>> with_keep("todre:exit=none", 64)
        'todre:keep=64,exit=none'
    """
    name, _, options = method.partition(":")
    if "keep=" in options or "stages=" in options or "+" in method:
        raise BudgetError(f"the budgets of {method!r} come from --keep", f"type {name!r} with its other options")
    return foveate.to_spec(foveate.from_spec(f"{name}:keep={keep!r}" + (f",{options}" if options else "")))


def expected_mean(method: Method, tokens: int, layers: int) -> float:
    """Return the mean of visual tokens per decoder layer of one image, as far as it is known beforehand.

    Raises:
        BudgetError: If the decoder is too shallow for the budget.

    Example:
        >>> expected_mean(foveate.from_spec("fastv:keep=64"), 576, 32), expected_mean(foveate.EvoCut(keep=64), 576, 32)
        (64.125, 64.0)
    """
    alive, entered, total = tokens, tokens, 0
    at = {site: part for part in method.parts for site in part.sites(layers)}
    for layer in range(layers):
        if layer in at:
            left = at[layer].expected(alive, entered if layer else tokens, layer, layers)
            alive = alive if left is None else left
        entered = entered if layer else alive
        total += alive
    return total / layers


def contest(
    model: Any, methods: Sequence[str] | None, budgets: Sequence[Keep], tokens: int
) -> tuple[list[Arm], dict[str, str]]:
    """Return the arms, and who cannot take part, with the reason.

    Args:
        model: The model; each method is attached to it once.
        methods: Specs without a budget; None: every registered method.
        budgets: Means of visual tokens per decoder layer.
        tokens: Visual tokens of one image, for budgets that a deep enough decoder would meet.

    Raises:
        UnknownMethod, UnsupportedMethod, BudgetError: If a method that was asked for by name cannot run at all.
    """
    with foveate.compress(model, "random:keep=1.0") as handle:
        layers = handle.report.layers
    arms, refused = [FULL, BLIND, *(Arm(f"downscale:keep={keep!r}", "downscale", keep) for keep in budgets)], {}
    names = list(dict.fromkeys((*ALWAYS, *(registry.names() if methods is None else methods))))
    for name in names:
        for keep in budgets:
            spec = with_keep(name, keep)
            try:
                built = foveate.from_spec(spec)
                expected_mean(built, tokens, layers)
                foveate.compress(model, built).remove()
            except BudgetError as error:
                refused[spec] = error.message
            except UnsupportedMethod as error:
                if methods is not None and name in methods:
                    raise
                refused[spec] = error.message
            else:
                arms.append(Arm(spec, name, keep))
    return arms, refused
