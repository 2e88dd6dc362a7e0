"""Tables made of the lines that the speed lab wrote, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from foveate.lab.speed.rows import BOUNDS, FEW, OVERLAP

Line = Mapping[str, str]

_SILENT = (OVERLAP, FEW)


@dataclass(frozen=True)
class Table:
    """A heading, the names of the columns, and cells."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> RichTable:
        """Return it for a terminal."""
        out = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, title=self.title, title_justify="left")
        for place, heading in enumerate(self.headings):
            out.add_column(heading, justify="right" if place else "left", no_wrap=not place)
        for row in self.rows:
            out.add_row(*map(escape, row))
        return out

    def markdown(self) -> str:
        """Return it as Markdown, arms as code."""
        lines = [self.headings, ["---"] * len(self.headings), *((f"`{first}`", *rest) for first, *rest in self.rows)]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


class Lines:
    """The lines of one run, by arm, metric and batch."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._by = {(line["arm"], line["metric"], int(line["batch"])): line for line in lines}
        self.batches = sorted({int(line["batch"]) for line in lines if line["metric"] == "first_token"})
        arms = dict.fromkeys(line["arm"] for line in lines if line["metric"] == "first_token")
        first = [arm for arm in arms if arm == "full" or arm.startswith("ideal")]
        named = sorted((arm for arm in arms if arm not in first), key=_order)
        self.arms = [*first, *named]
        self.refused = [line for line in lines if line["metric"] == "refused"]

    def get(self, arm: str, metric: str, batch: int = 1) -> Line | None:
        """Return a line, if there is one."""
        return self._by.get((arm, metric, batch))

    def median(self, arm: str, metric: str, batch: int = 1) -> str:
        """Return a median for people."""
        line = self.get(arm, metric, batch)
        return "" if line is None or not line["median"] else number(float(line["median"]))


def _order(arm: str) -> tuple[bool, str, bool]:
    name = arm.removeprefix("hand-cut ")
    return not name.startswith("random"), name, name != arm


def number(value: float) -> str:
    """Return three digits of a number, and no more after the point than they need.

    Example:
        >>> [number(value) for value in (0.1234, 3.14159, 31.4159, 3141.59)]
        ['0.123', '3.14', '31.4', '3142']
    """
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def stages(lines: Lines, batch: int = 1) -> Table:
    """Where the time goes, in milliseconds: medians, with quartiles of the first token."""
    rows = []
    for arm in lines.arms:
        first = lines.get(arm, "first_token", batch)
        if first is None:
            continue
        low, high = (number(float(first[f"quartile_{end}"])) for end in ("low", "high"))
        rows.append(
            (
                arm,
                first["mean_tokens"] and number(float(first["mean_tokens"])),
                *(lines.median(arm, metric, batch) for metric in ("encode", "select", "prefill")),
                f"{lines.median(arm, 'first_token', batch)} ({low}-{high})",
                _gain(first) + _by_operations(lines, arm),
                *(lines.median(arm, metric, batch) for metric in ("decode_step", "total")),
                _gain(lines.get(arm, "total", batch)),
            )
        )
    headings = ("arm", "tokens", "encode", "select", "prefill", "first token (quartiles)")
    more = ("full / it (by operations)", "per token", "total", "full / it")
    return Table(f"milliseconds, batch {batch}", headings + more, tuple(rows))


def costs(lines: Lines, batch: int = 1) -> Table:
    """What choosing costs, and how far the first token and a decode step are from the ideal."""
    rows = []
    for arm in lines.arms:
        selection = lines.get(arm, "selection", batch)
        if selection is None:
            continue
        accounted = lines.get(arm, "accounted", batch)
        share = selection["ratio"] if selection["ratio"] in _SILENT else f"{100 * float(selection['ratio']):.2f} %"
        rows.append(
            (
                arm,
                f"{lines.median(arm, 'selection', batch)} ({share})",
                _near(lines.get(arm, "first_token", batch)),
                "" if accounted is None or accounted["ratio"] in _SILENT else f"{float(accounted['ratio']):.3f}",
                _near(lines.get(arm, "first_token_by_hand", batch)),
                _near(lines.get(arm, "decode_step", batch)),
                selection["reads_llm_attention"].replace(";", ", ") or "no",
            )
        )
    headings = (
        "arm",
        "selection, ms (of first token)",
        "first token / ideal",
        "accounted for",
        "first token / hand-cut",
    )
    return Table("what choosing costs", (*headings, "per token / ideal", "reads LLM attention"), tuple(rows))


def sizes(lines: Lines) -> Table:
    """Operations, keys and values, and peak memory."""
    rows = []
    for arm in lines.arms:
        if not lines.get(arm, "operations") and not lines.get(arm, "peak_memory"):
            continue
        peak = lines.get(arm, "peak_memory")
        by_full = "" if peak is None or not peak["ratio"] else f"{float(peak['ratio']):.3f}"
        found = lines.median(arm, "peak_memory") or (peak["note"] if peak else "")
        kv = f"{lines.median(arm, 'kv')} / {lines.median(arm, 'kv_report') or '-'}"
        rows.append((arm, lines.median(arm, "operations"), kv, found, by_full))
    headings = ("arm", "GFLOP to the first token", "KV MiB, formula / report", "peak MiB", "it / full")
    return Table("operations and memory", headings, tuple(rows))


def throughput(lines: Lines) -> Table:
    """Pictures answered per second, by batch size, and how many times those of the full model."""
    rows = []
    for arm in lines.arms:
        cells = []
        for batch in lines.batches:
            line = lines.get(arm, "images_per_second", batch)
            gain = "" if line is None or not line["by_full"] else f" ({_times(line['by_full'])})"
            cells.append(lines.median(arm, "images_per_second", batch) + gain)
        rows.append((arm, *cells))
    return Table(
        "images per second (by the full model's)", ("arm", *(f"batch {b}" for b in lines.batches)), tuple(rows)
    )


def promises(lines: Sequence[Line], batch: int = 1) -> list[str]:
    """Say for each target who meets it, who does not, and of whom it is not known."""
    words = {
        ("first_token", BOUNDS.overhead): "first token, of the ideal's",
        ("accounted", BOUNDS.overhead): "first token, of the ideal's, as far as it can be accounted for",
        ("first_token_by_hand", BOUNDS.inner): "first token, of the hand-cut model's",
        ("selection", BOUNDS.selection): "selection, of the first token",
        ("decode_step", BOUNDS.decode): "decode step, of the ideal's",
        ("decode_step_by_hand", BOUNDS.decode): "decode step, of the hand-cut model's",
        ("peak_memory", BOUNDS.memory): "peak memory, of the full model's",
    }
    said = []
    for (metric, target), what in words.items():
        mine = [line for line in lines if line["metric"] == metric and line["met"] and line["batch"] == str(batch)]
        by = {met: [line["arm"] for line in mine if line["met"] == met] for met in ("yes", "no", "unresolved")}
        if mine:
            names = {met: "all" if len(by[met]) == len(mine) else ", ".join(by[met]) for met in ("no", "unresolved")}
            rest = "".join(f"; {met}: {who}" for met, who in names.items() if who)
            said.append(f"{what}: <= {target:g} in {len(by['yes'])} of {len(mine)}{rest}")
    return said


def _gain(line: Line | None) -> str:
    """How many times faster than the full model."""
    if line is None or not line["by_full"]:
        return ""
    return line["by_full"] if line["by_full"] in _SILENT else f"{1 / float(line['by_full']):.2f}"


def _times(text: str) -> str:
    return text if text in _SILENT else f"{float(text):.2f}x"


def _near(line: Line | None) -> str:
    """A ratio that should be near one, with its interval; where the spreads overlap the interval alone."""
    if line is None or not line["ratio"]:
        return ""
    low, high = (f"{float(line[f'ratio_{end}']):.3f}" for end in ("low", "high"))
    if line["ratio"] == FEW:
        return FEW
    value = line["ratio"] if line["ratio"] == OVERLAP else f"{float(line['ratio']):.3f}"
    return f"{value} ({low} .. {high})"


def _by_operations(lines: Lines, arm: str) -> str:
    full, mine = lines.get("full", "operations"), lines.get(arm.removeprefix("hand-cut "), "operations")
    if arm == "full" or full is None or mine is None:
        return ""
    return f" ({float(full['median']) / float(mine['median']):.2f})"


#: Every table, by the name that markers in the docs use.
TABLES: dict[str, Callable[[Lines], Table]] = {
    "stages": stages,
    "costs": costs,
    "sizes": sizes,
    "throughput": throughput,
}
