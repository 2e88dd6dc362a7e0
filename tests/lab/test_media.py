"""Pictures and videos from files, and prompts that show several pictures or a video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.errors import MissingDependency, TaskError, UnsupportedCall, UnsupportedModel
from foveate.lab.chat import prepare, visual_tokens
from foveate.lab.media import Video, grey, is_video, open_picture, open_video, thinned
from tests.zoo.models import tiny

COLOURS = ("red", "lime", "blue", "white", "black")


def frames(n: int = 5, size: tuple[int, int] = (16, 12)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[i]) for i in range(n)]


def seen(video: Video) -> list[str]:
    """The colours of a video, by the nearest of ours."""
    known = {colour: Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in COLOURS}

    def distance(one: Any, other: Any) -> int:
        return sum(abs(a - b) for a, b in zip(one, other, strict=True))

    pixels = [frame.getpixel((8, 6)) for frame in video.frames]
    return [min(known, key=lambda colour: distance(known[colour], pixel)) for pixel in pixels]


def test_a_folder_is_a_video_in_the_order_of_numbers(tmp_path: Path) -> None:
    for number, frame in zip((1, 2, 10, 11, 100), frames(), strict=True):
        frame.save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    assert is_video(tmp_path) and seen(open_video(tmp_path)) == list(COLOURS)
    assert seen(open_video(tmp_path, 3)) == ["red", "blue", "black"]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_moving_pictures_are_videos(tmp_path: Path, name: str) -> None:
    first, *rest = frames()
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=100)
    assert is_video(tmp_path / name)
    video = open_video(tmp_path / name)
    assert seen(video) == list(COLOURS) and video.size == (16, 12)
    assert seen(open_video(tmp_path / name, 2)) == ["red", "black"]
    first.save(tmp_path / f"still-{name}")
    assert not is_video(tmp_path / f"still-{name}")


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_films_are_read_by_pyav(tmp_path: Path, name: str) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / name), "w") as film:
        stream = film.add_stream("libvpx" if name.endswith("webm") else "mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in frames(5, (64, 48)):
            film.mux(stream.encode(av.VideoFrame.from_image(picture)))
        film.mux(stream.encode())
    assert is_video(tmp_path / name) and seen(open_video(tmp_path / name)) == list(COLOURS)
    assert seen(open_video(tmp_path / name, 3)) == ["red", "blue", "black"]
    (tmp_path / "torn.mp4").write_bytes((tmp_path / name).read_bytes()[:30])
    with pytest.raises(TaskError, match="not a readable film"):
        open_video(tmp_path / "torn.mp4")


@pytest.mark.parametrize(("begin", "edited"), [(30, True), (5, False)])
def test_films_that_were_cut_are_thinned_by_what_is_shown(tmp_path: Path, begin: int, edited: bool) -> None:
    """Packets are left over of what is cut: an edit list hides them, or there is no key frame to decode them by."""
    av = pytest.importorskip("av")
    whole, part = tmp_path / "whole.mp4", tmp_path / "part.mp4"
    with av.open(str(whole), "w") as film:
        stream = film.add_stream("libx264", rate=30, options={"g": "60" if edited else "20", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(60):
            film.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), (4 * number,) * 3))))
        film.mux(stream.encode())
    with av.open(str(whole)) as film, av.open(str(part), "w", options={"avoid_negative_ts": "disabled"}) as cut:
        source = film.streams.video[0]
        stream = cut.add_stream_from_template(source)
        for packet in [packet for packet in film.demux(source) if packet.size][0 if edited else begin :]:
            for time in ("pts", "dts"):
                setattr(packet, time, getattr(packet, time) - int(begin / (30 * source.time_base)))
            packet.stream = stream
            cut.mux(packet)
    first = 30 if edited else 20

    def numbers(most: int | None) -> list[int]:
        shades = [frame.getpixel((8, 6)) for frame in open_video(part, most).frames]
        return [round(shade[0] / 4) for shade in shades if isinstance(shade, tuple)]

    assert numbers(None) == list(range(first, 60))
    assert numbers(8) == [first + place for place in thinned(60 - first, 8)]
    assert numbers(1) == [first + (60 - first) // 2]


def test_a_film_without_pyav_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(MissingDependency, match="PyAV") as refused:
        open_video(tmp_path / "a.mp4")
    assert "foveate[video]" in str(refused.value.hint)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, size in enumerate(((4, 4), (4, 6))):
        Image.new("RGB", size).save(mixed / f"{i}.png")
    cases = [("nothing.mp4", "no such video"), ("empty", "no pictures in"), ("broken.gif", "not a readable video")]
    for name, message in [*cases, ("mixed", "4 x 4, 4 x 6")]:
        with pytest.raises(TaskError, match=message) as refused:
            open_video(tmp_path / name)
        assert refused.value.hint
    with pytest.raises(TaskError, match="at least one frame"):
        open_video(mixed, 0)
    with pytest.raises(TaskError, match="no such picture"):
        open_picture(tmp_path / "no.png")


def test_frames_are_thinned_evenly() -> None:
    for count in range(1, 20):
        for most in range(1, 25):
            kept = thinned(count, most)
            assert len(kept) == len(set(kept)) == min(count, most) and kept == sorted(kept)
            if most > 1:
                assert (kept[0], kept[-1]) == (0, count - 1)


def test_grey_has_the_same_shape() -> None:
    video = grey(Video(tuple(frames(3))))
    assert isinstance(video, Video) and len(video.frames) == 3 and video.size == (16, 12)
    assert grey(frames()[0]).getpixel((0, 0)) == (128, 128, 128)


class Recorder:
    """A processor that keeps what it is given."""

    image_token, video_token = "<image>", "<video>"

    def __init__(self, template: bool) -> None:
        self.chat_template = "x" if template else None

    def __call__(self, **given: Any) -> Any:
        self.given = given
        return self

    def apply_chat_template(self, conversations: Any, **given: Any) -> Any:
        self.conversations, self.given = conversations, given
        return self

    def to(self, *_: Any) -> Any:
        return self


@pytest.fixture(scope="module")
def network() -> Any:
    """A model that reads pictures and videos."""
    return tiny("llava_next_video")


def test_a_video_goes_into_the_messages_as_its_frames(network: Any) -> None:
    clip, picture, processor = Video(tuple(frames(3))), frames()[0], Recorder(template=True)
    prepare(network, processor, [[clip]], ["what moves?"])
    ((message,),) = processor.conversations
    assert message["content"][0] == {"type": "video", "video": list(clip.frames)}
    assert message["content"][1] == {"type": "text", "text": "what moves?"}
    prepare(network, processor, [[picture, picture]], ["which?"])
    assert [part["type"] for part in processor.conversations[0][0]["content"]] == ["image", "image", "text"]


def test_without_a_template_the_marks_stand_before_the_question(network: Any) -> None:
    clip, picture, processor = Video(tuple(frames(3))), frames()[0], Recorder(template=False)
    prepare(network, processor, [[clip], [clip]], ["a?", "b?"])
    assert processor.given["text"] == ["USER: <video>\na? ASSISTANT:", "USER: <video>\nb? ASSISTANT:"]
    assert processor.given["videos"] == [[list(clip.frames)]] * 2 and "images" not in processor.given
    prepare(network, processor, [[picture, picture]], ["c?"])
    assert processor.given["text"] == ["USER: <image><image>\nc? ASSISTANT:"] and "videos" not in processor.given


def test_a_video_is_shown_to_models_that_read_videos() -> None:
    clip, picture, processor = Video(tuple(frames(3))), frames()[0], Recorder(template=True)
    prepare(tiny("llava"), processor, [[picture]], ["what?"])
    with pytest.raises(UnsupportedModel, match="LlavaForConditionalGeneration reads no videos") as refused:
        prepare(tiny("llava"), processor, [[clip]], ["what?"])
    assert "such as demo-video" in str(refused.value.hint)


def test_clips_of_unequal_length_are_no_batch(network: Any) -> None:
    with pytest.raises(UnsupportedCall, match="3, 4 frames"):
        prepare(network, Recorder(True), [[Video(tuple(frames(3)))], [Video(tuple(frames(4)))]], ["a?", "b?"])


def test_tokens_of_videos_count_as_well() -> None:
    import torch

    class Config:
        image_token_id, video_token_index = 7, 8

    class Both:
        config = Config()

    ids = torch.tensor([[7, 7, 1, 8], [1, 8, 8, 1]])
    assert visual_tokens(Both(), {"input_ids": ids}) == [3, 2]
    with pytest.raises(UnsupportedCall, match="no places"):
        visual_tokens(type("None_", (), {"config": object()})(), {"input_ids": ids})
