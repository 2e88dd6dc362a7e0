"""``foveate studio``: load a model, and show a page that asks it."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from foveate.cli.ask import UserError, conditions, load
from foveate.cli.media import crops
from foveate.cli.options import Device, Limit, Model
from foveate.errors import MissingDependency


def studio(
    model: Model = "demo",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 means all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7860,
    device: Device = None,
    max_new_tokens: Limit = 32,
) -> None:
    """Open a page in the browser: ask about a picture, by two methods side by side, and move their budgets."""
    if importlib.util.find_spec("gradio") is None:
        raise MissingDependency("the studio needs gradio", "pip install 'foveate[studio]'")
    from foveate.studio.run import serve
    from foveate.studio.session import Session

    network, processor = load(model, device, pictures=True)
    about = f"{model}, {conditions(network)}"

    def ready(url: str) -> None:
        typer.echo(f"{about} at {url} (Ctrl-C ends it)", err=True)

    try:
        serve(Session(network, processor, max_new_tokens), about, crops(processor), host, port, ready)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error}", "pass another port, or 0 for a free one: --port 0"
        ) from error
