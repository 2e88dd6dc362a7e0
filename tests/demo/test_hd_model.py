"""The shipped demo-hd: it loads, answers about its world, and needs more than the thumbnail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from foveate.demo import load
from foveate.demo.hd import EXAMPLES, PICTURES
from foveate.demo.hd.evaluate import answer, evaluate, table
from foveate.demo.hd.questions import TYPES
from foveate.demo.hd.world import VALIDATION, scene
from foveate.demo.world import Question
from foveate.lab.chat import answers, prepare


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Model and processor."""
    return load("demo-hd", dtype=torch.bfloat16)


def test_it_is_a_stock_model_with_the_tokens_of_the_card(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    assert 12.0e6 < sum(p.numel() for p in model.parameters()) < 12.5e6
    inputs = processor(text="<image>", images=scene(EXAMPLES[0][0]).pictures[0], return_tensors="pt")
    assert inputs["pixel_values"].shape[2:] == (3, 336, 336)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 744


@pytest.mark.parametrize(("seed", "question", "expected"), EXAMPLES)
def test_it_answers_the_examples(loaded: tuple[Any, Any], seed: int, question: str, expected: str) -> None:
    assert seed in VALIDATION
    assert answer(*loaded, seed, [question]) == [expected]


@pytest.mark.parametrize(("names", "example"), [(("large",), 0), (("before", "after"), -1)])
def test_it_answers_about_the_bundled_pictures(loaded: tuple[Any, Any], names: tuple[str, ...], example: int) -> None:
    _, question, expected = EXAMPLES[example]
    inputs = prepare(*loaded, [[Image.open(PICTURES / f"{name}.jpg") for name in names]], [question])
    assert answers(loaded[1], inputs, loaded[0].generate(**inputs, max_new_tokens=6)) == [expected]


def test_small_things_are_not_in_the_thumbnail(loaded: tuple[Any, Any]) -> None:
    """With grey crops nearly nothing can be read; a grey thumbnail costs little."""
    single = [seed for seed in VALIDATION[200:240] if len(scene(seed).pictures) == 1][:5]
    pairs = [(seed, q) for seed in single for q in scene(seed).questions]
    right = {hide: evaluate(*loaded, pairs, hide)["all"].accuracy for hide in ("nothing", "crops", "thumbnail")}
    assert right["nothing"] > 0.75
    assert right["thumbnail"] > right["crops"] + 0.2 and right["nothing"] > right["crops"] + 0.2


def test_table_has_a_line_for_each_type(loaded: tuple[Any, Any]) -> None:
    scores = evaluate(*loaded, [(VALIDATION[0], Question("is there a red star?", "?", "presence"))])
    assert set(scores) == {"presence", "all"} and set(scores) - {"all"} <= set(TYPES)
    assert scores["all"].right == 0 and "| presence | 1 |" in table(scores)
