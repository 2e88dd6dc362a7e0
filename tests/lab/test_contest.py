"""Who takes part, and at which budgets they are compared."""

from __future__ import annotations

import pytest

import foveate
from foveate import registry
from foveate.budget import alive_per_layer
from foveate.errors import BudgetError, UnknownMethod, UnsupportedMethod
from foveate.lab.contest import contest, expected_mean, with_keep
from tests.models import tiny_llava
from tests.zoo.models import tiny

TOKENS = 36


@pytest.mark.parametrize("layers", [12, 28, 32])
@pytest.mark.parametrize("name", registry.names())
def test_equal_budgets_are_equal_means_per_layer(name: str, layers: int) -> None:
    for keep in (192, 128, 0.25):
        method, wanted = foveate.from_spec(with_keep(name, keep)), keep if isinstance(keep, int) else keep * 576
        mean = expected_mean(method, 576, layers)
        slack = 3.0 if name == "v2drop" and layers == 32 else 1.0  # at 32 layers it takes its paper's own stages
        assert abs(mean - wanted) <= slack, (mean, wanted)


def test_the_mean_is_that_of_the_stages() -> None:
    method = foveate.from_spec("v2drop:stages=3@0.5/17@0.3/22@0")
    assert expected_mean(method, 576, 32) == sum(alive_per_layer(576, method.stages, 32)) / 32


def test_everyone_takes_part_and_the_baselines_always_do() -> None:
    arms, refused = contest(tiny_llava(), None, [12, 0.25], TOKENS)
    names = [arm.name for arm in arms]
    assert names[:4] == ["full", "blind", "downscale:keep=12", "downscale:keep=0.25"]
    assert {arm.method for arm in arms} >= {"full", "blind", "downscale", *registry.names()} - {
        spec.split(":")[0] for spec in refused
    }
    assert len(set(names)) == len(names) and all("keep=" in name or name in ("full", "blind") for name in names)
    few, _ = contest(tiny_llava(), ["todre:exit=none"], [12], TOKENS)
    assert [arm.name for arm in few][3:] == ["random:keep=12", "todre:keep=12,exit=none"]


def test_what_is_out_of_reach_is_told_and_left_out() -> None:
    arms, refused = contest(tiny_llava(), ["fastv"], [1, 30], TOKENS)
    assert [arm.name for arm in arms if arm.method == "fastv"] == ["fastv:keep=30"]
    assert "out of reach" in refused["fastv:keep=1"]


def test_what_cannot_run_is_an_error_only_where_it_was_asked_for() -> None:
    model = tiny("mllama")
    arms, refused = contest(model, None, [6], 9)
    assert "evocut" in {arm.method for arm in arms} and "drops between decoder layers" in refused["fastv:keep=6"]
    with pytest.raises(UnsupportedMethod, match="drops between decoder layers"):
        contest(model, ["fastv"], [6], 9)


@pytest.mark.parametrize("spec", ["evocut:keep=9", "v2drop:stages=1@0.5", "evocut + v2drop"])
def test_budgets_are_not_given_twice(spec: str) -> None:
    with pytest.raises(BudgetError, match="come from --keep"):
        with_keep(spec, 9)
    with pytest.raises(UnknownMethod):
        with_keep("evocat", 9)
