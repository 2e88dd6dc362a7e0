"""Anything goes: a random family, method, budget, batch and way of decoding, dropped against masked.

A few cases in CI; `make fuzz` draws 1,000. What fails is shrunk, printed with the call that repeats it, and kept in
`.hypothesis/`, so that the next run begins with it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import foveate
from foveate.families import family_of
from tests.families.matrix import ATTENTION, WHOLE, kept_in, model_of
from tests.zoo.inputs import batch, mixed
from tests.zoo.models import GREEDY, MIXED, VIDEO, placeholders
from tests.zoo.reference import reference_logits

CASES = int(os.environ.get("FOVEATE_FUZZ", "40"))
LAYERS = 6


@dataclass(frozen=True)
class Case:
    """One draw; its repr is what a failure shows."""

    name: str
    impl: str
    kind: str
    rows: tuple[int, ...]
    seed: int
    spec: str
    decode: str


def _keep(draw: st.DrawFn) -> str:
    tokens, share = st.integers(1, 24).map(str), st.sampled_from(["0.05", "0.111", "0.34", "0.5", "0.9", "1.0"])
    return str(draw(st.one_of(tokens, share)))


def _prompt_spec(draw: st.DrawFn, name: str) -> str:
    method = draw(st.sampled_from(["evocut", "todre", "adav", "random", "grid"]))
    options = [f"keep={_keep(draw)}"]
    if method == "todre":
        options += ["exit=none", f"diversity={draw(st.sampled_from(['max_sum', 'k_center']))}"]
    if method == "evocut":
        options.append(f"share={draw(st.sampled_from(['crop', 'global']))}")
    options.append(f"per={draw(st.sampled_from(['video', 'frame']))}")
    legal = family_of(model_of(name, "sdpa")).positions
    options.append(f"positions={draw(st.sampled_from(['paper', *legal]))}")
    return f"{method}:{','.join(options)}"


def _inner_spec(draw: st.DrawFn, first: int) -> str:
    if draw(st.booleans()):
        sites = sorted(draw(st.sets(st.integers(first, LAYERS - 1), min_size=1, max_size=3)))
        keeps = [draw(st.sampled_from(["0.7", "0.5", "0.2", "3", "9"])) for _ in sites]
        if draw(st.booleans()):
            keeps[-1] = "0"
        return "v2drop:stages=" + "/".join(f"{site}@{keep}" for site, keep in zip(sites, keeps, strict=True))
    return f"todre:keep=1.0,exit={draw(st.sampled_from(['0.5', '0.7']))},tau={draw(st.sampled_from(['0.05', '0.9']))}"


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(WHOLE))
    kind = draw(st.sampled_from(["image", "image", *["video"] * (name in VIDEO), *["both"] * (name in MIXED)]))
    rows = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(any)))
    where = "site 0" if name == "mllama" else draw(st.sampled_from(["site 0", "inside", "both"]))
    parts = []
    if where != "inside":
        parts.append(_prompt_spec(draw, name))
    if where != "site 0":
        parts.append(_inner_spec(draw, family_of(model_of(name, "sdpa")).first_site(model_of(name, "sdpa"))))
    impl, decode = draw(st.sampled_from(ATTENTION)), draw(st.sampled_from(["greedy", "greedy", "beams", "no cache"]))
    return Case(name, impl, kind, rows, draw(st.integers(1, 99)), " + ".join(parts), decode)


@settings(max_examples=CASES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(case=_cases())
@torch.no_grad()
def test_dropped_equals_masked(case: Case) -> None:
    model = model_of(case.name, case.impl)
    if case.kind == "both":
        inputs: Any = mixed(case.name, seed=case.seed)
    else:
        inputs = batch(case.name, case.rows, seed=case.seed, video=case.kind == "video")
    options: dict[str, Any] = {"greedy": {}, "no cache": {"use_cache": False}}.get(case.decode, {})
    if case.decode == "beams":
        options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    settings = {**GREEDY, "max_new_tokens": 5, "suppress_tokens": placeholders(model), **options}
    with foveate.compress(model, case.spec) as handle:
        output = model.generate(**inputs, **settings)
    kept = kept_in(handle.report)
    reference = reference_logits(model, inputs, output.sequences[:, :-1], kept, handle.positions, window="packed")
    new = reference[:, -5:]
    if case.decode == "beams":
        chosen = new.log_softmax(-1).gather(2, output.sequences[:, -5:, None])[..., 0]
        assert torch.allclose(chosen.mean(1), output.sequences_scores, atol=1e-4)
    else:
        assert float((torch.stack(output.logits, 1) - new).abs().max()) <= 1e-4


def test_the_comparison_can_fail() -> None:
    model, inputs = model_of("llava", "sdpa"), batch("llava", (1, 2))
    settings = {**GREEDY, "max_new_tokens": 5, "suppress_tokens": placeholders(model)}
    with foveate.compress(model, "random:keep=5") as handle:
        output = model.generate(**inputs, **settings)
    wrong = [[(0, [*image.kept[:-1], image.tokens - 1])] for image in handle.report.images]
    assert any(tuple(items[0][1]) != image.kept for items, image in zip(wrong, handle.report.images, strict=True))
    reference = reference_logits(model, inputs, output.sequences[:, :-1], wrong, handle.positions)
    difference = float((torch.stack(output.logits, 1) - reference[:, -5:]).abs().max())
    assert difference > 1e-3
