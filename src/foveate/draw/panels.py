"""Where tokens lie on a picture: a panel is a picture, or a part of it, under a grid of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foveate.report import ImageReport

Grid = tuple[int, int, int]
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Panel:
    """A grid of tokens over a picture.

    Args:
        tokens: The number of the token in each cell, row by row.
        box: The part of the picture that the grid covers: left, top, right, bottom as shares of its width and height;
            below 0 and above 1 where cells lie partly beside it.
        frame: Which frame of a video it shows.
        title: What it shows, where there are several.
    """

    tokens: tuple[tuple[int, ...], ...]
    box: Box = WHOLE
    frame: int = 0
    title: str = ""

    @property
    def rows(self) -> int:
        """Rows of cells."""
        return len(self.tokens)

    @property
    def columns(self) -> int:
        """Cells of a row."""
        return len(self.tokens[0])

    @property
    def order(self) -> tuple[int, ...]:
        """The number of the token in each cell, in reading order."""
        return tuple(token for row in self.tokens for token in row)


def panels(report: ImageReport, size: tuple[int, int], *, crop: bool = False) -> tuple[Panel, ...]:
    """Return the panels that show all tokens of an image or video.

    A picture that was read as a whole and in tiles has two: the whole, and the tiles put together. A video has one for
    each frame (each pair of frames, where the model reads them so).

    Args:
        report: An entry of ``Report.images``.
        size: Width and height of the picture.
        crop: The processor cut the picture to its central square before it made tokens; one that was cut into tiles
            was read to its borders all the same.

    Raises:
        ValueError: If there are no tokens to show.
    """
    if report.frames is not None:
        names = ("whole", "tiles") if len(report.frames) == 2 else tuple(map(str, range(len(report.frames))))
        shown, start = [], 0
        for (rows, columns), name in zip(report.frames, names, strict=True):
            box = WHOLE if start == 0 else padded(size, rows, columns)
            shown.append(Panel(_cells(start, rows, columns), box, title=name))
            start += rows * columns
        return tuple(shown)
    count, rows, columns = report.grid
    if report.modality == "image" and count > 1:
        return _tiles(report.grid, size)
    return of_grid(report.grid, central(size) if crop else WHOLE)


def of_grid(grid: Grid, box: Box = WHOLE) -> tuple[Panel, ...]:
    """Return a panel for each frame of a grid, over the same part of each picture.

    Raises:
        ValueError: If the grid holds no cells.
    """
    if min(grid) < 1:
        raise ValueError(f"a grid is frames, rows, columns, each at least 1, got {grid}")
    frames, rows, columns = grid
    titles = [f"frame {frame}" if frames > 1 else "" for frame in range(frames)]
    return tuple(
        Panel(_cells(frame * rows * columns, rows, columns), box, frame, title) for frame, title in enumerate(titles)
    )


def central(size: tuple[int, int]) -> Box:
    """Return the central square of a picture."""
    width, height = size
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return left / width, top / height, (left + side) / width, (top + side) / height


def padded(size: tuple[int, int], rows: int, columns: int) -> Box:
    """Return where square cells lie that were put centrally over a picture without changing its shape.

    They reach beyond the picture where it fills no whole number of them.

    Args:
        size: Width and height of the picture.
        rows: Of the cells.
        columns: Of the cells.

    Example:
        >>> padded((300, 200), 6, 8)
        (0.0, -0.0625, 1.0, 1.0625)
    """
    width, height = size
    side = max(width / columns, height / rows)
    across, down = (columns * side / width - 1) / 2, (rows * side / height - 1) / 2
    return 0.0 - across, 0.0 - down, 1 + across, 1 + down


def tiling(tiles: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return into how many rows and columns of tiles a picture was cut: those that distort it least.

    Args:
        tiles: How many tiles there are.
        size: Width and height of the picture.

    Example:
        >>> tiling(6, (900, 600)), tiling(6, (500, 900)), tiling(12, (800, 600))
        ((2, 3), (3, 2), (3, 4))
    """
    ways = [(tiles // columns, columns) for columns in range(1, tiles + 1) if tiles % columns == 0]
    return min(ways, key=lambda way: abs(way[1] / way[0] - size[0] / size[1]))


def _tiles(grid: Grid, size: tuple[int, int]) -> tuple[Panel, ...]:
    """The panels of tiles in reading order and, after them, the whole picture."""
    count, rows, columns = grid
    high, wide = tiling(count - 1, size)
    put_together = tuple(
        tuple(
            (tile_row * wide + tile) * rows * columns + row * columns + column
            for tile in range(wide)
            for column in range(columns)
        )
        for tile_row in range(high)
        for row in range(rows)
    )
    whole = _cells((count - 1) * rows * columns, rows, columns)
    return Panel(whole, title="whole"), Panel(put_together, title="tiles")


def _cells(start: int, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(start + row * columns + column for column in range(columns)) for row in range(rows))


def finest(panels: tuple[Panel, ...], size: tuple[int, int]) -> float:
    """Return the shorter side of the smallest cell, in pixels of a picture of this size."""
    width, height = size
    sides = [
        side
        for panel in panels
        for side in (
            (panel.box[2] - panel.box[0]) * width / panel.columns,
            (panel.box[3] - panel.box[1]) * height / panel.rows,
        )
    ]
    return min(sides, default=math.inf)
