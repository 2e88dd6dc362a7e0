"""The trained video model: loads without a network or torchvision, reads clips, answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pytest
import torch
from PIL import Image

import foveate.demo as demo
from foveate.demo.video import CLIP, QUESTIONS, frames
from foveate.demo.video.world import VALIDATION, clip

FLOOR = 0.8
"""Least accuracy on some clips of the validation seeds; the card has the figure for the whole held-out set."""


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The trained model and its processor."""
    model, processor = demo.load("demo-video")
    return model, processor


def answers(loaded: tuple[Any, Any], shown: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
    model, processor = loaded
    inputs = processor.apply_chat_template(
        [
            [{"role": "user", "content": [{"type": "video", "video": list(shown)}, {"type": "text", "text": question}]}]
            for question in questions
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True},
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def test_what_it_is(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    assert type(model).__name__ == "LlavaNextVideoForConditionalGeneration" and not model.training
    assert 8e6 <= sum(p.numel() for p in model.parameters()) <= 14e6
    folder = demo.folder("demo-video")
    assert (folder / "model.safetensors").stat().st_size <= 25 * 2**20
    assert json.loads((folder / "config.json").read_text())["spatial_pool_stride"] == 2
    assert (folder / "CARD.md").is_file()


def test_it_answers_about_the_bundled_clip(loaded: tuple[Any, Any]) -> None:
    shown = frames()
    assert len(shown) == 8 and sum(path.stat().st_size for path in CLIP.iterdir()) < 150_000
    assert answers(loaded, shown, [q for q, _ in QUESTIONS]) == [a for _, a in QUESTIONS]


def test_the_bundled_questions_are_true() -> None:
    world = {(q.text.replace("color ", "colour "), q.answer) for q in clip(20005301).questions}
    assert set(QUESTIONS) <= world


def test_it_reads_its_world_and_not_the_questions_alone(loaded: tuple[Any, Any]) -> None:
    right, blind, total = 0, 0, 0
    for seed in VALIDATION[500:503]:
        shown = clip(seed)
        asked = [next(group) for _, group in groupby(shown.questions, lambda q: q.type)]
        texts, true = [q.text for q in asked], [q.answer for q in asked]
        grey = [Image.new("RGB", (168, 168), (128, 128, 128))] * len(shown.frames)
        right += sum(a == b for a, b in zip(answers(loaded, shown.frames, texts), true, strict=True))
        blind += sum(a == b for a, b in zip(answers(loaded, grey, texts), true, strict=True))
        total += len(asked)
    assert total > 18 and right / total >= FLOOR and blind / total <= 0.5
