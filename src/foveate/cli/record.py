"""One question at several budgets, for the page that `foveate run --html` writes: the encoder runs once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from foveate.errors import BudgetError

if TYPE_CHECKING:
    from foveate.core import Method
    from foveate.page import Run

#: Budgets beside the one that was asked for.
FACTORS = (0.25, 0.5, 1, 2, 4)


def around(method: Method, tokens: int) -> list[Method]:
    """Return the method at a quarter, a half, twice and four times its budget too, below all tokens, fewest first.

    A method without ``keep``, a chain or one with stages by hand, comes back alone.

    Args:
        method: The method as asked for.
        tokens: Visual tokens of the image with the fewest.

    Example:
        >>> from foveate import EvoCut, from_spec, to_spec
        >>> [to_spec(each) for each in around(EvoCut(keep=64), 576)]
        ['evocut:keep=16', 'evocut:keep=32', 'evocut:keep=64', 'evocut:keep=128', 'evocut:keep=256']
        >>> [to_spec(each) for each in around(EvoCut(keep=0.5), 576)]
        ['evocut:keep=0.125', 'evocut:keep=0.25', 'evocut:keep=0.5']
        >>> len(around(from_spec("v2drop:stages=3@0.5"), 576))
        1
    """
    keep: int | float | None = getattr(method, "keep", None)
    if keep is None:
        return [method]
    made: dict[int | float, Method] = {}
    for factor in FACTORS:
        scaled = round(keep * factor) if isinstance(keep, int) else float(f"{keep * factor:.4g}")
        share = scaled / tokens if isinstance(keep, int) else scaled
        if factor == 1 or 0 < share < 1:
            made[scaled] = method if factor == 1 else dataclasses.replace(method, keep=scaled)  # type: ignore[call-arg]
    return list(made.values())


def record(
    network: Any, processor: Any, inputs: Any, methods: Sequence[Method], asked: Method, limit: int
) -> tuple[list[Run], list[Method]]:
    """Answer once by each method; return the runs in their order, and the methods whose budgets cannot be met.

    Args:
        network: The model.
        processor: Its processor.
        inputs: What it reads.
        methods: One method at several budgets.
        asked: The one of them that is known to work.
        limit: Longest answer, in tokens.
    """
    from foveate.engines.base import compress
    from foveate.lab import chat
    from foveate.page import Run

    runs: dict[Method, Run] = {}
    with compress(network, asked) as handle:
        for method in sorted(methods, key=lambda method: method != asked):
            if runs:
                handle.reselect(method)
            try:
                output = network.generate(**inputs, max_new_tokens=limit, do_sample=False)
            except BudgetError:
                continue
            (answer,) = chat.answers(processor, inputs, output)
            runs[method] = Run(report=handle.report, answer=answer)
    return [runs[method] for method in methods if method in runs], [each for each in methods if each not in runs]
