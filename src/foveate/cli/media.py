"""What a question on the command line is about: pictures, or a video."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.cli.ask import UserError
from foveate.errors import FoveateError

if TYPE_CHECKING:
    from foveate.draw.ground import Frames
    from foveate.lab.media import Media, Video

#: Frames of a video, where neither the user nor the processor says how many.
FRAMES = 8


def shows_video(paths: Sequence[Path], question: str, frames: int | None) -> bool:
    """Whether these paths are one video; else they are pictures.

    Raises:
        UserError: If they are neither, or what else was typed does not go with them.
    """
    from foveate.lab.media import is_video

    if os.path.exists(question):
        kind = "folder" if os.path.isdir(question) else "file"
        raise UserError(f"no question, {question} is a {kind}", 'the question comes last: "what is in the picture?"')
    for path in paths:
        if not os.path.exists(path):  # unlike Path.exists, it takes a question that is too long for a name
            raise UserError(f"no such picture: {path}", "check the path, or try the bundled picture: foveate demo")
    videos = [path for path in paths if is_video(path)]
    if videos and len(paths) > 1:
        what = f"{len(videos)} videos" if len(videos) == len(paths) else f"pictures and a video, {videos[0]},"
        raise UserError(f"{what} in one question", "ask about one video, or about pictures")
    if frames is not None and not videos:
        raise UserError(f"--frames is for videos, {paths[0]} is a picture", "leave --frames out")
    return bool(videos)


def watch(path: Path, processor: Any, frames: int | None) -> Video:
    """Return as many frames of a video as are wanted, evenly spread.

    Args:
        path: A file, or a folder of frames.
        processor: Processor of the model that is asked.
        frames: Frames at most; what suits the model unless told.

    Raises:
        TaskError: If the video cannot be read.
    """
    from foveate.lab.media import open_video

    suits = getattr(getattr(processor, "video_processor", processor), "num_frames", None) or FRAMES
    return open_video(path, frames or suits)


def prepare(network: Any, processor: Any, shown: Sequence[Media], question: str) -> Any:
    """Return the model's inputs.

    Raises:
        UnsupportedModel: If it is shown a video, and the model reads none.
        UserError: If the processor refuses what it is shown: so many pictures, or a video where its template has none.
    """
    from foveate.lab import chat

    try:
        return chat.prepare(network, processor, [shown], [question])
    except FoveateError:
        raise
    except ValueError as error:
        name, first = type(processor).__name__, str(error).splitlines()[0].rstrip(".")
        hint = "ask about one picture, or of another model: foveate families"
        raise UserError(f"{name} cannot read this: {first}", hint) from error


def drawable(shown: Sequence[Media]) -> list[Frames]:
    """Return pictures, and of videos their frames, as drawings take them."""
    from foveate.lab.media import Video

    return [one.frames if isinstance(one, Video) else one for one in shown]


def crops(processor: Any, *, video: bool = False) -> bool:
    """Whether the processor cuts pictures, or frames, to their central square."""
    part = getattr(processor, "video_processor", None) if video else None
    return bool(getattr(part or getattr(processor, "image_processor", None), "do_center_crop", False))
