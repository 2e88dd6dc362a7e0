"""What the rounds say, arm by arm: medians and spreads, ratios by round, and what was promised."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from foveate.lab.paired import Estimate, ratios
from foveate.lab.speed.arms import Sample
from foveate.lab.speed.operations import Operations
from foveate.lab.speed.plan import Entrant, Plan
from foveate.lab.speed.rounds import Measured
from foveate.lab.speed.rows import BOUNDS, Compared, Row


def rows(plan: Plan, measured: Measured, operations: Operations | None, layers: int) -> list[Row]:
    """Return all rows but those of memory.

    Args:
        plan: Who takes part.
        measured: What the rounds gave.
        operations: What the formulas need.
        layers: Decoder layers.
    """
    made = [Row("media", "read", "ms", measured.media)] if measured.media else []
    for (arm, batch), samples in measured.samples.items():
        if samples:
            made += _timed(plan, measured, arm, batch, samples)
    alive: dict[str, Sequence[float]] = {"full": [sum(plan.sizes)] * layers}
    alive |= {name: [plan.kept(keep)] * layers for name, keep in plan.ideals.items()}
    alive |= {spec: entrant.alive for spec, entrant in plan.entrants.items()}
    for arm, each in alive.items():
        made += _counted(arm, each, operations, plan.entrants.get(arm))
    made += [Row(arm, "refused", "", (), note=why) for arm, why in plan.refused.items()]
    made += [Row(arm, "refused", "", (), batch, note=why) for (arm, batch), why in measured.refused.items()]
    return made


def facts(plan: Plan, arm: str) -> dict[str, str]:
    """Return the columns that tell what an arm is: its mean of tokens, and which layers' attention it reads."""
    entrant = plan.entrants.get(arm.removeprefix("hand-cut "))
    means: dict[str, float] = {name: plan.kept(keep) for name, keep in plan.ideals.items()}
    means["full"] = sum(plan.sizes)
    mean = means.get(arm) if entrant is None else entrant.mean
    reads = ";".join(map(str, entrant.reads)) if entrant is not None and arm == entrant.spec else ""
    return {"mean_tokens": "" if mean is None else f"{mean:.6g}", "reads_llm_attention": reads}


def _series(samples: Sequence[Sample], batch: int) -> dict[str, list[float]]:
    """Return the values per round of what was measured directly."""
    values = {
        "first_token": [run.first for run in samples],
        "first_token_cpu": [run.cpu for run in samples],
        "total": [run.total for run in samples],
        "encode": [run.encode for run in samples if run.encode is not None],
        "select": [run.select for run in samples],
        "evidence": [run.evidence for run in samples],
        "prefill": [run.prefill for run in samples if run.prefill is not None],
        "decode_step": [statistics.median(run.steps) for run in samples if run.steps],
        "decode_step_cpu": [statistics.median(run.steps_cpu) for run in samples if run.steps_cpu],
        "images_per_second": [1e3 * batch / run.total for run in samples],
    }
    return {name: each for name, each in values.items() if each}


def _timed(plan: Plan, measured: Measured, arm: str, batch: int, samples: Sequence[Sample]) -> list[Row]:
    series = _series(samples, batch)
    made = {
        metric: Row(arm, metric, "1/s" if metric == "images_per_second" else "ms", values, batch)
        for metric, values in series.items()
    }
    full = measured.samples.get(("full", batch))
    if full and arm != "full":
        whole = _series(full, batch)
        for metric in ("first_token", "total", "prefill", "decode_step", "images_per_second"):
            if metric in made and metric in whole:
                made[metric].full = Compared.of(series[metric], "full", whole[metric])
    entrant = plan.entrants.get(arm)
    if entrant is None:
        return list(made.values())
    extra = [_selection(arm, batch, samples)]
    ideal = plan.ideal_of(arm)
    bound = measured.samples.get((ideal, batch)) if ideal else None
    if ideal and bound:
        like = _series(bound, batch)
        for metric, target in (("first_token", BOUNDS.overhead), ("decode_step", BOUNDS.decode)):
            if metric in made:
                made[metric].compared = Compared.of(series[metric], ideal, like[metric])
                made[metric].target = target if entrant.even else None
        if entrant.before:
            extra.append(_accounted(arm, batch, samples, ideal, bound))
    cut = plan.cut_of(arm)
    by_hand = measured.samples.get((cut, batch)) if cut else None
    if cut and by_hand:
        like = _series(by_hand, batch)
        for metric, target in (
            ("first_token", BOUNDS.inner),
            ("prefill", BOUNDS.inner),
            ("decode_step", BOUNDS.decode),
        ):
            if metric in made:
                compared = Compared.of(series[metric], cut, like[metric])
                extra.append(Row(arm, f"{metric}_by_hand", "ms", series[metric], batch, None, compared, target))
    return [*made.values(), *extra]


def _selection(arm: str, batch: int, samples: Sequence[Sample]) -> Row:
    """Choice and evidence together, and their share of the first token."""
    whole = [run.select + run.evidence for run in samples]
    share = Compared("first_token", Estimate.of(ratios(whole, [run.first for run in samples])))
    return Row(arm, "selection", "ms", whole, batch, None, share, BOUNDS.selection)


def _accounted(arm: str, batch: int, samples: Sequence[Sample], ideal: str, bound: Sequence[Sample]) -> Row:
    """One plus what the method adds, by the ideal's first token.

    Added are selection, and the difference in all that is neither encoder, selection nor decoder layers. The noise of
    seconds of equal matrix products stays out.
    """
    base = statistics.median(run.first for run in bound)
    rest = statistics.median(map(_rest, samples)) - statistics.median(map(_rest, bound))
    values = [1.0 + (run.select + run.evidence + rest) / base for run in samples]
    return Row(arm, "accounted", "ratio", values, batch, None, Compared(ideal, Estimate.of(values)), BOUNDS.overhead)


def _rest(run: Sample) -> float:
    """What is neither encoder nor selection nor decoder layers: cutting the prompt, logits, ``generate`` itself."""
    return run.first - (run.encode or 0.0) - run.select - (run.prefill or 0.0)


def _counted(arm: str, alive: Sequence[float], operations: Operations | None, entrant: Entrant | None) -> list[Row]:
    made = []
    if operations is not None:
        made.append(Row(arm, "operations", "GFLOP", [operations.first_token_gflop(alive)], note="by formula"))
        made.append(Row(arm, "kv", "MiB", [operations.kv_mib(alive)], note="by formula"))
    if entrant is not None:
        made.append(Row(arm, "kv_report", "MiB", [entrant.kv_mib], note="by the report"))
    return made


def memory_rows(peaks: Mapping[str, Mapping[str, float] | str]) -> list[Row]:
    """Return the rows of memory, given what each arm's process found (or why it failed)."""
    made = []
    full = peaks.get("full")
    for arm, found in peaks.items():
        if isinstance(found, str):
            made.append(Row(arm, "peak_memory", "MiB", (), note=found))
            continue
        row = Row(arm, "peak_memory", "MiB", [found["peak"]])
        if arm != "full" and isinstance(full, Mapping):
            ratio = found["peak"] / full["peak"]
            row.compared, row.target = Compared("full", Estimate(ratio, ratio, ratio)), BOUNDS.memory
        made += [row, Row(arm, "memory_before", "MiB", [found["before"]])]
    return made
