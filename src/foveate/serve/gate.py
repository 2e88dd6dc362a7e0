"""The way in: how many questions are inside, how large they are and how slowly they come, before anything is parsed."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import h11
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from foveate.serve.limits import MIB, Limits
from foveate.serve.metrics import Metrics
from foveate.serve.refusals import Refused
from foveate.serve.worker import Worker


def response(refused: Refused) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(refused.body(), status_code=refused.status, headers=refused.headers)


class Gate:
    """Lets questions in one by one, each read whole under its limits; all other requests pass."""

    def __init__(self, app: ASGIApp, *, path: str, limits: Limits, worker: Worker, metrics: Metrics) -> None:
        self._app, self._path, self._limits = app, path, limits
        self._worker, self._metrics = worker, metrics
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        outward = self._counted(send)
        try:
            self._enter()
        except Refused as refused:
            await response(refused)(scope, receive, outward)
            return
        try:
            body = await self._read(scope, receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), outward)
        except Refused as refused:
            await response(refused)(scope, receive, outward)
        except _Stuck:
            pass  # nobody reads the answer: the connection is closed
        finally:
            self._inside -= 1
            self._metrics.inside.set(self._inside)
            self._metrics.seconds.observe(time.monotonic() - begin)

    def _enter(self) -> None:
        if self._inside >= self._limits.queue:
            seconds = min(60, max(1, math.ceil(self._inside * self._worker.pace)))
            raise Refused(
                f"{self._inside} questions are being answered or wait, and there is room for no more",
                f"ask again in {seconds} seconds",
                status=429,
                code="queue_full",
                retry_after=seconds,
            )
        self._inside += 1
        self._metrics.inside.set(self._inside)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, or None if the client went away; what is too large is not kept."""
        if int(dict(scope["headers"]).get(b"content-length", 0)) > self._limits.max_body:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._limits.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise Refused(
                f"the request did not arrive within {self._limits.body_seconds:g} seconds",
                "send it faster, or smaller pictures",
                status=408,
                code="timeout",
            ) from error

    def _too_large(self) -> Refused:
        return Refused(
            f"the request is larger than {self._limits.max_body / MIB:g} MiB",
            "send smaller pictures; the server's owner may raise --max-body-mib",
            status=413,
            code="too_large",
        )

    def _counted(self, send: Send) -> Send:
        """Count the response by its status, and do not wait for ever for a client that does not read it."""

        async def outward(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(str(message["status"])).inc()
            try:
                async with asyncio.timeout(self._limits.send_seconds):
                    await send(message)
            except TimeoutError as error:
                raise _Stuck from error

        return outward


class _Stuck(Exception):
    """A client takes nothing of its answer."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then what the connection tells: that the client has gone."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return whole.pop() if whole else await receive()

    return again


class Door(H11Protocol):
    """uvicorn's own protocol, with a time limit where it has none: a head, or what is left of a refused body, drips in.

    uvicorn reads on what belongs to a request that is answered already, so that the client gets to see the answer.
    """

    seconds = Limits.head_seconds
    _timer: asyncio.TimerHandle | None = None
    _awaited: Any = None

    def connection_made(self, transport: Any) -> None:
        """Expect a head."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Expect more while a head or a refused body is not whole; the time does not begin anew with each byte."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._await(None)
        super().connection_lost(exc)

    def _watch(self) -> None:
        theirs = self.conn.their_state
        refused = theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE
        self._await(theirs if theirs is h11.IDLE or refused else None)

    def _await(self, state: Any) -> None:
        if state is not self._awaited:
            if self._timer is not None:
                self._timer.cancel()
            self._awaited = state
            self._timer = None if state is None else self.loop.call_later(self.seconds, self._late)

    def _late(self) -> None:
        if not self.transport.is_closing():
            if self._awaited is h11.IDLE and self.conn.trailing_data[0]:
                self.transport.write(_LATE)
            self.transport.close()


def _late() -> bytes:
    refused = Refused("the head of the request did not arrive in time", "send it at once", status=408, code="timeout")
    body = bytes(response(refused).body)
    head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


_LATE = _late()
