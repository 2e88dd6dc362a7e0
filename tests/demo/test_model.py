"""The packaged model: loads without a network, reads 576 visual tokens, answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import foveate.demo as demo
from foveate.demo.evaluate import Score, answer, evaluate, prompt, table
from foveate.demo.world import COLOURS, SHAPES, WORDS, held_out

FLOOR = 0.9
"""Least accuracy on a small held-out sample; the card has the figure for the whole set."""


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The packaged model and its processor."""
    return demo.load()


def test_the_world_needs_no_transformers() -> None:
    code = "import sys, foveate.demo, foveate.demo.world as w; w.scene(1); assert 'transformers' not in sys.modules"
    path = str(Path(demo.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


def test_size_of_the_package() -> None:
    weights = demo.MODEL / "model.safetensors"
    assert weights.stat().st_size <= 25 * 2**20
    config = json.loads((demo.MODEL / "config.json").read_text())
    assert (config["model_type"], config["vision_feature_layer"]) == ("llava", -2)
    assert config["vision_config"]["image_size"] == 336 and config["text_config"]["num_hidden_layers"] >= 8


def test_parameters(loaded: tuple[Any, Any]) -> None:
    assert 8e6 <= sum(p.numel() for p in loaded[0].parameters()) <= 14e6
    assert not loaded[0].training


def test_a_picture_of_any_shape_is_576_tokens(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    text = processor.apply_chat_template(prompt("what colour is the star?"), add_generation_prompt=True)
    for size in ((336, 336), (90, 500), (1000, 700)):
        inputs = processor(images=[Image.new("RGB", size)], text=[text], return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576
        assert inputs["pixel_values"].shape == (1, 3, 336, 336)


def test_left_padding_and_template(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    tokens = processor.tokenizer
    assert tokens.padding_side == "left" and tokens.pad_token_id not in (tokens.eos_token_id, tokens.bos_token_id)
    text = processor.apply_chat_template(prompt("who?"), add_generation_prompt=True)
    assert text == "USER: <image>\nwho? ASSISTANT:"


def test_tokenizer_keeps_words_of_the_world_whole_and_any_text_intact(loaded: tuple[Any, Any]) -> None:
    tokens = loaded[1].tokenizer
    for word in (*COLOURS, *SHAPES, *WORDS):
        assert len(tokens(f" {word}", add_special_tokens=False).input_ids) == 1
    for text in ("a zebra, 47 times!", "größe 東京 🙂"):
        assert tokens.decode(tokens(text, add_special_tokens=False).input_ids) == text


def test_bundled_questions_are_answered(loaded: tuple[Any, Any]) -> None:
    image = Image.open(demo.PICTURE).convert("RGB")
    assert len(demo.QUESTIONS) == 3
    questions, truths = zip(*demo.QUESTIONS, strict=True)
    assert answer(*loaded, [image] * 3, questions) == list(truths)


def test_accuracy_on_a_small_held_out_sample(loaded: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    scores = evaluate(*loaded, islice(held_out(), 24), batch=8)
    assert scores["all"].n == 24 and scores["all"].accuracy >= FLOOR, table(scores)


def test_wilson_interval() -> None:
    """Against the worked example of 8 successes in 10: 0.490 .. 0.943."""
    low, high = Score(8, 10).interval
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert Score(0, 10).interval[0] == 0.0 and Score(10, 10).interval[1] == pytest.approx(1.0)
