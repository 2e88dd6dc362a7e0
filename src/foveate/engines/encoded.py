"""The encoder runs once in a call, and not at all where the last call's pictures are to be selected from again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from foveate.core import ENCODER_EVIDENCE, Method
from foveate.engines.capture import EncoderCapture, Record
from foveate.engines.state import Attachment, Clock, Frames
from foveate.errors import UnsupportedCall
from foveate.families import Family

#: What of a method says what it reads of the encoder: its kind, and its options but the budget.
Reader = tuple[type[Method], dict[str, Any]]


@dataclass(frozen=True)
class Encoded:
    """What the encoder made of the pictures of one call.

    Args:
        given: What it was given, by the names of the call's arguments, and which version of each tensor.
        outputs: What it gave, by modality.
        records: What it showed on the way.
        shown: For which method that was, by its place.
    """

    given: Mapping[str, tuple[Any, int | None]]
    outputs: Mapping[str, Any]
    records: Mapping[str, Record]
    shown: Mapping[int, Reader]

    def of(self, arguments: Mapping[str, Any], names: Sequence[str]) -> bool:
        """Whether a call brings the same pictures."""
        both = dict.fromkeys((*self.given, *(name for name in names if arguments.get(name) is not None)))
        return all(_same(arguments.get(name), *self.given.get(name, (None, None))) for name in both)


class Encoder:
    """Runs the vision encoder, and keeps what it made for the last call of each thread."""

    def __init__(
        self, model: Any, family: Family, methods: Sequence[Method], frames: Frames, attachment: Attachment
    ) -> None:
        self._model, self._family, self._frames = model, family, frames
        self._capture = EncoderCapture(model, family, methods, attachment)
        self._readers = {
            place: _reader(method) for place, method in enumerate(methods) if method.needs & ENCODER_EVIDENCE
        }
        self._local = threading.local()
        attachment.add(self._forget)

    @property
    def last(self) -> Encoded:
        """What the encoder made for the last call of this thread.

        Raises:
            UnsupportedCall: If there is none.
        """
        last: Encoded | None = getattr(self._local, "last", None)
        if last is None:
            raise UnsupportedCall(
                "there is nothing to select from again: no picture was read in this thread",
                "ask the first question without handle.reselect()",
            )
        return last

    def check(self, last: Encoded) -> None:
        """Refuse what the encoder made for other methods, where it does not show what those here read."""
        strange = [
            kind.name for place, (kind, options) in self._readers.items() if last.shown.get(place) != (kind, options)
        ]
        if strange:
            raise UnsupportedCall(
                f"`{strange[0]}` reads of the encoder what the last call did not record",
                "reselect the same method with another budget, or compress anew and encode again",
            )

    def adopt(self, last: Encoded, *, again: bool = False) -> None:
        """Hold this as what the encoder made last; ``again``: let the next call of this thread select from it."""
        self._local.last, self._local.again = last, again

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Refuse a call that leaves `reselect` unheeded; it holds for one call, whatever becomes of it."""
        try:
            yield
            if getattr(self._local, "again", False):
                raise UnsupportedCall(
                    "after handle.reselect() comes a call that reads no picture anew",
                    "pass the same pictures with the new prompt, and start a new cache",
                )
        finally:
            self._local.again = False

    def run(
        self, arguments: Mapping[str, Any], media: Sequence[str], clock: Clock
    ) -> tuple[dict[str, Any], dict[str, Record], set[str]]:
        """Return by modality what the encoder gave and what it showed, and the names of the arguments it took."""
        names = list(self._family.media_arguments.values())
        if getattr(self._local, "again", False):
            self._local.again, last = False, self._local.last
            if not last.of(arguments, names):
                raise UnsupportedCall(
                    "after handle.reselect() comes a call with other pictures than the last one",
                    "pass the same pictures, or leave out handle.reselect() for new ones",
                )
        else:
            self._local.last = None  # before the next are encoded
            self._local.last = last = self._encode(arguments, media, clock)
        return dict(last.outputs), dict(last.records), set(last.given)

    def _encode(self, arguments: Mapping[str, Any], media: Sequence[str], clock: Clock) -> Encoded:
        outputs, records, taken = {}, {}, set[str]()
        for modality in media:
            recording = self._capture.recording(modality, arguments)
            with recording as record, self._frames.entered(None), clock.section("encode"):
                outputs[modality], used = self._family.encode(self._model, modality, arguments)
            record.arguments = {}  # they hold the cache
            records[modality], taken = record, taken | used
        given = {name: (arguments[name], _version(arguments[name])) for name in sorted(taken)}
        return Encoded(given, outputs, records, self._readers)

    def _forget(self) -> None:
        self._local = threading.local()


def _reader(method: Method) -> Reader:
    options = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "keep"}
    return type(method), options


def _version(value: Any) -> int | None:
    """How often a tensor was changed in place, where that is counted."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _same(new: Any, old: Any, version: int | None) -> bool:
    if new is old:
        return _version(new) == version
    if isinstance(new, list | tuple) and isinstance(old, list | tuple):
        return len(new) == len(old) and all(_same(n, o, _version(o)) for n, o in zip(new, old, strict=True))
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        alike = new.shape == old.shape and new.device == old.device and _version(old) == version
        return alike and torch.equal(new, old)
    return not isinstance(new, Tensor) and not isinstance(old, Tensor) and bool(new == old)
