"""Times the stages of a call from outside: hooks of torch, and the registry of attention functions of transformers.

Every arm is watched alike, so that what watching costs is in all of them.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.families import Family

T = TypeVar("T")


def clock(device: torch.device) -> Callable[[], float]:
    """Return a clock in milliseconds; it is read when the device has done what it was asked."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() * 1e3

    return now


class Stamps(BaseStreamer):  # type: ignore[no-untyped-call,unused-ignore]
    """A streamer that keeps the time at which each token came; the prompt is the first thing it is shown."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.tokens: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.wall.append(self._now())
        self.cpu.append(time.process_time() * 1e3)
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        """Nothing is held back."""


class Watch:
    """Where the time of one call went, in milliseconds.

    Attributes:
        encode: The encoder and the projector, with what a method reads from them; None where it was not seen.
        prefill: The first pass of the decoder, with what a method does between its layers.
        fold: What a method does as the layers of the encoder end.
        tap: What a method does with queries and keys before an attention kernel runs, in encoder and decoder.
        reads: Decoder layers to whose attention a method listens.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self._model, self._family, self._now = model, family, clock(model.device)
        self.encode: float | None = None
        self.prefill: float | None = None
        self.fold = self.tap = 0.0
        self.reads: tuple[int, ...] = ()

    @contextmanager
    def over(self, attach: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """Attach a method (or nothing), and watch what is called then."""
        layers, ended = self._family.encoder_layers(self._model, "image"), list[float]()
        with ExitStack() as stack:
            for layer in layers:
                hook = layer.register_forward_hook(lambda *_: ended.append(self._now()))
                stack.callback(hook.remove)
            attached = self._listening(attach, stack)
            for layer in layers:
                stack.callback(layer.register_forward_hook(lambda *_: self._folded(ended.pop())).remove)
            stack.enter_context(self._encoding())
            decoder = self._family.decoder(self._model)
            begun: list[float] = []
            stack.callback(decoder.register_forward_pre_hook(lambda *_: begun.append(self._now())).remove)
            stack.callback(decoder.register_forward_hook(lambda *_: self._passed(begun[0])).remove)
            yield attached

    def _folded(self, ended: float) -> None:
        self.fold += self._now() - ended

    def _passed(self, begun: float) -> None:
        self.prefill = self._now() - begun if self.prefill is None else self.prefill

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        base: Any = self._family.base(self._model)
        if not hasattr(base, "get_image_features"):
            yield
            return
        original = base.get_image_features

        @functools.wraps(original)  # generate reads the signature
        def watched(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            output = original(*args, **kwargs)
            self.encode = (self.encode or 0.0) + self._now() - begin
            return output

        base.get_image_features = watched
        try:
            yield
        finally:
            del base.get_image_features

    def _listening(self, attach: Callable[[], AbstractContextManager[T]], stack: ExitStack) -> T:
        """Attach; where an attention module then has a function of its own, time it until its kernel begins.

        Such a function takes the kernel from transformers' registry when it is made, so that is where ours is put
        meanwhile; afterwards the function itself is wrapped. Both are overrides of the registry, not entries.
        """
        before = {module: module.config for module in self._model.modules() if "config" in vars(module)}
        entered: list[tuple[float, nn.Module]] = []

        def kernel(name: str) -> Callable[..., Any]:
            outer = ALL_ATTENTION_FUNCTIONS.get(name)

            def begin(*args: Any, **kwargs: Any) -> Any:
                start, module = entered.pop()
                self.tap += self._now() - start
                run = outer or sys.modules[type(module).__module__].eager_attention_forward
                return run(*args, **kwargs)

            return begin

        def enter(function: Callable[..., Any]) -> Callable[..., Any]:
            def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                entered.append((self._now(), module))
                return function(module, *args, **kwargs)

            return attention

        with ExitStack() as meanwhile:
            for name in {config._attn_implementation for config in before.values()}:
                meanwhile.enter_context(_override(name, kernel(name)))
            attached = stack.enter_context(attach())
        for module, config in before.items():
            if module.config is not config:
                name = module.config._attn_implementation
                stack.enter_context(_override(name, enter(ALL_ATTENTION_FUNCTIONS[name])))
        decoder = self._family.layers(self._model)
        self.reads = tuple(
            index
            for index, layer in enumerate(decoder)
            if any(module.config is not before[module] for module in layer.modules() if module in before)
        )
        return attached


@contextmanager
def _override(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let transformers find another attention function under a name."""
    ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
