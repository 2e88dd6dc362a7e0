"""A method of your own: a dataclass with one function. This one keeps what is unlike its surroundings.

python examples/own_method.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

import foveate
from foveate import demo, ops


@dataclass(frozen=True, kw_only=True)
class Contrast(foveate.PromptMethod):
    """Keep the tokens that differ most from the mean of their row and column."""

    name: ClassVar[str] = "contrast"

    def select(self, evidence: foveate.Evidence, site: int) -> foveate.Selection:
        _, rows, columns = evidence.filled_grid
        grid = ops.unit(evidence.features).reshape(-1, rows, columns, evidence.features.shape[1])
        around = ops.unit(grid.mean(1, keepdim=True) + grid.mean(2, keepdim=True))
        scores = 1 - (grid * around).sum(-1).flatten()
        return foveate.Selection(keep=ops.top_k(scores, self.count(evidence.n)), scores=scores)


if __name__ == "__main__":
    model, processor = demo.load()
    question, truth = demo.QUESTIONS[0]
    inputs = processor(Image.open(demo.PICTURE), f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
    for method in (Contrast(keep=96), foveate.Random(keep=96)):
        with foveate.compress(model, method) as handle:
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        print(f"{question} {answer} (it is {truth})", handle.report, sep="\n")
    print(foveate.verify(model, Contrast(keep=96)))  # a dropped token is a masked token
