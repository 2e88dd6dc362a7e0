"""One model, asked by one thread: with all tokens, and by two methods that each remember what the encoder made."""

from __future__ import annotations

import copy
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from foveate import registry
from foveate.core import Method
from foveate.engines.base import Handle, compress
from foveate.errors import FoveateError, UnsupportedCall
from foveate.families import family_of
from foveate.lab import chat
from foveate.lab.advice.timing import watched_calls
from foveate.report import Report
from foveate.studio.errors import StudioError, told

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What one way of answering said and did; times in milliseconds, `prefill` is what is left to the first token.

    Args:
        text: The answer.
        report: What the method did; None where all tokens were read.
        encode: The vision encoder, when it ran for this picture; None where it was not seen.
        reused: Whether what the encoder made earlier was read again, so that its time was not spent.
        select: The method's choice.
        prefill: The decoder over the prompt.
        decode: The tokens after the first.
    """

    text: str
    report: Report | None
    encode: float | None
    reused: bool
    select: float
    prefill: float
    decode: float

    @property
    def first_token(self) -> float:
        """Time to the first token, as it was spent."""
        return (0.0 if self.reused or self.encode is None else self.encode) + self.select + self.prefill

    @property
    def total(self) -> float:
        """Time to the last token, as it was spent."""
        return self.first_token + self.decode


class Session:
    """A model to be asked about pictures, one question at a time, from any thread.

    Args:
        model: A vision-language model of transformers; it is only read.
        processor: Its processor.
        limit: Longest answer, in tokens.

    Raises:
        UnsupportedModel: If no family serves the model.
    """

    def __init__(self, model: Any, processor: Any, limit: int = 32) -> None:
        self._plain, self._processor, self._limit = _Plain(model), processor, limit
        self._arms = {place: _Arm(model) for place in ("a", "b")}
        self._stopping = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="foveate-model")  # reselect() holds for one thread

    def close(self) -> None:
        """Give up what is being said, and end the thread."""
        self._stopping.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        for arm in self._arms.values():
            arm.detach()

    def warm_up(self, picture: Image.Image, question: str) -> None:
        """Answer once for nothing, so that the first answer that somebody times is not the first of all."""
        self.plain(picture, question)

    def methods(self) -> list[str]:
        """Return the names of the methods that take a budget and can run on this model."""
        return self._run(lambda: [name for name in sorted(registry.names()) if self._arms["a"].takes(name)])

    def tokens(self, picture: Image.Image) -> int | None:
        """Return the visual tokens of a picture; None where prompts do not show it."""
        try:
            inputs = self._run(lambda: self._inputs(picture, "?"))
            (count,) = chat.visual_tokens(self._plain.model, inputs)
        except UnsupportedCall:
            return None
        return count

    def plain(self, picture: Image.Image, question: str) -> Answer:
        """Answer with all visual tokens.

        Raises:
            FoveateError: If there is no answer.
        """
        return self._run(lambda: self._plain.ask(self._inputs(picture, question), self._say))

    def answer(self, place: str, spec: str, picture: Image.Image, question: str) -> Answer:
        """Answer by a method; the encoder runs only where this place has not asked a like method about the picture.

        Args:
            place: ``a`` or ``b``.
            spec: The method and its budget.
            picture: What is asked about.
            question: What is asked.

        Raises:
            FoveateError: If there is no answer.
        """
        method = built(spec)
        arm = self._arms[place]
        return self._run(lambda: arm.ask(method, _digest(picture), self._inputs(picture, question), self._say))

    def _run(self, work: Callable[[], T]) -> T:
        def guarded() -> T:
            with told():
                if self._stopping.is_set():
                    raise StudioError("the studio is closing", "start it again: foveate studio")
                return work()

        try:
            asked = self._thread.submit(guarded)
        except RuntimeError as error:  # the thread has ended
            raise StudioError("the studio is closed", "start it again: foveate studio") from error
        return asked.result()

    def _inputs(self, picture: Image.Image, question: str) -> Any:
        if not question.strip():
            raise StudioError("there is no question", "type one, or choose one of those below the picture")
        return chat.prepare(self._plain.model, self._processor, [[picture]], [question.strip()])

    def _say(self, model: Any, inputs: Any) -> tuple[str, float, float]:
        """Return an answer, and the times to its first and its last token."""
        now, first = _clock(model.device), list[float]()

        def stamp(_: Any, scores: Any) -> Any:
            first.append(now() if not first else 0.0)
            return scores

        def stopping(ids: Any, _: Any) -> Any:
            return torch.full((len(ids),), self._stopping.is_set(), device=ids.device)

        begin = now()
        output = model.generate(
            **inputs,
            max_new_tokens=self._limit,
            do_sample=False,
            logits_processor=LogitsProcessorList([stamp]),
            stopping_criteria=StoppingCriteriaList([stopping]),
        )
        end = now()
        (text,) = chat.answers(self._processor, inputs, output)
        return text, first[0] - begin, end - begin


class _Plain:
    """The model as it is."""

    def __init__(self, model: Any) -> None:
        self.model, self._family = model, family_of(model)

    def ask(self, inputs: Any, say: Callable[[Any, Any], tuple[str, float, float]]) -> Answer:
        with self._encoding() as spent:
            text, first, total = say(self.model, inputs)
        encode = sum(spent) if spent else None
        return Answer(text, None, encode, False, 0.0, first - (encode or 0.0), total - first)

    @contextmanager
    def _encoding(self) -> Iterator[list[float]]:
        """Time the encoder and projector, where the model has one function for both."""
        base: Any = self._family.base(self.model)
        spent, now = list[float](), _clock(self.model.device)
        if not hasattr(base, "get_image_features"):
            yield spent
            return
        with watched_calls(base, "get_image_features", spent, now):
            yield spent


class _Arm:
    """A method on a model of its own with everybody's weights, and what the encoder made there last."""

    def __init__(self, model: Any) -> None:
        self.model = twin(model)
        self._handle: Handle | None = None
        self._picture, self._encode = "", 0.0

    def takes(self, name: str) -> bool:
        """Whether a method takes a budget, and this model the method."""
        try:
            with compress(self.model, f"{name}:keep=64"):
                return True
        except FoveateError:
            return False

    def ask(
        self, method: Method, picture: str, inputs: Any, say: Callable[[Any, Any], tuple[str, float, float]]
    ) -> Answer:
        handle, reused = self._attached(method, picture)
        text, first, total = say(self.model, inputs)
        report = handle.report
        if not reused:
            self._picture, self._encode = picture, report.encode_ms or 0.0
        select, spent = report.select_ms or 0.0, report.encode_ms or 0.0
        return Answer(text, report, self._encode, reused, select, first - spent - select, total - first)

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._picture = None, ""

    def _attached(self, method: Method, picture: str) -> tuple[Handle, bool]:
        if self._handle is not None and picture == self._picture:
            try:
                self._handle.reselect(method)
                return self._handle, True
            except UnsupportedCall:  # a method that reads something else of the encoder
                pass
        self.detach()
        self._handle = compress(self.model, method)
        return self._handle, False


def twin(model: Any) -> Any:
    """Return a model of its own that shares every weight and buffer with another.

    Example:
        >>> linear = torch.nn.Linear(2, 2)
        >>> twin(linear) is linear, twin(linear).weight is linear.weight
        (False, True)
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def written(method: str, keep: int) -> str:
    """Return the spec of a method at a budget; one that says what it keeps stays as it is.

    Example:
        >>> written("evocut", 64), written("v2drop:metric=l1", 64), written("todre:keep=0.1 + fastv", 64)
        ('evocut:keep=64', 'v2drop:metric=l1,keep=64', 'todre:keep=0.1 + fastv')
    """
    method = method.strip()
    if "+" in method or "keep=" in method or "stages=" in method:
        return method
    return f"{method}{',' if ':' in method else ':'}keep={keep}"


def built(spec: str) -> Method:
    """Return the method of a spec.

    Raises:
        FoveateError: If there is no such method or budget.
    """
    try:
        return registry.from_spec(spec)
    except FoveateError:
        raise
    except (TypeError, ValueError) as error:  # an option of the wrong kind, met by the method's own checks
        hint = "options are numbers or words: evocut, v2drop:metric=l1, v2drop:stages=3@0.5/17@0.3/22@0"
        raise StudioError(f"cannot read the method {spec!r}: {str(error).splitlines()[0]}", hint) from error


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _clock(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * time.perf_counter()

    return now
