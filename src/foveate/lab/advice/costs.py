"""What a call costs, by what its parts were seen to cost: a few physical terms, whose coefficients are not negative.

=======  =============================================================================================================
part     milliseconds; B prompts of S tokens, C in the cache, P pixel values of a picture
=======  =============================================================================================================
encode   ``a + b B P + c B P^2``
prefill  ``a + b B + c B S + d B S^2``; where tokens leave inside the LLM, each layer has its share of every term
step     ``a + b B + c B C``, C the mean over layers
rest     ``a + b B``: all else until the first token
=======  =============================================================================================================

A method adds what it was seen to add: to the encoder, by picture; to the rest ``a + b B + c B K`` for its choice of K
tokens; inside the LLM, to the prefill ``a + b B`` and to each step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float64

from foveate.core import ENCODER_EVIDENCE
from foveate.lab.advice.profile import MethodPoint, Profile, Stage, schedule
from foveate.lab.contest import with_keep
from foveate.registry import from_spec

Row = tuple[float, ...]

#: From fewer rounds than this nobody knows how far apart two runs of the same call are; it is then taken to be this.
_ROUNDS, _UNKNOWN = 3, 0.1


@dataclass(frozen=True)
class Fit:
    """Coefficients of terms, and how far off the fit is where it has not looked.

    Args:
        coefficients: One per term.
        error: Root mean square of relative errors, each point predicted from all others.
        spread: Median spread of the values of a point from round to round, relative.
        sizes: Least and largest size that was measured.
    """

    coefficients: tuple[float, ...]
    error: float
    spread: float
    sizes: tuple[float, float]

    def __call__(self, row: Row) -> float:
        return math.fsum(c * x for c, x in zip(self.coefficients, row, strict=True))

    @property
    def uncertain(self) -> float:
        """Relative uncertainty: of the fit and of the machine."""
        return math.hypot(self.error, self.spread)


def least_squares(rows: Sequence[Row], values: Sequence[float], by: Sequence[float] | None = None) -> tuple[float, ...]:
    """Return the coefficients >= 0 with the least sum of squared errors, each by its value (or as ``by`` says).

    There are few terms, so each subset of them is tried; the best whose free solution is positive is the answer.

    Example:
        >>> [round(c, 6) for c in least_squares([(1, 1), (1, 2), (1, 4)], [3.0, 5.0, 9.0])]
        [1.0, 2.0]
        >>> [round(c, 6) for c in least_squares([(1, 1), (1, 2)], [3.0, 3.0])]
        [3.0, 0.0]
    """
    scale = np.asarray(values if by is None else by, dtype=float)
    table: Float64[np.ndarray, "n terms"] = np.asarray(rows, dtype=float) / scale[:, None]
    wanted, size = np.asarray(values, dtype=float) / scale, np.abs(table).max(axis=0)
    size = np.where(size > 0, size, 1.0)
    best, least = np.zeros(table.shape[1]), float((wanted**2).sum())
    for count in range(1, table.shape[1] + 1):
        for terms in map(list, itertools.combinations(range(table.shape[1]), count)):
            part = table[:, terms] / size[terms]
            found = np.linalg.lstsq(part, wanted, rcond=1e-9)[0]
            wrong = float(((part @ found - wanted) ** 2).sum())
            if (found >= 0).all() and wrong < least - 1e-12:
                best, least = np.zeros(table.shape[1]), wrong
                best[terms] = found
    return tuple(float(c) for c in best / size)


def fit(rows: Sequence[Row], values: Sequence[float], spread: float, sizes: Sequence[float]) -> Fit:
    """Fit the terms; with two points or fewer nothing is known of the error, and it is taken for the spread."""
    errors = []
    for i in range(len(rows) if len(rows) > 2 else 0):
        others = least_squares([*rows[:i], *rows[i + 1 :]], [*values[:i], *values[i + 1 :]])
        errors.append(math.fsum(c * x for c, x in zip(others, rows[i], strict=True)) / values[i] - 1.0)
    error = math.sqrt(math.fsum(e * e for e in errors) / len(errors)) if errors else spread
    return Fit(least_squares(rows, values), error, spread, (min(sizes), max(sizes)))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be answered.

    Args:
        tokens: Visual tokens of each picture.
        pictures: Pictures of each prompt; tiles, where each counts by itself.
        pixels: Pixel values of each prompt, as the encoder gets them.
        question: Tokens of each question.
        output: Tokens of each answer.
        batch: Prompts read together.
    """

    tokens: int
    pixels: float
    question: int
    output: int
    batch: int = 1
    pictures: int = 1


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one way of answering is predicted to cost: milliseconds and bytes.

    Args:
        method: Its spec without the budget; None: all tokens.
        keep: Budget, in tokens of one picture.
        batch: Prompts read together.
        alive: Tokens of one picture in each decoder layer.
        encode: The encoder, with what the method reads there.
        rest: All else before the first token, with the method's choice.
        prefill: The decoder over the prompt.
        decode: All steps after the first token.
        memory: Weights and the most that tensors take at once.
        kv: Keys and values at the end of the answer.
        error: Uncertainty of ``encode``, ``rest``, ``prefill`` and ``decode``, in milliseconds.
        beyond: What lies outside the range that was measured.
    """

    method: str | None
    keep: int
    batch: int
    alive: tuple[int, ...]
    encode: float
    rest: float
    prefill: float
    decode: float
    memory: float
    kv: float
    error: dict[str, float] = field(default_factory=dict)
    beyond: tuple[str, ...] = ()

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.encode + self.rest + self.prefill

    @property
    def total(self) -> float:
        """Time to the last token."""
        return self.first + self.decode

    @property
    def first_error(self) -> float:
        """Uncertainty of the time to the first token."""
        return math.hypot(*(self.error[part] for part in ("encode", "rest", "prefill")))

    @property
    def total_error(self) -> float:
        """Uncertainty of the time to the last token."""
        return math.hypot(*self.error.values())

    @property
    def mean_alive(self) -> float:
        """Mean tokens of one picture per decoder layer."""
        return sum(self.alive) / len(self.alive)

    def speedup(self, full: Cost, part: str = "total") -> tuple[float, float]:
        """Return how many times faster than ``full`` this is, and the uncertainty of that.

        Both run the same encoder: what is not known of its time moves numerator and denominator together.

        Args:
            full: What it is compared with.
            part: ``total``, or ``first`` for the time to the first token.
        """
        mine, other = getattr(self, part), getattr(full, part)
        own = ("rest", "prefill", "decode") if part == "total" else ("rest", "prefill")
        parts = [self.error[p] / mine for p in own] + [full.error[p] / other for p in own]
        ratio = other / mine
        return ratio, ratio * math.hypot(*parts, full.error["encode"] * (1 / mine - 1 / other))


@dataclass(frozen=True)
class MethodCost:
    """What a method adds, in milliseconds.

    Args:
        encode: To the encoder, by picture.
        inner: To the prefill: once, and by picture.
        step: To each step.
        rest: To all but encoder and prefill until the first token: once, by picture, by picture and token kept.
        select: Its own selection, of one picture, as the report counts it.
    """

    encode: float
    inner: tuple[float, float]
    step: float
    rest: tuple[float, ...]
    select: float


class Costs:
    """Predicts the cost of any way of answering from a profile."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.encode = self._fit("encode", lambda b, p: (1.0, b * p, b * p * p))
        self.prefill = self._fit("prefill", lambda b, s: (1.0, b, b * s, b * s * s))
        self.step = self._fit("step", lambda b, c: (1.0, b, b * c))
        self.rest = self._fit("rest", lambda b, s: (1.0, b))
        self._encoder_bytes = self._fit("memory: encode", lambda b, p: (1.0, b * p))
        self._reading_bytes = self._fit("memory: read", lambda b, s: (1.0, b * s, b * s * s))
        self._points = {name: list(each) for name, each in itertools.groupby(profile.methods, lambda p: p.method)}
        self.methods = {name: self._method(points) for name, points in self._points.items()}

    @cached_property
    def noise(self) -> float:
        """How far apart two runs of the same call are, relative: half the distance of quartiles, by the median."""
        return self._spread("first")

    def predict(self, work: Work, method: str | None = None, keep: int | None = None) -> Cost:
        """Return what answering costs with a method and a budget; without, with all tokens.

        Raises:
            BudgetError: If the method cannot meet the budget.
            KeyError: If the method is not in the profile.
        """
        b, text = work.batch, self.profile.text + work.question
        keep = work.tokens if keep is None or method is None else keep
        alive = self.alive(method, keep, work.tokens)
        lengths = [text + work.pictures * n for n in alive]
        cache = sum(lengths) / len(lengths) + work.output / 2
        encode, rest = self.encode((1.0, b * work.pixels, b * work.pixels**2)), self.rest((1.0, b))
        prefill, step = self._over_layers(b, lengths), self.step((1.0, b, b * cache))
        if method is not None:
            added = self.methods[method]
            encode, step = encode + added.encode * b, step + added.step
            prefill += added.inner[0] + added.inner[1] * b
            rest += added.rest[0] + added.rest[1] * b + added.rest[2] * b * work.pictures * keep
        decode = step * max(0, work.output - 1)
        error = {
            "encode": encode * self.encode.uncertain,
            "rest": rest * self.rest.uncertain,
            "prefill": prefill * self.prefill.uncertain,
            "decode": decode * self.step.uncertain,
        }
        memory, kv = self._memory(work, lengths)
        return Cost(
            method=method,
            keep=keep,
            batch=b,
            alive=alive,
            encode=encode,
            rest=rest,
            prefill=prefill,
            decode=decode,
            memory=memory,
            kv=kv,
            error=error,
            beyond=self._beyond(work, lengths),
        )

    def alive(self, method: str | None, keep: int, tokens: int) -> tuple[int, ...]:
        """Return the tokens of one picture in each decoder layer.

        Where a count depends on the input, it is taken from what the profile saw at the nearest budget.
        """
        layers, counts, alive = self.profile.layers, [], tokens
        stages = {} if method is None else dict(schedule(method, keep, tokens, layers))
        for layer in range(layers):
            if layer in stages:
                stays = stages[layer]
                alive = self._seen(str(method), keep, layer, alive) if stays is None else stays
            counts.append(alive)
        return tuple(counts)

    def _seen(self, method: str, keep: int, layer: int, alive: int) -> int:
        point = min(self._points[method], key=lambda p: abs(p.keep - keep))
        before = point.alive[layer - 1] if layer else self.profile.tokens
        return round(alive * point.alive[layer] / max(1, before))

    def _over_layers(self, batch: int, lengths: Sequence[int]) -> float:
        """The prefill where layers read prompts of different lengths: each has its share of every term."""
        mean, square = (math.fsum(n**power for n in lengths) / len(lengths) for power in (1, 2))
        return self.prefill((1.0, batch, batch * mean, batch * square))

    def _memory(self, work: Work, lengths: Sequence[int]) -> tuple[float, float]:
        """Weights and the most that tensors take: in the encoder, in a decoder layer, or at the end of the answer."""
        b, layer_kv = work.batch, self.profile.kv_bytes / len(lengths)
        constant, linear, square = self._reading_bytes.coefficients
        held, reading = 0.0, 0.0
        for n in lengths:
            held += b * n * layer_kv
            reading = max(reading, held + b * n * max(0.0, linear - self.profile.kv_bytes) + b * n * n * square)
        kv = held + b * work.output * self.profile.kv_bytes
        written = kv + b * (max(lengths) + work.output) * layer_kv  # a layer's cache is copied when it grows
        encoding = self._encoder_bytes((1.0, b * work.pixels))
        return self.profile.weight_bytes + max(encoding, constant + max(reading, written)), kv

    def _fit(self, stage: Stage, row: Callable[[float, float], Row]) -> Fit:
        points = self.profile.at(stage)
        spread = 0.0 if stage.startswith("memory") else self._spread(stage)
        rows = [row(point.batch, point.size) for point in points]
        return fit(rows, [point.median for point in points], spread, [point.batch * point.size for point in points])

    def _spread(self, stage: Stage) -> float:
        spread = float(np.median([point.spread for point in self.profile.at(stage)]))
        return spread if self.profile.rounds >= _ROUNDS else max(spread, _UNKNOWN)

    def _method(self, points: Sequence[MethodPoint]) -> MethodCost:
        profile, method = self.profile, from_spec(with_keep(points[0].method, points[0].keep))
        several = len({p.batch for p in points}) > 1  # if not, all that is added goes by the picture
        reads = any(part.needs & ENCODER_EVIDENCE for part in method.parts)
        inside = any(site for part in method.parts for site in part.sites(profile.layers))
        encode, inner, step = 0.0, (0.0, 0.0), 0.0
        text = profile.text + profile.question
        if reads:
            alone = {p.batch: p.median for p in profile.at("encode") if p.size == profile.pixels}
            whole = [p for p in points if p.median("encode") > 0]  # the others selected again from what these encoded
            encode = max(0.0, _mean([(p.median("encode") - alone[p.batch]) / p.batch for p in whole]))
        if inside:
            lengths = [[text + profile.pictures * n for n in p.alive] for p in points]
            seen = [p.median("prefill") - self._over_layers(p.batch, n) for p, n in zip(points, lengths, strict=True)]
            rows = [(float(several), float(p.batch)) for p in points]
            once, each = least_squares(rows, seen, [p.median("prefill") for p in points])
            inner = (once, each)
            caches = [sum(n) / len(n) for n in lengths]
            plain = [self.step((1.0, p.batch, p.batch * c)) for p, c in zip(points, caches, strict=True)]
            step = max(0.0, _mean([p.median("step") - s for p, s in zip(points, plain, strict=True)]))
        kept = [(float(several), float(p.batch), float(p.batch * profile.pictures * p.keep)) for p in points]
        rests = [p.median("rest") for p in points]
        more = [rest - self.rest((1.0, p.batch)) for p, rest in zip(points, rests, strict=True)]
        rest = least_squares(kept, more, rests)
        select = _mean([np.median(p.select) for p in points if p.batch == 1])
        return MethodCost(encode, inner, step, rest, select)

    def _beyond(self, work: Work, lengths: Sequence[int]) -> tuple[str, ...]:
        b = work.batch
        checks = (
            ("pixels", self.encode, [b * work.pixels]),
            ("prompt", self.prefill, [b * n for n in lengths]),
            ("cache", self.step, [b * (sum(lengths) / len(lengths) + work.output)]),
        )
        return tuple(
            name for name, seen, sizes in checks if min(sizes) < 0.9 * seen.sizes[0] or max(sizes) > 1.1 * seen.sizes[1]
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
