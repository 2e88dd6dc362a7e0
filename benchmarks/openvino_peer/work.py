"""What both workers share: one prompt, pictures by number, and how they are asked. Needs numpy and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SIDE, PATCH, MERGE = 672, 14, 2

#: Visual tokens of a picture before anything is pruned.
VISUAL = (SIDE // PATCH // MERGE) ** 2

PROMPT = "What is shown in this picture, and what is to the left of it?"

#: A conversation of one turn with one picture, as Qwen's template writes it.
CONVERSATION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
)

#: A request or a reply: one line of JSON.
Line = dict[str, Any]


def picture(number: int) -> np.ndarray:
    """Return picture ``number``, bytes [672, 672, 3]: coarse coloured blocks under fine noise, no two alike."""
    draw = np.random.default_rng(number)
    blocks = draw.integers(0, 256, (12, 12, 3)).repeat(SIDE // 12, 0).repeat(SIDE // 12, 1)
    return np.clip(blocks + draw.normal(0.0, 20.0, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


@contextlib.contextmanager
def timed(reply: Line) -> Iterator[None]:
    """Add to the reply the wall time and the CPU time of all threads, in milliseconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    reply["first_token"] = (time.perf_counter() - wall) * 1e3
    reply["first_token_cpu"] = (time.process_time() - cpu) * 1e3


def serve(hello: Line, answer: Callable[[Line], Line]) -> None:
    """Say hello, then answer each line of standard input with a line of standard output.

    Libraries may print what they like: standard output is moved aside for the lines, prints go to standard error.
    """
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lines.write(json.dumps(hello) + "\n")
    for line in sys.stdin:
        lines.write(json.dumps(answer(json.loads(line))) + "\n")
