"""The peer's benchmark without the peer: pictures, workers, refusals, the CSV and its tables. No times are asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.openvino_peer import table
from benchmarks.openvino_peer.measure import ROOT, Mismatch, Worker, _check
from benchmarks.openvino_peer.rows import Arm, Row, rows, write
from benchmarks.openvino_peer.work import SIDE, VISUAL, picture

THEIRS, OURS = Arm("openvino", "full", 0, {"prune": 0}), Arm("foveate", "full", 0, {"method": None})
PRUNED = [Arm(engine, "cdpruner", 75, {}) for engine in ("openvino", "openvino-one-block", "foveate")]
ECHO = """
from benchmarks.openvino_peer.work import serve, timed

def answer(request):
    print("a library talks")
    if request["picture"] < 0:
        raise ValueError("no such picture")
    reply = {}
    with timed(reply):
        pass
    return reply | {"seen": request["picture"]}

serve({"name": "echo"}, answer)
"""


def runs(first: list[float], tokens: int, **more: float) -> list[dict[str, float]]:
    return [{"first_token": value, "llm": value / 2, "tokens": tokens, "idle_cpu": 0.0, **more} for value in first]


def samples() -> dict[Arm, list[dict[str, float]]]:
    full, clear, wild = (
        [100.0, 101.0, 102.0, 103.0, 104.0],
        [30.0, 30.5, 31.0, 30.2, 30.4],
        [20.0, 200.0, 105.0, 5.0, 150.0],
    )
    return {
        THEIRS: runs(full, 613),
        OURS: runs([2 * value for value in full], 613),
        PRUNED[0]: runs(clear, 181),
        PRUNED[1]: runs(wild, 181),
        PRUNED[2]: runs([2 * value for value in clear], 181, select=5.0),
    }


def measured(folder: Path) -> list[dict[str, str]]:
    made = [*rows("float32", samples()), *rows("bfloat16", samples())]
    about = dict.fromkeys(("cpu", "cores", "threads", "openvino", "openvino-genai", "torch", "transformers"), "x")
    about |= dict.fromkeys(("attention", "python", "foveate", "commit", "date", "load_before", "load_after"), "y")
    write(folder / "results" / "peers.csv", made, about)
    return table.read(folder / "results" / "peers.csv")


def test_pictures_are_the_same_everywhere_and_never_alike() -> None:
    assert picture(3).shape == (SIDE, SIDE, 3)
    assert np.array_equal(picture(3), picture(3))
    assert np.abs(picture(3).astype(int) - picture(4)).mean() > 10
    assert VISUAL == 576


def test_a_worker_answers_and_its_libraries_may_talk(tmp_path: Path) -> None:
    worker = Worker([sys.executable, "-c", ECHO], {"PYTHONPATH": str(ROOT)}, tmp_path / "log")
    assert worker.hello == {"name": "echo"}
    replies = [worker.ask({"picture": number}) for number in (1, 2)]
    assert [reply["seen"] for reply in replies] == [1, 2]
    assert all(reply["first_token"] >= 0.0 for reply in replies)
    assert worker.cpu_ms() >= 0.0
    worker.close()
    assert "a library talks" in (tmp_path / "log").read_text()


def test_a_worker_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    worker = Worker([sys.executable, "-c", ECHO], {"PYTHONPATH": str(ROOT)}, tmp_path / "log")
    with pytest.raises(RuntimeError, match="no such picture"):
        worker.ask({"picture": -1})
    worker.close()


def test_ratios_are_paired_with_the_same_engine_and_refused_where_spreads_overlap(tmp_path: Path) -> None:
    found = {
        row["arm"]: row for row in measured(tmp_path) if row["metric"] == "first_token" and row["dtype"] == "float32"
    }
    assert found["openvino full"]["ratio"] == found["foveate full"]["against"] == ""
    assert found["openvino cdpruner -75%"]["against"] == "openvino full"
    assert found["openvino-one-block cdpruner -75%"]["against"] == "openvino full"
    assert found["foveate cdpruner -75%"]["against"] == "foveate full"
    assert float(found["foveate cdpruner -75%"]["ratio"]) == pytest.approx(0.300, abs=0.01)
    assert found["openvino-one-block cdpruner -75%"]["ratio"] == ""
    assert found["openvino-one-block cdpruner -75%"]["no_ratio"] == "overlap"


def test_rounds_that_disagree_give_no_ratio() -> None:
    row = Row(PRUNED[0], "float32", 181, "first_token", [20.0, 99.0, 50.0, 5.0, 60.0], "", [101.0] * 5)
    assert row.verdict() == (None, "unresolved")
    few = Row(PRUNED[0], "float32", 181, "first_token", [20.0] * 4, "", [101.0] * 4)
    assert few.verdict() == (None, "too few rounds")


def test_unequal_counts_and_unequal_models_end_the_measurement() -> None:
    same = {"tokens": 613, "logprob": -7.5}
    _check({THEIRS: same, OURS: same | {"logprob": -7.5004}}, "float32")
    with pytest.raises(Mismatch, match="unequal numbers of input tokens"):
        _check({THEIRS: same, OURS: same | {"tokens": 612}}, "float32")
    with pytest.raises(Mismatch, match="log-probabilities"):
        _check({THEIRS: same, OURS: same | {"logprob": -7.6}}, "float32")
    pruned = {PRUNED[0]: {"tokens": 181, "logprob": -1.0}, PRUNED[2]: {"tokens": 182, "logprob": -2.0}}
    with pytest.raises(Mismatch, match="unequal"):
        _check({THEIRS: same, OURS: same, **pruned}, "float32")


def test_the_tables_hold_what_was_measured(tmp_path: Path) -> None:
    empty = "text\n<!-- peers: begin (make peers) -->\n<!-- peers: end -->\nmore\n"
    page = table.filled(empty, measured(tmp_path))
    beside = next(line for line in page.splitlines() if line.startswith("| float32 | 181 of 613 | 0.295 |"))
    assert [cell.split()[0] for cell in beside.split("|")[4:7]] == ["0.300", "overlap", "0.300"]
    assert "| bfloat16 | 613 | `full` | 0.10 | 0.20 | 2.00 (2.00 .. 2.00) |" in page
    assert table.filled(page, measured(tmp_path)) == page
    with pytest.raises(ValueError, match="markers"):
        table.filled("no markers", [])


def test_the_page_is_fresh() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.filled(page, table.read(table.MEASURED)) == page, "python -m benchmarks.openvino_peer.table"


def test_the_shared_part_needs_only_numpy() -> None:
    """It runs in the peer's environment as well, where foveate is not."""
    program = "import sys, benchmarks.openvino_peer.work; print({'torch', 'foveate', 'rich'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
