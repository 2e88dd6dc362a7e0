"""The adviser on small models: prompts of any length and batch, calls timed by stage, memory, the command."""

from __future__ import annotations

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch

import foveate
from foveate import registry
from foveate.errors import BudgetError, UnsupportedModel
from foveate.lab import shapes
from foveate.lab.advice import check
from foveate.lab.advice.costs import Costs, Work
from foveate.lab.advice.measure import Plan, Profiler
from foveate.lab.advice.prompt import Prompt, of_inputs, of_shape, served
from foveate.lab.advice.timing import peak, timed
from tests.cli.test_bad_input import refused
from tests.cli.test_commands import call
from tests.zoo.inputs import batch
from tests.zoo.models import NAMES, tiny

SHAPE = shapes.SHAPES["tiny"]
FAST = ("--shape", "tiny", "--seconds", "0", "--method", "random", "--method", "v2drop", "--output", "8")


@pytest.fixture(scope="module")
def model() -> object:
    network = shapes.build(SHAPE, torch.float32, "sdpa", 0)
    network.generate(**of_shape(SHAPE, network).inputs(1), max_new_tokens=2)  # transformers notes things at first use
    return network


@pytest.fixture(scope="module")
def prompt(model: object) -> Prompt:
    return of_shape(SHAPE, model)


# -- prompts


@pytest.mark.parametrize("name", sorted({*NAMES} - {"mllama"}))
def test_prompts_of_every_family_are_repeated_and_lengthened(name: str) -> None:
    network = tiny(name, "sdpa")
    it = of_inputs(network, batch(name, (1,)), filler=50)
    with foveate.compress(network, "random:keep=0.5") as handle:
        rows = [network.generate(**it.inputs(q, b), max_new_tokens=3, eos_token_id=None) for q, b in ((0, 1), (7, 3))]
        report = handle.report
    short, long = rows
    assert short.shape == (1, it.length + 3)
    assert long.shape == (3, it.length + 7 + 3)
    assert (long == long[:1]).all()  # equal prompts have equal answers
    assert (long[0, it.length - 1 : it.length + 6] == 50).all()
    assert len(report.images) % 3 == 0
    assert it.pixels(served(network)) > 0


def test_a_model_that_looks_across_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no visual tokens in its prompts"):
        served(tiny("mllama", "sdpa"))


# -- calls


@pytest.mark.parametrize("spec", [None, "evocut:keep=8", "fastv:keep=12"])
def test_a_call_is_timed_by_stage_and_leaves_nothing_behind(model: object, prompt: Prompt, spec: str | None) -> None:
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}  # type: ignore[attr-defined]
    inputs = prompt.inputs(5, 2)
    if spec is None:
        call = timed(model, served(model), inputs, 4)
    else:
        with foveate.compress(model, spec):
            call = timed(model, served(model), inputs, 4)
    assert min(call.encode, call.prefill, call.step, call.rest) > 0
    assert call.encode + call.prefill + call.rest == pytest.approx(call.first)
    assert call.total >= call.first + call.step
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before  # type: ignore[attr-defined]


def test_a_picture_that_is_selected_from_again_is_not_encoded(model: object, prompt: Prompt) -> None:
    with foveate.compress(model, "random:keep=4") as handle:
        first = timed(model, served(model), prompt.inputs(5), 1)
        handle.reselect()
        again = timed(model, served(model), prompt.inputs(9), 1)
    assert first.encode > 0.0
    assert again.encode == 0.0
    assert again.step == 0.0  # there was no second token


def test_the_peak_is_what_lives_at_once(model: object) -> None:
    def work() -> None:
        ones = torch.zeros(1000, 250) + 1  # two of a million bytes
        del ones
        torch.ones(1000, 500)  # one of two million

    assert peak(model, work) == pytest.approx(2_000_000, rel=0.001)
    assert peak(model, lambda: None) == 0


# -- profiles


def test_memory_is_predicted_for_calls_that_were_not_profiled(model: object, prompt: Prompt) -> None:
    plan = Plan(question=4, output=8, methods=("random", "v2drop"), seconds=0.0)
    profiler = Profiler(model, "tiny", prompt, plan)
    profile = profiler.run()
    assert (profile.rounds, profile.tokens, profile.layers) == (1, SHAPE.tokens, SHAPE.layers)
    it = Costs(profile)
    for method, keep, question, rows in [(None, None, 30, 1), (None, None, 10, 3), ("random", 20, 40, 2)]:
        work = Work(tokens=profile.tokens, pixels=profile.pixels, question=question, output=4, batch=rows)
        spec = "random:keep=1.0" if method is None else f"{method}:keep={keep}"
        with foveate.compress(model, spec):
            call = partial(model.generate, **prompt.inputs(question, rows), max_new_tokens=4, do_sample=False)  # type: ignore[attr-defined]
            seen = peak(model, call)
        assert it.predict(work, method, keep).memory - profile.weight_bytes == pytest.approx(seen, rel=0.1)


def test_pictures_of_another_size_tell_what_pixels_cost() -> None:
    network = tiny("qwen2_5_vl", "sdpa")
    one, two = (of_inputs(network, batch("qwen2_5_vl", (1,), seed=seed), 50) for seed in (1, 1))
    larger = dict(two.base)
    larger["pixel_values"] = torch.cat([larger["pixel_values"]] * 2)
    larger["image_grid_thw"] = larger["image_grid_thw"] * torch.tensor([1, 2, 1])
    ids = larger["input_ids"]
    image = ids == network.config.image_token_id
    places = torch.arange(ids.shape[1]).repeat_interleave(1 + image[0].long())
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in larger:
            larger[name] = larger[name][:, places]
    profiler = Profiler(network, "q", one, Plan(methods=(), seconds=0.0), others=[two, of_inputs(network, larger, 50)])
    sizes = {point.size for point in profiler.run().at("encode")}
    assert sizes == {one.pixels(served(network)), 2 * one.pixels(served(network))}  # the same size adds nothing


def test_methods_that_refuse_are_named_unless_they_were_asked_for(
    model: object, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiler = Profiler(model, "tiny", prompt, Plan(methods=("evocut:layer=99",), seconds=0.0))
    with pytest.raises(BudgetError):
        profiler.run()
    shallow = shapes.build(dataclasses.replace(SHAPE, layers=2), torch.float32, "sdpa", 0)
    monkeypatch.setattr(registry, "names", lambda: ("random", "v2drop", "evocut"))
    profile = Profiler(shallow, "shallow", of_shape(SHAPE, shallow), Plan(seconds=0.0)).run()
    assert "v2drop" in profile.refused
    assert "v2drop" not in {point.method for point in profile.methods}
    assert {point.method for point in profile.methods} == {"evocut", "random"}


# -- the command


def test_the_command_advises_and_reads_its_profile_again(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    first = call("advise", *FAST, "--profile", path)
    assert first.exit_code == 0, first.stderr
    assert "all tokens" in first.stdout
    assert "random:keep=" in first.stdout
    assert "profiling" in first.stderr
    assert "Accuracy is what papers print, not measured here: 10 benchmarks on llava-hf/llava-1.5-7b-hf" in first.stdout
    again = call("advise", *FAST, "--profile", path, "--output", "400", "--json")
    assert "profiling" not in again.stderr
    data = json.loads(again.stdout)
    assert data["work"]["output"] == 400
    assert {option["method"] for option in data["options"]} == {"random", "v2drop"}
    assert data["full"]["total"] == pytest.approx(data["full"]["first"] + data["full"]["decode"])
    assert {sentence["topic"] for sentence in data["advice"]} >= {"use", "cost", "break-even", "not", "memory", "range"}
    assert "cache" in next(s["text"] for s in data["advice"] if s["topic"] == "range")
    more = json.loads(
        call("advise", *FAST, "--profile", path, "--output", "400", "--tokens", str(4 * SHAPE.tokens), "--json").stdout
    )
    assert more["work"]["tokens"] == 4 * SHAPE.tokens
    # Bytes, not times: a tiny model's times in a profile of moments are noise.
    assert more["full"]["alive"][0] == 4 * data["full"]["alive"][0]
    assert more["full"]["memory"] > data["full"]["memory"]
    refused(call("advise", *FAST, "--profile", path, "--method", "grid"), error="has no 'grid'", hint="known")


def test_mistakes_are_told(tmp_path: Path) -> None:
    refused(call("advise", "demo", "--image-size", "big"), error="a size is width x height", hint="1024x768")
    refused(call("advise", "--shape", "tny"), error="no such shape: 'tny'", hint="did you mean `tiny`?")
    refused(call("advise", "demo", "--image", "none.png"), error="no such picture: none.png", hint="foveate demo")
    refused(call("advise", "--shape", "tiny", "--method", "evocat"), error="unknown method", hint="`evocut`")
    path = tmp_path / "profile.json"
    path.write_text("{}")
    refused(call("advise", *FAST, "--profile", path), error="not a profile", hint="name a new file")


# -- predictions against measurements


def test_the_check_writes_predicted_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = (check.POINTS[2], check.POINTS[9])
    monkeypatch.setattr(check, "POINTS", some)
    out = tmp_path / "advise.csv"
    check.main(["--models", "shape", "--shape", "tiny", "--seconds", "0", "--rounds", "1", "--out", str(out)])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    points = [row for row in rows if row["kind"] == "point"]
    assert len(points) == 3 * len(some)
    assert {row["kind"] for row in rows} == {"point", "anchor before", "anchor after"}
    assert {row["metric"] for row in points} == {"first_token", "answer", "memory"}
    assert all(float(row["measured"]) > 0 and row["within_target"] in ("yes", "no") for row in points)
    assert all(row[name] for row in rows for name in ("commit", "torch", "hardware", "dtype", "load_before"))
    memory = [row for row in points if row["metric"] == "memory"]
    assert all(row["within_target"] == "yes" for row in memory)
    assert "full" in capsys.readouterr().out


def test_no_point_of_the_check_was_profiled() -> None:
    profiled = {Plan().question}, {1, 2}, {1 / 9, 1 / 2}
    for point in check.POINTS:
        seen = (point.question in profiled[0], point.batch in profiled[1], point.share in (*profiled[2], 1.0))
        assert not all(seen) or point.output not in (2, 6), point
    assert len(check.POINTS) >= 8
