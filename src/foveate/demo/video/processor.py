"""The video model's processor: clips are lists of pictures, so that nothing but Pillow is needed to read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from foveate.demo.video.world import CELL, LENGTHS, PATCH, SIDE
from foveate.errors import UnsupportedCall

CONFIG = "processor_config.json"
SIZE = {"height": SIDE, "width": SIDE}


class ClipProcessor:
    """Makes a model's inputs of texts and clips, as transformers' processors do.

    Args:
        tokenizer: The tokenizer, with the tokens ``<image>`` and ``<video>``.
        image_processor: Resizes and normalises a frame.
        chat_template: How conversations are written; the tokenizer's unless told.

    Example:
        >>> from foveate.demo.video import build
        >>> from foveate.demo.video.world import clip
        >>> processor = ClipProcessor.new(build.tokenizer(), build.CHAT_TEMPLATE)
        >>> inputs = processor(text="USER: <video> what moves? ASSISTANT:", videos=[clip(4).frames])
        >>> inputs["pixel_values_videos"].shape
        torch.Size([1, 16, 3, 168, 168])
    """

    image_token = "<image>"
    video_token = "<video>"
    num_frames = max(LENGTHS)  # of a longer video no more are shown
    model_input_names = ("input_ids", "attention_mask", "pixel_values_videos")

    def __init__(self, tokenizer: Any, image_processor: Any, chat_template: str | None = None) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.chat_template = chat_template or tokenizer.chat_template

    @classmethod
    def new(cls, tokenizer: Any, chat_template: str) -> ClipProcessor:
        """A processor of frames that fill the canvas; nothing is cropped away."""
        from transformers.models.clip import CLIPImageProcessorPil

        frames = CLIPImageProcessorPil(size=SIZE, do_center_crop=False, do_resize=True, do_convert_rgb=True)
        return cls(tokenizer, frames, chat_template)

    def __call__(
        self,
        text: str | Sequence[str],
        videos: Sequence[Any] | None = None,
        images: Any = None,
        return_tensors: str = "pt",
        padding: bool | str = False,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
    ) -> Any:
        """Makes a model's inputs.

        Args:
            text: Prompts; every ``<video>`` in them stands for the next clip.
            videos: Clips, each a list of pictures, all of the same length; or a list of clips for each prompt.
            images: Not taken.
            return_tensors: Kind of the tensors.
            padding: Whether shorter prompts are filled up.
            padding_side: On which side; the tokenizer's unless told.
            add_special_tokens: Whether the tokenizer begins each prompt with `<s>`.

        Returns:
            A `BatchFeature` of input_ids, attention_mask and, where there are clips, pixel_values_videos
            (clips, frames, 3, h, w).

        Raises:
            UnsupportedCall: If clips differ in length or number from what the prompts say, or there are pictures.
        """
        from transformers import BatchFeature

        if images is not None:
            raise UnsupportedCall("this model reads clips, not pictures", "a picture is a clip of one frame")
        texts = [text] if isinstance(text, str) else list(text)
        clips = list(_clips(videos)) if videos is not None else []
        wanted = sum(t.count(self.video_token) for t in texts)
        if wanted != len(clips):
            raise UnsupportedCall(
                f"the prompts have {wanted} places for clips, and there are {len(clips)}",
                f"write {self.video_token} once for each clip",
            )
        lengths = sorted({len(clip) for clip in clips})
        if len(lengths) > 1:
            raise UnsupportedCall(
                f"clips of {', '.join(map(str, lengths))} frames do not fit into one batch",
                "pass those of equal length together",
            )
        tokens = [self.video_token * (len(clip) * (SIDE // CELL) ** 2) for clip in clips]
        inputs = dict(self.tokenizer(
            list(_filled(texts, self.video_token, tokens)), padding=padding, padding_side=padding_side,
            return_tensors=return_tensors, add_special_tokens=add_special_tokens, return_token_type_ids=False,
        ))  # fmt: skip
        if clips:
            frames = [frame for clip in clips for frame in clip]
            pixels = self.image_processor(frames, return_tensors=return_tensors)["pixel_values"]
            inputs["pixel_values_videos"] = pixels.reshape(len(clips), lengths[0], *pixels.shape[1:])
        return BatchFeature(inputs, tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        processor_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Writes one or several conversations as prompts, or makes a model's inputs of them.

        Args:
            conversation: Messages, or a list of messages for each row; a clip is
                ``{"type": "video", "video": frames}``.
            add_generation_prompt: Whether it ends where the model is to speak.
            tokenize: Whether to make inputs; else text is returned.
            return_dict: With `tokenize`, whether all inputs are returned, or `input_ids` alone.
            return_tensors: Kind of the tensors.
            processor_kwargs: For the call, for example ``padding``.
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        rows = list(conversation) if batched else [conversation]
        texts = [
            self.tokenizer.apply_chat_template(
                row, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            for row in rows
        ]
        if not tokenize:
            return texts if batched else texts[0]
        parts = [p for row in rows for m in row if not isinstance(m["content"], str) for p in m["content"]]
        clips = [part["video"] for part in parts if part["type"] == "video"]
        images = [part["image"] for part in parts if part["type"] == "image"]
        options: dict[str, Any] = {"return_tensors": return_tensors} | (processor_kwargs or {})
        inputs = self(text=texts, videos=clips or None, images=images or None, **options)
        return inputs if return_dict else inputs["input_ids"]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """What tokens say, row by row."""
        said: list[str] = self.tokenizer.batch_decode(*args, **kwargs)
        return said

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """What tokens say."""
        said: str = self.tokenizer.decode(*args, **kwargs)
        return said

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer and processor; where torchvision is installed, `AutoProcessor` reads them too."""
        place = Path(folder)
        self.tokenizer.chat_template = None
        self.tokenizer.save_pretrained(place)
        (place / "chat_template.jinja").write_text(self.chat_template)
        frames = self.image_processor.to_dict()
        shared = {k: frames[k] for k in ("image_mean", "image_std", "resample", "rescale_factor", "size")}
        steps = {f"do_{step}": True for step in ("resize", "rescale", "normalize", "convert_rgb")}
        tiles = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]], "do_pad": True, "crop_size": SIZE}
        stock = {
            "processor_class": "LlavaNextVideoProcessor", "patch_size": PATCH, "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default", "image_token": self.image_token,
            "video_token": self.video_token,
            "image_processor": {"image_processor_type": "LlavaNextImageProcessor", "do_center_crop": False}
            | shared | steps | tiles,
            "video_processor": {"video_processor_type": "LlavaNextVideoVideoProcessor", "do_center_crop": False,
                                "do_sample_frames": False} | shared | steps,
        }  # fmt: skip
        (place / CONFIG).write_text(json.dumps(stock, indent=2) + "\n")


def load(folder: str | Path) -> ClipProcessor:
    """Reads the processor of a folder."""
    from transformers import PreTrainedTokenizerFast

    place = Path(folder)
    tokens = PreTrainedTokenizerFast.from_pretrained(place, local_files_only=True)
    return ClipProcessor.new(tokens, (place / "chat_template.jinja").read_text())


def _clips(videos: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Clips out of one clip, a list of clips, or a list of these for each prompt."""
    if len(videos) and not isinstance(videos[0], (list, tuple)):
        yield videos
        return
    for part in videos:
        yield from _clips(part)


def _filled(texts: Sequence[str], mark: str, tokens: Sequence[str]) -> Iterator[str]:
    """Texts with each mark replaced by the next run of tokens."""
    left = iter(tokens)
    for text in texts:
        first, *others = text.split(mark)
        yield first + "".join(next(left) + other for other in others)
