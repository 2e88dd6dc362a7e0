"""The video model's processor, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foveate.demo.video import build
from foveate.demo.video.processor import ClipProcessor, load
from foveate.demo.video.world import clip
from foveate.errors import UnsupportedCall

FRAMES = list(clip(20_000_005).frames[:8])


@pytest.fixture(scope="module")
def processor() -> ClipProcessor:
    return build.processor()


def chat(question: str, *clips: object) -> list[dict[str, object]]:
    shown = [{"type": "video", "video": one} for one in clips]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


def test_a_conversation_becomes_inputs(processor: ClipProcessor) -> None:
    chats = [chat("what shape moves?", FRAMES), chat("what colour is the star at the end?", FRAMES)]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, processor_kwargs={"padding": True, "padding_side": "left"}
    )
    video = processor.tokenizer.convert_tokens_to_ids("<video>")
    assert (inputs["input_ids"] == video).sum(1).tolist() == [288, 288]
    assert inputs["pixel_values_videos"].shape == (2, 8, 3, 168, 168)
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].tolist() == [1, 1]
    said = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert said[0].split("\n")[-1] == "what shape moves? assistant:"
    alone = processor.apply_chat_template(chats[0], add_generation_prompt=True, tokenize=True)
    assert torch.equal(alone["input_ids"][0], inputs["input_ids"][0][inputs["attention_mask"][0] == 1])


def test_a_conversation_becomes_text(processor: ClipProcessor) -> None:
    text = "USER: <video>\nwhat moves? ASSISTANT:"
    assert processor.apply_chat_template(chat("what moves?", FRAMES), add_generation_prompt=True) == text
    assert processor.apply_chat_template([chat("what moves?", FRAMES)], add_generation_prompt=True) == [text]
    several = processor.apply_chat_template([{"role": "user", "content": "hello"}])
    assert several == "USER: hello "


def test_clips_come_one_or_many_to_a_prompt(processor: ClipProcessor) -> None:
    one = processor(text="<video>", videos=FRAMES)
    assert torch.equal(one["pixel_values_videos"], processor(text="<video>", videos=[FRAMES])["pixel_values_videos"])
    two = processor(text=["<video> a <video>"], videos=[[FRAMES[:2], FRAMES[2:4]]])
    assert two["pixel_values_videos"].shape[:2] == (2, 2)
    assert torch.equal(two["pixel_values_videos"].flatten(0, 1), one["pixel_values_videos"][0, :4])
    assert "pixel_values_videos" not in processor(text="hello")


def test_what_does_not_fit_is_refused(processor: ClipProcessor) -> None:
    with pytest.raises(UnsupportedCall, match="clips of 4, 8 frames"):
        processor(text=["<video>", "<video>"], videos=[FRAMES[:4], FRAMES], padding=True)
    with pytest.raises(UnsupportedCall, match="1 places for clips, and there are 2"):
        processor(text="<video>", videos=[FRAMES, FRAMES])
    with pytest.raises(UnsupportedCall, match="not pictures"):
        processor(text="<image>", images=FRAMES[:1])


def test_it_is_saved_and_loaded(processor: ClipProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = load(tmp_path)
    question = chat("which way does the moon move?", FRAMES)
    for name, value in processor.apply_chat_template(question, tokenize=True).items():
        assert torch.equal(value, again.apply_chat_template(question, tokenize=True)[name])


def test_the_stock_processor_finds_its_settings(processor: ClipProcessor, tmp_path: Path) -> None:
    """What transformers' own processor reads where torchvision is installed."""
    processor.save_pretrained(tmp_path)
    stock = json.loads((tmp_path / "processor_config.json").read_text())
    assert stock["processor_class"] == "LlavaNextVideoProcessor"
    video = stock["video_processor"]
    assert video["video_processor_type"] == "LlavaNextVideoVideoProcessor"
    ours = json.loads(json.dumps(processor.image_processor.to_dict()))
    for name in ("size", "image_mean", "image_std", "rescale_factor", "do_center_crop", "do_resize", "do_normalize"):
        assert video[name] == ours[name]
    assert not video["do_sample_frames"]
