"""Clients of a server under load: those that ask well, and five kinds that do not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

CHAT = "/v1/chat/completions"
_DRIP = 0.25
_PIECE = 2**20


@dataclass(frozen=True)
class Asked:
    """A question as a client asks it: a picture's data URL, what is asked about it, and the method."""

    picture: str
    question: str
    method: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The question in OpenAI's form."""
        image = {"type": "image_url", "image_url": {"url": self.picture}}
        return [{"role": "user", "content": [image, {"type": "text", "text": self.question}]}]


@dataclass(frozen=True)
class Outcome:
    """What a client got: a status (0 = none), an answer or an error's message, and when, in seconds."""

    kind: str
    status: int
    text: str
    seconds: float
    first: float
    per_layer: float = 0.0


async def ask(client: Any, asked: Asked, *, stream: bool, kind: str = "good") -> Outcome:
    """Ask through OpenAI's own client; one token after another, or all at once."""
    import openai

    begin, first, text = time.perf_counter(), 0.0, ""
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    try:
        answer = await client.chat.completions.create(
            model="demo",
            messages=asked.messages,
            temperature=0,
            extra_body={"foveate": {"method": asked.method}},
            **options,
        )
        if stream:
            async for chunk in answer:
                piece = chunk.choices[0].delta.content if chunk.choices else None
                first = first or (time.perf_counter() - begin if piece else 0.0)
                text, usage = text + (piece or ""), chunk.usage
        else:
            text, usage = answer.choices[0].message.content, answer.usage
    except openai.APIStatusError as error:
        body: Any = error.body
        return Outcome(kind, error.status_code, str(body["message"]), time.perf_counter() - begin, 0.0)
    taken = time.perf_counter() - begin
    return Outcome(kind, 200, text, taken, first or taken, usage.foveate["visual_tokens_per_layer"])


async def broken_base64(client: Any, port: int, asked: Asked) -> Outcome:
    """Send a picture whose base64 has a letter that is none."""
    broken = Asked(asked.picture[:200] + "!" + asked.picture[201:], asked.question, asked.method)
    return await ask(client, broken, stream=False, kind="broken base64")


async def bomb(client: Any, port: int, asked: Asked) -> Outcome:
    """Send a small file that is a picture of 30,000 by 30,000 pixels."""
    return await ask(client, Asked(BOMB, asked.question, asked.method), stream=False, kind="30,000 x 30,000 PNG")


async def unknown_method(client: Any, port: int, asked: Asked) -> Outcome:
    """Ask for a method that there is not."""
    unknown = Asked(asked.picture, asked.question, "evocat:keep=64")
    return await ask(client, unknown, stream=True, kind="unknown method")


async def large_body(client: Any, port: int, asked: Asked) -> Outcome:
    """Send 100 MB."""
    piece, pieces = b"x" * _PIECE, 96

    async def send(writer: asyncio.StreamWriter) -> None:
        for _ in range(pieces):
            writer.write(piece)
            await writer.drain()

    return await _raw(port, "100 MB body", pieces * len(piece), send)


async def slow(client: Any, port: int, asked: Asked) -> Outcome:
    """Send a byte, and after a while another."""

    async def send(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(_DRIP)

    return await _raw(port, "slow client", 10_000, send)


BAD: tuple[Callable[[Any, int, Asked], Awaitable[Outcome]], ...] = (
    broken_base64,
    bomb,
    unknown_method,
    large_body,
    slow,
)


async def _raw(port: int, kind: str, length: int, send: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> Outcome:
    """Send a request by hand; read what comes back, also while sending."""
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
    writer.write(head.encode())
    sending = asyncio.ensure_future(send(writer))
    try:
        status, text = await _answer(reader)
        with contextlib.suppress(TimeoutError, OSError):
            if kind != "slow client":  # one that sends it all before it looks
                await asyncio.wait_for(sending, 60)
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        status, text = 0, f"no answer: {error!r}"
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.transport.abort()
    taken = time.perf_counter() - begin
    return Outcome(kind, status, text, taken, taken)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, str]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    length = next(int(line.split(":")[1]) for line in head.lower().splitlines() if line.startswith("content-length:"))
    body = json.loads(await reader.readexactly(length))
    return int(head.split()[1]), str(body["error"]["message"])


def _many_pixels(side: int) -> str:
    """Return the data URL of a valid PNG of black pixels, a bit each."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        file += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


BOMB = _many_pixels(30_000)
