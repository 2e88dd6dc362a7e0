"""Advice: which method and budget pay, where they stop paying, and when not to compress; never without the number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from foveate.errors import BudgetError
from foveate.lab.advice.costs import Cost, Costs, Work
from foveate.lab.advice.evidence import Evidence, Retention
from foveate.lab.contest import with_keep

#: Budgets, as shares of a picture's tokens: half, a third, a quarter, a ninth, a twentieth.
SHARES = (1 / 2, 1 / 3, 1 / 4, 1 / 9, 1 / 20)

#: A speed-up of less is not worth losing tokens for.
WORTH = 1.1

#: Published for Qwen2.5-VL-7B with a tenth of its tokens: the table of Tencent/AngelSlim, over training-free methods.
TEXT_RICH = "with 10 % kept, OCRBench falls from 85.3 to 23-34 and DocVQA from 94.9 to 38-66 (Qwen2.5-VL-7B, AngelSlim)"

#: Larger batches are not looked for.
_MANY = 1 << 14

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Option:
    """One method at one budget.

    Args:
        cost: What it is predicted to cost.
        first: How many times sooner the first token comes, and the uncertainty.
        total: How many times sooner the answer is there, and the uncertainty.
        retention: What is known of the accuracy; None: nothing.
        pays: Whether the answer comes sooner by more than runs of one call differ and than the prediction may be off.
    """

    cost: Cost
    first: tuple[float, float]
    total: tuple[float, float]
    retention: Retention | None
    pays: bool

    @property
    def spec(self) -> str:
        """Method and budget."""
        return with_keep(str(self.cost.method), self.cost.keep)

    def kept(self, reading: bool) -> float | None:
        """The share of accuracy that is kept, of questions about text if ``reading``."""
        known = self.retention
        return None if known is None else known.reading if reading else known.share


@dataclass(frozen=True)
class Sentence:
    """One piece of advice.

    Args:
        topic: ``use``, ``cost``, ``break-even``, ``not``, ``accuracy`` or ``range``.
        text: The sentence, with its numbers.
    """

    topic: str
    text: str


class Adviser:
    """Turns predictions into advice.

    Args:
        costs: What predicts.
        work: What is to be answered.
        evidence: What is known of accuracy.
        loss: The share of accuracy that may be lost.
        text_rich: The pictures are text to be read: documents, screens, charts.
    """

    def __init__(
        self, costs: Costs, work: Work, evidence: Evidence, *, loss: float = 0.05, text_rich: bool = False
    ) -> None:
        self.costs, self.work, self.evidence, self.loss, self.text_rich = costs, work, evidence, loss, text_rich
        self.full = costs.predict(work)

    @property
    def visual(self) -> int:
        """Visual tokens of a prompt."""
        return self.work.pictures * self.work.tokens

    # -- what there is to choose from

    def option(self, method: str, keep: int, work: Work | None = None) -> Option:
        """Return one choice.

        Raises:
            BudgetError: If the method cannot meet the budget.
        """
        work = work or self.work
        full = self.full if work == self.work else self.costs.predict(work)
        cost = self.costs.predict(work, method, keep)
        first, total = cost.speedup(full, "first"), cost.speedup(full)
        noise = max(total[1], self.costs.noise)
        return Option(cost, first, total, self.evidence.of(method, keep, work.tokens), total[0] - noise > 1.0)

    @cached_property
    def _all(self) -> dict[str, Option | BudgetError]:
        """Every method at every budget, or why it cannot meet it."""
        found: dict[str, Option | BudgetError] = {}
        for method in self.costs.methods:
            for keep in dict.fromkeys(max(1, round(share * self.work.tokens)) for share in SHARES):
                try:
                    found[with_keep(method, keep)] = self.option(method, keep)
                except BudgetError as error:
                    found[with_keep(method, keep)] = error
        return found

    @property
    def options(self) -> list[Option]:
        """Every method at every budget that it can meet."""
        return [one for one in self._all.values() if isinstance(one, Option)]

    @property
    def out_of_reach(self) -> dict[str, str]:
        """Every method at every budget that it cannot meet, and why."""
        return {spec: one.message for spec, one in self._all.items() if isinstance(one, BudgetError)}

    @cached_property
    def chosen(self) -> Option | None:
        """The fastest that pays and is known to keep enough accuracy; of equally fast ones that which keeps most."""
        enough = [one for one in self.paying if (one.kept(self.text_rich) or 0.0) >= 1.0 - self.loss]
        return max(enough, key=self._merit, default=None)

    @property
    def paying(self) -> list[Option]:
        """What is worth it, by time alone."""
        return [one for one in self.options if one.pays and one.total[0] >= WORTH]

    @cached_property
    def example(self) -> Option | None:
        """What break-evens are shown for: the choice, else what keeps most accuracy, else the cheapest choice."""
        known = [one for one in self.options if one.kept(self.text_rich) is not None]
        if self.chosen is not None:
            return self.chosen
        if known:
            return max(known, key=lambda one: (one.pays, one.kept(self.text_rich), one.total[0]))
        return max(self.options, key=lambda one: one.total[0], default=None)

    def _merit(self, one: Option) -> tuple[float, float]:
        return round(one.total[0], 1), one.kept(self.text_rich) or 0.0

    # -- where it stops paying

    def largest_keep(self, method: str) -> int | None:
        """The largest budget at which the answer still comes sooner by more than noise; None: there is none."""
        n = self.work.tokens
        return next((keep for keep in self._tokens(n) if self._pays(method, keep)), None)

    def longest_output(self, method: str, keep: int) -> int | None:
        """The longest answer that still comes `WORTH` times sooner; 0: none does; None: as long as the model goes."""

        def worth(output: int) -> bool:
            return self.option(method, keep, replace(self.work, output=output)).total[0] >= WORTH

        most = max(1, self.costs.profile.limit - self.costs.profile.text - self.work.question - self.visual)
        most = min(most, 1 << 15)
        if worth(most):
            return None
        return _last(worth, most)

    def least_batch(self, method: str, keep: int, most: int = 64) -> int | None:
        """The smallest batch whose answers come `WORTH` times sooner; None: none up to ``most``."""
        batches = [2**i for i in range(most.bit_length())]
        total = {b: self.option(method, keep, replace(self.work, batch=b)).total[0] for b in batches}
        return next((b for b in batches if total[b] >= WORTH), None)

    def largest_batch(self, method: str | None, keep: int | None = None) -> int:
        """How many prompts at once the device's memory holds; 0: not even one."""

        def fits(batch: int) -> bool:
            return self.costs.predict(replace(self.work, batch=batch), method, keep).memory <= self._device

        return _last(fits, _MANY)

    @property
    def _device(self) -> float:
        return float(self.costs.profile.device_bytes)

    def _tokens(self, n: int) -> Iterator[int]:
        """Budgets from nearly all tokens down, a hundredth at a time."""
        yield from dict.fromkeys(max(1, round(n * percent / 100)) for percent in range(99, 0, -1))

    def _pays(self, method: str, keep: int) -> bool:
        try:
            return self.option(method, keep).pays
        except BudgetError:
            return False

    # -- in words

    def sentences(self) -> list[Sentence]:
        """Return the advice."""
        parts = (self._use, self._spent, self._break_even, self._do_not, self._memory, self._accuracy, self._range)
        return [sentence for part in parts for sentence in part()]

    def _use(self) -> Iterator[Sentence]:
        chosen, name = self.chosen, self.costs.profile.setting["model"]
        known = [one for one in self.paying if one.kept(self.text_rich) is not None]
        best = max(self.options, key=lambda one: one.total[0], default=None)
        if chosen is not None and not self.text_rich:
            text = f"Use {chosen.spec}: {self._gain(chosen)}; {self._kept(chosen)}."
        elif not self.paying and best is not None and best.total[0] >= WORTH:
            text = (
                f"Undecided: the fastest, {best.spec}, is predicted to answer {_times(best.total)} as fast, which may "
                "be nothing; profile for longer (--seconds), or on a machine that does nothing else."
            )
        elif not self.paying and best is not None:
            text = f"Do not compress for speed: the fastest, {best.spec}, answers {_times(best.total)} as fast."
        elif self.text_rich:
            text = f"Do not compress text that is to be read, unless you measured it: {TEXT_RICH}{self._best(known)}."
        elif known:
            text = f"Nothing that pays is known to keep {1 - self.loss:.0%} of the accuracy{self._best(known)}."
        elif best is not None:
            text = (
                f"No recommendation: nothing is known of any method's accuracy on such a model (foveate eval {name} "
                f"measures it). By time alone, {best.spec}: {self._gain(best)}."
            )
        else:
            text = f"No recommendation: no method can run on {name}."
        yield Sentence("use", text)

    def _best(self, known: Sequence[Option]) -> str:
        if not known:
            return ""
        best = max(known, key=lambda one: (one.kept(self.text_rich) or 0.0, one.total[0]))
        return f". The least loss: {best.spec}, {self._kept(best)}, {self._gain(best)}"

    def _gain(self, one: Option) -> str:
        return (
            f"the answer comes {_times(one.total)} as fast ({_ms(self.full.total)} -> {_ms(one.cost.total)}), "
            f"the first token {_times(one.first)} ({_ms(self.full.first)} -> {_ms(one.cost.first)})"
        )

    def _kept(self, one: Option) -> str:
        known, share = one.retention, one.kept(self.text_rich)
        if known is None or share is None:
            return "nothing is known of its accuracy"
        what = "of the accuracy on questions about text" if self.text_rich else "of the accuracy"
        at = f"at {known.fraction(self.work.tokens):.0%} of the tokens"
        return f"it keeps {share:.1%} {what} {at} ({known.source})"

    def _spent(self) -> Iterator[Sentence]:
        full = self.full
        shares = [f"{name} {value / full.total:.0%}" for name, value in self._stages(full)]
        yield Sentence("cost", f"With all {self.visual} visual tokens the time goes to: {', '.join(shares)}.")

    def _stages(self, cost: Cost) -> list[tuple[str, float]]:
        stages = ("encoder", cost.encode), ("prefill", cost.prefill), ("decode", cost.decode), ("the rest", cost.rest)
        return sorted(stages, key=lambda stage: -stage[1])

    def _break_even(self) -> Iterator[Sentence]:
        one = self.example
        if one is None or one.cost.method is None:
            return
        method, keep, n = one.cost.method, one.cost.keep, self.work.tokens
        most, noise = self.largest_keep(method), f"{self.costs.noise:.1%}"
        if most is None:
            text = f"{method} pays at no budget: it saves less than its choice and noise ({noise}) cost."
        else:
            text = f"{method} pays up to keep={most} of {n}: beyond, its choice and noise ({noise}) eat the gain."
        yield Sentence("break-even", text)
        output = self.longest_output(method, keep)
        if output is None:
            text = f"{one.spec} stays {WORTH}x or more as fast for answers of any length that the model can write."
        elif output == 0:
            text = f"{one.spec} is less than {WORTH}x as fast even for an answer of one token."
        else:
            text = f"{one.spec} falls under {WORTH}x for answers of more than {output} tokens."
        yield Sentence("break-even", text)
        batch = self.least_batch(method, keep)
        if batch is None:
            text = f"{one.spec} stays under {WORTH}x in batches up to 64."
        elif batch == 1:
            text = f"{one.spec} is at {WORTH}x or more from batch 1 on."
        else:
            text = f"{one.spec} is at {WORTH}x or more in batches of {batch} and up; you asked for {self.work.batch}."
        yield Sentence("break-even", text)

    def _do_not(self) -> Iterator[Sentence]:
        full, none, n = self.full, self._none(), self.visual
        text, (name, most) = self.costs.profile.text + self.work.question, self._stages(self.full)[0]
        bound = f"with no visual token at all the answer would come {full.total / none.total:.2f}x as fast"
        if full.total / none.total < WORTH:
            kind = f"{name}-bound" if name in ("decode", "encoder") else f"bound by {name}"
            yield Sentence("not", f"This is {kind} ({most / full.total:.0%}): {bound}.")
        else:
            yield Sentence("not", f"The bound: {bound}, the first token {full.first / none.first:.2f}x.")
        if n <= text:
            yield Sentence("not", f"The picture is few tokens already: {n}, beside {text} of text.")

    def _none(self) -> Cost:
        """What it costs to read no visual token."""
        return self.costs.predict(replace(self.work, tokens=0))

    def _memory(self) -> Iterator[Sentence]:
        one, full = self.example, self.full
        if one is None or one.cost.method is None:
            return
        saved, share = (full.memory - one.cost.memory) / _MIB, full.memory / self._device
        batches = self.largest_batch(None), self.largest_batch(one.cost.method, one.cost.keep)
        where = f"{full.memory / _GIB:.2f} of {self._device / _GIB:.1f} GiB ({share:.0%})"
        saves = f"{where} at most, and {one.spec} saves {saved:.0f} MiB of it"
        fit = [f"{n} or more" if n == _MANY else str(n) for n in batches]
        room = f"{fit[0]} such prompts fit at once, {fit[1]} with {one.spec}"
        if batches[0] < self.work.batch <= batches[1]:
            text = f"Compress for memory: {room}; you asked for {self.work.batch}."
        elif share < 0.5:
            text = f"Memory is not the limit: {saves}; {room}."
        else:
            text = f"Memory: {saves}; {room}."
        yield Sentence("memory", text)

    def _accuracy(self) -> Iterator[Sentence]:
        sources = self.evidence.sources
        if not sources:
            yield Sentence("accuracy", "Nothing is known of accuracy here: no table of answers, nothing published.")
        elif self.evidence.known[0].measured:
            yield Sentence("accuracy", f"Accuracy is measured: {'; '.join(sources)}.")
        else:
            yield Sentence("accuracy", f"Accuracy is what papers print, not measured here: {'; '.join(sources)}.")

    def _range(self) -> Iterator[Sentence]:
        if self.full.beyond:
            yield Sentence(
                "range", f"Outside what was profiled: {', '.join(self.full.beyond)}; trust these figures less."
            )
        rounds = self.costs.profile.rounds
        if rounds < 3:
            yield Sentence("range", f"Rounds of the profile: {rounds}; for 3 or more give it time, --seconds.")


def _last(holds: Callable[[int], bool], most: int) -> int:
    """Return the last of 1..most for which something holds that holds up to some point; 0: not for 1."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.1f} s"


def _times(ratio: tuple[float, float]) -> str:
    return f"{ratio[0]:.2f}x (±{ratio[1]:.2f})"
