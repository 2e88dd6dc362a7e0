"""What caches remember: pictures passed again, later turns under another handle or none, copies of models."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import foveate
from foveate.core import Method
from foveate.engines.base import compress
from tests.engine.oracle import GREEDY, differ, pair, prompts
from tests.engine.test_oracle import CASES, TOLERANCE
from tests.families.matrix import inputs_of, model_of
from tests.models import IMAGE, TOKENS, one_row, tiny_inputs
from tests.zoo import inputs as zoo
from tests.zoo.models import placeholders

KINDS = ["evocut", "evocut original", "v2drop to nothing", "evocut original + v2drop"]


def _later(first: Any, inputs: dict[str, Tensor], words: list[int]) -> dict[str, Tensor]:
    """The whole conversation with new words at its end, and its pictures again."""
    ids = torch.cat([first.sequences, torch.tensor([words] * len(first.sequences))], 1)
    more = ids.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)
    types = {n: torch.nn.functional.pad(v, (0, more)) for n, v in inputs.items() if n.endswith("token_type_ids")}
    return {**inputs, "input_ids": ids, "attention_mask": mask, **types}


def _refused(words: str, call: Any) -> None:
    with pytest.raises(foveate.UnsupportedCall, match=words) as caught, torch.no_grad():
        call()
    assert caught.value.hint


# -- pictures passed again


@pytest.mark.parametrize("case", [*KINDS, "ragged inside, together"])
def test_pictures_passed_again_are_in_the_cache_already(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    with compress(model, method) as handle:
        first = model.generate(**inputs, **GREEDY, max_new_tokens=4)
        for words in ([44, 45], [7]):
            again, cache = _later(first, inputs, words), copy.deepcopy(first.past_key_values)
            output = model.generate(**again, past_key_values=cache, **GREEDY, max_new_tokens=4)
            assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE
        assert handle.report.calls == 1


def test_pictures_of_which_nothing_left_may_be_passed_again_too() -> None:
    (model, _), inputs = pair(), tiny_inputs()
    first = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    text = {name: value for name, value in _later(first, inputs, [44]).items() if name != "pixel_values"}
    plain = model.generate(**text, past_key_values=first.past_key_values, **GREEDY, max_new_tokens=4)
    with compress(model, "evocut:keep=1.0"):
        first = model.generate(**inputs, **GREEDY, max_new_tokens=4)
        again = _later(first, inputs, [44])
        output = model.generate(**again, past_key_values=first.past_key_values, **GREEDY, max_new_tokens=4)
    assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("case", KINDS)
def test_a_loop_may_pass_the_pictures_at_every_step(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), one_row(tiny_inputs(), 2)
    mask, steps = inputs["attention_mask"], []
    with compress(model, method) as handle, torch.no_grad():
        output = model(**inputs, use_cache=True)
        ids = inputs["input_ids"]
        for _ in range(3):
            new = output.logits[:, -1:].argmax(-1)
            steps.append(output.logits[:, -1])
            ids, mask = torch.cat([ids, new], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
            step = {"input_ids": new, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
            output = model(**step, past_key_values=output.past_key_values)
        assert differ(steps, oracle.logits(inputs, ids, handle.report, positions)) <= TOLERANCE
        step["input_ids"] = torch.full((1, TOKENS), IMAGE)
        cache = output.past_key_values
        _refused("picture was added", lambda: model(**step, past_key_values=cache))


@pytest.mark.parametrize("case", KINDS)
def test_a_new_picture_needs_a_new_cache(case: str) -> None:
    (method, _), (model, _), inputs = CASES[case], pair(), one_row(tiny_inputs(), 1)
    with compress(model, method):
        first = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        more = _later(first, inputs, [5, *[IMAGE] * TOKENS, 5])
        cache = copy.deepcopy(first.past_key_values)
        _refused("picture was added", lambda: model.generate(**more, past_key_values=cache, max_new_tokens=2))
        both = {**more, "pixel_values": torch.cat([inputs["pixel_values"]] * 2)}
        _refused("picture was added", lambda: model.generate(**both, past_key_values=cache, max_new_tokens=2))
        model.generate(**both, **GREEDY, max_new_tokens=2)  # as the hint says


@pytest.mark.parametrize("case", KINDS)
def test_pictures_of_another_conversation(case: str) -> None:
    (method, _), (model, _), inputs = CASES[case], pair(), one_row(tiny_inputs(), 1)
    plain = model.generate(**inputs, **GREEDY, max_new_tokens=3)
    with compress(model, method):
        again = _later(plain, inputs, [5])
        cache = copy.deepcopy(plain.past_key_values)
        _refused("not empty", lambda: model.generate(**again, past_key_values=cache, max_new_tokens=2))
        cache = model.generate(**inputs, **GREEDY, max_new_tokens=3).past_key_values
        again["input_ids"][0, 1] = 77
        _refused("does not begin", lambda: model.generate(**again, past_key_values=cache, max_new_tokens=2))


@pytest.mark.parametrize("spec", ["evocut:keep=0.4", "v2drop:stages=3@0.5/4@0.3"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_pictures_passed_again_in_other_families(name: str, spec: str) -> None:
    model, inputs = model_of(name, "sdpa"), inputs_of(name, "image")
    options = {**GREEDY, "max_new_tokens": 4, "suppress_tokens": placeholders(model)}
    with compress(model, spec):
        first = model.generate(**inputs, **options)
        again = _later(first, inputs, [44, 45])
        output = model.generate(**again, past_key_values=first.past_key_values, **options)
        fresh = model.generate(**again, **options)  # neither method looks at the text
    assert (torch.stack(output.logits) - torch.stack(fresh.logits)).abs().max() <= 1e-5


# -- who goes on


@pytest.mark.parametrize("case", [*KINDS, "ragged inside"])
def test_a_shortened_cache_needs_a_handle(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    with compress(model, method) as handle:
        first = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    whole = {name: value for name, value in _later(first, inputs, [44]).items() if name != "pixel_values"}
    copies = [copy.deepcopy(first.past_key_values), pickle.loads(pickle.dumps(first.past_key_values))]
    for cache in (first.past_key_values, *copies):
        lengths = [layer.get_seq_length() for layer in cache.layers]
        _refused("no handle", lambda c=cache: model.generate(**whole, past_key_values=c, max_new_tokens=2))
        _refused("no handle", lambda c=cache: model(input_ids=torch.tensor([[7]] * 3), past_key_values=c))
        assert [layer.get_seq_length() for layer in cache.layers] == lengths
        with compress(model, method):
            output = model.generate(**whole, past_key_values=cache, **GREEDY, max_new_tokens=4)
        assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE


def test_what_a_prompt_looks_across_at_needs_a_handle_too() -> None:
    model, inputs = model_of("mllama", "sdpa"), inputs_of("mllama", "image")
    with compress(model, "evocut:keep=0.4"):
        cache = model.generate(**inputs, **GREEDY, max_new_tokens=2).past_key_values
    step = {"input_ids": torch.full((len(inputs["input_ids"]), 1), 7), "past_key_values": cache}
    _refused("no handle", lambda: model(**step))


def test_a_shortened_cache_that_was_reset_is_as_good_as_new() -> None:
    (model, _), text = pair(), tiny_inputs((0, 0))
    plain = model.generate(**text, **GREEDY, max_new_tokens=4)
    for spec in ("evocut:keep=5", "v2drop:stages=2@0.5"):
        cache = DynamicCache(config=model.config.get_text_config())
        with compress(model, spec):
            model.generate(**tiny_inputs(), **GREEDY, past_key_values=cache, max_new_tokens=2)
        cache.reset()
        output = model.generate(**text, **GREEDY, past_key_values=cache, max_new_tokens=4)
        assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits))


def test_a_shortened_cache_is_freed_at_once() -> None:
    model, _ = pair()
    with compress(model, "evocut:keep=8 + v2drop:stages=2@0.5"):
        output = model.generate(**tiny_inputs(), **GREEDY, max_new_tokens=2)
        cache = weakref.ref(output.past_key_values)
        gc.disable()
        try:
            del output
            assert cache() is None
        finally:
            gc.enable()


@pytest.mark.parametrize(
    ("filled", "going_on", "words"),
    [
        ("v2drop:stages=2@0.5/4@0", "evocut:keep=5", r"layers \[2, 4\].*before the LLM alone"),
        ("v2drop:stages=2@0.5/4@0", "v2drop:stages=3@0.5", r"layers \[2, 4\].*layers \[3\]"),
        ("evocut:keep=8 + v2drop:stages=2@0.5", "evocut:keep=8", r"layers \[2\].*before the LLM alone"),
        ("v2drop:stages=2@0.5/4@0", "v2drop:stages=1@0.9", None),
        ("evocut:keep=8,positions=original + v2drop:stages=2@0.5", "v2drop:stages=2@0.9", None),
        ("evocut:keep=5", "grid:keep=4", None),
    ],
)
def test_another_method_goes_on_where_it_can(filled: str, going_on: str, words: str | None) -> None:
    (model, oracle), inputs = pair(), tiny_inputs()
    with compress(model, filled) as handle:
        first = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    again, cache = _later(first, inputs, [44]), first.past_key_values
    with compress(model, going_on):
        if words is not None:
            _refused(words, lambda: model.generate(**again, past_key_values=cache, max_new_tokens=2))
            return
        output = model.generate(**again, past_key_values=cache, **GREEDY, max_new_tokens=4)
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, handle.positions)) <= TOLERANCE


def test_some_prompts_of_a_cache_cannot_go_on_alone() -> None:
    (model, _), inputs = pair(), prompts([[1, 5, IMAGE, 6], [1, IMAGE, 7, 8], [1, IMAGE, IMAGE, 9]])
    with compress(model, "v2drop:stages=2@0.5/4@0"), torch.no_grad():
        cache = model(**inputs).past_key_values
        cache.batch_select_indices(torch.tensor([0, 2]))
        step = {"input_ids": torch.tensor([[7], [7]]), "past_key_values": cache}
        _refused("filled by 3 prompts, and 2 go on", lambda: model(**step))


# -- copies of models


@pytest.mark.parametrize("method", [case[0] for name, case in CASES.items() if name in KINDS], ids=str)
def test_a_compressed_model_is_not_copied(method: Method | str) -> None:
    (model, _), inputs = pair(), tiny_inputs()
    before = set(vars(model)), set(vars(model.model.language_model))
    with compress(model, method):
        compressed = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        for part in (model, model.model, model.model.language_model, {"inside": [model]}):
            _refused("cannot be copied", lambda p=part: copy.deepcopy(p))
        assert set(model.state_dict()) == set(pair()[1].model.state_dict())
        again = model.generate(**inputs, **GREEDY, max_new_tokens=3)
    assert torch.equal(again.sequences, compressed.sequences)
    assert (set(vars(model)), set(vars(model.model.language_model))) == before
    twin = copy.deepcopy(model)
    plain = [each.generate(**inputs, **GREEDY, max_new_tokens=3).sequences for each in (model, twin)]
    assert torch.equal(*plain)


def test_every_row_of_a_zoo_batch_reads_its_own_pictures_again() -> None:
    name = "qwen2_5_vl"
    model, inputs = model_of(name, "sdpa"), inputs_of(name, "image")
    options = {**GREEDY, "max_new_tokens": 3, "suppress_tokens": placeholders(model)}
    with compress(model, "v2drop:stages=3@0.5/4@0"):
        for row in (1, 2):
            single = zoo.one_row(name, inputs, row)
            first = model.generate(**single, **options)
            again = _later(first, single, [44])
            output = model.generate(**again, past_key_values=first.past_key_values, **options)
            fresh = model.generate(**again, **options)
            assert (torch.stack(output.logits) - torch.stack(fresh.logits)).abs().max() <= 1e-5
