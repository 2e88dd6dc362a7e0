"""The one thread that owns the model. Questions wait for it in line; what it says goes back to the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from queue import SimpleQueue

import torch

from foveate.errors import FoveateError
from foveate.serve.reader import Question, Reader, Said
from foveate.serve.refusals import Refused

Event = str | Said | FoveateError

_LOG = logging.getLogger(__name__)


class Job:
    """A question on its way through the line; made and read in the event loop."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._given_up = threading.Event()

    def tell(self, event: Event) -> None:
        """Send a piece of the answer, or its end, from another thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def give_up(self) -> None:
        """Let the model stop at its next token, or never begin."""
        self._given_up.set()

    def given_up(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._given_up.is_set()

    async def next(self) -> str | Said:
        """Return the next piece of the answer, at last how it ended.

        Raises:
            FoveateError: If there is no answer.
        """
        event = await self._events.get()
        if isinstance(event, FoveateError):
            raise event
        return event

    async def pieces(self, first: str | Said) -> AsyncIterator[str | Said]:
        """Yield the pieces of the answer from one that was read already, and how it ended."""
        event = first
        while isinstance(event, str):
            yield event
            event = await self.next()
        yield event


class Worker:
    """Answers questions one after another."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._line: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="foveate-model", daemon=True)
        self._stopping = threading.Event()
        self.pace = 1.0
        """Seconds per answer, the last ones most."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Give up what waits and what is being said, and end the thread."""
        self._stopping.set()
        self._line.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether questions are answered."""
        return self._thread.is_alive() and not self._stopping.is_set()

    @property
    def waiting(self) -> int:
        """Questions in line, without the one that is being answered."""
        return self._line.qsize()

    def ask(self, question: Question) -> Job:
        """Put a question at the end of the line."""
        job = Job(question)
        self._line.put(job)
        return job

    def _run(self) -> None:
        for job in iter(self._line.get, None):
            if self._stopping.is_set():
                job.tell(Refused("the server is stopping", "ask again in a minute", status=503, code="stopping"))
            elif not job.given_up():
                begin = time.monotonic()
                job.tell(self._answer(job))
                self.pace += 0.1 * (time.monotonic() - begin - self.pace)

    def _answer(self, job: Job) -> Said | FoveateError:
        try:
            return self._reader.answer(job.question, job.tell, lambda: job.given_up() or self._stopping.is_set())
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return Refused(
                "the device has too little memory for this request",
                "send fewer or smaller pictures, or a smaller budget",
                status=503,
                code="out_of_memory",
            )
        except Exception as error:
            told = Refused.of(error)
            if told.status >= 500:
                _LOG.exception("an answer failed")
            return told
