"""Accuracy of demo-hd on its held-out set: `python -m foveate.demo.hd.evaluate`, also with crops or thumbnail grey."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foveate.demo.evaluate import Score, table
from foveate.demo.hd.questions import TYPES
from foveate.demo.hd.world import held_out, scene
from foveate.demo.world import Question

HIDE = ("nothing", "crops", "thumbnail", "all")
"""What may be made evenly grey."""


def answer(model: Any, processor: Any, seed: int, questions: list[str], hide: str = "nothing") -> list[str]:
    """Answers questions about one scene with the stock `generate`, greedily.

    Args:
        model: The model.
        processor: Its processor.
        seed: The scene, see `foveate.demo.hd.world.scene`.
        questions: The questions.
        hide: One of `HIDE`.

    Returns:
        The answers, stripped, lower case.
    """
    import torch

    pictures = scene(seed).pictures
    content = [{"type": "image"}] * len(pictures)
    chats = [[{"role": "user", "content": [*content, {"type": "text", "text": question}]}] for question in questions]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(images=list(pictures) * len(texts), text=texts, return_tensors="pt", padding=True)
    pixels = inputs["pixel_values"].to(model.dtype)
    grey = (0.5 - torch.tensor(processor.image_processor.image_mean)) / torch.tensor(
        processor.image_processor.image_std
    )
    frames = {"nothing": slice(0, 0), "crops": slice(1, None), "thumbnail": slice(0, 1), "all": slice(None)}[hide]
    pixels[:, frames] = grey.to(pixels)[:, None, None]
    inputs["pixel_values"] = pixels
    with torch.inference_mode():
        output = model.generate(**inputs.to(model.device), max_new_tokens=6, do_sample=False)
    decoded = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip().lower() for text in decoded]


def evaluate(
    model: Any, processor: Any, pairs: Iterable[tuple[int, Question]], hide: str = "nothing"
) -> dict[str, Score]:
    """Accuracy per question type.

    Args:
        model: The model.
        processor: Its processor.
        pairs: Seeds and questions, see `foveate.demo.hd.world.held_out`.
        hide: What to make grey, one of `HIDE`.

    Returns:
        A score for each type, and one called "all".
    """
    by_scene: dict[int, list[Question]] = defaultdict(list)
    for seed, question in pairs:
        by_scene[seed].append(question)
    right, total = dict.fromkeys(TYPES, 0), dict.fromkeys(TYPES, 0)
    for seed, questions in by_scene.items():
        given = answer(model, processor, seed, [q.text for q in questions], hide)
        for text, question in zip(given, questions, strict=True):
            right[question.type] += text == question.answer
            total[question.type] += 1
    scores = {kind: Score(right[kind], total[kind]) for kind in TYPES if total[kind]}
    return scores | {"all": Score(sum(right.values()), sum(total.values()))}


def main() -> None:
    """Command line."""
    import torch

    from foveate.demo import load

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000, help="questions, a multiple of four")
    parser.add_argument("--hide", choices=HIDE, default="nothing", help="what to make evenly grey")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    model, processor = load("demo-hd", args.device, getattr(torch, args.dtype))
    scores = evaluate(model, processor, held_out(args.n), args.hide)
    print(table(scores))
    if args.json:
        args.json.write_text(json.dumps({kind: (s.right, s.n) for kind, s in scores.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
