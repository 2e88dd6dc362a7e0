"""Pictures that the studio offers, and those that a user brings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from foveate import demo
from foveate.demo.world import scene
from foveate.studio.errors import StudioError

if TYPE_CHECKING:
    from PIL import Image

#: Scenes of the demo model's world that it has never seen, offered beside `foveate.demo.PICTURE`.
SCENES = (30_000_000, 30_000_003, 30_000_005)
#: Pixels of a picture, at most.
MOST_PIXELS = 36_000_000


@dataclass(frozen=True, eq=False)
class Example:
    """A picture to choose, and what can be asked about it.

    Args:
        image: The picture.
        questions: Questions; the demo model knows no others.
    """

    image: Image.Image
    questions: tuple[str, ...]


def examples() -> list[Example]:
    """Return the bundled picture, and a few scenes that are painted anew each time."""
    chosen = [Example(opened(demo.PICTURE), tuple(question for question, _ in demo.QUESTIONS))]
    for seed in SCENES:
        made = scene(seed)
        kinds = {question.type: question.text for question in reversed(made.questions)}  # the first of each type
        chosen.append(Example(made.image, tuple(reversed(kinds.values()))[:4]))
    return chosen


def opened(path: str | Path) -> Image.Image:
    """Return the picture in RGB, upright.

    Raises:
        StudioError: If it is broken, or too large.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise _too_large()
            return ImageOps.exif_transpose(picture).convert("RGB")
    except StudioError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large() from error
    except Exception as error:  # Pillow raises whatever it meets in a broken file
        raise StudioError("this file is not a readable picture", "choose a complete PNG, JPEG or WebP file") from error


def _too_large() -> StudioError:
    return StudioError("this picture is too large", f"make it smaller: at most {MOST_PIXELS:,} pixels")
