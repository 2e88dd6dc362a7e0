"""What is asked: questions about pictures with their answers, from the demo world, a folder, JSONL or parquet."""

from __future__ import annotations

import hashlib
import io
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import MissingDependency, TaskError, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

#: The files of a folder that may hold its questions, the first that is there.
QUESTION_FILES = ("questions.jsonl", "metadata.jsonl")
SCORES = ("exact", "contains")
_LINE = 'one object a line: {"image": "a.png", "question": "...", "answer": "..."}'
_SIGNS = f"[{re.escape(string.punctuation)}]"


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        name: Its name in the task, unique.
        pictures: Keys of its pictures, in the order of the prompt; `Task.open` opens them.
        question: What is asked.
        answers: What counts as right, any of them.
        type: The kind of question, for tables by type.
    """

    name: str
    pictures: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    type: str = "all"


@dataclass(frozen=True)
class Task:
    """Questions, and how to open their pictures."""

    name: str
    items: tuple[Item, ...]
    open: Callable[[str], Image.Image]


def load_task(source: str, n: int | None = None) -> Task:
    """Read a task.

    Args:
        source: ``demo``: the demo world's held-out set, 2,000 questions. Or a JSONL or parquet file, or a folder that
            holds ``questions.jsonl``, ``metadata.jsonl`` or one parquet file. Each row has ``image`` (a path from the
            file's folder; in parquet also the picture's bytes) or ``images``, ``question``, and ``answer`` or
            ``answers``; it may have ``type`` and ``id``.
        n: Take the first n questions only.

    Raises:
        TaskError: With the file, the row, and what is missing.
        MissingDependency: If a parquet file is to be read without pyarrow.
    """
    if n is not None and n < 1:
        raise TaskError(f"a task has at least one question, got n={n}", "leave n out for all questions")
    path = Path(source)
    task = _demo(n) if source == "demo" else _table(_file(path), n)
    if not task.items:
        raise TaskError(f"no question in {source}", "a row has image, question and answer")
    return task


def right(given: str, answers: Iterable[str], score: str = "exact") -> bool:
    """Judge an answer: letter case, punctuation, articles and spaces do not count.

    Args:
        given: What the model said.
        answers: What is right, any of them.
        score: ``exact``: the same words; ``contains``: the right words somewhere in the answer, one after the other.

    Example:
        >>> right("The dog.", ["dog"]), right("a big dog", ["dog"]), right("a big dog", ["dog"], "contains")
        (True, False, True)
    """
    if score not in SCORES:
        raise TaskError(f"no way of scoring is called {score!r}", did_you_mean(score, SCORES))
    said = normalise(given)
    wanted = [normalise(answer) for answer in answers]
    return said in wanted if score == "exact" else any(f" {answer} " in f" {said} " for answer in wanted)


def normalise(text: str) -> str:
    """Return the words of an answer in lower case, without punctuation and articles.

    Example:
        >>> normalise(" The  U.S. flag! "), normalise("2.5"), normalise("A")
        ('us flag', '2.5', 'a')
    """
    text = re.sub(
        rf"(?<!\d)[{re.escape(string.punctuation)}]|[{re.escape(string.punctuation)}](?!\d)", "", text.lower()
    )
    words = text.split()
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(words)


def _demo(n: int | None) -> Task:
    from foveate.demo.world import held_out, scene

    whole = 2000 if n is None else min(2000, -(-n // 4) * 4)
    items = [
        Item(str(i), (str(seed),), question.text, (question.answer,), question.type)
        for i, (seed, question) in enumerate(held_out(whole))
    ]
    return Task("demo", tuple(items[:n]), lambda key: scene(int(key)).image)


def _file(path: Path) -> Path:
    if not path.exists():
        raise TaskError(f"no such task: {path}", "pass 'demo', a JSONL or parquet file, or a folder that holds one")
    if path.is_file():
        return path
    found = [path / name for name in QUESTION_FILES if (path / name).is_file()] or sorted(path.glob("*.parquet"))
    if not found or (len(found) > 1 and found[0].suffix == ".parquet"):
        names = ", ".join(file.name for file in found) or "none"
        raise TaskError(
            f"a folder holds one file of questions; {path} has {names}",
            f"name the file, or write {path / QUESTION_FILES[0]} with image, question and answer in each line",
        )
    return found[0]


def _table(path: Path, n: int | None) -> Task:
    rows: Sequence[Mapping[str, Any]] = _parquet(path, n) if path.suffix == ".parquet" else _jsonl(path, n)
    stored: dict[str, bytes] = {}
    items: dict[str, Item] = {}
    for place, row in enumerate(rows):
        where = f"{path}, row {place + 1}"
        pictures = tuple(_picture(value, path, stored, where) for value in _pictures(row, where))
        answers = row.get("answers", row.get("answer"))
        answers = [answers] if isinstance(answers, str | int | float) else answers
        if not row.get("question") or not answers:
            raise TaskError(f"{where} has {', '.join(row)}", "each row has image, question and answer")
        name, kind = str(row.get("id", place)), str(row.get("type", "all"))
        if name in items:
            raise TaskError(f"{where}: the id {name!r} is taken", "give each question an id of its own, or none")
        items[name] = Item(name, pictures, str(row["question"]), tuple(map(str, answers)), kind)
    return Task(
        path.stem if path.stem not in ("questions", "metadata") else path.parent.name,
        tuple(items.values()),
        _opener(stored),
    )


def _jsonl(path: Path, n: int | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if len(rows) == n:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(
                    f"{path}, line {number} is not JSON: {error}", "write one JSON object a line"
                ) from error
            if not isinstance(row, dict):
                raise TaskError(f"{path}, line {number} is no object", _LINE)
            rows.append(row)
    return rows


def _parquet(path: Path, n: int | None) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependency("parquet files are read by pyarrow", "pip install 'foveate[lab]'") from error
    rows: list[dict[str, Any]] = parquet.read_table(path).slice(0, n).to_pylist()
    return rows


def _pictures(row: Mapping[str, Any], where: str) -> list[Any]:
    value = row.get("images", row.get("image", row.get("file_name")))
    pictures = value if isinstance(value, list) else [] if value is None else [value]
    if not pictures:
        raise TaskError(f"{where} has no picture; it has {', '.join(row)}", "each row has image, question and answer")
    return pictures


def _picture(value: Any, path: Path, stored: dict[str, bytes], where: str) -> str:
    """Return the key of a picture: its path, or the digest under which its bytes are kept."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        key = hashlib.sha256(value).hexdigest()
        stored[key] = value
        return key
    if not isinstance(value, str):
        raise TaskError(f"{where}: a picture is a path or bytes, got {type(value).__name__}", 'like "image": "a.png"')
    file = path.parent / value
    if not file.is_file():
        raise TaskError(f"{where}: no such picture: {file}", f"paths count from {path.parent}")
    return str(file)


def _opener(stored: Mapping[str, bytes]) -> Callable[[str], Image.Image]:
    def open_one(key: str) -> Image.Image:
        from PIL import Image, ImageOps

        try:
            with Image.open(io.BytesIO(stored[key]) if key in stored else key) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of them on broken files
            raise TaskError(f"not a readable picture: {key}", "pass complete PNG, JPEG or WebP files") from error

    return open_one
