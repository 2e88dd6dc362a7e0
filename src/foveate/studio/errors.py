"""What goes wrong in the studio, as a message and a hint; a traceback is for the terminal, never for the page."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from foveate.errors import FoveateError


class StudioError(FoveateError):
    """What was asked of the studio cannot be answered."""


@contextmanager
def told() -> Iterator[None]:
    """Let only the library's own errors out; what nobody foresaw is logged, and named in one line."""
    try:
        yield
    except FoveateError:
        raise
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        hint = "choose a smaller picture or a smaller budget, or start the studio with --device cpu"
        raise StudioError("the device has too little memory for this question", hint) from error
    except Exception as error:
        logging.getLogger(__name__).exception("an answer failed")
        first = (str(error).strip() or "no message").splitlines()[0]
        raise StudioError(
            f"the model failed: {type(error).__name__}: {first}", "the terminal shows where; another question may work"
        ) from error
