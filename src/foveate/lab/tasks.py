"""What is asked: questions about pictures and videos with their answers, from a demo world or from files."""

from __future__ import annotations

import hashlib
import io
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from foveate.errors import MissingDependency, TaskError, did_you_mean
from foveate.lab.media import Media, Video, open_picture, open_video

#: The files of a folder that may hold its questions, the first that is there.
QUESTION_FILES = ("questions.jsonl", "metadata.jsonl")
SCORES = ("exact", "contains")

#: Frames that are read of a video at most, where a row does not say.
FRAMES = 16

#: Questions of a demo world's held-out set.
HELD_OUT = 2000

_LINE = 'one object a line: {"image": "a.png", "question": "...", "answer": "..."}'
_SIGNS = f"[{re.escape(string.punctuation)}]"


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        name: Its name in the task, unique.
        pictures: Keys of its pictures, in the order of the prompt, or of its video; `Task.open` opens them.
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
    """Questions, how to open what they are about, and what that is called."""

    name: str
    items: tuple[Item, ...]
    open: Callable[[str], Media]
    about: str = "pictures"


def load_task(source: str, n: int | None = None) -> Task:
    """Read a task.

    Args:
        source: ``demo``, ``demo-hd`` or ``demo-video``: the held-out set of that world, 2,000 questions. Or a JSONL or
            parquet file, or a folder that holds ``questions.jsonl``, ``metadata.jsonl`` or one parquet file. Each row
            has ``image`` (a path from the file's folder; in parquet also the picture's bytes), ``images`` or ``video``
            (a folder of frames, a moving GIF or WebP, or a film), ``question``, and ``answer`` or ``answers``; it may
            have ``type``, ``id``, and ``frames``, the most that are read of its video.
        n: Take the first n questions only.

    Raises:
        TaskError: With the file, the row, and what is missing.
        MissingDependency: If a parquet file is to be read without pyarrow.
    """
    if n is not None and n < 1:
        raise TaskError(f"a task has at least one question, got n={n}", "leave n out for all questions")
    path = Path(source)
    task = _world(source, n) if source in WORLDS else _table(_file(path), n)
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


def _demo() -> tuple[Any, Callable[[str], Media], Callable[[int], tuple[str, ...]]]:
    from foveate.demo.world import held_out, scene

    return held_out, lambda key: scene(int(key)).image, lambda seed: (str(seed),)


def _demo_hd() -> tuple[Any, Callable[[str], Media], Callable[[int], tuple[str, ...]]]:
    from foveate.demo.hd.world import contents, held_out, scene

    drawn = lru_cache(maxsize=1)(scene)  # the two pictures of a scene are drawn together

    def open_one(key: str) -> Media:
        seed, _, number = key.partition("/")
        return drawn(int(seed)).pictures[int(number)]

    return held_out, open_one, lambda seed: tuple(f"{seed}/{number}" for number in range(len(contents(seed)[1])))


def _demo_video() -> tuple[Any, Callable[[str], Media], Callable[[int], tuple[str, ...]]]:
    from foveate.demo.video.world import clip, held_out

    return held_out, lambda key: Video(clip(int(key)).frames), lambda seed: (str(seed),)


#: The demo models' worlds: the held-out set, what a key opens, and the keys of a seed.
WORLDS = {"demo": _demo, "demo-hd": _demo_hd, "demo-video": _demo_video}


#: What their questions are about, where it is not single pictures.
ABOUT = {"demo-hd": "pictures or pairs of them", "demo-video": "clips"}


def _world(name: str, n: int | None) -> Task:
    held_out, opened, keys = WORLDS[name]()
    whole = HELD_OUT if n is None else min(HELD_OUT, -(-n // 4) * 4)
    items = [
        Item(str(i), keys(seed), question.text, (question.answer,), question.type)
        for i, (seed, question) in enumerate(held_out(whole))
    ]
    return Task(name, tuple(items[:n]), opened, ABOUT.get(name, Task.about))


def _file(path: Path) -> Path:
    if not path.exists():
        raise TaskError(
            f"no such task: {path}", f"pass {', '.join(WORLDS)}, a JSONL or parquet file, or a folder that holds one"
        )
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
    stored: dict[str, bytes | tuple[Path, int]] = {}
    items: dict[str, Item] = {}
    for place, columns in enumerate(rows):
        where, row = f"{path}, row {place + 1}", {name: one for name, one in columns.items() if one is not None}
        pictures = _shown(row, path, stored, where)
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
        "videos" if any(isinstance(kept, tuple) for kept in stored.values()) else Task.about,
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


def _shown(row: Mapping[str, Any], path: Path, stored: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return the keys of what a row is about."""
    value = row.get("images", row.get("image", row.get("file_name", [])))
    pictures = value if isinstance(value, list) else [value]
    video = row.get("video")
    if not pictures and video is None:
        raise TaskError(f"{where} has no picture; it has {', '.join(row)}", "each row has image, question and answer")
    if pictures and video is not None:
        raise TaskError(f"{where} has pictures and a video", "ask about one video, or about pictures")
    if video is None:
        return tuple(_picture(one, path, stored, where) for one in pictures)
    most = row.get("frames", FRAMES)
    if isinstance(most, float) and most.is_integer():  # as columns are in which some rows have none
        most = int(most)
    if not isinstance(video, str) or isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise TaskError(f"{where}: video is a path, frames a number", 'like "video": "clip.mp4", "frames": 8')
    file = path.parent / video
    if not file.exists():
        raise TaskError(f"{where}: no such video: {file}", f"paths count from {path.parent}")
    key = str(file) if most == FRAMES else f"{file}, {most} frames"
    stored[key] = file, most
    return (key,)


def _picture(value: Any, path: Path, stored: dict[str, Any], where: str) -> str:
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


def _opener(stored: Mapping[str, bytes | tuple[Path, int]]) -> Callable[[str], Media]:
    def open_one(key: str) -> Media:
        kept = stored.get(key)
        if isinstance(kept, tuple):
            return open_video(*kept)
        return open_picture(key if kept is None else io.BytesIO(kept), key)

    return open_one
