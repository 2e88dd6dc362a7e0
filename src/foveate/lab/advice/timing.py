"""One call of ``generate`` seen from outside: its time by stage and the most memory its tensors take."""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from foveate.families import Family

Clock = Callable[[], float]


@dataclass(frozen=True)
class Call:
    """Where the time of one call went, in milliseconds.

    Args:
        first: From the call to the first token.
        encode: The vision encoder and projector, with what a method reads there; 0 where they did not run.
        prefill: The decoder's layers over the prompt, with what a method does between them.
        step: A decode step after the first token, median; 0 where there was none.
        total: From the call to the last token.
    """

    first: float
    encode: float
    prefill: float
    step: float
    total: float

    @property
    def rest(self) -> float:
        """What is neither: the choice before the LLM, cutting the prompt, logits, ``generate`` itself."""
        return self.first - self.encode - self.prefill


class _Stamps(BaseStreamer):  # type: ignore[no-untyped-call,unused-ignore]
    """Keeps the time at which each token came; the prompt is the first thing it is shown."""

    def __init__(self, now: Clock) -> None:
        self._now = now
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.at.append(self._now())

    def end(self) -> None:
        """Nothing is held back."""


def clock(device: torch.device) -> Clock:
    """Return a clock in milliseconds that waits for the device before it is read."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() * 1e3

    return now


def exactly(output: int) -> dict[str, Any]:
    """Return the arguments that make ``generate`` write so many tokens, the likeliest ones."""
    return {"max_new_tokens": output, "min_new_tokens": output, "do_sample": False}


@torch.no_grad()
def timed(model: Any, family: Family, inputs: Mapping[str, Any], output: int) -> Call:
    """Generate exactly ``output`` tokens and tell where the time went; a method may be on the model."""
    now = clock(model.device)
    stamps, spans = _Stamps(now), dict[str, list[float]]()
    encoder = watched_calls(family.base(model), "get_image_features", spans.setdefault("encode", []), now)
    decoder = watched_calls(family.decoder(model), "forward", spans.setdefault("prefill", []), now)
    with encoder, decoder:
        begin = now()
        model.generate(**inputs, **exactly(output), streamer=stamps)
    steps = [after - before for before, after in pairwise(stamps.at[1:])]
    return Call(
        first=stamps.at[1] - begin,
        encode=math.fsum(spans["encode"]),
        prefill=spans["prefill"][0],
        step=statistics.median(steps) if steps else 0.0,
        total=stamps.at[-1] - begin,
    )


@contextmanager
def watched_calls(module: Any, name: str, spans: list[float], now: Clock) -> Iterator[None]:
    """Time every call of one method of one module, over whatever is wrapped around it already."""
    original, own = getattr(module, name), name in module.__dict__

    @functools.wraps(original)  # generate reads the signature
    def watched(*args: Any, **kwargs: Any) -> Any:
        begin = now()
        output = original(*args, **kwargs)
        spans.append(now() - begin)
        return output

    setattr(module, name, watched)
    try:
        yield
    finally:
        if own:
            setattr(module, name, original)
        else:
            delattr(module, name)


@torch.no_grad()
def peak(model: Any, work: Callable[[], object]) -> int:
    """Return the most bytes that the tensors made by ``work`` take at once, above what was there before."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return int(torch.cuda.max_memory_allocated(device) - before)
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when a profiler is first made; it talks to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events: Any = seen.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
