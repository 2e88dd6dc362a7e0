"""The bundled model answers three questions, with all its visual tokens and with fewer and fewer.

python examples/first_steps.py
"""

from __future__ import annotations

import contextlib

from PIL import Image

import foveate
from foveate import demo


def main() -> None:
    """Print one line per budget: tokens that enter the LLM, and the three answers."""
    model, processor = demo.load()
    image = Image.open(demo.PICTURE)
    print("questions:", *(f"{question} ({truth})" for question, truth in demo.QUESTIONS))
    for keep in (None, 192, 64, 16):
        answers = []
        with foveate.compress(model, foveate.EvoCut(keep=keep)) if keep else contextlib.nullcontext() as handle:
            for question, _ in demo.QUESTIONS:
                if handle and answers:
                    handle.reselect()  # the same picture: it is not encoded again
                text = f"USER: <image>\n{question} ASSISTANT:"
                inputs = processor(images=image, text=text, return_tensors="pt")
                output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
                answer = output[0, inputs["input_ids"].shape[1] :]  # the prompt comes back in front
                answers.append(processor.decode(answer, skip_special_tokens=True).strip())
        print(handle.report.kept if handle else "all", "tokens:", *answers)


if __name__ == "__main__":
    main()
