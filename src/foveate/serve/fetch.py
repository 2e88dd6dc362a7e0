"""Pictures from the web, and from nowhere else: every address is looked at, and the one looked at is the one called."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from functools import cache
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import h11

from foveate.serve.limits import Limits
from foveate.serve.refusals import Refused

_REDIRECTS = (301, 302, 303, 307, 308)
_HOPS = 4
_CHUNK = 2**16
_PROTOCOLS = ipaddress.ip_network("192.0.0.0/24")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PASTE = "send the picture itself: data:image/png;base64,..."

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class _Reply:
    status: int
    location: str | None
    content: bytes


async def fetch(url: str, limits: Limits, room: int) -> bytes:
    """Return what is at a URL, at most ``room`` bytes; the caller limits the time.

    Raises:
        Refused: If it is not on the public web, too large, or not there.
    """
    for _ in range(_HOPS):
        parts, host, port = _split(url)
        address = await _resolve(host, port, limits.private_urls)
        try:
            reply = await _get(parts, host, port, address, room)
        except (OSError, h11.ProtocolError) as error:
            raise _failed(f"cannot fetch a picture from {host}: {_word(error)}") from error
        if reply.status not in _REDIRECTS or reply.location is None:
            break
        url = urljoin(url, reply.location)
    else:
        raise _failed(f"more than {_HOPS - 1} redirects from {host}")
    if reply.status != 200:
        raise _failed(f"{host} answered {reply.status} instead of a picture")
    return reply.content


def public(address: Address) -> bool:
    """Whether an address is one that anybody can reach; a private one in the clothes of IPv6 is private.

    Example:
        >>> [public(ipaddress.ip_address(text)) for text in ("93.184.215.14", "127.0.0.1", "::ffff:10.0.0.1")]
        [True, False, False]
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.ipv4_mapped or address.sixtofour or address.teredo:
            return False
    elif address in _PROTOCOLS:
        return False
    special = address.is_private or address.is_loopback or address.is_link_local or address.is_multicast
    return address.is_global and not (special or address.is_reserved or address.is_unspecified)


def _split(url: str) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("ascii")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise _failed("not a URL that can be read") from error
    if parts.scheme not in ("http", "https") or not host:
        raise _failed(f"pictures come from http, https and data URLs, got {parts.scheme or 'no scheme'!r}")
    if parts.username is not None or parts.password is not None:
        raise _failed("a URL with a user name or password is not fetched")
    return parts, host, port


async def _resolve(host: str, port: int, private: bool) -> str:
    """Return the address to call. One that is not public among several makes the name one that is not public."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _failed(f"no such host: {host}") from error
    addresses = [str(sockaddr[0]) for *_, sockaddr in found]
    if not private and not all(public(ipaddress.ip_address(address)) for address in addresses):
        raise Refused(
            f"{host} is not on the public web",
            f"{_PASTE}; the server's owner may start it with --allow-private-urls",
            code="private_url",
            param="messages",
        )
    return addresses[0]


async def _get(parts: SplitResult, host: str, port: int, address: str, room: int) -> _Reply:
    secure = parts.scheme == "https"
    reader, writer = await asyncio.open_connection(
        address, port, ssl=_trust() if secure else None, server_hostname=host if secure else None
    )
    try:
        connection = h11.Connection(h11.CLIENT)
        shown = f"[{host}]" if ":" in host else host
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (
            f"?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else ""
        )
        headers = [
            ("Host", shown if port == (443 if secure else 80) else f"{shown}:{port}"),
            ("User-Agent", "foveate"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        writer.write(connection.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
        await writer.drain()
        return await _read(connection, reader, room)
    finally:
        writer.transport.abort()


async def _read(connection: h11.Connection, reader: asyncio.StreamReader, room: int) -> _Reply:
    status, location, content = 0, None, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_CHUNK))
        elif isinstance(event, h11.Response):
            status = event.status_code
            location = next((value.decode("latin-1") for name, value in event.headers if name == b"location"), None)
            if status != 200:
                return _Reply(status, location, b"")
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > room:
                raise Refused(
                    "the pictures of the request are too large to fetch",
                    f"make them smaller: {room / 2**20:.1f} MiB are left",
                    status=413,
                    code="too_large",
                    param="messages",
                )
        elif isinstance(event, h11.EndOfMessage):
            return _Reply(status, location, bytes(content))
        elif isinstance(event, h11.ConnectionClosed):
            raise _failed("the connection closed before the picture was whole")


@cache
def _trust() -> ssl.SSLContext:
    return ssl.create_default_context()


def _failed(message: str) -> Refused:
    return Refused(message, _PASTE, code="invalid_image_url", param="messages")


def _word(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
