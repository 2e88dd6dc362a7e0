"""Tasks from files: what is read, how answers are judged, and what is refused before anything is asked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.errors import TaskError
from foveate.lab.media import Video
from foveate.lab.tasks import load_task, normalise, right


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (8, 6), colour).save(tmp_path / name)
    return tmp_path


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_with_questions(folder: Path) -> None:
    jsonl(
        folder / "questions.jsonl",
        {"image": "red.png", "question": "colour?", "answer": "red", "type": "colour"},
        {"images": ["red.png", "blue.png"], "question": "which?", "answers": ["both", "all"], "id": "last"},
        {"image": "red.png", "question": "how many?", "answer": 1},
    )
    task = load_task(str(folder))
    first, second, third = task.items
    assert task.name == folder.name and load_task(str(folder), 2).items == (first, second)
    assert (first.name, first.type, first.answers) == ("0", "colour", ("red",))
    assert (second.name, second.type, second.answers, len(second.pictures)) == ("last", "all", ("both", "all"), 2)
    assert third.answers == ("1",) and third.pictures == first.pictures
    assert [task.open(key).getpixel((0, 0)) for key in second.pictures] == [(255, 0, 0), (0, 0, 255)]


def test_parquet_with_pictures_inside(folder: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    stored = io.BytesIO()
    Image.new("RGB", (4, 4), "lime").save(stored, "PNG")
    picture = {"bytes": stored.getvalue(), "path": None}
    rows = [
        {"image": picture, "question": "a?", "answer": "x"},
        {"image": {"bytes": None, "path": "red.png"}, "question": "b?", "answer": "y"},
        {"image": picture, "question": "c?", "answer": "z"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "set.parquet")
    task = load_task(str(folder))
    keys = [item.pictures[0] for item in task.items]
    assert keys[0] == keys[2] != keys[1], "the same picture is one picture"
    assert [task.open(key).getpixel((0, 0)) for key in keys[:2]] == [(0, 255, 0), (255, 0, 0)]


def test_columns_that_are_empty_count_as_none(folder: Path) -> None:
    """Where some rows are about videos, the tables of parquet have null in what the others lack."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "clip").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 6), "lime").save(folder / "clip" / f"{i}.png")
    rows: list[dict[str, Any]] = [
        {"image": "red.png", "question": "a?", "answer": "x", "id": None, "type": None},
        {"images": ["red.png", "blue.png"], "question": "b?", "answers": ["y", "z"], "type": "two"},
        {"video": "clip", "question": "c?", "answer": "x", "frames": None},
        {"video": "clip", "question": "d?", "answer": "x", "frames": 2.0, "id": "last"},
    ]
    columns = {name: None for row in rows for name in row}
    table = pyarrow.Table.from_pylist([columns | row for row in rows])
    parquet.write_table(table, folder / "mixed.parquet")
    for file in (folder / "mixed.parquet", jsonl(folder / "mixed.jsonl", *(columns | row for row in rows))):
        task = load_task(str(file))
        assert [(item.name, item.type) for item in task.items] == [
            ("0", "all"), ("1", "two"), ("2", "all"), ("last", "all")
        ]  # fmt: skip
        assert [item.answers for item in task.items[:2]] == [("x",), ("y", "z")]
        shown = [[task.open(key) for key in item.pictures] for item in task.items]
        assert list(map(len, shown)) == [1, 2, 1, 1]
        assert [len(clip.frames) for (clip,) in shown[2:] if isinstance(clip, Video)] == [4, 2]


def test_the_demo_world() -> None:
    task = load_task("demo", 6)
    assert len(task.items) == 6 and task.open(task.items[0].pictures[0]).size == (336, 336)
    assert task.items[0].pictures == task.items[3].pictures != task.items[4].pictures, "four questions a picture"


def test_a_row_about_a_video(folder: Path) -> None:
    (folder / "clip").mkdir()
    for i, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (8, 6), colour).save(folder / "clip" / f"{i}.png")
    rows = [{"video": "clip", "question": "what?", "answer": "x"}]
    rows += [{**rows[0], "frames": 2}, {**rows[0], "question": "again?"}]
    task = load_task(str(jsonl(folder / "a.jsonl", *rows)))
    keys = [item.pictures for item in task.items]
    assert keys[0] == keys[2] != keys[1], "a video that is read in another way is another"
    clips = [task.open(key) for (key,) in keys]
    assert all(isinstance(clip, Video) for clip in clips)
    assert [[frame.getpixel((0, 0)) for frame in clip.frames] for clip in clips[:2]] == [
        [(255, 0, 0), (0, 255, 0), (0, 0, 255)],
        [(255, 0, 0), (0, 0, 255)],
    ]


def test_the_worlds_of_several_pictures_and_of_clips() -> None:
    large = load_task("demo-hd", 30)
    shown = {item.pictures for item in large.items}
    assert {len(keys) for keys in shown} == {1, 2} and len(shown) == 8
    pair = next(keys for keys in shown if len(keys) == 2)
    one, other = (large.open(key) for key in pair)
    assert one.size == other.size and one.tobytes() != other.tobytes()
    asked = {item.pictures: item.type for item in large.items}
    assert asked[pair] in ("which", "differs")
    clips = load_task("demo-video", 6)
    video = clips.open(clips.items[0].pictures[0])
    assert isinstance(video, Video) and video.size == (168, 168) and len(video.frames) in (8, 12, 16)
    assert clips.items[:4] == load_task("demo-video", 4).items


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no question in"),
        ([{"image": "red.png", "question": "a?"}], "row 1 has image, question"),
        ([{"image": "red.png", "question": "", "answer": "b"}], "row 1 has image, question, answer"),
        ([{"question": "a?", "answer": "b"}], "row 1 has no picture"),
        ([{"image": "green.png", "question": "a?", "answer": "b"}], "no such picture"),
        ([{"video": "no.mp4", "question": "a?", "answer": "b"}], "no such video"),
        ([{"video": "red.png", "frames": 0, "question": "a?", "answer": "b"}], "video is a path, frames a number"),
        ([{"video": "red.png", "frames": 2.5, "question": "a?", "answer": "b"}], "video is a path, frames a number"),
        ([{"image": None, "question": "a?", "answer": "b"}], "row 1 has no picture; it has question, answer"),
        ([{"image": "red.png", "question": "a?", "answers": None}], "row 1 has image, question"),
        ([{"video": "red.png", "image": "red.png", "question": "a?", "answer": "b"}], "has pictures and a video"),
        ([{"image": 3, "question": "a?", "answer": "b"}], "a picture is a path or bytes, got int"),
        ([{"image": "red.png", "question": "a?", "answer": "b", "id": "x"}] * 2, "the id 'x' is taken"),
    ],
)
def test_a_wrong_row_is_refused_with_its_place(folder: Path, rows: list[dict[str, Any]], message: str) -> None:
    path = jsonl(folder / "mine.jsonl", *rows)
    with pytest.raises(TaskError, match=message) as refused:
        load_task(str(path))
    assert refused.value.hint


def test_what_is_no_task_is_refused(folder: Path) -> None:
    for source, message in ((folder, "has none"), (folder / "nothing.jsonl", "no such task")):
        with pytest.raises(TaskError, match=message):
            load_task(str(source))
    (folder / "torn.jsonl").write_text('{"image": "red')
    (folder / "list.jsonl").write_text("[1]\n")
    for name, message in (("torn.jsonl", "line 1 is not JSON"), ("list.jsonl", "line 1 is no object")):
        with pytest.raises(TaskError, match=message):
            load_task(str(folder / name))
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    task = load_task(str(jsonl(folder / "b.jsonl", {"image": "broken.png", "question": "a?", "answer": "b"})))
    with pytest.raises(TaskError, match="not a readable picture"):
        task.open(task.items[0].pictures[0])
    with pytest.raises(TaskError, match="at least one question"):
        load_task("demo", 0)


@pytest.mark.parametrize(
    ("given", "answer", "exact", "contains"),
    [
        ("Red.", "red", True, True),
        ("the  red one", "red", False, True),
        ("A", "a", True, True),
        ("hundred", "red", False, False),
        ("2.5", "2.5", True, True),
        ("25", "2.5", False, False),
        ("it is 3!", "3", False, True),
        ("", "red", False, False),
    ],
)
def test_judging(given: str, answer: str, exact: bool, contains: bool) -> None:
    assert right(given, [answer, "never"]) == exact
    assert right(given, ["never", answer], "contains") == contains


def test_judging_asks_for_a_known_way() -> None:
    with pytest.raises(TaskError, match="'exakt'"):
        right("a", ["a"], "exakt")
    assert normalise("...") == ""
