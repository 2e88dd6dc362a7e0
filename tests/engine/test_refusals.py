"""What cannot be honoured is refused by name, with something to type, and the model works afterwards."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import foveate
from foveate.core import Evidence, Selection
from foveate.engines.base import compress
from tests.engine.oracle import GREEDY, differ, pair, prompts
from tests.engine.probes import Coin, SharedCoin, Wrong, peek
from tests.models import IMAGE, TOKENS, chunked, one_row, tiny_inputs, tiny_llava

SITE_0, INSIDE = "evocut:keep=5", "v2drop:stages=2@0.5/4@0"


def _logits(model: Any) -> torch.Tensor:
    return torch.stack(model.generate(**tiny_inputs(), **GREEDY, max_new_tokens=3).logits)


def _refused(error: type[foveate.FoveateError], what: Callable[[], Any], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        what()
    assert caught.value.hint, "a refusal says what to type instead"
    assert "hint: " in str(caught.value)


# -- before any call


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        ("evocut:keep=0", foveate.BudgetError, "at least 1"),
        ("evocut:keep=64.0", foveate.BudgetError, r"\(0, 1\]"),
        ("evocut:keep=-1", foveate.BudgetError, "-1"),
        ("evocut:keep=0.0", foveate.BudgetError, r"\(0, 1\]"),
        ("evocat:keep=4", foveate.UnknownMethod, "evocat"),
        ("evocut:kepp=4", foveate.BudgetError, "kepp"),
        ("v2drop:stages=2@0.5/6@0", foveate.BudgetError, "6 layers"),
        ("v2drop:stages=0@0.5", foveate.BudgetError, ">= 1"),
        ("evocut:keep=4,start=9", foveate.BudgetError, "4 layers"),
        ("v2drop:stages=2@0.5,positions=packed", foveate.UnsupportedMethod, "inside the LLM"),
        ("evocut:keep=8,positions=original + adav:keep=4", foveate.UnsupportedMethod, "different positions"),
        (Coin(at="02"), foveate.UnsupportedMethod, "sites"),
        (Coin(at="6"), foveate.UnsupportedMethod, "sites"),
        (SharedCoin(at="0"), foveate.UnsupportedMethod, "together"),
        (peek(0, "hidden"), foveate.UnsupportedMethod, "hidden.* before the LLM"),
        (peek(0, "relevance", "coordinates"), foveate.UnsupportedMethod, "relevance.* before"),
        (peek(2, "encoder_fold"), foveate.UnsupportedMethod, "encoder_fold.* inside the LLM"),
        (peek(2, "seed", "hidden"), foveate.UnsupportedMethod, "seed.* inside"),
    ],
    ids=str,
)
def test_wrong_methods(method: Any, error: type[foveate.FoveateError], words: str) -> None:
    model, _ = pair()
    before = _logits(model)
    _refused(error, lambda: compress(model, method), words)
    assert torch.equal(_logits(model), before)


class _Stranger(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=kind)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_Stranger("lava"), "lava"),
        (_Stranger("llava"), "head"),
        (nn.Linear(2, 2), "Linear"),
        ("llava-hf/llava-1.5-7b-hf", "str"),
    ],
    ids=["unknown", "no head", "no config", "a name"],
)
def test_unknown_models(model: Any, words: str) -> None:
    _refused(foveate.UnsupportedModel, lambda: compress(model, SITE_0), words)


@pytest.mark.parametrize(("tower", "strategy"), [("clip", "full"), ("siglip", "default")])
def test_a_tower_read_the_wrong_way(tower: Any, strategy: str) -> None:
    model = tiny_llava(tower=tower)
    model.config.vision_feature_select_strategy = strategy
    _refused(foveate.UnsupportedModel, lambda: compress(model, SITE_0), "vision_feature_select_strategy")


# -- at the call


def _right_padded() -> dict[str, Any]:
    inputs = tiny_inputs()
    for name in ("input_ids", "attention_mask"):
        rows = [
            torch.roll(row, int(mask.sum())) for row, mask in zip(inputs[name], inputs["attention_mask"], strict=True)
        ]
        inputs[name] = torch.stack(rows)
    return inputs


def _without(inputs: dict[str, Any], place: int) -> dict[str, Any]:
    return {
        **inputs,
        **{n: torch.cat([inputs[n][:, :place], inputs[n][:, place + 1 :]], 1) for n in ("input_ids", "attention_mask")},
    }


def _calls(model: Any) -> dict[str, tuple[Callable[[], Any], str]]:
    inputs, one = tiny_inputs(), one_row(tiny_inputs(), 2)
    ids, ones = inputs["input_ids"], torch.ones(1, 1, 53, 53)
    embeds = model.get_input_embeddings()(ids)
    pixels = {"pixel_values": inputs["pixel_values"]}
    ready = {"image": model.model.get_image_features(**pixels, return_dict=True)}
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    crossing = prompts([[1, IMAGE, 5], [1, IMAGE, 5]])
    crossing["input_ids"][0, 16], crossing["input_ids"][1, 17] = 7, IMAGE

    def filled() -> Any:
        return model.generate(**prompts([[1, 5, 6]]), **GREEDY, max_new_tokens=2).past_key_values

    def later(**options: Any) -> Any:
        cache = model.generate(**one, **GREEDY, max_new_tokens=2).past_key_values
        return model.generate(past_key_values=cache, max_new_tokens=2, **options)

    return {
        "right padding": (lambda: model.generate(**_right_padded()), "padded on the right"),
        "labels": (lambda: model(**inputs, labels=ids), "labels"),
        "a placeholder missing": (lambda: model.generate(**_without(one, 10)), "31 image tokens .* make 32"),
        "a picture missing": (
            lambda: model.generate(**{**inputs, "pixel_values": pixels["pixel_values"][:2]}),
            "48 .* 32",
        ),
        "a picture too many": (lambda: model.generate(**{**one, **pixels}), "32 .* 48"),
        "a picture across rows": (lambda: model.generate(**crossing), "two prompts"),
        "embeddings": (lambda: model.generate(inputs_embeds=embeds, **pixels), "inputs_embeds"),
        "embeddings and ids": (lambda: model.generate(**inputs, inputs_embeds=embeds), "inputs_embeds"),
        "embeddings alone": (lambda: model.generate(inputs_embeds=embeds), "whether there are any"),
        "embeddings alone, plain": (lambda: model(inputs_embeds=embeds[:, :3]), "whether there are any"),
        "embeddings of placeholders": (lambda: model.generate(**text, inputs_embeds=embeds), "inputs_embeds"),
        "pictures alone": (lambda: model.generate(**pixels), "without a prompt"),
        "continuous batching": (lambda: model.generate(**inputs, cache_implementation="paged"), "paged"),
        "token healing": (lambda: model.generate(**inputs, token_healing=True), "token_healing"),
        "embeddings, plain": (lambda: model(inputs_embeds=embeds, **pixels), "inputs_embeds"),
        "ready features": (lambda: model.generate(**text, mm_encoder_outputs=ready), "mm_encoder_outputs"),
        "ready features, plain": (lambda: model(**text, mm_encoder_outputs=ready), "mm_encoder_outputs"),
        "a mask of four dimensions": (lambda: model(**{**one, "attention_mask": ones}), "attention_mask of shape"),
        "a picture on a full cache": (
            lambda: model.generate(**one, past_key_values=filled(), max_new_tokens=2),
            "not empty",
        ),
        "embeddings on a full cache": (
            lambda: model(inputs_embeds=embeds[:1, -2:], past_key_values=filled(), **pixels),
            "inputs_embeds",
        ),
        "a picture added later": (
            lambda: later(
                input_ids=torch.cat([one["input_ids"], torch.tensor([[5, 6, *[IMAGE] * TOKENS, 5]])], 1),
                pixel_values=pixels["pixel_values"],
            ),
            "not empty",
        ),
    }


def _turn_calls(model: Any) -> dict[str, tuple[Callable[[], Any], str]]:
    one, two = one_row(tiny_inputs(), 2), tiny_inputs((1, 1))

    def later(first: dict[str, Any] = one, **options: Any) -> Any:
        cache = model.generate(**first, **GREEDY, max_new_tokens=2).past_key_values
        return model.generate(past_key_values=cache, max_new_tokens=2, **options)

    other = torch.cat([one["input_ids"] + 0, torch.tensor([[5, 6, 7]])], 1)
    other[0, 2] = 77
    embeds = model.get_input_embeddings()(other)
    ready = {"image": model.model.get_image_features(pixel_values=one["pixel_values"], return_dict=True)}
    more = torch.nn.functional.pad(one["input_ids"], (0, 3), value=7)
    return {
        "ready features": (lambda: later(input_ids=more, mm_encoder_outputs=ready), "mm_encoder_outputs"),
        "another prompt": (lambda: later(input_ids=other), "does not begin"),
        "another batch": (lambda: later(two, input_ids=other), "2 prompts, this call brings 1"),
        "no ids": (lambda: later(inputs_embeds=embeds), "input_ids"),
    }


NAMES = list(_calls(tiny_llava()))


@pytest.mark.parametrize("spec", [SITE_0, INSIDE])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_calls(name: str, spec: str) -> None:
    model, _ = pair()
    before = _logits(model)
    call, words = _calls(model)[name]
    with compress(model, spec):
        compressed = _logits(model)
        with torch.no_grad():
            _refused(foveate.UnsupportedCall, call, words)
        assert torch.equal(_logits(model), compressed)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("name", ["another prompt", "another batch", "no ids", "ready features"])
def test_later_turns(name: str) -> None:
    model, _ = pair()
    call, words = _turn_calls(model)[name]
    with compress(model, "evocut:keep=5,positions=original"):
        _refused(foveate.UnsupportedCall, call, words)


@pytest.mark.parametrize("spec", [SITE_0, "evocut:keep=1.0"])
def test_positions_of_ones_own(spec: str) -> None:
    (model, oracle), inputs = pair(), tiny_inputs()
    own = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with compress(model, SITE_0):
        _refused(foveate.UnsupportedCall, lambda: model.generate(**inputs, position_ids=own), "position_ids")
    with compress(model, "evocut:keep=5,positions=original") as handle:
        output = model.generate(**inputs, **GREEDY, position_ids=own, max_new_tokens=3)
        wide = model.generate(**inputs, **GREEDY, position_ids=2 * own, max_new_tokens=3)
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, "original")) <= 1e-4
    assert not torch.equal(torch.stack(wide.logits), torch.stack(output.logits))


def test_original_positions_of_a_padded_batch_need_the_whole_mask() -> None:
    model, _ = pair()
    inputs = tiny_inputs()
    with compress(model, "evocut:keep=5,positions=original"), torch.no_grad():
        cache = model(**inputs).past_key_values
        new = torch.tensor([[5]] * 3)
        _refused(foveate.UnsupportedCall, lambda: model(input_ids=new, past_key_values=cache), "attention_mask")
        short = torch.ones(3, int(cache.get_seq_length()) + 1, dtype=torch.long)
        call = lambda: model(input_ids=new, past_key_values=cache, attention_mask=short)  # noqa: E731
        _refused(foveate.UnsupportedCall, call, "attention_mask")


@pytest.mark.parametrize("method", ["evocut:keep=5,positions=original", Coin(share=0.1)], ids=str)
def test_original_positions_need_a_last_word(method: Any) -> None:
    (model, _), inputs = pair(), prompts([[1, 5, IMAGE], [1, IMAGE, 6]])
    with compress(model, method):
        _refused(foveate.UnsupportedCall, lambda: model.generate(**inputs, max_new_tokens=2), "ends with a picture")


@pytest.mark.parametrize("method", ["v2drop:stages=2@0", Coin(share=0.0, least=0, positions="packed")], ids=str)
def test_a_prompt_that_would_lose_everything(method: Any) -> None:
    (model, _), inputs = pair(), prompts([[IMAGE], [1, IMAGE, 6]])
    with compress(model, method):
        _refused(foveate.UnsupportedCall, lambda: model.generate(**inputs, max_new_tokens=2), "without text")


@chunked
def test_chunks_are_read_at_site_0_only() -> None:
    (model, _), inputs = pair(), tiny_inputs()
    for spec in (INSIDE, "evocut:keep=10 + v2drop:stages=2@0.5", "todre:keep=8,exit=0.5"):
        with compress(model, spec):
            compressed = _logits(model)
            call = lambda: model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)  # noqa: E731
            _refused(foveate.UnsupportedCall, call, "chunks")
            assert torch.equal(_logits(model), compressed)


# -- methods that answer wrongly, models that do not obey


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    "answer",
    [
        lambda n: [1, 0, *range(2, n // 2)],
        lambda n: [0, 0, *range(2, n // 2)],
        lambda n: [*range(n // 2 - 1), n],
        lambda n: [-1, *range(1, n // 2)],
        lambda n: [*range(n // 2 + 1)],
        lambda n: [*range(n)],
        lambda n: [],
    ],
    ids=["unsorted", "twice", "beyond", "negative", "one more", "all", "none"],
)
def test_invalid_selections(answer: Callable[[int], list[int]], at: int) -> None:
    model, _ = pair()
    before = _logits(model)
    with compress(model, Wrong(answer=answer, at=at)):
        for inputs in (tiny_inputs(), one_row(tiny_inputs(), 1)):  # several images go through vmap, one does not
            _refused(foveate.ContractError, lambda i=inputs: model.generate(**i, max_new_tokens=2), "wrong")
    with compress(model, Wrong(answer=lambda n: [*range(n // 2)], at=at)) as handle:
        _logits(model)
        assert [image.alive[at] for image in handle.report.images] == [8, 8, 8]
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("at", [0, 2])
def test_evidence_that_was_not_declared(at: int) -> None:
    class Greedy(type(peek(at))):  # type: ignore[misc]
        def select(self, evidence: Evidence, site: int) -> Selection:
            evidence.require("encoder_fold" if site == 0 else "hidden")
            raise AssertionError

    model, _ = pair()
    with compress(model, Greedy()):
        _refused(foveate.MissingEvidence, lambda: _logits(model), "not captured")


def test_layers_that_are_bypassed() -> None:
    model, _ = pair()
    decoder = model.model.language_model
    layers = decoder.layers
    with compress(model, INSIDE):
        compressed = _logits(model)
        decoder.layers = nn.ModuleList(list(layers)[:2])  # layers 2 and 4, where tokens should leave, never run
        try:
            _refused(foveate.NothingCompressed, lambda: _logits(model), r"layers \[2, 4\]")
        finally:
            decoder.layers = layers
        hook = layers[3].register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0][:, 1:],), kwargs) if args[0].shape[1] > 1 else None,
            with_kwargs=True,
            prepend=True,
        )
        try:
            _refused(foveate.NothingCompressed, lambda: _logits(model), "layer 3 got")
        finally:
            hook.remove()
        assert torch.equal(_logits(model), compressed)
