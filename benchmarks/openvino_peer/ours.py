"""Our side: the same checkpoint in stock transformers, compressed by foveate. Started by `measure`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import foveate
from benchmarks.openvino_peer.work import CONVERSATION, PROMPT, VISUAL, Line, picture, serve, timed

PAD = "<|image_pad|>"


@contextmanager
def decoder(model: Any) -> Iterator[list[float]]:
    """Note when the decoder's first call began and when it ended."""
    stamps: list[float] = []
    layers = model.model.language_model
    hooks = [
        layers.register_forward_pre_hook(lambda *_: stamps.append(time.perf_counter())),
        layers.register_forward_hook(lambda *_: stamps.append(time.perf_counter())),
    ]
    try:
        yield stamps
    finally:
        for hook in hooks:
            hook.remove()


def main(folder: str, dtype: str, threads: str) -> None:
    """Load the checkpoint and answer requests ``{"picture": number, "method": spec or None}``."""
    torch.set_num_threads(int(threads))
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)

    def inputs(image: Any) -> dict[str, torch.Tensor]:
        text = CONVERSATION.format(prompt=PROMPT).replace(PAD, PAD * VISUAL)
        ids = tokenizer([text], return_tensors="pt")
        kinds = (ids["input_ids"] == model.config.image_token_id).int()
        return {**ids, "mm_token_type_ids": kinds, **processor(images=[image], return_tensors="pt")}

    def answer(request: Line) -> Line:
        image, method = picture(request["picture"]), request["method"]
        reply: Line = {}
        with (
            nullcontext() if method is None else foveate.compress(model, method) as handle,
            decoder(model) as stamps,
            timed(reply),
        ):
            start = time.perf_counter()
            prompt = inputs(image)
            ready = time.perf_counter()
            output = model.generate(
                **prompt, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            scores = output.logits[0][0].float().log_softmax(-1)
            best = int(scores.argmax())
        report = None if handle is None else handle.report
        return reply | {
            "tokens": prompt["input_ids"].shape[1] if report is None else report.prompt_tokens_after[0],
            "before_llm": (stamps[0] - start) * 1e3,
            "llm": (stamps[1] - stamps[0]) * 1e3,
            "processor": (ready - start) * 1e3,
            **({} if report is None else {"select": report.select_ms}),
            "word": tokenizer.decode([best]),
            "logprob": float(scores[best]),
        }

    serve({"pid": os.getpid(), "attention": model.config._attn_implementation}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
