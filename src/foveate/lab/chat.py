"""From pictures, videos and questions to a model's inputs, as many rows at a time as wanted; from output to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.errors import UnsupportedCall, UnsupportedModel
from foveate.families import family_of
from foveate.lab.media import Media, Video

KINDS = ("image", "video")


def prepare(
    network: Any, processor: Any, pictures: Sequence[Sequence[Media]], questions: Sequence[str], **options: Any
) -> Any:
    """Return the inputs of a batch: by the processor's chat template, or LLaVA-1.5's prompt where there is none.

    What is shown stands before the question, in its order.

    Args:
        network: The model; inputs go to its device, pixels to its dtype.
        processor: Its processor.
        pictures: One or more pictures, or a video, for each row; the videos of a batch have equally many frames.
        questions: One question for each row.
        options: For the processor's call, for example ``size``.

    Raises:
        UnsupportedModel: If there are videos, and the model reads none.
        UnsupportedCall: If videos of a batch differ in length.
    """
    if len(questions) > 1:
        options = {"padding": True, "padding_side": "left"} | options
    lengths = {len(one.frames) for row in pictures for one in row if isinstance(one, Video)}
    if lengths and "video" not in family_of(network).modalities:
        raise UnsupportedModel(
            f"{type(network).__name__} reads no videos",
            "show it pictures, or take a model that reads videos, such as demo-video",
        )
    if len(lengths) > 1:
        raise UnsupportedCall(
            f"videos of {', '.join(map(str, sorted(lengths)))} frames do not fit into one batch",
            "pass those of equal length together",
        )
    if lengths and getattr(getattr(processor, "video_processor", None), "do_sample_frames", False):
        options = {"do_sample_frames": False} | options  # all frames that are passed are read
    if getattr(processor, "chat_template", None):
        inputs = processor.apply_chat_template(
            [_chat(row, question) for row, question in zip(pictures, questions, strict=True)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
    else:
        media = {
            f"{kind}s": [[_content(one) for one in row if _kind(one) == kind] for row in pictures]
            for kind in KINDS
            if any(_kind(one) == kind for row in pictures for one in row)
        }
        texts = written(processor, pictures, questions)
        inputs = processor(text=texts, return_tensors="pt", **media, **options)
    return inputs.to(network.device, network.dtype)


def written(processor: Any, pictures: Sequence[Sequence[Media]], questions: Sequence[str]) -> list[str]:
    """Return the prompts of a batch as text, in which one mark stands for each picture or video."""
    if getattr(processor, "chat_template", None):
        chats = [_chat(row, question) for row, question in zip(pictures, questions, strict=True)]
        texts: list[str] = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        return texts
    marks = {kind: getattr(processor, f"{kind}_token", f"<{kind}>") for kind in KINDS}
    shown = ["".join(marks[_kind(one)] for one in row) for row in pictures]
    return [f"USER: {seen}\n{question} ASSISTANT:" for seen, question in zip(shown, questions, strict=True)]


def answers(processor: Any, inputs: Any, output: Any) -> list[str]:
    """Return what was said after the prompt, one text a row."""
    said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def visual_tokens(network: Any, inputs: Any) -> list[int]:
    """Return how many places for tokens of pictures and videos each row's prompt has.

    Raises:
        UnsupportedCall: If the model's prompts have none.
    """
    config = network.config
    tokens = {getattr(config, f"{kind}_token_id", getattr(config, f"{kind}_token_index", None)) for kind in KINDS}
    if not tokens - {None}:
        raise UnsupportedCall(
            f"the prompts of {type(network).__name__} have no places for pictures' tokens",
            "smaller pictures cannot be compared by tokens here",
        )
    ids = inputs["input_ids"]
    counts: list[int] = sum((ids == token).sum(-1) for token in tokens - {None}).tolist()
    return counts


def _chat(pictures: Sequence[Media], question: str) -> list[dict[str, Any]]:
    shown = [{"type": _kind(one), _kind(one): _content(one)} for one in pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


def _kind(one: Media) -> str:
    return "video" if isinstance(one, Video) else "image"


def _content(one: Media) -> Any:
    return list(one.frames) if isinstance(one, Video) else one
