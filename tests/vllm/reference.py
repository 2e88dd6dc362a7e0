"""The same answers from the transformers engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from tests.vllm.answers import NEW, Answer, Request
from tests.vllm.tiny import picture


class Reference:
    """A model under the transformers engine.

    Args:
        folder: Where the model is.
    """

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)

    def answer(self, request: Request) -> Answer:
        """Answer greedily; log-probabilities of all tokens at each step."""
        pictures = [picture(*each) for each in request["pictures"]]
        inputs = self.processor(images=pictures, text=request["prompt"], return_tensors="pt")
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        with foveate.compress(self.model, request["kwargs"]["foveate"]) as handle:
            made = self.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        start = inputs["input_ids"].shape[1]
        return {
            "length": handle.report.prompt_tokens_after[0],
            "full": handle.report.prompt_tokens[0],
            "tokens": made.sequences[0, start:].tolist(),
            "logprobs": [step[0].log_softmax(-1) for step in made.logits],
        }


def difference(answer: Answer, reference: Answer) -> float:
    """The largest difference of log-probabilities, over the tokens that vLLM told at each step."""
    pairs = zip(answer["logprobs"], reference["logprobs"], strict=True)
    return max(abs(value - float(all_[int(token)])) for step, all_ in pairs for token, value in step.items())
