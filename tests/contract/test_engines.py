"""What every family promises with every method: a new family or method is tested by being registered."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import foveate
from foveate import Report, registry
from foveate.core import Method
from foveate.engines.base import compress
from foveate.families import FAMILIES, CrossFamily, family_of
from tests.models import TOKENS, tiny_inputs, tiny_llava
from tests.zoo.inputs import batch
from tests.zoo.models import NAMES, placeholders, tiny

LAYERS, NEW = 6, 4
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}

#: Every method runs on each of these; every family runs in `tests/families`.
MODELS: dict[str, Callable[[], Any]] = {
    "llava-clip": lambda: tiny_llava(tower="clip"),
    "llava-siglip": lambda: tiny_llava(tower="siglip"),
    "llava-clip-eager": lambda: tiny_llava("eager"),
}


def _specs() -> list[str]:
    """Every method at a third of the tokens, or at its defaults where they fit a small model."""
    return [f"{name}:keep={0.6 if name == 'v2drop' else 0.3}" for name in registry.names()]


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.mark.parametrize("name", NAMES)
def test_a_family_knows_its_model(name: str) -> None:
    model = tiny(name)
    family = family_of(model)
    assert model.config.model_type in family.model_types
    assert len(family.layers(model)) == LAYERS
    assert family.provides(model) <= foveate.core.DECLARABLE


def test_every_family_has_a_model() -> None:
    here = {family.name for family in FAMILIES if family.lacks("image") is None}
    assert {family_of(tiny(name)).name for name in NAMES} >= here


@pytest.mark.parametrize("spec", _specs())
def test_counts_are_what_the_method_announced(spec: str, model: Any) -> None:
    method, inputs = registry.from_spec(spec), tiny_inputs()
    with compress(model, method) as handle:
        assert repr(method) and registry.to_spec(method) in repr(handle)
        assert handle.report.images == ()
        output = model.generate(**inputs, **OPTIONS)
    report = handle.report
    assert torch.equal(output.sequences[:, :-NEW], inputs["input_ids"])
    assert [image.tokens for image in report.images] == [TOKENS] * 3
    assert report.method == registry.to_spec(method)
    for image in report.images:
        alive = TOKENS
        for layer in range(LAYERS):
            before = image.tokens if layer == 0 else image.n_kept
            parts = [part for part in method.parts if layer in part.sites(LAYERS)]
            for part in parts:
                announced = part.expected(alive, before, layer, LAYERS)
                alive = image.alive[layer] if announced is None else announced
            assert image.alive[layer] == len(image.after(layer)) == alive
            assert sorted(set(image.after(layer))) == list(image.after(layer))
        assert sum(image.alive) < TOKENS * LAYERS
    _numbers_add_up(report, output)


def _numbers_add_up(report: Report, output: Any) -> None:
    text = [t - sum(i.tokens for i in report.images if i.row == row) for row, t in enumerate(report.prompt_tokens)]
    after = [t + sum(i.n_kept for i in report.images if i.row == row) for row, t in enumerate(text)]
    assert list(report.prompt_tokens_after) == after
    layers = output.past_key_values.layers
    per_token = 2 * layers[0].keys.shape[1] * layers[0].keys.shape[3] * layers[0].keys.element_size()
    assert report.kv_bytes_before == per_token * LAYERS * sum(report.prompt_tokens)
    assert report.kv_bytes_after == per_token * (LAYERS * sum(text) + sum(sum(i.alive) for i in report.images))
    assert None not in (report.encode_ms, report.select_ms, report.prefill_ms)
    assert Report.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["calls"] == 1 and str(report)


@pytest.mark.parametrize("name", registry.names())
def test_everything_kept_is_the_plain_model(name: str, model: Any) -> None:
    inputs = tiny_inputs()
    more = ",tau=0.0" if name == "todre" else ""
    plain = model.generate(**inputs, **OPTIONS)
    with compress(model, f"{name}:keep=1.0{more}") as handle:
        output = model.generate(**inputs, **OPTIONS)
    assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits))
    assert torch.equal(output.sequences, plain.sequences)
    assert all(image.alive == (TOKENS,) * LAYERS for image in handle.report.images)


@pytest.mark.parametrize("spec", _specs())
def test_the_same_call_twice_is_the_same_answer(spec: str, model: Any) -> None:
    inputs = tiny_inputs()
    before = {name: value.clone() for name, value in inputs.items()}
    plain = model.generate(**inputs, **OPTIONS)
    with compress(model, spec) as handle:
        first = model.generate(**inputs, **OPTIONS)
        second = model.generate(**inputs, **OPTIONS)
        assert handle.report.calls == 2
    assert torch.equal(torch.stack(first.logits), torch.stack(second.logits))
    assert all(torch.equal(before[name], value) for name, value in inputs.items()), "the caller's tensors are his own"
    again = model.generate(**inputs, **OPTIONS)
    assert torch.equal(torch.stack(again.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("spec", _specs())
def test_verify_agrees(spec: str, model: Any) -> None:
    outcome = foveate.verify(model, spec, new_tokens=2)
    assert outcome.ok and outcome.difference <= 1e-4, str(outcome)


def test_verify_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.engines import sequence
    from foveate.engines.decoder import DecoderPart
    from tests.engine.oracle import vivid

    model = vivid(tiny_llava())
    assert foveate.verify(model, "v2drop:keep=8", new_tokens=2).ok

    def elsewhere(self: Any, call: Any, cutting: Any, embeddings: Any) -> Any:
        return tuple(sequence.take(e, cutting.plan.index * 0, e.dim() - 2) for e in embeddings)

    with monkeypatch.context() as patch:  # every survivor believes that it stands first
        patch.setattr(DecoderPart, "_rotary", elsewhere)
        assert not foveate.verify(model, "v2drop:keep=8", new_tokens=2).ok
    assert foveate.verify(model, "v2drop:keep=8", new_tokens=2).ok


@pytest.mark.parametrize("name", NAMES)
def test_evidence_has_one_row_per_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engine.probes import peek, watch

    model, seen = tiny(name), watch(monkeypatch)
    family = family_of(model)
    provided = family.provides(model)
    inside = sorted(provided & foveate.core.DECODER_EVIDENCE)
    before = sorted(provided - foveate.core.DECODER_EVIDENCE)
    methods: list[Method] = [peek(0, *before)]
    if not isinstance(family, CrossFamily) and name != "gemma4_shared":
        methods.append(peek(4, *inside))
    with compress(model, foveate.Chain(*methods) if len(methods) > 1 else methods[0]):
        model.generate(**batch(name), **OPTIONS, suppress_tokens=placeholders(model))
    for site, names in ((0, before), (4, inside))[: len(methods)]:
        assert seen["peek", site]
        for evidence in seen["peek", site]:
            n = evidence.n
            assert n == len(evidence.coordinates) == sum(evidence.crops or [n]) == sum(map(len, evidence.by_crop()))
            assert torch.cat(evidence.by_crop()).sort().values.tolist() == list(range(n))
            frames, rows, columns = evidence.grid
            flat = (evidence.coordinates * torch.tensor([rows * columns, columns, 1])).sum(1)
            assert frames * rows * columns >= n and len(flat.unique()) == n, "a place of its own for each token"
            for known in set(names) - {"text", "text_keys", "text_hidden", "seed", "relevance", "coordinates"}:
                assert len(evidence.require(known)) == n
                assert torch.isfinite(evidence.require(known).float()).all()
            if site:
                assert evidence.require("relevance").shape[1] == n
