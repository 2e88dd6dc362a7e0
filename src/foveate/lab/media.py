"""What a question may be about: a picture, or a video, which is a few frames in their order; and files of both.

Folders of frames and moving GIF, PNG and WebP files are read by Pillow, films (MP4, WebM ...) by PyAV.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps, ImageSequence

from foveate.errors import MissingDependency, TaskError

#: Files that are films: their frames need a decoder.
FILMS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi")

#: Files that may hold one picture or many.
MOVING = (".gif", ".png", ".apng", ".webp")

#: What Pillow raises on broken files.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError)

T = TypeVar("T")


@dataclass(frozen=True)
class Video:
    """Frames in their order, RGB, all of one size."""

    frames: tuple[Image.Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of each frame."""
        return self.frames[0].size


#: What is shown to a model.
Media = Image.Image | Video


def is_video(path: Path) -> bool:
    """Whether a path is a folder, a film, or a moving picture."""
    if path.is_dir() or path.suffix.lower() in FILMS:
        return True
    if path.suffix.lower() not in MOVING or not path.is_file():
        return False
    try:
        with Image.open(path) as picture:
            return bool(getattr(picture, "n_frames", 1) > 1)
    except _BROKEN:
        return False


def open_picture(file: Path | str | io.BytesIO, name: str = "") -> Image.Image:
    """Return a picture in RGB, upright.

    Args:
        file: A path, or an open file.
        name: What messages call it; its path unless told.

    Raises:
        TaskError: If it cannot be read.
    """
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError as error:
        hint = "check the path, or try the bundled picture: foveate demo"
        raise TaskError(f"no such picture: {name or file}", hint) from error
    except _BROKEN as error:
        raise TaskError(f"not a readable picture: {name or file}", "pass complete PNG, JPEG or WebP files") from error


def open_video(path: Path, most: int | None = None) -> Video:
    """Return the frames of a folder (its pictures, by name), a moving GIF, PNG or WebP, or a film.

    Args:
        path: The folder or file.
        most: Frames at most; more are thinned evenly, the first and the last stay. None: all of them.

    Raises:
        TaskError: If there is no such video, no frame in it, or frames of several sizes.
        MissingDependency: If a film is to be read without PyAV.
    """
    if most is not None and most < 1:
        raise TaskError(f"a video has at least one frame, got {most}", "ask for 8 frames")
    if not path.exists():
        raise TaskError(f"no such video: {path}", "pass a folder of frames, a GIF or WebP, or a film such as an MP4")
    if path.is_dir():
        frames = _folder(path, most)
    elif path.suffix.lower() in FILMS:
        frames = _film(path, most)
    else:
        frames = _moving(path, most)
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        found = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)) or "none"
        raise TaskError(f"the frames of a video have one size; those of {path} have {found}", "scale them to one size")
    return Video(tuple(frames))


def thinned(count: int, most: int | None) -> list[int]:
    """Return which of ``count`` frames stay: at most ``most``, spread evenly, the first and the last among them.

    Example:
        >>> thinned(9, 3), thinned(4, 8), thinned(5, 1)
        ([0, 4, 8], [0, 1, 2, 3], [2])
    """
    if most is None or count <= most:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def grey(media: Media) -> Media:
    """Return the same with nothing to see: a picture, or frames, of even grey."""
    if isinstance(media, Video):
        return Video((Image.new("RGB", media.size, (128, 128, 128)),) * len(media.frames))
    return Image.new("RGB", media.size, (128, 128, 128))


# -- three kinds of file


def _folder(path: Path, most: int | None) -> list[Image.Image]:
    known = Image.registered_extensions()
    files = sorted((file for file in path.iterdir() if file.suffix.lower() in known), key=_in_order)
    if not files:
        raise TaskError(f"no pictures in {path}", "a video is a folder of frames: 01.png, 02.png ...")
    return [open_picture(files[place]) for place in thinned(len(files), most)]


def _in_order(file: Path) -> list[tuple[int, str]]:
    """Sort 2.png before 10.png."""
    pieces = re.findall(r"\d+|\D+", file.name)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece.lower()) for piece in pieces]


def _moving(path: Path, most: int | None) -> list[Image.Image]:
    try:
        with Image.open(path) as picture:
            wanted = thinned(getattr(picture, "n_frames", 1), most)
            return [frame.convert("RGB") for frame in _at(ImageSequence.Iterator(picture), wanted)]
    except _BROKEN as error:
        raise TaskError(f"not a readable video: {path}", "pass a folder of frames, a GIF, a WebP or an MP4") from error


def _film(path: Path, most: int | None) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise MissingDependency(f"{path.suffix} files are read by PyAV", "pip install 'foveate[video]'") from error

    try:
        with av.open(path) as film:  # what the file says of its length is often wrong
            count = sum(1 for packet in film.demux(video=0) if packet.size and not packet.is_discard)
        frames, shown = _decoded(path, thinned(count, most))
        return frames if shown == count else _decoded(path, thinned(shown, most))[0]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise TaskError(f"not a readable film: {path}", "pass an MP4 or WebM file with a picture track") from error


def _decoded(path: Path, wanted: list[int]) -> tuple[list[Image.Image], int]:
    """Return the frames at some places, and how many the film shows: not every packet need become a frame."""
    import av

    frames, shown, places = list[Image.Image](), 0, set(wanted)
    with av.open(path) as film:
        for shown, frame in enumerate(film.decode(video=0), 1):
            if shown - 1 in places:
                frames.append(_upright(frame))
    return frames, shown


def _upright(frame: Any) -> Image.Image:
    """Return a film's frame as it is to be seen: telephones lay films on their side, and say how to turn them."""
    picture: Image.Image = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _at(items: Iterable[T], wanted: list[int]) -> Iterator[T]:
    """Yield the items at some rising places; later ones are not looked at."""
    last, places = (wanted[-1] if wanted else -1), set(wanted)
    return (item for place, item in enumerate(itertools.islice(items, last + 1)) if place in places)
