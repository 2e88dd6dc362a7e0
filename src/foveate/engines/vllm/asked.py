"""What a request asks of each of its pictures: the method, and what of the prompt the method reads."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate import registry
from foveate.core import Method

#: In ``mm_processor_kwargs``: a method's spec, and what to take for the text after the pictures.
METHOD, QUESTION = "foveate", "foveate_question"
#: Under which name the processor hands on what is asked of each picture.
ASKED = "foveate_asked"
#: Under which names this travels beside a picture's pixels.
FIELDS = ("foveate_method", "foveate_text", "foveate_seed")


@dataclass(frozen=True)
class Asked:
    """All that decides, with the picture, which of its tokens stay. It is part of the picture's identity in caches.

    Args:
        method: Spec of the method.
        text: Token ids of the text after the picture, where the method reads it.
        seed: Made from the prompt and the picture's place in it, where the method draws by lot.
    """

    method: str
    text: tuple[int, ...] = ()
    seed: int = 0

    def tensors(self) -> tuple[Tensor, ...]:
        """The same as tensors, in the order of `FIELDS`."""
        spec = torch.tensor(list(self.method.encode()), dtype=torch.uint8)
        return spec, torch.tensor(self.text, dtype=torch.long), torch.tensor(self.seed)


def ask(
    method: Method, prompt: Sequence[int], token: int, pictures: int, question: Sequence[int] | None
) -> list[Asked]:
    """Say what is asked of each picture of a prompt.

    Args:
        method: For all of them.
        prompt: Token ids, with one placeholder for each picture.
        token: The placeholder.
        pictures: How many there are.
        question: Token ids that count as the text after every picture; None: the text that is there.
    """
    needs = {need for part in method.parts for need in part.needs}
    spec, starts = registry.to_spec(method), [place for place, word in enumerate(prompt) if word == token]
    starts += [len(prompt)] * (pictures - len(starts))  # vLLM refuses such a prompt by itself
    words = np.array([word for word in prompt if word != token], dtype=np.int64)
    asked = []
    for start in starts[:pictures]:
        text = [word for word in prompt[start:] if word != token] if question is None else question
        seed = zlib.crc32(words.tobytes(), start) if "seed" in needs else 0  # as in transformers for the first picture
        asked.append(Asked(spec, tuple(text) if "text" in needs else (), seed))
    return asked


def take(fields: dict[str, Any]) -> list[Asked]:
    """Take what is asked out of what a model is called with; empty where no picture came."""
    columns = [fields.pop(name, ()) for name in FIELDS]
    return [
        Asked(bytes(spec.tolist()).decode(), tuple(text.tolist()), int(seed))
        for spec, text, seed in zip(*columns, strict=True)
    ]


def without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a processor without ours."""
    return {name: value for name, value in kwargs.items() if name not in (METHOD, QUESTION, ASKED)}
