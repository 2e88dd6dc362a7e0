"""Pictures by name, opened one at a time and in any process: what a scale-out needs of a folder or a parquet file."""

from __future__ import annotations

import bisect
import io
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from foveate.errors import MissingDependency, TaskError


class Pictures:
    """The pictures of a folder, or of a parquet file's column ``image``.

    Args:
        source: A folder, whose pictures are named by their files, or a file, whose pictures are named by their rows.

    Attributes:
        names: All of them, in order.

    Raises:
        TaskError: If there are none.
        MissingDependency: If a parquet file cannot be read.
    """

    def __init__(self, source: Path | str) -> None:
        self.source = Path(source)
        self._ends: list[int] = []
        self._group: tuple[int, Any] = (-1, None)
        if self.source.is_dir():
            known = Image.registered_extensions()
            self.names = sorted(file.name for file in self.source.iterdir() if file.suffix.lower() in known)
        else:
            metadata = self._file().metadata
            groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
            self._ends = list(accumulate(group.num_rows for group in groups))
            self.names = [str(row) for row in range(metadata.num_rows)]
        if not self.names:
            raise TaskError(f"no pictures in {self.source}", "name a folder with pictures, or a parquet file")

    def open(self, name: str) -> Image.Image:
        """Return a picture in RGB, upright; of a parquet file only the row group around it is read.

        Raises:
            TaskError: If it is broken.
        """
        try:
            with Image.open(self._row(int(name)) if self._ends else self.source / name) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of them on broken files
            raise TaskError(f"not a readable picture: {name} of {self.source}", "mend it, or take it out") from error

    def _row(self, row: int) -> io.BytesIO:
        group = bisect.bisect_right(self._ends, row)
        if self._group[0] != group:
            self._group = group, self._file().read_row_group(group, columns=["image"])["image"]
        value = self._group[1][row - self._ends[group]].as_py()
        return io.BytesIO(value["bytes"] if isinstance(value, dict) else value)

    def _file(self) -> Any:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise MissingDependency("parquet files are read by pyarrow", "pip install 'foveate[lab]'") from error
        try:
            file = parquet.ParquetFile(self.source)
        except (OSError, ValueError) as error:  # pyarrow's own errors are among them
            raise TaskError(f"{self.source} is no folder and no parquet file", "name one that is") from error
        if "image" not in file.schema_arrow.names:
            raise TaskError(f"{self.source} has no column 'image'", f"it has {', '.join(file.schema_arrow.names)}")
        return file
