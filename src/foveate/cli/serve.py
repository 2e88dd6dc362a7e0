"""``foveate serve``: load a model, listen, answer."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from foveate.cli.ask import UserError, build, conditions, load
from foveate.cli.options import Device, Dtype, Model
from foveate.errors import MissingDependency

_PILLOWS_OWN = 89_478_485
"""Pixels above which Pillow itself takes a picture for an attack."""


def serve(
    model: Model = "demo",
    method: Annotated[
        str, typer.Option(help="Method where a request names none. See: foveate methods.")
    ] = "adav:keep=64",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 means all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    device: Device = None,
    dtype: Dtype = None,
    max_image_pixels: Annotated[
        int, typer.Option(min=1, max=_PILLOWS_OWN, help="Pixels of all pictures of a request together.")
    ] = 36_000_000,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Size of a request, and of what it has fetched.")] = 20,
    queue: Annotated[int, typer.Option(min=1, help="Requests inside at once; one more gets 429.")] = 64,
    allow_private_urls: Annotated[
        bool, typer.Option("--allow-private-urls", help="Fetch pictures from private and local addresses, too.")
    ] = False,
) -> None:
    """Serve a model to OpenAI's clients, with a budget of visual tokens for each request."""
    try:
        from foveate.serve.app import create_app
        from foveate.serve.limits import MIB, Limits
        from foveate.serve.reader import Reader
        from foveate.serve.run import run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("foveate"):
            raise
        raise MissingDependency(f"serving needs {error.name}", "pip install 'foveate[serve]'") from error
    built = build(method)
    limits = Limits(
        max_image_pixels=max_image_pixels,
        max_body=int(max_body_mib * MIB),
        queue=queue,
        private_urls=allow_private_urls,
    )
    with _listening(host, port) as place:
        network, processor = load(model, device, dtype=dtype, pictures=True)
        app = create_app(Reader(model, network, processor, built), limits)
        shown, number = place.getsockname()[:2]
        url = f"http://{f'[{shown}]' if ':' in shown else shown}:{number}/v1"
        typer.echo(f"{model} with {method} at {url}, {conditions(network)}", err=True)
        run(app, place, limits)


def _listening(host: str, port: int) -> socket.socket:
    from foveate.serve.run import listen

    try:
        return listen(host, port)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            "pass another port, or 0 for a free one: --port 0",
        ) from error
