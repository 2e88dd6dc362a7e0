"""Accuracy of the demo model on the held-out set: `python -m foveate.demo.evaluate`."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.demo.questions import TYPES
from foveate.demo.world import SIDE, Question, held_out, scene

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Score:
    """Right answers out of n.

    Args:
        right: How many were right.
        n: How many were asked.
    """

    right: int
    n: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        if not self.n:
            return math.nan, math.nan
        z, p, n = 1.959964, self.right / self.n, self.n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


def prompt(question: str) -> list[dict[str, Any]]:
    """A conversation of one picture and one question, as chat templates take it."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def answer(model: Any, processor: Any, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
    """Answers one question on each picture with the stock `generate`, greedily.

    Args:
        model: Any image-text-to-text model.
        processor: Its processor.
        images: The pictures.
        questions: As many questions.

    Returns:
        The answers, stripped, lower case.
    """
    import torch

    texts = [processor.apply_chat_template(prompt(q), add_generation_prompt=True) for q in questions]
    inputs = processor(images=list(images), text=texts, return_tensors="pt", padding=True)
    inputs = inputs.to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    decoded = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip().lower() for text in decoded]


def evaluate(
    model: Any, processor: Any, pairs: Iterable[tuple[int, Question]], batch: int = 8, blind: bool = False
) -> dict[str, Score]:
    """Accuracy per question type.

    Args:
        model: Any image-text-to-text model.
        processor: Its processor.
        pairs: Seeds and questions, see `foveate.demo.world.held_out`.
        batch: Questions per call of `generate`.
        blind: Show an evenly grey picture instead.

    Returns:
        A score for each type, and one called "all".
    """
    from PIL import Image

    grey = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    asked = list(pairs)
    right, total = dict.fromkeys(TYPES, 0), dict.fromkeys(TYPES, 0)
    pictures: dict[int, Image.Image] = {}
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        seeds = {seed for seed, _ in part}
        pictures = {s: pictures.get(s) or (grey if blind else scene(s).image) for s in seeds}
        answers = answer(model, processor, [pictures[s] for s, _ in part], [q.text for _, q in part])
        for given, (_, question) in zip(answers, part, strict=True):
            right[question.type] += given == question.answer
            total[question.type] += 1
    scores = {kind: Score(right[kind], total[kind]) for kind in TYPES if total[kind]}
    return scores | {"all": Score(sum(right.values()), sum(total.values()))}


def table(scores: dict[str, Score], blind: dict[str, Score] | None = None) -> str:
    """The scores as a Markdown table."""
    lines = ["| type | n | accuracy | 95 % interval |" + (" blind |" if blind else "")]
    lines += ["|---|---|---|---|" + ("---|" if blind else "")]
    for kind, score in scores.items():
        low, high = score.interval
        line = f"| {kind} | {score.n} | {100 * score.accuracy:.1f} % | {100 * low:.1f} .. {100 * high:.1f} |"
        lines.append(line + (f" {100 * blind[kind].accuracy:.1f} % |" if blind else ""))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    import torch

    import foveate.demo as demo

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a model; the packaged one unless told")
    parser.add_argument("--n", type=int, default=2000, help="questions, a multiple of four")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--blind", action="store_true", help="also with a grey picture in place of every picture")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if args.model:
        demo.MODEL = args.model
    model, processor = demo.load("demo", args.device, getattr(torch, args.dtype))
    start = time.monotonic()
    scores = evaluate(model, processor, held_out(args.n), args.batch)
    blind = evaluate(model, processor, held_out(args.n), args.batch, blind=True) if args.blind else None
    print(table(scores, blind))
    print(f"{args.n} questions, {args.dtype}, {time.monotonic() - start:.0f} s")
    if args.json:
        record = {name: {k: (s.right, s.n) for k, s in part.items()} for name, part in
                  (("full", scores), ("blind", blind or {}))}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
