"""`foveate run` about large pictures, several pictures, and videos of every kind."""

from __future__ import annotations

import builtins
import importlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from foveate import demo
from foveate.cli import media
from tests.cli.test_bad_input import refused
from tests.cli.test_commands import call
from tests.cli.test_see import data
from tests.vllm import tiny as folders
from tests.zoo.models import BOS, VIDEO_TOKEN, tiny

SIDE = 16  # of the frames that the tiny video model reads: 4 tokens each
METHOD = ("--method", "evocut:keep=8", "--max-new-tokens", "2")


class Projector:
    """A processor for the tiny video model that remembers what it was shown."""

    chat_template = "here"
    image_processor = SimpleNamespace(do_center_crop=False)
    num_frames = 12

    def __init__(self) -> None:
        self.shown: list[Image.Image] = []

    def apply_chat_template(self, conversations: Any, **_: Any) -> BatchFeature:
        (message,) = conversations[0]
        self.shown = list(message["content"][0]["video"])
        pixels = np.stack([np.asarray(frame.resize((SIDE, SIDE))) for frame in self.shown]).transpose(0, 3, 1, 2)
        ids = torch.tensor([[BOS, *[VIDEO_TOKEN] * 4 * len(self.shown), 7, 8]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return BatchFeature(batch | {"pixel_values_videos": torch.from_numpy(pixels / 255.0)[None].float()})

    def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]

    @property
    def numbers(self) -> list[int]:
        """The numbers of the frames that were shown, as `frames` painted them."""
        return [round(frame.getpixel((frame.width - 4, 20))[0] / 10) for frame in self.shown]  # type: ignore[index]


@pytest.fixture
def projector(monkeypatch: pytest.MonkeyPatch) -> Projector:
    """The processor of the model that every name loads: a tiny one that reads videos."""
    processor = Projector()
    command = importlib.import_module("foveate.cli.run")  # the package has a function of that name
    monkeypatch.setattr(command, "load", lambda *_, **__: (tiny("llava_next_video"), processor))
    return processor


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that reads pictures as a whole and in tiles of 64 px, 8 x 8 tokens each."""
    return folders.folder("llava_next", tmp_path_factory.mktemp("models"))


def frames(count: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """Frames as grey as ten times their number says, with a white spot in the upper left corner."""
    made = [Image.new("RGB", size, (10 * number,) * 3) for number in range(count)]
    for frame in made:
        frame.paste((255, 255, 255), (0, 0, 16, 16))
    return made


def filmed(path: Path, shown: Sequence[Image.Image], codec: str, turned: int = 0) -> Path:
    with av.open(str(path), "w") as film:
        stream: Any = film.add_stream(codec, rate=10)
        (stream.width, stream.height), stream.pix_fmt = shown[0].size, "yuv420p"
        if turned:
            stream.set_display_rotation(turned)
        for frame in shown:
            film.mux(stream.encode(av.VideoFrame.from_image(frame)))
        film.mux(stream.encode())
    return path


def moving(path: Path, shown: Sequence[Image.Image]) -> Path:
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=100, **lossless)
    return path


def foldered(path: Path, shown: Iterable[Image.Image]) -> Path:
    path.mkdir()
    for number, frame in enumerate(shown):
        frame.save(path / f"frame{number}.png")
    (path / "notes.txt").write_text("no picture")
    return path


# -- pictures


def test_two_pictures_are_asked_about_together(tiles: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    for seed, path in enumerate(paths):
        folders.picture(seed, 128, 64).save(path)
    drawn, page = tmp_path / "kept.png", tmp_path / "page.html"
    result = call("run", *paths, "What?", "--model", tiles, *METHOD, "--json", "--draw", drawn, "--html", page)
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert (told["images"], told["frames"]) == (list(map(str, paths)), None)
    assert [each["tokens"] for each in told["report"]["images"]] == [64 + 128] * 2  # the whole, and two tiles
    assert told["compressed"]["tokens"] == 16
    made = data(page)
    assert [[panel["title"] for panel in each["panels"]] for each in made["images"]] == [["whole", "tiles"]] * 2
    with Image.open(drawn) as sheet:
        assert sheet.width > 2 * sheet.height  # side by side


def test_the_drawing_of_several_pictures_is_written_as_shapes_too(tiles: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        folders.picture(1).save(tmp_path / name)
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    result = call("run", *paths, "What?", "--model", tiles, *METHOD, "--draw", tmp_path / "kept.svg")
    assert result.exit_code == 0
    titles = re.findall(r">(image \d: \d+ of \d+ tokens)<", (tmp_path / "kept.svg").read_text(encoding="utf-8"))
    assert [title.split(" of ")[0] for title in titles] == ["image 1: 8", "image 2: 8", "image 3: 8"]


def test_one_picture_in_tiles_is_drawn_as_a_whole_and_in_tiles(tiles: Path, tmp_path: Path) -> None:
    folders.picture(0, 400, 400).save(tmp_path / "large.png")
    result = call("run", tmp_path / "large.png", "What?", "--model", tiles, *METHOD, "--draw", tmp_path / "kept.png")
    assert result.exit_code == 0
    with Image.open(tmp_path / "kept.png") as drawn:
        assert drawn.size == (400 + 8 + 400, 400)


# -- videos


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "libx264"), ("clip.webm", "libvpx")])
def test_a_film_is_read_evenly(projector: Projector, tmp_path: Path, name: str, codec: str) -> None:
    path = filmed(tmp_path / name, frames(21), codec)
    told = json.loads(call("run", path, "What?", *METHOD, "--frames", "5", "--json").stdout)
    assert projector.numbers == [0, 5, 10, 15, 20]
    assert (told["images"], told["frames"]) == ([str(path)], 5)
    (seen,) = told["report"]["images"]
    assert (seen["modality"], seen["grid"], told["compressed"]["tokens"]) == ("video", [5, 2, 2], 8)


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.png"])
def test_a_moving_picture_is_a_video(projector: Projector, tmp_path: Path, name: str) -> None:
    assert call("run", moving(tmp_path / name, frames(9)), "What?", *METHOD, "--frames", "3").exit_code == 0
    assert projector.numbers == [0, 4, 8]


def test_a_folder_is_a_video_in_the_order_of_its_numbers(projector: Projector, tmp_path: Path) -> None:
    path = foldered(tmp_path / "clip", frames(11))  # frame10 comes after frame9
    assert call("run", path, "What?", *METHOD, "--frames", "20").exit_code == 0
    assert projector.numbers == list(range(11))


def test_the_processor_says_how_many_frames_suit_its_model(
    projector: Projector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = foldered(tmp_path / "clip", frames(23))
    call("run", path, "What?", *METHOD)
    assert projector.numbers == list(range(0, 23, 2))
    monkeypatch.delattr(Projector, "num_frames")
    call("run", path, "What?", *METHOD)
    assert len(projector.numbers) == media.FRAMES


@pytest.mark.parametrize("turned", [90, -90, 180])
def test_a_film_that_lies_on_its_side_is_set_upright(projector: Projector, tmp_path: Path, turned: int) -> None:
    (upright,) = frames(1)
    path = filmed(tmp_path / "phone.mp4", [upright.rotate(-turned, expand=True)] * 2, "libx264", turned)
    assert call("run", path, "What?", *METHOD).exit_code == 0
    (frame, _) = projector.shown
    assert frame.size == upright.size
    assert [frame.getpixel(place)[0] > 128 for place in ((8, 8), (56, 8), (8, 40), (56, 40))] == [True] + [False] * 3  # type: ignore[index]


def test_a_video_is_drawn_as_a_contact_sheet_and_shown_on_a_page(projector: Projector, tmp_path: Path) -> None:
    path = foldered(tmp_path / "clip", frames(6))
    drawn, svg, page = (tmp_path / name for name in ("kept.png", "kept.svg", "page.html"))
    for out in (drawn, svg):
        assert call("run", path, "What?", *METHOD, "--draw", out).exit_code == 0
    titles = re.findall(r">frame \d: (\d) of 4<", svg.read_text(encoding="utf-8"))
    assert len(titles) == 6
    assert sum(map(int, titles)) == 8
    with Image.open(drawn) as sheet:
        assert sheet.width > 4 * 220
    assert call("run", path, "What?", *METHOD, "--html", page).exit_code == 0
    (made,) = data(page)["images"]
    assert made["video"]
    assert len(made["pictures"]) == len(made["panels"]) == 6


def test_the_time_in_the_encoder_is_seen_of_a_video(projector: Projector, tmp_path: Path) -> None:
    told = json.loads(call("run", foldered(tmp_path / "clip", frames(4)), "What?", *METHOD, "--json").stdout)
    assert min(told["full"]["encode_ms"], told["compressed"]["encode_ms"]) > 0


# -- mistakes


@pytest.mark.parametrize("command", [["run", "{picture}", "What?", "--model"], ["bench"], ["advise"]])
def test_the_model_of_clips_is_shown_no_picture(tmp_path: Path, command: list[str]) -> None:
    folders.picture(0).save(tmp_path / "still.png")
    asked = [word.format(picture=tmp_path / "still.png") for word in command]
    refused(call(*asked, "demo-video"), error="demo-video reads clips, not pictures", hint="foveate run CLIP")


def test_weights_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "_CHECKOUT", tmp_path)
    refused(call("verify", "demo-hd"), error="the weights of demo-hd", hint="pip install ./demo-models")


def test_what_is_no_picture_and_no_video(tmp_path: Path) -> None:
    still, clip = tmp_path / "still.png", foldered(tmp_path / "clip", frames(3))
    folders.picture(0).save(still)
    for asked, error, hint in [
        (["gone.mp4", "What?"], "no such picture: gone.mp4", "foveate demo"),
        ([still, "gone.png", "What?"], "no such picture: gone.png", "check the path"),
        ([still, still], f"no question, {still} is a file", "comes last"),
        ([still, clip], f"no question, {clip} is a folder", "comes last"),
        ([still, clip, "What?"], f"pictures and a video, {clip}, in one question", "one video"),
        ([clip, clip, "What?"], "2 videos in one question", "one video"),
        ([still, "What?", "--frames", "4"], f"--frames is for videos, {still} is a picture", "leave --frames out"),
        ([clip, "What?"], "reads no videos", "such as demo-video"),
        ([still, still, still.with_name("q" * 5000), "What?"], "no such picture", "check the path"),
    ]:
        refused(call("run", *asked), error=error, hint=hint)


def test_videos_that_cannot_be_read(projector: Projector, tmp_path: Path) -> None:
    empty, uneven, broken = tmp_path / "empty", tmp_path / "uneven", tmp_path / "broken.mp4"
    empty.mkdir()
    (empty / "notes.txt").write_text("no picture")
    foldered(uneven, [*frames(2), Image.new("RGB", (10, 10))])
    broken.write_bytes(b"no film")
    refused(call("run", empty, "What?"), error=f"no pictures in {empty}", hint="a folder of frames")
    refused(call("run", uneven, "What?"), error="10 x 10, 64 x 48", hint="one size")
    refused(call("run", broken, "What?"), error=f"{broken}", hint="pass an MP4")


def test_what_the_processor_refuses(projector: Projector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("found 0 <video> tokens and 1 video.\nSee the docs")

    monkeypatch.setattr(projector, "apply_chat_template", refuse)
    result = call("run", foldered(tmp_path / "clip", frames(2)), "What?", *METHOD)
    refused(result, error="Projector cannot read this: found 0 <video> tokens and 1 video", hint="another model")


def test_films_need_pyav_and_say_so(projector: Projector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, clip = filmed(tmp_path / "clip.mp4", frames(2), "libx264"), moving(tmp_path / "clip.gif", frames(2))
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(call("run", path, "What?"), error=".mp4 files are read by PyAV", hint="pip install 'foveate[video]'")
    assert call("run", clip, "What?", *METHOD).exit_code == 0
