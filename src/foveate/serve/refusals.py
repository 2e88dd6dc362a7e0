"""Errors as OpenAI's clients know them: a status, and a JSON object with a message that holds the hint."""

from __future__ import annotations

from typing import Any

from foveate.errors import BudgetError, FoveateError, UnknownMethod, UnsupportedCall, UnsupportedMethod

#: Errors of the library that the client's request has caused.
_CLIENTS = (BudgetError, UnknownMethod, UnsupportedCall, UnsupportedMethod)

_LONGEST = 600


class Refused(FoveateError):
    """A request that gets no answer.

    Args:
        message: What is wrong.
        hint: What to send instead.
        status: Status of the response.
        code: Word for programs.
        param: The part of the request it is about.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self,
        message: str,
        hint: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message, hint)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @classmethod
    def of(cls, error: BaseException) -> Refused:
        """Return what to tell the client about an error of any kind."""
        if isinstance(error, Refused):
            return error
        if isinstance(error, _CLIENTS):
            hint = error.hint or "type `foveate methods` to see what there is"
            param = None if isinstance(error, UnsupportedCall) else "foveate"
            return cls(error.message, hint, code=_code(error), param=param)
        return cls(
            f"the server failed: {type(error).__name__}",
            "see the server's log; other requests go on",
            status=500,
            code="server_error",
        )

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the status."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """Return the response in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        text = f"{_cut(self.message)}\nhint: {self.hint}"
        safe = text.encode("utf-8", "backslashreplace").decode("utf-8")  # JSON may bring half a character, UTF-8 not
        return {"error": {"message": safe, "type": kind, "param": self.param, "code": self.code}}


def _cut(text: str) -> str:
    """Return a message that is not longer for having quoted a long request."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 4 :]}"


def _code(error: FoveateError) -> str:
    """Return a class name as a word with underscores: ``budget_error``."""
    name = type(error).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
