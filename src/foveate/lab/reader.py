"""A model that answers whole conversations, in batches, compressed or plain: what evaluation harnesses need of one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import foveate
from foveate import demo
from foveate.errors import NothingCompressed, UnsupportedCall, UnsupportedModel

#: What the plain model is called where a method is named.
PLAIN = "none"

#: How a picture's place is marked in the text of some tasks.
PICTURE_MARK = "<image>"

_ONLY = "choose tasks with pictures, videos and text"


@dataclass(frozen=True)
class Prompt:
    """A conversation as chat templates take it, and what there is to see in it, in order.

    Args:
        messages: Role and content; a picture or video is only a mark of its kind.
        images: Pictures, or where they are.
        videos: Where the videos are.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """Read messages whose pictures and videos stand under ``url``.

        Raises:
            UnsupportedCall: If there is something to hear in them, or a part of a video.

        Example:
            >>> prompt = Prompt.of([{"role": "user", "content": [{"type": "image", "url": "a.png"}]}])
            >>> prompt.messages, prompt.images
            ([{'role': 'user', 'content': [{'type': 'image'}]}], ['a.png'])
        """
        prompt = cls()
        for message in messages:
            content = message["content"]
            content = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts = []
            for part in _in_place(content):
                kind, seen = part["type"], part.get("url")
                if kind == "image":
                    prompt.images.append(seen)
                elif kind == "video" and isinstance(seen, str):
                    prompt.videos.append(seen)
                elif kind != "text":
                    raise UnsupportedCall(f"this task brings {'a part of a video' if kind == 'video' else kind}", _ONLY)
                parts.append(part if kind == "text" else {"type": kind})
            prompt.messages.append({"role": message["role"], "content": parts})
        return prompt

    @classmethod
    def about(cls, visuals: Sequence[Any], text: str) -> Prompt:
        """Put a text after what it is about: pictures, or paths of pictures and videos.

        Raises:
            UnsupportedCall: If it is about something else.
        """
        return cls.of([{"role": "user", "content": [*map(_part, visuals), {"type": "text", "text": text}]}])


@dataclass(frozen=True)
class Answer:
    """What was said, and how many tokens the LLM read and wrote for it."""

    text: str
    read: int
    written: int


@dataclass
class Tally:
    """What compression did: sums over pictures and videos."""

    pictures: int = 0
    tokens: int = 0
    entered: int = 0
    per_layer: float = 0.0

    def add(self, report: foveate.Report) -> None:
        """Add what one call did."""
        self.pictures += len(report.images)
        self.tokens += report.tokens
        self.entered += report.kept
        self.per_layer += report.mean_alive

    def means(self) -> dict[str, float]:
        """Return means over the pictures and videos."""
        sums = {"tokens": self.tokens, "entered": self.entered, "per_layer": self.per_layer}
        return {f"visual_{name}": value / max(1, self.pictures) for name, value in sums.items()}


class Reader:
    """A model, its processor and a method.

    Args:
        pretrained: ``demo``, ``demo-hd``, ``demo-video``, a folder, or a name on the hub.
        method: Spec of a method, or ``none`` for the plain model.
        device: Where the model goes; unless told a GPU, one for each process of a machine, or the CPU.
        dtype: Type of the weights; unless told float32 on a CPU, and the checkpoint's own elsewhere.
        attn_implementation: As in transformers.
        device_map: As in transformers, instead of a device.
        chat_template: File with a template, for processors that have none.
        max_num_frames: Frames that are read of a video, at most.

    Raises:
        UnsupportedModel: If there is no chat template.
    """

    def __init__(
        self,
        pretrained: str,
        method: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        device_map: str | None = None,
        chat_template: str | None = None,
        max_num_frames: int | str = 32,
    ) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        built = None if method == PLAIN else foveate.from_spec(method)
        ours = pretrained in demo.MODELS
        place = str(demo.folder(pretrained)) if ours else pretrained
        self.processor: Any = demo.load_processor(pretrained) if ours else AutoProcessor.from_pretrained(place)
        if chat_template is not None:
            self.processor.chat_template = Path(chat_template).read_text(encoding="utf-8")
        if not getattr(self.processor, "chat_template", None):
            raise UnsupportedModel(f"the processor of {pretrained!r} has no chat template", "name a chat_template=FILE")
        self.tokenizer: Any = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        given = {"attn_implementation": attn_implementation, "device_map": device_map}
        network: Any = AutoModelForImageTextToText.from_pretrained(
            place,
            dtype=dtype or ("float32" if device == "cpu" else "auto"),
            **{name: value for name, value in given.items() if value is not None},
        )
        self.network = (network if device_map else network.to(device)).eval()
        self.frames = int(max_num_frames)
        self.method = PLAIN if built is None else foveate.to_spec(built)
        self.handle = None if built is None else foveate.compress(self.network, built)
        self.tally = Tally()

    def close(self) -> None:
        """Take the method off the model, and let go of both."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = self.network = None

    def answer(self, prompts: Sequence[Prompt], **options: Any) -> list[Answer]:
        """Answer prompts with equally many pictures and videos each, greedily unless ``generate`` is told otherwise."""
        inputs = self._inputs(prompts)
        output, read = self._generate(inputs, **{"do_sample": False, **options})
        written = output[:, inputs["input_ids"].shape[1] :]
        counts = (written != self.tokenizer.pad_token_id).sum(1).tolist()
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [Answer(text.strip(), *numbers) for text, *numbers in zip(texts, read, counts, strict=True)]

    def loss(self, prompt: Prompt, answer: str) -> tuple[float, bool]:
        """Return the mean negative log-likelihood of an answer, and whether it is the one that is given greedily.

        The answer is forced upon ``generate``, so that tokens are chosen for the prompt alone, as for any answer.

        Raises:
            UnsupportedCall: If the answer is empty.
        """
        from transformers import LogitsProcessorList

        text = self._text(prompt)
        answer = answer.lstrip() if text[-1:].isspace() else answer
        before, whole = (self.tokenizer(one, add_special_tokens=False).input_ids for one in (text, text + answer))
        wanted = whole[len(before) :]
        if not wanted:
            raise UnsupportedCall("there is an empty answer to score", "choose a task whose answers are words")
        left = iter(wanted)

        def force(ids: Any, scores: Any) -> Any:
            forced = scores.new_full(scores.shape, float("-inf"))
            forced[:, next(left)] = 0.0
            return forced

        output, _ = self._generate(
            self._inputs([prompt]),
            max_new_tokens=len(wanted),
            do_sample=False,
            logits_processor=LogitsProcessorList([force]),
            output_logits=True,
            return_dict_in_generate=True,
        )
        steps = [(logits[0].float(), token) for logits, token in zip(output.logits, wanted, strict=True)]
        losses = [float(logits.logsumexp(-1) - logits[token]) for logits, token in steps]
        return sum(losses) / len(losses), all(int(logits.argmax()) == token for logits, token in steps)

    def _text(self, prompt: Prompt) -> str:
        return str(self.processor.apply_chat_template(prompt.messages, add_generation_prompt=True))

    def _inputs(self, prompts: Sequence[Prompt]) -> Any:
        from transformers.image_utils import load_image

        texts = [self._text(prompt) for prompt in prompts]
        media: dict[str, Any] = {}
        if prompts[0].images:
            media["images"] = [[load_image(image) for image in prompt.images] for prompt in prompts]
        if prompts[0].videos:
            read = [[_frames(video, self.frames) for video in prompt.videos] for prompt in prompts]
            if hasattr(self.processor, "video_processor"):
                media["videos"] = [[frames for frames, _ in row] for row in read]
                media["video_metadata"] = [[told for _, told in row] for row in read]
                media["do_sample_frames"] = False
            else:  # of our own processor a clip is a list of frames
                media["videos"] = [[list(frames) for frames, _ in row] for row in read]
        start = self.tokenizer.bos_token
        if start and texts[0].startswith(start):
            media["add_special_tokens"] = False
        inputs = self.processor(text=texts, padding=True, return_tensors="pt", **media)
        return inputs.to(self.network.device, self.network.dtype)

    def _generate(self, inputs: Any, **options: Any) -> tuple[Any, list[int]]:
        """Return what was generated, and how many tokens of each prompt the LLM read."""
        import torch

        before = 0 if self.handle is None else self._check(inputs)
        with torch.inference_mode():
            output = self.network.generate(**inputs, **options, pad_token_id=self.tokenizer.pad_token_id)
        if self.handle is None or not _pixels(inputs):
            return output, inputs["attention_mask"].sum(1).tolist()
        report = self.handle.report
        if report.calls == before:
            raise NothingCompressed(
                f"a call with {', '.join(_pixels(inputs))} went by `{self.method}`",
                "method=none is the plain model",
            )
        self.tally.add(report)
        return output, list(report.prompt_tokens_after)

    def _check(self, inputs: Mapping[str, Any]) -> int:
        """Refuse what the method would leave as it is; return the calls so far."""
        assert self.handle is not None
        family = self.handle.family
        strange = set(_pixels(inputs)) - {*family.media_arguments.values(), *family.former_names}
        if strange:
            raise UnsupportedModel(
                f"of {family.name} only {' and '.join(family.modalities)} tokens are compressed, got {strange.pop()}",
                "choose other tasks; `foveate families` says what is read of each family",
            )
        return self.handle.report.calls


def _pixels(inputs: Mapping[str, Any]) -> list[str]:
    return [name for name in inputs if name.startswith("pixel_values")]


def _part(visual: Any) -> dict[str, Any]:
    from PIL.Image import Image, registered_extensions

    if isinstance(visual, Image):
        return {"type": "image", "url": visual}
    if isinstance(visual, str):
        return {"type": "image" if Path(visual).suffix.lower() in registered_extensions() else "video", "url": visual}
    raise UnsupportedCall(f"this task shows a {type(visual).__name__}", _ONLY)


def _in_place(content: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where a text marks the place of each picture, put them there."""
    images = [dict(part) for part in content if part["type"] == "image"]
    marks = sum(part["text"].count(PICTURE_MARK) for part in content if part["type"] == "text")
    if not images or marks != len(images):
        return [dict(part) for part in content]
    left, placed = iter(images), list[dict[str, Any]]()
    for part in content:
        if part["type"] == "text":
            for i, text in enumerate(part["text"].split(PICTURE_MARK)):
                placed += [next(left)] if i else []
                placed += [{"type": "text", "text": text}] if text else []
        elif part["type"] != "image":
            placed.append(dict(part))
    return placed


def _frames(video: str, most: int) -> tuple[Any, Any]:
    """Return frames spread evenly over a video, and what is known of them."""
    import numpy as np
    from transformers import video_utils

    def chosen(metadata: Any, **_: Any) -> Any:
        total = metadata.total_num_frames
        return np.linspace(0, total - 1, min(most, total)).round().astype(int)

    load: Any = video_utils.load_video
    frames, told = load(video, backend="pyav", sample_indices_fn=chosen)
    return frames, told
