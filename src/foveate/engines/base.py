"""`compress` and `Handle`: choose the engine parts a method calls for, refuse early, attach, take off."""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from types import TracebackType
from typing import Any

import torch

from foveate import registry
from foveate.core import DECODER_EVIDENCE, Method
from foveate.engines.cross import CrossPart
from foveate.engines.cut import guard_gaps
from foveate.engines.decoder import DecoderPart
from foveate.engines.prompt import PromptPart
from foveate.engines.state import Attachment, Clock, Frame, Frames, attending
from foveate.errors import UnsupportedCall, UnsupportedMethod
from foveate.families import CrossFamily, Family, family_of
from foveate.families.base import BEFORE_THE_LLM
from foveate.report import Report

_MARK = "_foveate_handle"


class Handle:
    """A method attached to a model. Take it off with ``remove()``, or use it in a ``with`` statement."""

    def __init__(self, model: Any, method: Method, family: Family) -> None:
        self.model, self.family = model, family
        self._attachment, self._frames = Attachment(), Frames()
        self._last: Frame | None = None
        self._calls = 0
        self._attach(method)

    def _attach(self, method: Method) -> None:
        model, family, self.method = self.model, self.family, method
        layers = family.layers(model)
        prompt, inner = _split(method, family, model)
        if inner and isinstance(family, CrossFamily):
            raise UnsupportedMethod(
                f"`{inner[0].name}` drops between decoder layers, where {family.name} has no visual tokens: its text "
                "looks across at them",
                BEFORE_THE_LLM,
            )
        self.positions = positions = _positions(method, prompt, family)
        _check_evidence(prompt, inner, family, model)
        if inner:
            family.check_layers(model)
        try:
            if inner:
                DecoderPart(model, family, inner, self._frames, self._attachment)
            if prompt and positions == "original" and not isinstance(family, CrossFamily):
                guard_gaps(family.base(model), family.decoder(model), layers, self._attachment)
            self._time_prefill(family.decoder(model))
            shared = (self._frames, self._finished, self._attachment)
            if isinstance(family, CrossFamily):
                self._prompt: PromptPart = CrossPart(model, family, prompt, *shared)
            else:
                sites = frozenset(site for part in inner for site in part.sites(len(layers)))
                self._prompt = PromptPart(model, family, prompt, sites, positions, *shared)
            model.__dict__[_MARK] = self
            self._attachment.add(lambda: model.__dict__.pop(_MARK))
        except BaseException:
            self._attachment.remove()
            raise

    @property
    def report(self) -> Report:
        """What the last call with pictures did; reading it waits for the device."""
        layers = self.family.reading_layers(self.model)
        spec = registry.to_spec(self.method)
        if self._last is None:
            return Report(method=spec, model=type(self.model).__name__, layers=layers)
        return self._last.report(spec, self.model, layers, self._calls)

    @property
    def frame(self) -> Frame | None:
        """The last call with pictures, with everything still on the device; for `verify` and for research."""
        return self._last

    def reselect(self, method: Method | str | None = None) -> None:
        """Let the next call of this thread select anew from the pictures of the last one, without encoding them again.

        For a new question about the same pictures: it brings them again, in a new prompt with a new cache. Its report
        has no ``encode_ms``. The handle keeps what the encoder made, and the pictures themselves, until the next ones.

        Args:
            method: Another method from now on, in every thread: the same one with another budget, or any that reads
                nothing of the encoder but what this one reads at the same place.

        Raises:
            UnsupportedCall: If this thread has read no picture yet, or the encoder has not shown what the other method
                reads (the handle stays as it was); the next call, if its pictures are not the same.
        """
        last = self._prompt.encoder.last
        if method is not None:
            former, built = self.method, registry.from_spec(method)
            self._attachment.remove()
            try:
                self._attach(built)
                self._prompt.encoder.check(last)
            except BaseException:
                self._attachment.remove()
                self._attach(former)
                self._prompt.encoder.adopt(last)
                raise
        self._prompt.encoder.adopt(last, again=True)

    def remove(self) -> None:
        """Leave the model as it was; a second time does nothing. The report stays."""
        self._attachment.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<foveate.Handle {registry.to_spec(self.method)!r} on {type(self.model).__name__}>"

    def _finished(self, frame: Frame) -> None:
        self._last = frame
        self._calls += 1

    def _time_prefill(self, decoder: Any) -> None:
        """Time the first pass of the decoder over each prompt."""
        original = decoder.forward

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            frame = self._frames.top
            clock: Clock | None = None if frame is None or frame.clock.ran("prefill") else frame.clock
            if torch.compiler.is_compiling():  # no clock in a graph
                return original(*args, **kwargs)
            with attending(), nullcontext() if clock is None else clock.section("prefill"):
                return original(*args, **kwargs)

        self._attachment.wrap(decoder, "forward", forward)


def compress(model: Any, method: Method | str) -> Handle:
    """Let a model read with a fraction of its visual tokens, until the handle is removed.

    Args:
        model: A vision-language model of transformers, with its head (``...ForConditionalGeneration``).
        method: A method, or its spec: ``"evocut:keep=64"``.

    Returns:
        The handle: a context manager with ``.report`` and ``.remove()``.

    Raises:
        UnknownMethod, BudgetError: If the spec is wrong.
        UnsupportedModel: If no family serves the model.
        UnsupportedMethod: If the method cannot run on this model.
        UnsupportedCall: If the model is compressed already.

    Example:
        >>> import foveate, foveate.demo
        >>> model, processor = foveate.demo.load()
        >>> with foveate.compress(model, "evocut:keep=64") as handle:
        ...     print(handle)
        <foveate.Handle 'evocut:keep=64' on LlavaForConditionalGeneration>
    """
    built = registry.from_spec(method)
    family = family_of(model)
    if _MARK in model.__dict__:
        raise UnsupportedCall(
            f"this model is compressed already: {model.__dict__[_MARK]!r}",
            "call `.remove()` on that handle, or combine methods with foveate.Chain(first, second)",
        )
    return Handle(model, built, family)


def _split(method: Method, family: Family, model: Any) -> tuple[list[Method], list[Method]]:
    """Return the parts that act before the LLM and those that act inside it."""
    n_layers, first = len(family.layers(model)), family.first_site(model)
    prompt, inner = [], []
    for part in method.parts:
        sites = part.sites(n_layers)
        if sites == (0,) and part.scope == "prompt":
            raise UnsupportedMethod(
                f"`{part.name}` judges a prompt's images together, which is possible inside the LLM only",
                'set scope = "image": before the LLM every image is judged alone',
            )
        if sites == (0,):
            prompt.append(part)
        elif sites and min(sites) >= first and max(sites) < n_layers:
            inner.append(part)
        else:
            hint = "make it a chain of parts, one for site 0 and one for the layers"
            if sites and 1 <= min(sites) < first:
                hint = f"{family.name} needs all tokens before layer {first}: v2drop:stages={first}@0.5 is the earliest"
            allowed = f"allowed are 0 alone, or layers {first}..{n_layers - 1} of this model"
            raise UnsupportedMethod(f"`{part.name}` acts at sites {sites}; {allowed}", hint)
    return prompt, inner


def _positions(method: Method, prompt: list[Method], family: Family) -> str:
    """Return the one position policy of the parts that act before the LLM: the paper's, where the family allows it."""
    wanted = set()
    for part in prompt:
        chosen = part.positions if method.positions == "paper" else method.positions
        paper = part.paper_positions if part.paper_positions in family.positions else family.positions[0]
        wanted.add(paper if chosen == "paper" else chosen)
    if len(wanted) > 1:
        raise UnsupportedMethod(
            f"the parts of `{registry.to_spec(method)}` want different positions: {', '.join(sorted(wanted))}",
            'give each the same: positions="original" or positions="packed"',
        )
    policy = wanted.pop() if wanted else "original"
    if policy not in family.positions:
        raise UnsupportedMethod(
            f"{family.name} knows only {', '.join(family.positions)} positions, got {policy!r}",
            f'choose positions="{family.positions[0]}"',
        )
    inner = [part for part in method.parts if part not in prompt and part.positions == "packed"]
    if inner:
        raise UnsupportedMethod(
            f"`{inner[0].name}` drops inside the LLM, where keys already carry their original positions",
            'choose positions="original"',
        )
    return policy


def _check_evidence(prompt: list[Method], inner: list[Method], family: Family, model: Any) -> None:
    """Refuse what is not there to be captured: what the decoder shows exists inside it only, all else before it."""
    provided = family.provides(model)
    before, inside = provided - DECODER_EVIDENCE, provided & (DECODER_EVIDENCE | {"coordinates", "text"})
    for part in [*prompt, *inner]:
        missing = part.needs - (before if part in prompt else inside)
        if missing:
            raise UnsupportedMethod(
                f"`{part.name}` needs {', '.join(sorted(missing))}, which {family.name} with a "
                f"{family.tower_type(model)} tower does not provide {'before' if part in prompt else 'inside'} the LLM",
                "type `foveate methods` to see what each method needs",
            )
