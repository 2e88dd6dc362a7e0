"""`foveate bench` from the outside: what it writes and prints, and what it refuses. No times are asserted."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from foveate import registry
from foveate.cli import app
from foveate.lab.speed import arms, memory
from foveate.lab.speed.rows import read
from tests.models import tiny_llava

ROOT = Path(__file__).parents[2]
TINY = ("--shape", "tiny", "--keep", "9", "--steps", "1")
ONCE = ("--repeats", "1", "--warmup", "0", "--no-memory")
QUICK = (*TINY, *ONCE)

OWN = {"arm", "batch", "metric", "unit", "median", "quartile_low", "quartile_high", "rounds", "by_full", "by_full_low"}
OWN |= {"by_full_high", "against", "ratio", "ratio_low", "ratio_high", "target", "met", "note", "samples"}
OWN |= {"mean_tokens", "reads_llm_attention"}
ABOUT = {"date", "commit", "foveate", "torch", "transformers", "python", "cpu", "cores", "threads", "device", "model"}
ABOUT |= {"seed", "layers", "width", "visual_tokens", "text_tokens", "keep", "steps", "dtype", "attention"}
ABOUT |= {"load_before", "load_after"}

Table = dict[tuple[str, str, int], dict[str, str]]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "foveate", "bench", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)


def table(path: Path) -> Table:
    return {(line["arm"], line["metric"], int(line["batch"])): line for line in read(path)}


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, str]:
    """All methods on the tiny shape, through the command in a process of its own."""
    out = tmp_path_factory.mktemp("bench") / "new" / "bench.csv"
    done = subprocess.run(
        command(*QUICK, "--threads", "1", "--out", out), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "round 1 of 1" in done.stderr and "round" not in done.stdout.split("milliseconds")[0]
    return table(out), done.stdout


def test_every_registered_method_is_measured_beside_the_three_bounds(everyone: tuple[Table, str]) -> None:
    lines, printed = everyone
    specs = {f"{name}:keep=9" for name in registry.names()}
    found = {arm for arm, metric, _ in lines if metric == "first_token"}
    assert found == specs | {"full", "ideal"} | {arm for arm in found if arm.startswith("hand-cut ")}
    assert {arm for arm in found if arm.startswith("hand-cut ")} == {
        f"hand-cut {name}:keep=9" for name in ("dart", "fastv", "pyramiddrop", "v2drop")
    }
    for title in re.split(r"\n(?=milliseconds|what choosing|operations and)", printed):
        assert all(spec in title for spec in specs)
    measured = ("encode", "select", "evidence", "prefill", "decode_step", "total", "images_per_second", "selection")
    for spec in specs:
        assert all((spec, metric, 1) in lines for metric in (*measured, "operations", "kv", "kv_report"))


def test_each_row_carries_what_is_needed_to_judge_it(everyone: tuple[Table, str]) -> None:
    lines, printed = everyone
    for line in lines.values():
        assert set(line) == OWN | ABOUT
        assert all(line[name] for name in ABOUT)
    assert "commit=" in printed
    times = lines["full", "first_token", 1]
    assert (times["model"], times["visual_tokens"], times["text_tokens"]) == ("tiny", "36", "9")
    assert [float(v) for v in times["samples"].split(";")] == [float(times["median"])]


def test_the_parts_of_a_first_token_add_up(everyone: tuple[Table, str]) -> None:
    lines, _ = everyone
    for arm, metric, _batch in lines:
        if metric == "first_token" and not arm.startswith("hand-cut"):
            first, encode, prefill, total = (
                float(lines[arm, name, 1]["median"]) for name in ("first_token", "encode", "prefill", "total")
            )
            assert 0 < encode + prefill < first < total


def test_only_those_that_say_so_read_the_attention_of_the_llm(everyone: tuple[Table, str]) -> None:
    """By measurement: which attention modules of the decoder have a listener while a method is attached."""
    lines, _ = everyone
    reads = {
        arm.partition(":")[0]: line["reads_llm_attention"]
        for (arm, what, _), line in lines.items()
        if what == "selection"
    }
    assert {name: layers for name, layers in reads.items() if layers} == {
        "dart": "0",  # its keys alone
        "fastv": "0",
        "pyramiddrop": "0;1;3",
        "sparsevlm": "0;1;2",
        "todre": "4",  # its exit
        "vscan": "2",  # its second stage
    }


def test_keys_and_values_by_formula_are_those_of_the_report(everyone: tuple[Table, str]) -> None:
    lines, _ = everyone
    for arm, metric, _batch in lines:
        if metric == "kv_report":
            assert float(lines[arm, "kv", 1]["median"]) == pytest.approx(
                float(lines[arm, metric, 1]["median"]), rel=1e-4
            )
            assert float(lines[arm, "kv", 1]["median"]) < float(lines["full", "kv", 1]["median"])


def test_one_round_shows_no_ratio(everyone: tuple[Table, str]) -> None:
    lines, printed = everyone
    compared = [line for line in lines.values() if line["by_full"]]
    assert compared and {line["by_full"] for line in compared} == {"few rounds"}
    assert {line["met"] for line in lines.values()} == {"", "unresolved"}
    assert "few rounds" in printed


def test_a_method_that_cannot_run_is_a_row_unless_it_was_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    done = call("--shape", "tiny", "--keep", "4", "--steps", "0", *ONCE, "--out", out)
    assert done.exit_code == 0
    refused = {arm: line["note"] for (arm, metric, _), line in table(out).items() if metric == "refused"}
    assert set(refused) == {"dart", "fastv", "pyramiddrop", "sparsevlm", "v2drop"}
    assert all("a mean of 4 of 36 tokens per layer is out of reach" in why for why in refused.values())
    assert "refused: fastv (batch 1): a mean of 4" in done.stdout
    named = call("--shape", "tiny", "--keep", "4", *ONCE, "--method", "fastv", "--out", out)
    assert named.exit_code == 2
    assert "error: a mean of 4 of 36 tokens" in named.stderr and "hint: keep at least 6" in named.stderr


def test_batches_give_throughput(tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    done = call(*QUICK, "--shape", "tiny-qwen", "--method", "evocut", "--batch", "1", "--batch", "3", "--out", out)
    lines = table(out)
    for arm in ("full", "ideal", "random:keep=9", "evocut:keep=9"):
        for batch in (1, 3):
            line = lines[arm, "images_per_second", batch]
            assert float(line["median"]) == pytest.approx(
                1e3 * batch / float(lines[arm, "total", batch]["median"]), rel=1e-4
            )
    assert "batch 3" in done.stdout.split("images per second")[1]


def test_budgets_of_their_own_have_ideals_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    call(
        *QUICK,
        "--method",
        "grid:keep=18",
        "--method",
        "evocut",
        "--method",
        "evocut:keep=12 + v2drop:keep=11",
        "--out",
        out,
    )
    lines = table(out)
    against = {arm: line["against"] for (arm, metric, _), line in lines.items() if metric == "first_token"}
    assert (
        against["grid:keep=18"] == "ideal:keep=18" and lines["ideal:keep=18", "first_token", 1]["mean_tokens"] == "18"
    )
    assert against["evocut:keep=9"] == against["random:keep=9"] == "ideal"
    assert against["evocut:keep=12 + v2drop:keep=11"] == "ideal:keep=11"


def test_a_model_with_a_processor_shows_what_reading_a_picture_takes(tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    done = call("demo", "--method", "grid", "--steps", "0", *ONCE, "--out", out)
    read = table(out)["media", "read", 1]
    assert float(read["median"]) > 0 and (read["model"], read["visual_tokens"]) == ("demo", "576")
    assert "opening and preparing a picture: " in done.stdout


# -- nothing is lost


def test_a_kill_loses_no_round_that_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    arguments = command(*TINY, "--method", "grid", "--warmup", "0", "--repeats", "100000", "--no-memory", "--out", out)
    with subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if "round 3 of" in line:
                run.send_signal(signal.SIGKILL)
                break
    lines = table(out)
    assert {arm for arm, *_ in lines} == {"full", "ideal", "grid:keep=9", "random:keep=9"}
    assert min(int(line["rounds"]) for (_, metric, _), line in lines.items() if metric == "first_token") >= 3


def test_ctrl_c_shows_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, original, turns = tmp_path / "bench.csv", arms.Arms.full, []

    def full(self: arms.Arms, batch: int) -> arms.Sample:
        turns.append(batch)
        if len(turns) > 3:  # counted once, two rounds
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(arms.Arms, "full", full)
    done = call(*TINY, "--method", "grid", "--warmup", "0", "--repeats", "9", "--out", out)
    assert done.exit_code == 130
    assert "interrupted" in done.stderr and "grid:keep=9" in done.stdout
    assert {line["rounds"] for (_, metric, _), line in table(out).items() if metric == "first_token"} == {"2"}


def test_the_time_box_ends_the_rounds(tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    done = call(*TINY, "--method", "grid", "--repeats", "9", "--no-memory", "--seconds", "0", "--out", out)
    assert done.exit_code == 0 and "the time is up after 1 rounds" in done.stderr
    assert table(out)["full", "total", 1]["rounds"] == "1"


# -- memory


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def instead(arguments: list[str]) -> dict[str, float] | str:
        commands.append(arguments)
        arm = arguments[arguments.index("--memory-of") + 1]
        return "killed" if arm == "ideal" else {"before": 10.0, "peak": 20.0 if arm == "full" else 19.0}

    monkeypatch.setattr(memory, "in_a_process", instead)
    out = tmp_path / "bench.csv"
    done = call(*TINY, "--method", "grid", "--repeats", "1", "--warmup", "0", "--out", out)
    lines = table(out)
    assert [lines[arm, "peak_memory", 1]["ratio"] for arm in ("grid:keep=9", "random:keep=9")] == ["0.9500", "0.9500"]
    assert (lines["ideal", "peak_memory", 1]["note"], lines["ideal", "peak_memory", 1]["median"]) == ("killed", "")
    assert "peak memory, of the full model's: <= 1 in 2 of 2" in done.stdout
    monkeypatch.undo()
    alone = subprocess.run(
        next(c for c in commands if c[-1] == "ideal"), env=environment(), capture_output=True, text=True, check=True
    )
    found = json.loads(alone.stdout)
    assert found["peak"] >= found["before"] > 10.0


def test_a_process_that_fails_says_why() -> None:
    assert (
        memory.in_a_process([sys.executable, "-c", "raise SystemExit('error: no such thing')"])
        == "error: no such thing"
    )
    assert memory.in_a_process([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == "killed"


# -- what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["--shape", "tiny", "--keep", "36"], "keep=36 of a picture that is 36 visual tokens", "--keep 4"),
        (["--shape", "tiny", "--keep", "1.0"], "keep=1.0 of a picture that is 36 visual tokens", "--keep 4"),
        (["--shape", "tiny", "--keep", "many"], "a budget is a number, got 'many'", "--keep 64"),
        (["--shape", "tinny"], "no such shape: 'tinny'", "did you mean `tiny`"),
        (["--shape", "tiny", "--side", "61"], "a multiple of 10 pixels, got 61", "--side 60"),
        (["--shape", "llava-1.5-7b", "--width", "200"], "heads are 128 wide", "--width 128"),
        (["demo", "--shape", "tiny"], "a model does not go with --shape", "leave one of them out"),
        (["--layers", "3"], "--layers does not go with a model", "leave one of them out"),
        (["--image", "a.png", "--side", "99"], "--side does not go with --image", "leave one of them out"),
        (["--image", "nowhere.png"], "no such picture: nowhere.png", "foveate demo"),
        (["--shape", "tiny", "--attention", "none-such"], "attention 'none-such' cannot be used", "--attention sdpa"),
        (["--shape", "tiny", "--dtype", "float31"], "no such dtype: 'float31'", "float32"),
        (["--shape", "tiny", "--keep", "9", "--method", "evocat"], "unknown method: 'evocat'", "did you mean `evocut`"),
        (["--shape", "tiny", "--out", "."], "cannot write .", "--out bench.csv"),
    ],
)
def test_what_cannot_be_measured(arguments: list[str], error: str, hint: str, tmp_path: Path) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "bench.csv")]
    done = call(*arguments, *out)
    assert (done.exit_code, done.stdout) == (2, "")
    said = dict(line.split(": ", 1) for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: ")))
    assert error in said["error"] and hint in said["hint"]


def test_a_folder_without_a_processor(tmp_path: Path) -> None:
    tiny_llava().save_pretrained(tmp_path / "model")
    done = call(tmp_path / "model", "--out", tmp_path / "bench.csv")
    assert done.exit_code == 2 and "processor" in done.stderr and "hint: " in done.stderr


# -- what the tables say


def test_a_table_shows_no_ratio_of_spreads_that_overlap(tmp_path: Path) -> None:
    """Every cell with a ratio of two arms is looked up among the samples."""
    out = tmp_path / "bench.csv"
    call(
        *TINY, "--method", "grid", "--method", "v2drop", "--repeats", "5", "--warmup", "0", "--no-memory", "--out", out
    )
    runs = defaultdict(list)
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        runs[line["arm"], line["metric"]] = [float(line["quartile_low"] or 0), float(line["quartile_high"] or 0)]
    seen = 0
    for line in lines:
        metric = line["metric"].removesuffix("_by_hand")
        for name, other in (("by_full", "full"), ("ratio", line["against"])):
            if line[name] and line["metric"] not in ("selection", "accounted"):
                (low, high), (from_, to) = runs[line["arm"], line["metric"]], runs[other, metric]
                one = float(line[f"{name}_low"]) <= 1.0 <= float(line[f"{name}_high"])
                assert (line[name] == "overlap") == ((low <= to and from_ <= high) or one), line
                seen += 1
    assert seen > 20
