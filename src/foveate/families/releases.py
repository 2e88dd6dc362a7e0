"""Which transformers is installed. One that is too old for all of foveate is refused when this file is imported."""

from __future__ import annotations

import transformers

from foveate.errors import MissingDependency

#: The oldest that is served.
FLOOR = "5.18"

#: The first whose ``generate`` hands pictures on to a prompt that is read in chunks; older ones drop them.
CHUNKS = "5.23"


def installed() -> str:
    """Return the version of the installed transformers."""
    return str(transformers.__version__)


def older_than(wanted: str) -> bool:
    """Whether the installed transformers comes before the release ``wanted``, "5.18" say."""
    return _numbers(installed()) < _numbers(wanted)


def upgrade(wanted: str) -> str:
    """Return what to type for a release that is new enough."""
    return f"pip install -U 'transformers>={wanted}'"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def check() -> None:
    """Refuse a transformers that is too old for all of foveate.

    Raises:
        MissingDependency: With the version that is needed.
    """
    if older_than(FLOOR):
        raise MissingDependency(f"foveate needs transformers >= {FLOOR}, found {installed()}", upgrade(FLOOR))


check()
