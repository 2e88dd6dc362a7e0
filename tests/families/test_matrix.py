"""Every family x method x attention implementation: dropped equals masked."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch
from PIL import Image

import foveate
from foveate.families import FAMILIES
from tests.families.matrix import ATTENTION, SERVED, WHOLE, cases, inputs_of, measure, model_of
from tests.zoo.models import GREEDY, NAMES, model_type, placeholders


@pytest.mark.parametrize(("name", "kind", "spec", "impl"), list(cases()))
def test_dropped_equals_masked(name: str, kind: str, spec: str, impl: str) -> None:
    difference, report = measure(name, kind, spec, impl)
    assert difference <= 1e-4
    assert report.mean_alive < report.tokens


@pytest.mark.parametrize("impl", ATTENTION)
@pytest.mark.parametrize("name", WHOLE)
def test_keeping_all_is_the_plain_model(name: str, impl: str) -> None:
    model, inputs = model_of(name, impl), inputs_of(name, "image")
    settings = {**GREEDY, "max_new_tokens": 3, "suppress_tokens": placeholders(model)}
    plain = model.generate(**inputs, **settings)
    with foveate.compress(model, "random:keep=1.0"):
        same = model.generate(**inputs, **settings)
    assert torch.equal(torch.stack(same.logits), torch.stack(plain.logits))
    assert torch.equal(same.sequences, plain.sequences)


@pytest.mark.parametrize("name", WHOLE)
def test_every_report_can_be_drawn_and_read_back(name: str) -> None:
    model, inputs = model_of(name, "sdpa"), inputs_of(name, "image")
    with foveate.compress(model, "random:keep=3") as handle:
        model.generate(**inputs, max_new_tokens=1)
    report = handle.report
    assert foveate.Report.from_json(report.to_json()) == report
    photo = Image.effect_noise((300, 200), 60).convert("RGB")
    for index, image in enumerate(report.images):
        drawn = report.draw(photo, index)
        assert drawn.width >= 300 * (1 if image.frames is None else len(image.frames))


def test_every_served_type_was_measured() -> None:
    measured = json.loads((resources.files("foveate.families") / "measured.json").read_text(encoding="utf-8"))
    assert set(measured) == SERVED, "type `make oracle`"
    assert all(float(seen["largest_difference"]) <= 1e-4 for seen in measured.values())


def test_every_family_is_in_the_matrix() -> None:
    here = [family for family in FAMILIES if family.lacks("image") is None]
    assert {model_type(name) for name in NAMES} >= {kind for family in here for kind in family.model_types}
