"""One model, its processor and its method: answers one question at a time, each under a method of its own."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import StoppingCriteriaList

from foveate import registry
from foveate.core import Method
from foveate.engines.base import compress
from foveate.errors import FoveateError, UnsupportedModel
from foveate.report import Report
from foveate.serve.pictures import decode
from foveate.serve.refusals import Refused
from foveate.serve.voice import Voice

#: Tokens of an answer where neither the request nor the model's own settings say how many.
ANSWER_TOKENS = 512
#: A temperature below this is 0: divided by it, logits leave the range of numbers.
COLDEST = 1e-3
#: Characters of text for each token of the context, at most; a token of more is rare.
WIDEST = 16

_MEDIA = re.compile("image|img|video|vision|picture|audio", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """What one request asks.

    Args:
        turns: The conversation; a picture is its file, a text itself.
        method: How it is compressed.
        max_tokens: Longest answer; None: as the model's settings say.
        sampling: Arguments of ``generate`` that say how tokens are chosen.
        seed: Of the random numbers.
        stops: Strings that end the answer.
    """

    turns: tuple[tuple[str, tuple[str | bytes, ...]], ...]
    method: Method
    max_tokens: int | None = None
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Said:
    """How an answer ended, and what it took."""

    finish_reason: Literal["stop", "length"]
    tokens: int
    prompt_tokens: int
    prompt_tokens_before: int
    report: Report


class Reader:
    """A model that answers questions.

    Args:
        name: What clients call it.
        model: A vision-language model of transformers.
        processor: Its processor, with a chat template.
        method: How pictures are compressed where a request does not say.

    Raises:
        UnsupportedModel: If the processor has no chat template, or no family serves the model.
        UnsupportedMethod: If the method cannot run on this model.
    """

    def __init__(self, name: str, model: Any, processor: Any, method: Method) -> None:
        if not getattr(processor, "chat_template", None):
            raise UnsupportedModel(
                f"the processor of {name!r} has no chat template, so it is not known how to write a conversation",
                "save one beside the model: chat_template.jinja",
            )
        with compress(model, method):
            pass
        self.name, self.method = name, method
        self._model, self._processor, self._tokenizer = model, processor, processor.tokenizer
        self._context = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**17)
        self._media = [word for word in self._tokenizer.get_added_vocab() if _MEDIA.search(word)]
        ends = model.generation_config.eos_token_id
        self._ends = ends if isinstance(ends, list) else [] if ends is None else [ends]

    # -- before a question waits in the queue

    def choose(self, keep: float | None, spec: str | None) -> Method:
        """Return the method of a request that may name a budget or a method.

        Raises:
            FoveateError: If there is no such method or budget.
        """
        if spec is None and keep is None:
            return self.method
        try:
            if spec is None:
                return self._rebudgeted(keep)
            if keep is not None:
                raise Refused(
                    "both a method and a budget are given",
                    "write the budget into the method: evocut:keep=64",
                    param="foveate",
                )
            return registry.from_spec(spec)
        except FoveateError:
            raise
        except (TypeError, ValueError) as error:  # an option of the wrong kind, met by the method's own checks
            first = str(error).splitlines()[0]
            hint = "options are numbers or words: evocut:keep=64, v2drop:stages=3@0.5/17@0.3/22@0"
            raise Refused(f"cannot read the method: {first}", hint, code="budget_error", param="foveate") from error

    def _rebudgeted(self, keep: float | None) -> Method:
        if not any(field.name == "keep" for field in dataclasses.fields(self.method) if field.init):
            raise Refused(
                f"the server's method `{registry.to_spec(self.method)}` has no `keep` of its own",
                'name a method: "foveate": {"method": "evocut:keep=64"}',
                param="foveate",
            )
        changed: Any = {"keep": keep}
        return dataclasses.replace(self.method, **changed)

    def check(self, texts: Sequence[str]) -> None:
        """Refuse texts that cannot be read as text.

        Raises:
            Refused: If they hold placeholders of pictures, half characters, or more than the context can hold.
        """
        if sum(map(len, texts)) > WIDEST * self._context:
            raise self._too_long("the text is too long")
        for text in texts:
            for word in self._media:
                if word in text:
                    raise Refused(
                        f"the text holds {word!r}, which stands for a picture in this model's prompts",
                        "leave it out: a picture is sent as an image_url, and finds its place",
                        param="messages",
                    )
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise Refused("the text holds half a character (a lone surrogate)", "send UTF-8", param="messages")

    # -- in the thread of the model

    def answer(self, question: Question, say: Callable[[str], None], given_up: Callable[[], bool]) -> Said:
        """Answer a question, piece by piece.

        Args:
            question: What is asked.
            say: Takes each piece of the answer.
            given_up: Whether nobody waits for it any more; looked at after each token.

        Raises:
            Refused: If a picture is broken, or the prompt does not fit.
            FoveateError: If the method cannot run on it.
        """
        inputs = self._prompt(question)
        length = int(inputs["input_ids"].shape[1])
        voice = Voice(self._tokenizer, self._ends, question.stops, say, given_up)
        with compress(self._model, question.method) as handle, _seeded(question.seed, self._model.device):
            self._model.generate(
                **inputs,
                **question.sampling,
                num_beams=1,
                max_new_tokens=self._limit(question.max_tokens, length),
                stopping_criteria=StoppingCriteriaList([voice]),
            )
            report = handle.report
        voice.finish()
        return Said(
            finish_reason="stop" if voice.ended else "length",
            tokens=voice.tokens,
            prompt_tokens=report.prompt_tokens_after[0] if report.images else length,
            prompt_tokens_before=length,
            report=report,
        )

    def _prompt(self, question: Question) -> Any:
        conversation = [{"role": role, "content": [_content(part) for part in parts]} for role, parts in question.turns]
        try:
            inputs = self._processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:  # templates and processors raise what they like where a request is not to theirs
            logging.getLogger(__name__).info("a prompt was refused", exc_info=error)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refused(
                f"this model cannot read the conversation: {reason}",
                "begin with the user, take turns, and send pictures of an ordinary shape",
                param="messages",
            ) from error
        return inputs.to(self._model.device, self._model.dtype)

    def _limit(self, wanted: int | None, length: int) -> int:
        """How many tokens an answer may have; before compression, for positions may be those of the full prompt."""
        room = self._context - length
        if room < 1:
            raise self._too_long(f"the prompt has {length} tokens with its pictures")
        if wanted is not None and wanted > room:
            raise self._too_long(f"the prompt has {length} tokens with its pictures, and {wanted} more are asked for")
        return wanted or min(room, self._model.generation_config.max_new_tokens or ANSWER_TOKENS)

    def _too_long(self, what: str) -> Refused:
        return Refused(
            f"{what}, the model reads at most {self._context}",
            "send fewer or shorter messages, fewer pictures, or a smaller max_tokens",
            code="context_length_exceeded",
            param="messages",
        )


def _content(part: str | bytes) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": decode(part)}


def sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Return arguments for ``generate``; nothing said: as the model's own settings say, which is greedy for most.

    Example:
        >>> sampling(0.0, None)["do_sample"], sampling(None, 0.9)["temperature"], sampling(None, None)
        (False, 1.0, {})
    """
    if temperature is None and top_p is None:
        return {}
    if temperature is not None and temperature < COLDEST:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if top_p is None else top_p,
        "top_k": 0,  # transformers' own default would cut the tail that the client did not ask to be cut
    }


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from a seed of this request's own, and leave the stream of random numbers as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
        torch.manual_seed(seed)
        yield
