"""Pictures of a folder and of a parquet file are the same pictures, by name, in any process."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.errors import TaskError
from foveate.lab.pictures import Pictures

COLOURS = [(10 * i, 0, 255 - 10 * i) for i in range(7)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (4, 3), colour).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(params=["as datasets write it", "bytes alone"])
def file(folder: Path, request: pytest.FixtureRequest) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    stored = [(folder / f"{i}.png").read_bytes() for i in range(len(COLOURS))]
    column = stored if request.param == "bytes alone" else [{"bytes": one, "path": None} for one in stored]
    parquet.write_table(
        pa.table({"image": column, "id": list(range(7))}), folder.parent / "p.parquet", row_group_size=3
    )
    return folder.parent / "p.parquet"


def test_a_folder(folder: Path) -> None:
    pictures = Pictures(folder)
    assert pictures.names == [f"{i}.png" for i in range(7)]
    assert [pictures.open(name).getpixel((0, 0)) for name in pictures.names] == COLOURS


def test_a_parquet_file(file: Path) -> None:
    pictures = pickle.loads(pickle.dumps(Pictures(file)))
    assert pictures.names == [str(i) for i in range(7)]
    order = ["6", "0", "3", "2", "5", "1", "4"]
    assert [pictures.open(name).getpixel((0, 0)) for name in order] == [COLOURS[int(name)] for name in order]


def test_pictures_stand_upright(folder: Path) -> None:
    turned = Image.new("L", (4, 2))
    turned.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it right by a quarter
    turned.save(folder / "0.png", exif=exif)
    picture = Pictures(folder).open("0.png")
    assert (picture.size, picture.mode) == ((2, 4), "RGB")
    assert np.asarray(picture)[0, 1].tolist() == [255, 255, 255]


def test_what_holds_no_pictures_is_named(tmp_path: Path, folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"photo": [b""]}), tmp_path / "other.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "other.parquet").read_bytes()[:20])
    for source, said in (
        (tmp_path / "empty", "no pictures in"),
        (tmp_path / "missing", "is no folder and no parquet file"),
        (folder / "notes.txt", "is no folder and no parquet file"),
        (tmp_path / "torn.parquet", "is no folder and no parquet file"),
        (tmp_path / "other.parquet", "no column 'image'"),
    ):
        with pytest.raises(TaskError, match=said):
            Pictures(source)
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes()[:40])
    with pytest.raises(TaskError, match=r"not a readable picture: 1\.png") as caught:
        Pictures(folder).open("1.png")
    assert isinstance(caught.value.__cause__, OSError | SyntaxError | ValueError)


def test_one_row_group_is_read_at_a_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    read: list[int] = []
    whole = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_group", lambda self, i, **kw: read.append(i) or whole(self, i, **kw)
    )
    pictures = Pictures(file)
    for name in pictures.names:
        pictures.open(name)
    assert read == [0, 1, 2]
