"""Pictures come from the public web alone, whatever their URL looks like, and in bounded time and size."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from foveate.serve import pictures
from foveate.serve.fetch import fetch, public
from foveate.serve.limits import Limits
from foveate.serve.refusals import Refused
from tests.serve.conftest import bomb

OPEN, CLOSED = Limits(private_urls=True), Limits()
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),  # where clouds keep their secrets
        ("100.64.0.1", False),
        ("192.0.0.8", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", False),  # no client needs that form, and other libraries read it their own way
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::5db8:d70e", True),
    ],
)
def test_public_addresses(address: str, expected: bool) -> None:
    assert public(ipaddress.ip_address(address)) is expected


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0"],
)
def test_private_hosts_in_every_spelling(host: str) -> None:
    with pytest.raises(Refused, match=r"not on the public web|no such host|not a URL"):
        asyncio.run(fetch(f"http://{host}:9/a.png", CLOSED, 1000))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "http, https and data"),
        ("gopher://example.org/", "http, https and data"),
        ("http:///a.png", "http, https and data"),
        ("http://", "http, https and data"),
        ("no url", "http, https and data"),
        ("http://[::1/", "not a URL"),
        ("http://a:99999/", "not a URL"),
        ("http://" + "a" * 300 + ".org/", "not a URL|no such host"),
        ("http://user:word@example.org/", "user name or password"),
        ("http://\ud800.org/", "not a URL"),
    ],
)
def test_urls_that_are_not_fetched(url: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        asyncio.run(fetch(url, CLOSED, 1000))


def names(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Let the name service answer so, one time after another; return the names that were asked for."""
    asked: list[str] = []

    async def getaddrinfo(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return asked


def test_the_address_that_was_looked_at_is_the_one_that_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means another address when asked again (DNS rebinding) gains nothing."""
    asked = names(monkeypatch, ["93.184.215.14"], ["127.0.0.1"])
    called: list[Any] = []

    async def open_connection(host: str, port: int, **kwargs: Any) -> Any:
        called.append((host, port, kwargs["server_hostname"]))
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    with pytest.raises(Refused, match=r"cannot fetch a picture from rebind\.example: Connection refused"):
        asyncio.run(fetch("https://rebind.example/a.png", CLOSED, 1000))
    assert asked == ["rebind.example"]
    assert called == [("93.184.215.14", 443, "rebind.example")]


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, ["93.184.215.14", "10.0.0.1"])
    with pytest.raises(Refused, match="not on the public web"):
        asyncio.run(fetch("http://both.example/", CLOSED, 1000))


def get(serve: Serve, limits: Limits = OPEN, room: int = 10_000, path: str = "/a.png") -> bytes:
    """Fetch from a server that does as it is told."""

    return asyncio.run(calling(serve, lambda base: fetch(base + path, limits, room)))


async def calling(serve: Serve, call: Callable[[str], Awaitable[Any]]) -> Any:
    """Call something with the URL of a server that does as it is told."""

    async def tidy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except OSError:
            pass  # the other side has left
        finally:
            writer.transport.abort()

    async with await asyncio.start_server(tidy, "127.0.0.1", 0) as server:
        return await call(f"http://localhost:{server.sockets[0].getsockname()[1]}")


def saying(*answers: bytes) -> tuple[Serve, list[bytes]]:
    """Answer one request after another so; return also what was asked."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answers[min(len(heads), len(answers)) - 1])
        await writer.drain()
        writer.write_eof()
        await reader.read()  # until the other side has enough

    return serve, heads


def test_a_file_is_fetched_with_its_name_and_query() -> None:
    serve, heads = saying(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")
    assert get(serve, path="/ä b%20c.png?x=1&y=ü") == b"abc"
    assert heads[0].startswith(b"GET /%C3%A4%20b%20c.png?x=1&y=%C3%BC HTTP/1.1\r\n")
    assert b"Host: localhost:" in heads[0]


def test_a_redirect_to_a_private_address_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    serve, heads = saying(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/secrets\r\n\r\n")
    monkeypatch.setattr("foveate.serve.fetch.public", lambda address: address == ipaddress.ip_address("127.0.0.1"))
    with pytest.raises(Refused, match=r"169\.254\.169\.254 is not on the public web"):
        get(serve, CLOSED)
    assert len(heads) == 1


def test_redirects_end() -> None:
    serve, heads = saying(b"HTTP/1.1 302 Found\r\nLocation: /round\r\n\r\n")
    with pytest.raises(Refused, match="more than 3 redirects"):
        get(serve)
    assert len(heads) == 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nabc", "cannot fetch"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "cannot fetch"),
        (b"", "cannot fetch"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 20_000, "too large"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 20_000, "too large"),
    ],
)
def test_servers_that_misbehave(answer: bytes, message: str) -> None:
    with pytest.raises(Refused, match=message):
        get(saying(answer)[0])


def test_a_server_that_drips_is_left_in_time() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(100):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    limits = dataclasses.replace(OPEN, fetch_seconds=0.3)
    with pytest.raises(Refused, match=r"did not arrive within 0\.3 seconds"):
        asyncio.run(calling(drip, lambda url: pictures.gather([url], limits)))


def test_pictures_share_their_room() -> None:
    file = bomb(8, 8)
    serve, _ = saying(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(file) + file)

    def both(room: int) -> Any:
        limits = dataclasses.replace(OPEN, max_body=room)
        return asyncio.run(calling(serve, lambda url: pictures.gather([url, url], limits)))

    assert both(2 * len(file)) == [file, file]
    with pytest.raises(Refused, match="too large to fetch"):
        both(2 * len(file) - 1)
