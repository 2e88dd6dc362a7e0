"""From a session to a page that is served, and that goes when it is told to. Nothing is sent anywhere else."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from foveate.studio.app import build
from foveate.studio.session import Session

#: Fonts of the reader's own machine.
_FONTS = ("system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
_MONO = ("ui-monospace", "Consolas", "monospace")
_LARGEST_FILE = "50mb"


def serve(session: Session, about: str, crop: bool, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until SIGINT or SIGTERM; what users brought and what was drawn is deleted then.

    Args:
        session: Who answers; closed at the end.
        about: The model, and what times depend on.
        crop: The processor cuts pictures to their central square.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        ready: Is told the page's address once it is there.

    Raises:
        OSError: If the port is taken.
        ModuleNotFoundError: If Gradio is not installed.
    """
    over = threading.Event()
    with tempfile.TemporaryDirectory(prefix="foveate-studio-") as folder:
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=folder)
        import gradio as gr

        try:
            page = build(session, about, crop)
            former = {which: signal.signal(which, lambda *_: over.set()) for which in (signal.SIGINT, signal.SIGTERM)}
            try:
                _, url, _ = page.queue(default_concurrency_limit=1).launch(
                    server_name=host,
                    server_port=port or _free(host),
                    prevent_thread_lock=True,
                    quiet=True,
                    share=False,
                    inbrowser=False,
                    ssr_mode=False,
                    show_error=False,
                    enable_monitoring=False,
                    footer_links=[],
                    max_file_size=_LARGEST_FILE,
                    theme=gr.themes.Base(font=list(_FONTS), font_mono=list(_MONO)),
                    css_paths=[Path(__file__).with_name("studio.css")],
                )
                ready(url)
                over.wait()
                session.close()  # first, for the page waits for its answers
                page.close(verbose=False)
            finally:
                for which, handler in former.items():
                    signal.signal(which, handler)
        finally:
            session.close()


def _free(host: str) -> int:
    """Return a port that nobody listens on; Gradio wants to be told one."""
    with socket.create_server((host, 0)) as place:
        number: int = place.getsockname()[1]
    return number
