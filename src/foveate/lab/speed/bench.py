"""One run of the lab. What is measured is on disk after every round, and after every process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foveate.budget import Keep
from foveate.lab.environment import environment, load
from foveate.lab.speed import memory, rows, summary
from foveate.lab.speed.arms import Arms
from foveate.lab.speed.operations import Operations
from foveate.lab.speed.plan import Plan
from foveate.lab.speed.rounds import Pace, rounds
from foveate.lab.speed.rows import Row
from foveate.lab.speed.work import Work


@dataclass
class Bench:
    """What is measured of whom.

    Args:
        methods: Specs; None: every registered method.
        keep: Budget of those that have none.
        batches: Batch sizes.
        steps: Decode steps after the first token.
        pace: How much is measured.
        out: The CSV.
        about: What else each line carries: which model, what was drawn from which seed.
        say: Told how it goes.
    """

    methods: Sequence[str] | None
    keep: Keep
    batches: Sequence[int]
    steps: int
    pace: Pace
    out: Path
    about: Mapping[str, str] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        self.lines: list[dict[str, str]] = []
        self._plan, self._rows, self._constant = Plan(0, ()), list[Row](), dict[str, str]()

    def measure(self, work: Work) -> bool:
        """Run the rounds; return whether they came to their end. After Ctrl-C, what is complete counts."""
        self._constant = self._conditions(work)
        arms = Arms(work, self.steps)
        self._plan = Plan.make(arms, self.methods, work.budget(self.keep), self.say)
        self.say(f"{len(self._plan.entrants)} methods ran once; the rounds begin")
        operations, layers = Operations.of(work), len(work.family.layers(work.model))
        try:
            for measured in rounds(arms, self._plan, self.batches, self.pace, self.say):
                self._rows = summary.rows(self._plan, measured, operations, layers)
                self._save(self._rows)
        except KeyboardInterrupt:
            self.say("interrupted; the rounds that are complete count")
            return False
        return True

    def weigh(self, command: Callable[[str], Sequence[str]]) -> None:
        """Measure each arm's memory in a process of its own, by a command that prints what `memory.peak` returns.

        The model should have been given back before: every process makes its own.
        """
        peaks: dict[str, Mapping[str, float] | str] = {}
        try:
            for arm in ("full", *self._plan.ideals, *self._plan.entrants):
                found = peaks[arm] = memory.in_a_process(command(arm))
                self._save([*self._rows, *summary.memory_rows(peaks)])
                self.say(f"memory of {arm}: " + (found if isinstance(found, str) else f"{found['peak']:.0f} MiB"))
        except KeyboardInterrupt:
            self.say("interrupted; the memory of the other arms is not known")

    def _save(self, made: Sequence[Row]) -> None:
        constant = {**self._constant, "load_after": load()}
        self.lines = [{**row.cells(), **summary.facts(self._plan, row.arm), **constant} for row in made]
        rows.write(self.out, self.lines)

    def _conditions(self, work: Work) -> dict[str, str]:
        model = work.model
        return {
            **environment(model.device),
            **self.about,
            "layers": str(len(work.family.layers(model))),
            "width": str(model.config.get_text_config().hidden_size),
            "visual_tokens": str(work.tokens),
            "text_tokens": str(work.text),
            "keep": str(self.keep),
            "steps": str(self.steps),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": str(model.config._attn_implementation),
            "load_before": load(),
        }
