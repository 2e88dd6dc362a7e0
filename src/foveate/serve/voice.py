"""From tokens to text while a model speaks: whole characters only, and nothing that may be part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

_HALF = "\N{REPLACEMENT CHARACTER}"


class Stops:
    """Text passes through, up to the first stop string.

    Example:
        >>> stops = Stops(("END",))
        >>> [stops.push(piece) for piece in ("one E", "ven", " EN", "D two")], stops.met
        (['one ', 'Even', ' ', ''], True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.met = False

    def push(self, piece: str) -> str:
        """Return what may be said now."""
        if self.met:
            return ""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.met, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """Return what was held back for a stop string that did not come."""
        rest, self._held = self._held, ""
        return rest


class Voice(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Sees each new token of one answer, says the text of it, and tells ``generate`` when to stop.

    As a streamer would, but a stopping criterion sees a token before the next one is made, whatever the device.

    Args:
        tokenizer: What decodes.
        ends: Ids that end an answer.
        stops: Strings that end it, and that are not said.
        say: Takes each new piece of text.
        given_up: Whether nobody listens any more.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Sequence[int],
        stops: Sequence[str],
        say: Callable[[str], None],
        given_up: Callable[[], bool],
    ) -> None:
        self._tokenizer, self._ends, self._say, self._given_up = tokenizer, frozenset(ends), say, given_up
        self._stops = Stops(stops)
        self._ids: list[int] = []
        self._from, self._until = 0, 0  # ids that are decoded again for their context, and up to where they were said
        self._silent = True
        self.tokens = 0
        self.ended = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Take the newest token; return whether it was the last."""
        if not self.ended:
            self._hear(int(input_ids[0, -1]))
        return torch.tensor([self.ended or self._given_up()], device=input_ids.device)

    def _hear(self, token: int) -> None:
        self.tokens += 1
        if token in self._ends:
            self.ended = True
            return
        self._ids.append(token)
        text, known = self._decoded()
        if len(text) > len(known) and not text.endswith(_HALF):
            self._from, self._until = self._until, len(self._ids)
            self._pass(self._stops.push(text[len(known) :]))
            self.ended = self._stops.met

    def finish(self) -> None:
        """Say what was held back."""
        if not self._stops.met:
            text, known = self._decoded()
            self._pass(self._stops.push(text[len(known) :]))
            self.ended = self.ended or self._stops.met
            self._pass(self._stops.rest())

    def _decoded(self) -> tuple[str, str]:
        """Return the text of the last few tokens, and the part of it that was said."""

        def decode(ids: list[int]) -> str:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))

        return decode(self._ids[self._from :]), decode(self._ids[self._from : self._until])

    def _pass(self, piece: str) -> None:
        piece = piece.lstrip() if self._silent else piece  # templates leave a space after "ASSISTANT:"
        if piece:
            self._silent = False
            self._say(piece)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
