"""From an application to a process that listens, and that ends when it is told to with its answers given."""

from __future__ import annotations

import signal
import socket

import fastapi
import uvicorn

from foveate.serve.gate import Door
from foveate.serve.limits import Limits


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises:
        OSError: If the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def configured(app: fastapi.FastAPI, limits: Limits) -> uvicorn.Server:
    """Return the server of an application, not yet running."""
    config = uvicorn.Config(
        app,
        http=type("Door", (Door,), {"seconds": limits.head_seconds}),
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=limits.grace_seconds,
    )
    return uvicorn.Server(config)


def run(app: fastapi.FastAPI, place: socket.socket, limits: Limits) -> None:
    """Serve until SIGINT or SIGTERM; then answer what is inside, and return."""
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it is done
        signal.signal(number, lambda *_: None)
    configured(app, limits).run(sockets=[place])
