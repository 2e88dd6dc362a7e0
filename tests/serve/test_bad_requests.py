"""Every request that cannot be answered gets a 4xx with a hint, and the server goes on."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from foveate import demo
from foveate.serve.app import CHAT
from foveate.serve.limits import Limits
from tests.serve.conftest import Puppet, bomb, messages, picture_url, post, refused, serving

LIMITS = Limits(max_body=2**20, max_image_pixels=1_000_000, queue=4, head_seconds=1, body_seconds=1, send_seconds=1)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def port(puppet: Puppet) -> Iterator[int]:
    with serving(puppet, LIMITS) as port:
        yield port
        status, answer, _ = post(port, {"messages": HELLO})
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "so")


def test_what_is_no_question(port: int) -> None:
    for body in (b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"messages": 1' + b"0" * 5000 + b"}"):
        refused(post(port, body), 400, "")
    refused(post(port, {}), 400, "messages")
    refused(post(port, {"messages": HELLO}, kind="text/plain"), 400, "no JSON object", "application/json")
    refused(post(port, {"messages": []}), 400, "messages")
    refused(post(port, {"messages": HELLO}, "/v1/completions"), 404, "POST /v1/completions", "/v1/chat/completions")
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", CHAT)
    assert connection.getresponse().status == 405
    connection.close()


@pytest.mark.parametrize(
    ("field", "value", "message", "hint"),
    [
        ("n", 2, "`n`", "openapi"),
        ("tools", [], "`tools` is not served", "leave it out"),
        ("logprobs", True, "`logprobs`", "openapi"),
        ("temperature", -1, "`temperature`", "openapi"),
        ("temperature", float("nan"), "`temperature`", "openapi"),
        ("top_p", 1.1, "`top_p`", "openapi"),
        ("max_tokens", 0, "`max_tokens`", "openapi"),
        ("stop", ["a"] * 5, "`stop", "openapi"),
        ("stop", "", "`stop", "openapi"),
        ("seed", 2**70, "`seed`", "openapi"),
        ("model", "\ud800", "no such model", "demo"),
        ("foveate", {"method": "evocat:keep=64"}, "unknown method: 'evocat'", "did you mean `evocut`?"),
        ("foveate", {"method": "evocut"}, "`evocut` needs keep", "keep=64"),
        ("foveate", {"method": "\ud800:keep=1"}, "foveate.method", ""),
        ("foveate", {"method": "v2drop:stages=a@0.5"}, "", ""),
        ("foveate", {"method": "evocut:keep=64", "keep": 32}, "both a method and a budget", "evocut:keep=64"),
        ("foveate", {"keep": 0}, "keep must be at least 1 token, got 0", "keep=64"),
        ("foveate", {"keep": 64.0}, "a fraction in (0, 1], got 64.0", "keep=64"),
        ("foveate", {"keep": True}, "foveate.keep", "openapi"),
        ("foveate", {"kepp": 64}, "`foveate.kepp` is not served", "leave it out"),
        ("messages", [{"role": "tool", "content": "x"}], "role", "openapi"),
        ("messages", messages("what is <image> here?"), "'<image>'", "leave it out"),
        ("messages", [{"role": "user", "content": "\udc80"}], "half a character", "UTF-8"),
        ("messages", [{"role": "user", "content": "x" * 70_000}], "too long", "fewer"),
        ("messages", messages("two", *["data:,"] * 17), "17 pictures", "fewer"),
        ("messages", messages("?", "ftp://example.org/a.png"), "http, https and data URLs", "data:image/png"),
        ("messages", messages("?", "http://127.0.0.1:1/a.png"), "not on the public web", "--allow-private-urls"),
        ("messages", messages("?", "data:image/png,abc"), "not in base64", "data:image/png;base64"),
        ("messages", messages("?", "data:image/png;base64,iVBOR???"), "base64 is broken", "encode"),
        ("messages", messages("?", picture_url(b"no picture")), "cannot be read", "complete picture"),
        ("messages", messages("?", picture_url(b"<svg/>", "svg+xml")), "cannot be read", "PNG"),
    ],
)
def test_what_is_not_served(puppet: Puppet, port: int, field: str, value: Any, message: str, hint: str) -> None:
    refused(post(port, {"messages": HELLO} | {field: value}), 404 if field == "model" else 400, message, hint)
    assert not puppet.asked


def test_a_picture_of_too_many_pixels_is_never_decoded(puppet: Puppet, port: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("foveate.serve.reader.decode", None)
    large = bomb()
    assert len(large) < 200_000
    refused(post(port, {"messages": messages("?", picture_url(large))}), 413, "too large", "1,000,000 pixels")
    half = picture_url(Image.new("RGB", (1000, 600)))
    refused(post(port, {"messages": messages("?", half, half)}), 413, "1,200,000 pixels in all")
    assert not puppet.asked


def test_a_picture_that_ends_early(model: tuple[Any, Any]) -> None:
    """Its header is whole, so this is seen only when the model's turn comes, in a stream as well."""
    from foveate import registry
    from foveate.serve.reader import Reader

    broken = picture_url(demo.PICTURE.read_bytes()[:3000])
    with serving(Reader("demo", *model, registry.from_spec("evocut:keep=64")), Limits()) as port:
        for stream in (False, True):
            asked = {"messages": messages("?", broken), "stream": stream}
            refused(post(port, asked), 400, "cannot be read to its end", "complete picture")
            for method in ("v2drop:keep=1", "v2drop:stages=30@0.5"):
                asked = {"messages": messages("?", picture_url()), "stream": stream, "foveate": {"method": method}}
                refused(post(port, asked), 400, "")
            refused(post(port, asked | {"max_tokens": 10_000, "foveate": None}), 400, "10000 more", "max_tokens")


def test_a_body_that_is_too_large(port: int) -> None:
    large = {"messages": HELLO, "user": "x" * 3_000_000}
    refused(post(port, large), 413, "larger than 1 MiB", "--max-body-mib")
    with socket.create_connection(("127.0.0.1", port)) as client:  # nothing of its size is known before
        client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode())
        for _ in range(40):
            client.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize("slow", [b"POST / HT", b"POST / HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_drips_in(port: int, slow: bytes) -> None:
    assert drip(port, slow).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_drips_in(port: int) -> None:
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" % CHAT.encode()
    answer = drip(port, head)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert "hint: send it faster" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def drip(port: int, begin: bytes) -> bytes:
    """Send a beginning, then a byte at a time; return all that comes until the server closes the connection."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(0.1)
        client.sendall(begin)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                client.send(b"x")
                piece = client.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                return answer
            answer += piece
            if not piece:
                return answer
    raise AssertionError("the connection stays open")


def test_a_full_house(puppet: Puppet, port: int) -> None:
    puppet.may.clear()
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(post(port, {"messages": HELLO}))) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: count(port, "foveate_requests_inside") == 4)
    full = post(port, {"messages": HELLO})
    refused(full, 429, "room for no more", "ask again in")
    assert int(next(value for name, value in full[2].items() if name.lower() == "retry-after")) >= 1
    puppet.may.set()
    for thread in threads:
        thread.join()
    assert [status for status, _, _ in answers] == [200] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_the_model(puppet: Puppet, port: int, stream: bool) -> None:
    puppet.may.clear()
    body = json.dumps({"messages": HELLO, "stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    def inside(n: int) -> None:
        until(lambda: count(port, "foveate_requests_inside") == n)

    with socket.create_connection(("127.0.0.1", port)) as answered:
        answered.sendall(head.encode() + body)
        until(lambda: len(puppet.asked) == 1)
        with socket.create_connection(("127.0.0.1", port)) as waiting:
            waiting.sendall(head.encode() + body)
            inside(2)
        inside(1)
    inside(0)
    until(lambda: puppet.stopped == 1)
    puppet.may.set()
    assert len(puppet.asked) == 1  # the one that waited never began


def test_a_client_that_reads_nothing_is_left(puppet: Puppet, port: int) -> None:
    puppet.text = "x" * 30_000_000
    body = json.dumps({"messages": HELLO, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body)
        until(lambda: len(puppet.asked) == 1 and count(port, "foveate_requests_inside") == 0)
    puppet.text = "so"


def test_a_failure_of_our_own_is_a_500_and_not_the_end(puppet: Puppet, port: int, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(puppet, "answer", lambda *_: 1 / 0)
        status, body, _ = post(port, {"messages": HELLO})
    assert status == 500
    assert body["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in body["error"]["message"]


def count(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
