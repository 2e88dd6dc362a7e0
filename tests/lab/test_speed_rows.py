"""When a ratio is shown and when it is not, and what the tables make of the rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.lab.paired import Estimate, Spread
from foveate.lab.speed.rows import Compared, Row, read, write
from foveate.lab.speed.tables import TABLES, Lines, costs, promises, sizes, stages, throughput

FACTS = {"mean_tokens": "64", "reads_llm_attention": ""}


def lines(*rows: Row) -> list[dict[str, str]]:
    return [{**row.cells(), **FACTS} for row in rows]


def test_an_interval_that_holds_the_target_decides_nothing() -> None:
    wide, narrow = Estimate(1.0, 0.9, 1.3), Estimate(1.01, 1.0, 1.02)
    assert (wide.meets(1.05), narrow.meets(1.05), Estimate(1.2, 1.19, 1.21).meets(1.05)) == ("unresolved", "yes", "no")
    assert Estimate.of([1.0] * 4).meets(1.05) == "unresolved"
    assert Estimate.of([1.0] * 5).meets(1.05) == "yes"


@given(
    first=st.lists(st.floats(1, 100), min_size=3, max_size=9),
    second=st.floats(0.2, 5.0),
    noise=st.floats(0.0, 0.5),
)
def test_a_ratio_is_shown_exactly_where_the_quartiles_stand_apart(
    first: list[float], second: float, noise: float
) -> None:
    others = [value * second * (1 + noise * (i % 2)) for i, value in enumerate(first)]
    compared = Compared.of(first, "full", others)
    apart = not Spread.of(first).overlaps(Spread.of(others)) and not compared.ratio.low <= 1.0 <= compared.ratio.high
    assert (compared.text != "overlap") == apart
    if apart:
        assert float(compared.text) == pytest.approx(compared.ratio.value, abs=1e-4)


def test_below_three_rounds_nothing_is_compared() -> None:
    assert Compared.of([1.0, 1.0], "full", [9.0, 9.0]).text == "few rounds"
    assert Compared.of([1.0] * 3, "full", [9.0] * 3).text == "0.1111"


def test_the_file_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "a" / "bench.csv"
    first = lines(Row("full", "first_token", "ms", [1.0, 2.0, 3.0]))
    write(out, first)
    assert read(out) == first
    with pytest.raises(ValueError):
        write(out, [first[0], {"odd": "1"}])
    assert read(out) == first


def whole() -> list[dict[str, str]]:
    """Two arms of three rounds, one of which stands apart from the full model."""
    full, near, far = [100.0, 101.0, 102.0], [99.0, 100.5, 103.0], [40.0, 41.0, 42.0]
    rows = [Row("full", "first_token", "ms", full), Row("full", "images_per_second", "1/s", [9.0] * 3)]
    rows += [Row("full", "operations", "GFLOP", [8.0]), Row("full", "peak_memory", "MiB", [512.0])]
    for arm, values in (("ideal", far), ("slow", near), ("fast", far)):
        row = Row(arm, "first_token", "ms", values, 1, Compared.of(values, "full", full))
        if arm != "ideal":
            row.compared, row.target = Compared.of(values, "ideal", far), 1.05
            share = Compared("first_token", Estimate(0.01, 0.009, 0.011))
            rows.append(Row(arm, "selection", "ms", [1.0] * 3, 1, None, share, 0.02))
        rows += [row, Row(arm, "operations", "GFLOP", [4.0])]
        rows.append(Row(arm, "images_per_second", "1/s", [9.0] * 3, 1, Compared.of([9.0] * 3, "full", [9.0] * 3)))
    memory = Row("fast", "peak_memory", "MiB", [500.0], 1, None, Compared("full", Estimate(0.98, 0.98, 0.98)), 1.0)
    return lines(*rows, memory, Row("odd", "refused", "", (), note="it needs more"))


def test_tables_show_ratios_and_overlaps() -> None:
    each = Lines(whole())
    by = {row[0]: row for row in stages(each).rows}
    assert list(by) == ["full", "ideal", "fast", "slow"]  # bounds first
    assert by["fast"][5:7] == ("41 (40.5-41.5)", "2.46 (2.00)")
    assert by["slow"][6] == "overlap (2.00)"
    cost = {row[0]: row for row in costs(each).rows}
    assert cost["fast"][1] == "1 (1.00 %)" and cost["fast"][2].startswith("overlap (")
    assert cost["slow"][2].startswith("2.4")
    assert {row[0]: row[-1] for row in sizes(each).rows}["fast"] == "0.980"
    assert {row[0]: row[1] for row in throughput(each).rows}["slow"] == "9 (overlap)"
    assert [line["note"] for line in each.refused] == ["it needs more"]


def test_promises_name_who_misses_them() -> None:
    said = promises(whole())
    assert "first token, of the ideal's: <= 1.05 in 0 of 2; unresolved: all" in said
    assert "peak memory, of the full model's: <= 1 in 1 of 1" in said


def test_a_table_is_markdown_too() -> None:
    each = Lines(whole())
    for make in TABLES.values():
        text = make(each).markdown().splitlines()
        assert len({line.count("|") for line in text}) == 1 and text[2].startswith("| `f")


def test_the_page_has_its_tables_from_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("speed_page", Path(__file__).parents[2] / "docs" / "speed.py")
    assert spec is not None and spec.loader is not None
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    write(tmp_path / "new.csv", whole())
    (tmp_path / "former.csv").write_text("arm,metric,median\nfull,first_token,1.0\n")
    blocks = ("new.csv stages", "new.csv promises", "former.csv stages", "none.csv costs")
    text = "".join(f"<!-- {block}: begin, made -->\nstale\n<!-- {block}: end -->\n" for block in blocks)
    made = docs.page(text)
    assert "stale" not in made and docs.page(made) == made
    assert stages(Lines(whole())).markdown() in made and "- peak memory, of the full model's: <= 1 in 1 of 1" in made
    assert made.count("Not measured yet") == 2
