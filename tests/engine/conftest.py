"""The largest difference to the reference is part of what the tests have to say."""

from __future__ import annotations

from typing import Any

from tests.engine.oracle import DIFFERENCES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if DIFFERENCES:
        terminalreporter.write_line(
            f"engine against the masking reference: largest logit difference {max(DIFFERENCES):.1e} "
            f"in {len(DIFFERENCES)} comparisons"
        )
