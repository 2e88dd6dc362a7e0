"""Selecting again from pictures that were encoded before: another question, no encoder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.engines.base import compress
from foveate.families import family_of
from tests.engine.oracle import GREEDY, differ, pair, prompts
from tests.engine.test_oracle import CASES, TOLERANCE
from tests.families.matrix import inputs_of, model_of
from tests.models import IMAGE
from tests.zoo.models import placeholders

QUESTIONS = [[41, 42, 43], [101, 77, 119, 88]]


@contextmanager
def _encoding(model: Any) -> Iterator[list[int]]:
    """Count the passes of the vision encoder."""
    passes: list[int] = []
    tower = family_of(model).tower(model, "image")
    hook = tower.register_forward_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        hook.remove()


def _ask(words: list[int], seed: int = 1, rows: int = 2) -> dict[str, Tensor]:
    return prompts([[1, 5, IMAGE, *words], [1, 6, IMAGE, 7, IMAGE, *words, 9]][:rows], seed=seed)


@pytest.mark.parametrize(
    "case", ["adav", "evocut", "v2drop to nothing", "evocut original + v2drop", "ragged", "random"]
)
def test_another_question_is_not_encoded_again(case: str) -> None:
    (method, positions), (model, oracle) = CASES[case], pair()
    first, second = (_ask(words) for words in QUESTIONS)
    with compress(model, method) as handle, _encoding(model) as passes:
        model.generate(**first, **GREEDY, max_new_tokens=4)
        before = handle.report
        assert len(passes) == 1 and before.encode_ms is not None
        for _ in range(2):
            handle.reselect()
            output = model.generate(**second, **GREEDY, max_new_tokens=4)
            assert len(passes) == 1
            report = handle.report
            assert report.encode_ms is None and report.select_ms is not None
            assert differ(output.logits, oracle.logits(second, output.sequences, report, positions)) <= TOLERANCE
        fresh = model.generate(**second, **GREEDY, max_new_tokens=4)
        assert len(passes) == 2 and handle.report.encode_ms is not None
    assert torch.equal(torch.stack(output.logits), torch.stack(fresh.logits))
    assert [image.stages for image in report.images] == [image.stages for image in handle.report.images]
    if case == "adav":
        assert [image.kept for image in before.images] != [image.kept for image in report.images], "the text counts"


def test_the_prompts_may_be_others_as_long_as_the_pictures_are_not() -> None:
    (model, oracle), first = pair(), _ask(QUESTIONS[0])
    spread = prompts([[1, 5, IMAGE, 8, IMAGE, 9], [1, IMAGE, 4]])
    with compress(model, "adav:keep=6") as handle, _encoding(model) as passes, torch.no_grad():
        model(**first)
        handle.reselect()
        output = model.generate(**{**spread, "pixel_values": first["pixel_values"].clone()}, **GREEDY, max_new_tokens=4)
        assert len(passes) == 1
        reference = oracle.logits(spread, output.sequences, handle.report, "packed")
    assert differ(output.logits, reference) <= TOLERANCE


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ("evocut:keep=9", "evocut:keep=5"),
        ("adav:keep=6", "adav:keep=10"),
        ("adav:keep=6", "random:keep=5"),
        ("random:keep=6", "v2drop:stages=1@0.5"),
        ("v2drop:stages=1@0.5", "fastv:stages=2@0.5"),
        ("todre:keep=8", "todre:keep=5"),
    ],
)
def test_another_budget_or_method_selects_from_what_the_encoder_made(first: str, other: str) -> None:
    (model, _), inputs = pair(), _ask(QUESTIONS[0])
    with compress(model, other) as handle, torch.no_grad():
        fresh, alone = model(**inputs).logits, handle.report
    with compress(model, first) as handle, _encoding(model) as passes, torch.no_grad():
        model(**inputs)
        handle.reselect(other)
        again = model(**inputs).logits
        assert len(passes) == 1 and handle.method == foveate.from_spec(other)
        assert [i.stages for i in handle.report.images] == [i.stages for i in alone.images]
        assert torch.equal(again, fresh)
        model(**inputs)
        assert len(passes) == 2, "the method stays, the pictures are read anew"
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("wrong", ["nonsense:keep=3", "evocut:keep=0", "v2drop:stages=99@0.5", "evocut:keep=5"])
def test_a_method_that_cannot_be_reselected_leaves_the_handle_as_it_was(wrong: str) -> None:
    (model, _), inputs = pair(), _ask(QUESTIONS[0])
    with compress(model, "adav:keep=6") as handle, _encoding(model) as passes, torch.no_grad():
        before = model(**inputs).logits
        with pytest.raises(foveate.FoveateError):
            handle.reselect(wrong)
        assert handle.method == foveate.from_spec("adav:keep=6")
        handle.reselect()
        assert torch.equal(model(**inputs).logits, before) and len(passes) == 1


def test_only_the_next_call_is_meant() -> None:
    (model, _), inputs = pair(), _ask(QUESTIONS[0])
    with compress(model, "evocut:keep=5") as handle, _encoding(model) as passes:
        model.generate(**inputs, max_new_tokens=2)
        handle.reselect()
        handle.reselect()
        model.generate(**inputs, max_new_tokens=2)
        assert len(passes) == 1
        model.generate(**inputs, max_new_tokens=2)
        assert len(passes) == 2
        model.generate(**_ask(QUESTIONS[0], seed=2), max_new_tokens=2)
        handle.reselect()
        model.generate(**_ask(QUESTIONS[1], seed=2), max_new_tokens=2)
        assert len(passes) == 3


def _refused(words: str, call: Any) -> None:
    with pytest.raises(foveate.UnsupportedCall, match=words) as caught:
        call()
    assert caught.value.hint


def test_what_cannot_be_selected_from_again() -> None:
    (model, _), inputs = pair(), _ask(QUESTIONS[0])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].where(text["input_ids"] != IMAGE, 8)
    with compress(model, "evocut:keep=5") as handle:
        _refused("no picture was read", handle.reselect)
        cache = model.generate(**inputs, **GREEDY, max_new_tokens=2).past_key_values
        ids = torch.nn.functional.pad(inputs["input_ids"], (0, 3), value=7)
        calls = {
            "other pictures": lambda: model.generate(**_ask(QUESTIONS[0], seed=2), max_new_tokens=2),
            "with other": lambda: model.generate(**_ask(QUESTIONS[0], rows=1), max_new_tokens=2),
            "reads no picture": lambda: model.generate(**text, max_new_tokens=2),
            "no picture anew": lambda: model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2),
        }
        for words, call in calls.items():
            handle.reselect()
            _refused(words, call)
            model.generate(**inputs, max_new_tokens=2)  # the order is spent
    _refused("no picture was read", handle.reselect)


def test_a_picture_changed_in_place_is_another_picture() -> None:
    (model, _), inputs = pair(), _ask(QUESTIONS[0])
    with compress(model, "evocut:keep=5") as handle:
        model.generate(**inputs, max_new_tokens=2)
        inputs["pixel_values"].mul_(2)
        handle.reselect()
        _refused("other pictures", lambda: model.generate(**inputs, max_new_tokens=2))


def test_an_order_is_of_one_thread() -> None:
    (model, _), inputs = pair(), _ask(QUESTIONS[0])
    with compress(model, "evocut:keep=5") as handle, _encoding(model) as passes:
        model.generate(**inputs, max_new_tokens=2)
        handle.reselect()
        thread = threading.Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 2})
        thread.start()
        thread.join()
        assert len(passes) == 2
        model.generate(**inputs, max_new_tokens=2)
        assert len(passes) == 2


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "gemma3", "mllama"])
def test_other_families(name: str) -> None:
    model, inputs = model_of(name, "sdpa"), inputs_of(name, "image")
    options = {**GREEDY, "max_new_tokens": 4, "suppress_tokens": placeholders(model)}
    with compress(model, "adav:keep=5") as handle, _encoding(model) as passes:
        fresh = model.generate(**inputs, **options)
        count = len(passes)
        handle.reselect()
        again = model.generate(**inputs, **options)
        assert len(passes) == count
    assert torch.equal(torch.stack(again.logits), torch.stack(fresh.logits))
