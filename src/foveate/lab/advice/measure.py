"""Measures the profile of a model: calls of the stock ``generate``, by stage.

Everything takes turns in rounds, in a new random order each time, so that whatever else the machine does falls on all
of it; of each quantity the values of all rounds are kept.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import foveate
from foveate import registry
from foveate.errors import BudgetError, UnsupportedMethod
from foveate.families import Family
from foveate.lab.advice.profile import MethodPoint, Point, Profile, Stage, device_bytes, schedule, setting
from foveate.lab.advice.prompt import Prompt, served
from foveate.lab.advice.timing import Call, exactly, peak, timed
from foveate.lab.contest import with_keep

#: Something that is measured once a round; it is told which round.
Arm = Callable[[int], None]

#: Decode steps of each call: enough for a median.
_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Args:
        question: Tokens of the question.
        output: Longest answer that predictions are wanted for, in tokens.
        batch: Largest batch that they are wanted for.
        methods: Specs without a budget; None: all registered methods.
        seconds: Begin no round after so long; one is always made.
        rounds: Most rounds.
        seed: Of the order in each round.
    """

    question: int = 30
    output: int = 64
    batch: int = 1
    methods: Sequence[str] | None = None
    seconds: float = 60.0
    rounds: int = 7
    seed: int = 0


class Profiler:
    """Measures one model on one prompt.

    Args:
        model: A vision-language model, not compressed.
        name: What it is called.
        prompt: One prompt with one picture.
        plan: What to measure.
        say: Gets a line now and then.
        others: Prompts with pictures of other sizes, for the encoder; those of the same size add nothing.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        prompt: Prompt,
        plan: Plan,
        say: Callable[[str], None] = lambda line: None,
        others: Sequence[Prompt] = (),
    ) -> None:
        self.model, self.name, self.prompt, self.plan, self.say = model, name, prompt, plan, say
        self.family: Family = served(model)
        self.values: dict[tuple[Stage, int, int], list[float]] = {}
        self.calls: dict[tuple[str, int, int], list[tuple[Call, float]]] = {}
        self.alive: dict[tuple[str, int, int], tuple[int, ...]] = {}
        self.refused: dict[str, str] = {}
        self.pixels = prompt.pixels(self.family)
        self.others = [other for other in others if other.pixels(self.family) != self.pixels]
        self.inputs = prompt.inputs(plan.question)
        _, report = self._call("random:keep=1", self.inputs, 1)
        assert report is not None
        self.pictures, self.layers, self.length = len(report.images), report.layers, report.prompt_tokens[0]
        self.visual = report.tokens
        self.tokens = round(self.visual / self.pictures)
        self.text = self.length - self.visual - plan.question
        self.kv_bytes = report.kv_bytes_before // self.length
        self.limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)

    # -- what is measured

    @property
    def batches(self) -> list[int]:
        """The batches at which parts are measured."""
        return sorted({1, 2, self.plan.batch})

    @property
    def lengths(self) -> list[int]:
        """Prompt lengths: from few visual tokens to all, and to what the cache holds at the end of an answer."""
        least = self.length - self.visual + max(self.pictures, self.visual // 20)
        longest = max(self.length + 1, min(self.length + self.plan.output, 2 * self.length, self.limit - _STEPS))
        between = [least + round(share * (self.length - least)) for share in (0.1, 0.25, 0.5)]
        return sorted({least, *between, longest})

    def budgets(self, method: str) -> list[int]:
        """The budgets that a method is measured at, in tokens: a ninth and a half of all, or three quarters.

        Raises:
            BudgetError: If it can meet none of them.
        """
        found: list[int] = []
        reason: BudgetError | None = None
        for share in (1 / 9, 1 / 2, 3 / 4):
            keep = max(1, round(share * self.tokens))
            try:
                schedule(method, keep, self.tokens, self.layers)
            except BudgetError as error:
                reason = error
            else:
                found.append(keep)
        if reason is not None and not found:
            raise reason
        return found[:2]

    def run(self) -> Profile:
        """Measure in rounds until the time is over."""
        begin = time.monotonic()
        arms: list[Arm] = []
        for batch in self.batches:
            arms += [partial(self._parts, batch), partial(self._plain, batch)]
        arms += [partial(self._other, other) for other in self.others]
        arms += self._methods()
        self._call(None, self.inputs, 2)
        shuffle, rounds, longest = random.Random(self.plan.seed), 0, 0.0
        while rounds < self.plan.rounds:
            started = time.monotonic()
            shuffle.shuffle(arms)
            for arm in arms:
                gc.collect()
                arm(rounds)
            rounds, took = rounds + 1, time.monotonic() - started
            longest = took if rounds < 3 else max(longest, took)  # the first round warms up what a method needs
            self.say(f"round {rounds} took {took:.0f} s")
            if time.monotonic() - begin + longest > self.plan.seconds:
                break
        self._memory()
        return self._profile(rounds, time.monotonic() - begin)

    def _parts(self, batch: int, turn: int) -> None:
        """The encoder once, then prompts of several lengths, in which each picture takes one token."""
        lengths = self.lengths if batch == 1 else [self.lengths[0], self.lengths[-2], self.length]
        with foveate.compress(self.model, "random:keep=1") as handle:
            call = timed(self.model, self.family, self.prompt.inputs(self.plan.question, batch), 1)
            self._note("encode", batch, self.pixels, call.encode)
            for length in lengths:
                inputs = self.prompt.inputs(length - self.pictures - self.text, batch)
                handle.reselect()
                call = timed(self.model, self.family, inputs, 1 + _STEPS)
                self._note("prefill", batch, length, call.prefill)
                self._note("step", batch, length + _STEPS // 2, call.step)

    def _plain(self, batch: int, turn: int) -> None:
        call, _ = self._call(None, self.prompt.inputs(self.plan.question, batch), 1 + _STEPS)
        self._note("encode", batch, self.pixels, call.encode)
        self._note("prefill", batch, self.length, call.prefill)
        self._note("rest", batch, self.length, call.rest)
        self._note("first", batch, self.length, call.first)
        self._note("step", batch, self.length + _STEPS // 2, call.step)

    def _other(self, other: Prompt, turn: int) -> None:
        call, _ = self._call("random:keep=1", other.inputs(1), 1)
        self._note("encode", 1, other.pixels(self.family), call.encode)

    def _methods(self) -> list[Arm]:
        """What measures the methods; one that was not asked for by name may refuse."""
        arms, asked = [], self.plan.methods
        for method in registry.names() if asked is None else asked:
            try:
                arms.append(self._method(method))
            except (BudgetError, UnsupportedMethod) as error:
                if asked is not None:
                    raise
                self.refused[method] = error.message
        return arms

    def _method(self, method: str) -> Arm:
        """What measures a method: its first budget with the encoder, the others on what that made."""
        specs = {keep: with_keep(method, keep) for keep in self.budgets(method)}
        for spec in specs.values():
            foveate.compress(self.model, spec).remove()
        first = next(iter(specs.values()))
        batches = [1] if self.plan.batch == 1 else [1, self.plan.batch]

        def measure(turn: int) -> None:
            for batch in batches:
                inputs = self.prompt.inputs(self.plan.question, batch)
                if turn == 0:
                    self._call(first, inputs, 1)  # a first call makes what later ones find
                with foveate.compress(self.model, first) as handle:
                    for keep, spec in specs.items():
                        if spec != first:
                            handle.reselect(spec)
                        call, key = timed(self.model, self.family, inputs, 1 + _STEPS), (method, keep, batch)
                        self.calls.setdefault(key, []).append((call, handle.report.select_ms or 0.0))
                        self.alive[key] = handle.report.images[0].alive

        return measure

    def _memory(self) -> None:
        """The most memory: of the encoder, and of reading prompts that are encoded already."""
        for batch in (1, 2):
            inputs = self.prompt.inputs(self.plan.question, batch)
            bytes_ = peak(self.model, partial(self.family.encode, self.model, "image", inputs))
            self._note("memory: encode", batch, self.pixels, bytes_)
        with foveate.compress(self.model, "random:keep=1") as handle:
            self.model.generate(**self.prompt.inputs(self.plan.question), **exactly(1))
            for length in (self.lengths[0], self.lengths[-2], self.length):
                inputs = self.prompt.inputs(length - self.pictures - self.text)
                handle.reselect()
                bytes_ = peak(self.model, partial(self.model.generate, **inputs, **exactly(1)))
                self._note("memory: read", 1, length, bytes_)

    # -- how

    def _call(self, spec: str | None, inputs: Any, output: int) -> tuple[Call, foveate.Report | None]:
        with nullcontext() if spec is None else foveate.compress(self.model, spec) as handle:
            call = timed(self.model, self.family, inputs, output)
            return call, None if handle is None else handle.report

    def _note(self, stage: Stage, batch: int, size: int, value: float) -> None:
        self.values.setdefault((stage, batch, size), []).append(value)

    def _profile(self, rounds: int, seconds: float) -> Profile:
        weights = [*self.model.parameters(), *self.model.buffers()]
        return Profile(
            setting=setting(self.model, self.name),
            layers=self.layers,
            tokens=self.tokens,
            pictures=self.pictures,
            text=self.text,
            question=self.plan.question,
            pixels=self.pixels,
            kv_bytes=self.kv_bytes,
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in weights),
            device_bytes=device_bytes(self.model.device),
            limit=self.limit,
            points=tuple(Point(*key, tuple(values)) for key, values in sorted(self.values.items())),
            methods=tuple(
                MethodPoint(*key, self.alive[key], tuple(c for c, _ in calls), tuple(s for _, s in calls))
                for key, calls in self.calls.items()
            ),
            refused=self.refused,
            seconds=seconds,
            rounds=rounds,
        )
