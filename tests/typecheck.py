"""The run-time type checker of the tests: beartype that lets an int pass for a float, as mypy does."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
