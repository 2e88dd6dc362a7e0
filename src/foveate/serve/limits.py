"""What one request may cost before the model has read a word of it."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Args:
        max_image_pixels: Pixels of all pictures of a request together, as their headers say.
        max_body: Bytes of a request, and of what it makes the server fetch.
        queue: Requests that may be in the house at once, from their first byte to their answer's last.
        private_urls: Whether pictures may be fetched from private, local and other special addresses.
        pictures: Pictures of a request.
        head_seconds: Time for the head of a request, and for the rest of a body that is refused already.
        body_seconds: Time for the body of a request.
        fetch_seconds: Time for all pictures that a request names by URL.
        send_seconds: Time in which a client must make room for more of its answer.
        grace_seconds: Time that a stopping server gives to the requests it has.
    """

    max_image_pixels: int = 36_000_000
    max_body: int = 20 * MIB
    queue: int = 64
    private_urls: bool = False
    pictures: int = 16
    head_seconds: float = 10.0
    body_seconds: float = 20.0
    fetch_seconds: float = 10.0
    send_seconds: float = 30.0
    grace_seconds: int = 30
