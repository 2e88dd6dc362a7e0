"""Two methods in one: some tokens leave before the LLM, more of them inside it.

python examples/chain.py
"""

from __future__ import annotations

from PIL import Image

import foveate
from foveate import demo

BOTH = foveate.Chain(
    foveate.ToDRE(keep=128, exit=None, positions="original"),  # a diverse subset enters the LLM
    foveate.FastV(stages=((6, 0.25),)),  # before layer 6 those leave that the question hardly attends to
)


def main() -> None:
    """Print an answer, what each stage kept, and how many tokens each layer read."""
    model, processor = demo.load()
    question, truth = demo.QUESTIONS[0]
    image = Image.open(demo.PICTURE)
    inputs = processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
    with foveate.compress(model, BOTH) as handle:
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{question} {answer.strip()} (it is {truth})")
    print(handle.report)
    print("tokens in each layer:", *handle.report.images[0].alive)
    print("the same in one line:", foveate.to_spec(BOTH))
    handle.report.draw(image).save("chain.png")  # the longer a token lives, the brighter


if __name__ == "__main__":
    main()
