"""The speed benchmark runs from end to end and writes down what its figures rest on. No times are asserted."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from foveate.lab import shapes, speed
from foveate.lab.arms import Bench
from foveate.lab.paired import Estimate, Spread
from foveate.lab.rows import Row

ENVIRONMENT = {"date", "commit", "foveate", "torch", "transformers", "python", "cpu", "cores", "threads", "shape"}
ENVIRONMENT |= {"layers", "width", "visual_tokens", "text_tokens", "keep", "steps", "dtype", "attention", "seed"}
ENVIRONMENT |= {"load_before", "load_after"}
OWN = {"arm", "metric", "unit", "median", "quartile_low", "quartile_high", "rounds", "against", "ratio", "ratio_low"}
OWN |= {"ratio_high", "target", "met", "samples"}
OPTIONS = ["--shape", "tiny", "--keep", "12", "--steps", "2"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on two threads, far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bench(keep: int = 12) -> Bench:
    shape = shapes.SHAPES["tiny"]
    return Bench(shapes.build(shape, torch.float32, "sdpa", 0), shape, keep, 2, 0)


def test_runs_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "speed.csv"
    speed.main([*OPTIONS, "--repeats", "2", "--warmup", "1", "--no-memory", "--quiet", "--out", str(out)])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == OWN | ENVIRONMENT
    assert all(row[name] for row in rows for name in ENVIRONMENT)
    assert {row["rounds"] for row in rows} == {"2"}
    methods = {f"{name}:keep=12" for name in ("evocut", "todre", "adav", "random", "grid", "pool", "v2drop")}
    methods.add("todre:keep=12,exit=none")
    arms = methods | {"full", "ideal", "hand-cut v2drop:keep=12"}
    assert {row["arm"] for row in rows} == arms
    against = {(row["arm"], row["metric"]): (row["against"], row["target"]) for row in rows if row["against"]}
    for method in methods:
        inner = method.startswith("v2drop")
        reference = f"hand-cut {method}" if inner else "ideal"
        assert against[method, "first_token"] == (reference, "1.08" if inner else "1.05")
        assert against[method, "decode_step"] == (reference, "1.03")
        assert against[method, "selection"] == ("first_token", "0.02")
    printed = capsys.readouterr().out
    assert all(arm in printed for arm in arms)
    assert "commit=" in printed


def test_ideal_is_the_method_without_its_choice() -> None:
    """Handed the features that a method kept, the ideal answers as the compressed model does."""
    it = bench()
    sample, report = it.method("evocut:keep=12")
    it.chosen = torch.tensor(report.images[0].stages[0].kept)
    assert it.ideal().token == sample.token
    assert sample.fold is not None and sample.fold > 0.0


def test_hand_cut_computes_what_the_method_does() -> None:
    it = bench()
    sample, report = it.method("v2drop:keep=12")
    assert len(report.images[0].stages) == 3
    assert it.hand_cut(it.columns(report)).token == sample.token


def test_taps_are_found_and_taken_off() -> None:
    it = bench()
    assert list(it.tapped("grid:keep=12")) == []
    assert [name.rpartition("layers.")[2] for name in it.tapped("todre:keep=12")] == ["3.self_attn", "4.self_attn"]
    assert list(it.tapped("grid:keep=12")) == []


def test_memory_of_one_arm_in_its_own_process() -> None:
    rows = speed.memory(["full"], [*OPTIONS, "--threads", "1"], lambda _: None)
    assert [(row.arm, row.metric) for row in rows] == [("full", "peak_memory"), ("full", "memory_before")]
    assert rows[0].values[0] >= rows[1].values[0] > 0.0


def test_flop_are_those_of_the_model() -> None:
    """The formulas that the prediction uses agree with torch's own count."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = dataclasses.replace(shapes.SHAPES["tiny"], width=256, vision_width=64)
    model = shapes.build(shape, torch.float32, "eager", 0)
    inputs = {
        "input_ids": shapes.prompt(shape, shape.tokens, 0),
        "pixel_values": shapes.picture(shape, torch.float32, 0),
    }
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    assert shape.first_token_gflop(shape.tokens) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.01)


def test_a_ratio_that_means_nothing_is_not_printed() -> None:
    wide, narrow = Estimate(1.0, 0.9, 1.3), Estimate(1.01, 1.0, 1.02)
    assert Row("a", "first_token", "ms", [1.0], "ideal", wide, 1.05, "unresolved").cells()["ratio"] == ""
    assert Row("a", "first_token", "ms", [1.0], "ideal", narrow, 1.05, "yes").cells()["ratio"] == "1.0100"
    assert (wide.meets(1.05), narrow.meets(1.05)) == ("unresolved", "yes")
    assert Estimate.of([1.0] * 4).meets(1.05) == "unresolved"
    assert Estimate.of([1.0] * 5).meets(1.05) == "yes"
    assert Spread.of([1.0, 2.0]).overlaps(Spread.of([1.9, 3.0])) is False
    assert Spread.of([1.0, 2.0]).overlaps(Spread.of([1.5, 3.0])) is False
    assert Spread.of([1.0, 3.0]).overlaps(Spread.of([2.0, 3.0])) is True
