"""From pictures and questions to a model's inputs, as many rows at a time as wanted, and from its output to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from foveate.errors import UnsupportedCall

if TYPE_CHECKING:
    from PIL import Image


def prepare(
    network: Any, processor: Any, pictures: Sequence[Sequence[Image.Image]], questions: Sequence[str], **options: Any
) -> Any:
    """Return the inputs of a batch: by the processor's chat template, or LLaVA-1.5's prompt where there is none.

    Args:
        network: The model; inputs go to its device, pixels to its dtype.
        processor: Its processor.
        pictures: One or more pictures for each row.
        questions: One question for each row.
        options: For the processor's call, for example ``size``.
    """
    if len(questions) > 1:
        options = {"padding": True, "padding_side": "left"} | options
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
        image = getattr(processor, "image_token", "<image>")
        texts = [f"USER: {image * len(row)}\n{q} ASSISTANT:" for row, q in zip(pictures, questions, strict=True)]
        inputs = processor(images=[list(row) for row in pictures], text=texts, return_tensors="pt", **options)
    return inputs.to(network.device, network.dtype)


def answers(processor: Any, inputs: Any, output: Any) -> list[str]:
    """Return what was said after the prompt, one text a row."""
    said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def visual_tokens(network: Any, inputs: Any) -> list[int]:
    """Return how many places for pictures' tokens each row's prompt has.

    Raises:
        UnsupportedCall: If the model's prompts have none.
    """
    config = network.config
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if token is None:
        raise UnsupportedCall(
            f"the prompts of {type(network).__name__} have no places for pictures' tokens",
            "smaller pictures cannot be compared by tokens here",
        )
    counts: list[int] = (inputs["input_ids"] == token).sum(-1).tolist()
    return counts


def _chat(pictures: Sequence[Image.Image], question: str) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]
