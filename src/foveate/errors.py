"""Every exception of foveate.

FoveateError
├── BudgetError(ValueError)           keep is out of range or of the wrong kind
├── UnknownMethod(LookupError)        no method of that name; says the nearest
├── UnsupportedModel(TypeError)       no family serves this model
├── UnsupportedMethod(TypeError)      this method cannot run on this family or engine
├── UnsupportedCall(TypeError)        right padding, labels, a wrong number of image tokens ...
├── MissingEvidence(LookupError)      a method read what it did not declare
├── ContractError(RuntimeError)       a method returned an invalid Selection
├── NothingCompressed(RuntimeError)   tokens should have gone and did not
├── TaskError(ValueError)             questions that are to be asked, or answers to go on from, cannot be read
└── MissingDependency(ImportError)    a package is not installed or too old; says the install command
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FoveateError(Exception):
    """Root of all errors: what is wrong and, after ``hint:``, what to type instead.

    Args:
        message: What is wrong, what was received, what is allowed; no full stop.
        hint: Something the user can type or do.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")

    def __str__(self) -> str:
        return str(self.args[0])


class BudgetError(FoveateError, ValueError):
    """``keep`` is out of range or of the wrong kind."""


class UnknownMethod(FoveateError, LookupError):
    """No method is registered under this name."""


class UnsupportedModel(FoveateError, TypeError):
    """No family serves this model."""


class UnsupportedMethod(FoveateError, TypeError):
    """This method cannot run on this family or engine."""


class UnsupportedCall(FoveateError, TypeError):
    """The call asks for something that compression cannot honour."""


class MissingEvidence(FoveateError, LookupError):
    """A method read evidence that it did not declare."""


class ContractError(FoveateError, RuntimeError):
    """A method returned an invalid ``Selection``."""


class NothingCompressed(FoveateError, RuntimeError):
    """Tokens should have gone and did not."""


class TaskError(FoveateError, ValueError):
    """Questions that are to be asked, or answers to go on from, cannot be read."""


class MissingDependency(FoveateError, ImportError):
    """A package is not installed, or too old."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint that offers the nearest known names, or lists all when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    if near:
        best, worst = (difflib.SequenceMatcher(None, n, name).ratio() for n in (near[0], near[-1]))
        near = near if best - worst < 0.15 else near[:1]
        return "did you mean " + " or ".join(f"`{n}`" for n in near) + "?"
    return "known: " + ", ".join(f"`{n}`" for n in names)
