"""Several pictures in one call, several in one prompt: each has a budget of its own, as if it were asked about alone.

python examples/batch.py
"""

from __future__ import annotations

import foveate
from foveate import demo
from foveate.demo.world import scene


def main() -> None:
    """Print the answers about three pictures asked together, then one prompt that shows two of them."""
    model, processor = demo.load()
    processor.tokenizer.padding_side = "left"  # as for any generation in batches
    scenes = [scene(seed) for seed in (20_000_001, 20_000_007, 20_000_012)]

    def ask(pictures: list, prompts: list[str]) -> list[str]:
        inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    with foveate.compress(model, "todre:keep=0.1,exit=none") as handle:
        questions = [f"USER: <image>\n{s.questions[0].text} ASSISTANT:" for s in scenes]
        answers = ask([[s.image] for s in scenes], questions)
        for s, answer in zip(scenes, answers, strict=True):
            print(f"{s.questions[0].text} {answer} (it is {s.questions[0].answer})")
        print(handle.report)  # a row for each picture
        ask([[scenes[0].image, scenes[1].image]], ["USER: <image>\n<image>\nwhat word is written? ASSISTANT:"])
        print("two pictures in one prompt:", [image.n_kept for image in handle.report.images], "tokens")


if __name__ == "__main__":
    main()
