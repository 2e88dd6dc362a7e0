"""The answers of an evaluation: one JSON line each, under a header that says what was asked of whom."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import TaskError


@dataclass(frozen=True)
class Answer:
    """What one arm said to one question.

    Args:
        arm: ``full``, ``blind``, or a method's spec with its budget: ``evocut:keep=64``.
        method: The arm without its budget.
        budget: Tokens per image, or their share; None for ``full`` and ``blind``.
        item: Name of the question.
        picture: Key of what it is about: answers about one picture are not independent.
        type: Kind of question.
        given: What was said.
        right: Whether that is right.
        mean_alive: Visual tokens per decoder layer, measured.
    """

    arm: str
    method: str
    budget: float | int | None
    item: str
    picture: str
    type: str
    given: str
    right: bool
    mean_alive: float


def read(path: Path) -> tuple[dict[str, Any], list[Answer]]:
    """Return the header and the answers of a log; of a run that went on, what its last header says.

    ``commit`` names those of all starts. Arms that could not run are in the header under ``refused``, with the reason.
    A last line without its line break was cut short by a kill, and is dropped. A log that holds no complete line has
    an empty header.

    Raises:
        TaskError: If the log cannot be read, or one of its lines is broken.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror}", "pass the log of an evaluation") from error
    header: dict[str, Any] = {}
    refused: dict[str, str] = {}
    commits: dict[str, None] = {}
    answers = []
    for number, line in enumerate(lines, 1):
        row = _object(line)
        try:
            if row.keys() == {"run"}:
                header |= row["run"]
                refused |= header.get("refused", {})
                commits |= dict.fromkeys([row["run"]["commit"]] if "commit" in row["run"] else [])
            elif row.keys() == {"refused"}:
                refused |= row["refused"]
            else:
                answers.append(Answer(**row))
        except TypeError as error:
            raise TaskError(f"{path}, line {number} is no answer", "remove that line; it is asked again") from error
    if answers and not header:
        raise TaskError(f"{path} does not say what was asked of whom", "its first line is the header of a run")
    found = {"refused": refused, "commit": ", ".join(commits)}
    return header | {name: value for name, value in found.items() if value}, answers


def _object(line: bytes) -> dict[str, Any]:
    """Return a line's object, or an empty one if it holds none."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
