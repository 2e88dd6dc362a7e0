"""Who takes part: every method at every budget, and the rows that no table does without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foveate
from foveate import registry
from foveate.budget import Keep, check_keep
from foveate.core import Method
from foveate.errors import BudgetError, TaskError, UnsupportedMethod

#: Methods that are in every contest: differences are taken to them.
ALWAYS = ("random",)

#: Budgets by task; those of others are tokens, as papers have them for LLaVA-1.5.
BUDGETS: dict[str, tuple[Keep, ...]] = {"demo-hd": (0.33, 0.22, 0.11, 0.056), "demo-video": (0.25, 0.15, 0.1)}
PUBLISHED: tuple[Keep, ...] = (192, 128, 64, 32)


@dataclass(frozen=True)
class Arm:
    """One way of answering.

    Args:
        name: ``full``, ``blind`` (a grey picture), ``downscale:keep=64``, or a method's spec.
        method: The same without its budget.
        budget: Mean of visual tokens per decoder layer and image: int = tokens, float = fraction; None: all of them, or
            what the method takes.
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


def read_arms(path: Path) -> list[Arm]:
    """Read arms from a file: in each line a budget, and a method with its options.

    ``0.22  evocut:alpha=0.5`` keeps 0.22 of the tokens. A method that says itself what it keeps stands beside those of
    the budget before it (``0.22  v2drop:stages=1@0.149``), or beside none (``-  todre:keep=1.0``). A ``#`` begins a
    comment.

    Raises:
        TaskError: With the line, if it cannot be read.
        UnknownMethod, BudgetError: If a method or a budget is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read {path}: {error}", "each line has a budget and a method") from error
    arms: list[Arm] = []
    for number, line in enumerate(lines, 1):
        text, *rest = line.partition("#")[0].strip().split(maxsplit=1) or [""]
        if not text:
            continue
        try:
            budget: Keep | None = None if text == "-" else int(text) if text.isdigit() else float(text)
            (spec,) = rest
        except ValueError as error:
            hint = "write a budget and a method: 0.22  evocut:alpha=0.5"
            raise TaskError(f"{path}, line {number} is no arm: {line.strip()!r}", hint) from error
        if budget is not None:
            check_keep(budget)
        own = budget is None or "keep=" in spec or "stages=" in spec
        name = foveate.to_spec(foveate.from_spec(spec)) if own or budget is None else with_keep(spec, budget)
        arms.append(Arm(name, name if own else spec, budget))
    return arms


def contest(
    model: Any, methods: Sequence[str] | None, budgets: Sequence[Keep], tokens: int, more: Sequence[Arm] = ()
) -> tuple[list[Arm], dict[str, str]]:
    """Return the arms, and who cannot take part, with the reason.

    Args:
        model: The model; each method is attached to it once.
        methods: Specs without a budget; None: every registered method.
        budgets: Means of visual tokens per decoder layer.
        tokens: Visual tokens of one image, for budgets that a deep enough decoder would meet.
        more: Further arms; of those with one name the first takes part.

    Raises:
        UnknownMethod, UnsupportedMethod, BudgetError: If a method that was asked for by name cannot run at all.
    """
    with foveate.compress(model, "random:keep=1.0") as handle:
        layers = handle.report.layers
    arms, refused = [FULL, BLIND, *(Arm(f"downscale:keep={keep!r}", "downscale", keep) for keep in budgets)], {}
    names = list(dict.fromkeys((*ALWAYS, *(registry.names() if methods is None else methods))))
    wanted = [Arm(with_keep(name, keep), name, keep) for name in names for keep in budgets]
    asked: dict[str, Arm] = {}
    for arm in (*wanted, *more):
        asked.setdefault(arm.name, arm)
    for arm in asked.values():
        try:
            built = foveate.from_spec(arm.name)
            expected_mean(built, tokens, layers)
            foveate.compress(model, built).remove()
        except BudgetError as error:
            refused[arm.name] = error.message
        except UnsupportedMethod as error:
            if arm in more or (methods is not None and arm.method in methods):
                raise
            refused[arm.name] = error.message
        else:
            arms.append(arm)
    return arms, refused
