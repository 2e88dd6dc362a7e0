"""Budgets: how many of n tokens stay, how many are alive in each decoder layer, which schedule meets a mean.

``keep`` is the only dial and always says what stays: a float is a fraction in (0, 1], an int is a number of tokens.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from functools import partial

from foveate.errors import BudgetError

Keep = float | int
Stage = tuple[int, Keep]

_HINT = "keep=64 keeps 64 tokens, keep=0.25 keeps a quarter of them, keep=1.0 keeps all"


def check_keep(keep: object, *, allow_zero: bool = False) -> None:
    """Refuse a budget that is out of range or of the wrong kind.

    Args:
        keep: An int >= 1 (tokens) or a float in (0, 1] (fraction that stays).
        allow_zero: Also accept 0, "none stays", as the stages of in-LLM methods do.

    Raises:
        BudgetError: With what was received and what is allowed.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise BudgetError(f"keep must be an int or a float, got {keep!r}", _HINT)
    if allow_zero and keep == 0:
        return
    if isinstance(keep, int) and keep < 1:
        raise BudgetError(f"keep must be at least 1 token, got {keep}", _HINT)
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        whole = f"a number of tokens is an int: keep={int(keep)}; " if keep > 1 and keep == keep // 1 else ""
        raise BudgetError(f"a float keep is a fraction in (0, 1], got {keep}", whole + _HINT)


def resolve_keep(keep: Keep, n: int) -> int:
    """Return how many of ``n`` tokens stay: ``min(keep, n)`` or ``max(1, round(keep * n))``, halves up.

    Example:
        >>> resolve_keep(64, 576), resolve_keep(0.111, 576), resolve_keep(1.0, 576), resolve_keep(64, 10)
        (64, 64, 576, 10)
    """
    check_keep(keep)
    if isinstance(keep, int):
        return min(keep, n)
    return min(n, max(1, math.floor(keep * n + 0.5)))


def stage_keep(keep: Keep, alive: int) -> int:
    """Return how many of the ``alive`` tokens a stage keeps: ``floor(alive * keep)``, or ``min(keep, alive)``.

    A stage of 0 keeps none. (V2Drop's released code keeps ``max(1, .)``.)

    Example:
        >>> stage_keep(0.5, 576), stage_keep(0.3, 288), stage_keep(0, 86), stage_keep(12, 86)
        (288, 86, 0, 12)
    """
    check_keep(keep, allow_zero=True)
    return min(keep, alive) if isinstance(keep, int) else math.floor(alive * keep + 1e-9)


def check_stages(stages: Sequence[Stage]) -> None:
    """Refuse stages that do not rise, begin before layer 1, or keep what no stage can.

    Raises:
        BudgetError: With what was received and what to type.
    """
    layers = [layer for layer, _ in stages]
    if not layers or layers != sorted(set(layers)) or layers[0] < 1:
        raise BudgetError(f"stages need rising layers >= 1, got {layers}", "type stages=3@0.5/17@0.3/22@0")
    for _, share in stages:
        check_keep(share, allow_zero=True)


def at_depths(depths: Sequence[float], n_layers: int) -> tuple[int, ...]:
    """Return rising layers >= 1 at some depths of a decoder, fractions in [0, 1]; halves up.

    Example:
        >>> at_depths((3 / 32, 17 / 32, 22 / 32), 28)
        (3, 15, 19)
    """
    layers: list[int] = []
    for depth in depths:
        layers.append(max(math.floor(depth * n_layers + 0.5), layers[-1] + 1 if layers else 1))
    return tuple(layers)


def alive_per_layer(n: int, stages: Sequence[Stage], n_layers: int) -> tuple[int, ...]:
    """Return the visual tokens alive in each decoder layer, when before layer ``site`` each stage cuts once.

    Example:
        >>> alive_per_layer(576, ((3, 0.5), (5, 0)), 6)
        (576, 576, 576, 288, 288, 0)
    """
    at = dict(stages)
    alive, counts = n, []
    for layer in range(n_layers):
        if layer in at:
            alive = stage_keep(at[layer], alive)
        counts.append(alive)
    return tuple(counts)


def solve_schedule(n: int, keep: Keep, n_layers: int, sites: tuple[int, int, int]) -> tuple[Stage, ...]:
    """Return three stages whose mean of tokens per decoder layer is ``keep``.

    Before ``sites[0]`` and ``sites[1]`` the same share r of the tokens stays, before ``sites[2]`` none does. r solves
    ``a + b r + c r^2 = mean * n_layers / n`` with a, b, c the number of layers between the sites; the counts are then
    rounded so that the mean is met to within half a token per layer.

    Args:
        n: Visual tokens that enter the decoder.
        keep: Wanted mean of tokens per layer; int = tokens, float = fraction of n.
        n_layers: Decoder layers.
        sites: Three rising layer indices >= 1.

    Raises:
        BudgetError: If even dropping everything at ``sites[0]`` leaves a mean above ``keep``.

    Example:
        >>> stages = solve_schedule(576, 128, 32, (3, 17, 22))
        >>> round(sum(alive_per_layer(576, stages, 32)) / 32)
        128
    """
    first, second, third = sites
    if not 1 <= first < second < third <= n_layers:
        raise BudgetError(
            f"a schedule needs three rising layers in 1..{n_layers}, got {sites}",
            "name the stages yourself: v2drop:stages=3@0.5/17@0.3/22@0",
        )
    budget = _left(n, keep, n_layers, first)
    a, b = (second - first) * n, (third - second) * n
    if budget >= a + b:
        return ((first, n), (second, n), (third, _spread(budget - a - b, n_layers - third, n)))
    r = (-a + math.sqrt(a * a + 4 * b * budget)) / (2 * b)
    k1 = min(n, round(r * n))
    k2 = min(k1, _spread(budget - (second - first) * k1, third - second, n))
    return ((first, k1), (second, k2), (third, 0))


def solve_decay(
    n: int,
    keep: Keep,
    n_layers: int,
    sites: Sequence[int],
    goes_on: Callable[[int, int], int] = lambda alive, k: k,
) -> tuple[Stage, ...]:
    """Return stages that each keep the same share of what is alive, with a mean of ``keep`` tokens per layer.

    r solves ``sum_i w_i r^i = left / alive`` with w_i the layers that run after stage i; the first count is
    ``round(r alive)``, and the rest is solved again from there, so that the mean is met to within half a token.

    Args:
        n: Visual tokens that enter the decoder.
        keep: Wanted mean of tokens per layer; int = tokens, float = fraction of n.
        n_layers: Decoder layers.
        sites: Rising layer indices >= 1.
        goes_on: How many of ``alive`` tokens go on where a stage keeps ``k``, rising in k by at most one.

    Raises:
        BudgetError: If even dropping everything at ``sites[0]`` leaves a mean above ``keep``.

    Example:
        >>> solve_decay(576, 64, 32, (2,)), solve_decay(576, 270, 32, (8, 16, 24))
        (((2, 30),), ((8, 288), (16, 144), (24, 72)))
    """
    left = _left(n, keep, n_layers, sites[0])
    runs = [end - site for site, end in zip(sites, (*sites[1:], n_layers), strict=True)]
    alive, stages = n, []
    for i, site in enumerate(sites):
        wanted = math.floor(_share(runs[i:], left / max(alive, 1)) * alive + 0.5)
        k = bisect.bisect_left(range(wanted), wanted, key=partial(goes_on, alive))
        alive = goes_on(alive, k)
        left -= runs[i] * alive
        stages.append((site, k))
    return tuple(stages)


def _share(runs: Sequence[int], wanted: float) -> float:
    """Return the r in [0, 1] with ``sum_i runs_i r^i`` nearest to ``wanted``, i from 1."""
    low, high = 0.0, 1.0
    for _ in range(50):
        r = (low + high) / 2
        spent = sum(run * r**i for i, run in enumerate(runs, 1))
        low, high = (r, high) if spent < wanted else (low, r)
    return high


def _left(n: int, keep: Keep, n_layers: int, first: int) -> int:
    """Return what a mean leaves to spend, in tokens times layers, after ``first`` layers with all tokens."""
    mean = resolve_keep(keep, n)
    if mean * n_layers < first * n:
        least = math.ceil(first * n / n_layers)
        raise BudgetError(
            f"a mean of {mean} of {n} tokens per layer is out of reach: {first} of {n_layers} layers "
            f"run with all tokens, which alone makes {least}",
            f"keep at least {least}, or use a method that selects before the LLM",
        )
    return mean * n_layers - first * n


def _spread(tokens: int, layers: int, n: int) -> int:
    """Return the count per layer that spends ``tokens`` over ``layers``, within 0..n."""
    return min(n, max(0, round(tokens / layers))) if layers else 0
