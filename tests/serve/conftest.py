"""A server in a thread, over a real socket: the demo model behind it, or a reader that does as the test says."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate import demo, registry
from foveate.report import Report
from foveate.serve.app import CHAT, create_app
from foveate.serve.limits import Limits
from foveate.serve.reader import Question, Reader, Said
from foveate.serve.run import configured, listen


class Puppet(Reader):
    """Answers "so", or another text, when it may, and remembers what it was asked."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.may, self.asked, self.stopped, self.text = threading.Event(), list[Question](), 0, "so"
        self.may.set()

    def answer(self, question: Question, say: Callable[[str], None], given_up: Callable[[], bool]) -> Said:
        self.asked.append(question)
        while not self.may.wait(0.01):
            if given_up():
                self.stopped += 1
                break
        say(self.text)
        return Said("stop", 1, 1, 1, Report(method="evocut:keep=64", model="", layers=1))


@contextlib.contextmanager
def serving(reader: Reader, limits: Limits) -> Iterator[int]:
    """Run a server; yields its port."""
    place = listen("127.0.0.1", 0)
    server = configured(create_app(reader, limits), limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        yield place.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        place.close()


@pytest.fixture(scope="session")
def model() -> tuple[Any, Any]:
    return demo.load()


@pytest.fixture
def puppet(model: tuple[Any, Any]) -> Puppet:
    return Puppet("demo", *model, registry.from_spec("evocut:keep=64"))


def picture_url(picture: Path | Image.Image | bytes = demo.PICTURE, kind: str = "png") -> str:
    if isinstance(picture, Path):
        picture = picture.read_bytes()
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, "PNG")
        picture = file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def messages(text: str, *urls: str) -> list[dict[str, Any]]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A small, whole and valid PNG of a great many black pixels."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def post(port: int, body: Any, path: str = CHAT, kind: str = "application/json") -> tuple[int, Any, dict[str, str]]:
    """Send JSON, or bytes as they are; return status, body and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, raw, {"Content-Type": kind})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None, dict(response.getheaders())
    finally:
        connection.close()


def refused(answer: tuple[int, Any, Any], status: int, message: str, hint: str = "") -> None:
    """Check that an answer is an error in OpenAI's form, with a hint."""
    assert answer[0] == status, answer
    error = answer[1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    said, _, advice = error["message"].partition("\nhint: ")
    assert message in said, error
    assert advice, error
    assert hint in advice, error
