"""foveate as a model of lmms-eval: ``lmms-eval --model foveate --model_args pretrained=NAME,method=evocut:keep=64``.

lmms-eval finds it by the entry point `models`, and needs no edit.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from foveate.errors import UnsupportedCall, did_you_mean
from foveate.lab.reader import Prompt, Reader, Tally

if TYPE_CHECKING or find_spec("lmms_eval"):
    from lmms_eval.api.model import lmms
else:
    lmms = object

T = TypeVar("T")

#: What may stand in --model_args. All from ``method=`` to the next of these is the method's.
ARGUMENTS = ("pretrained", "method", "dtype", "attn_implementation", "device_map", "chat_template", "max_num_frames")

#: The longest answer where a task sets no limit.
LONGEST = 1024


def models() -> Any:
    """Tell lmms-eval the model's name, and the classes for its two ways of putting a question."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("foveate", f"{__name__}.SimpleModel", f"{__name__}.ChatModel")


# -- what lmms-eval says


def read_arguments(text: str) -> dict[str, str]:
    """Return the parts of ``--model_args``; a method keeps its own commas and equals signs.

    Raises:
        UnsupportedCall: If an argument is unknown or missing, or an option stands twice outside of quotes: lmms-eval
            files answers in its cache under these arguments, and of two with one name it sees the last.

    Example:
        >>> read_arguments("pretrained=demo,method=todre:keep=0.1,exit=0.875,dtype=bfloat16")
        {'pretrained': 'demo', 'method': 'todre:keep=0.1,exit=0.875', 'dtype': 'bfloat16'}
    """
    first, *pieces = re.split(rf"(?:^|,)\s*({'|'.join(ARGUMENTS)})=", text.strip())
    found = {name: value.strip(" ,") for name, value in zip(pieces[::2], pieces[1::2], strict=True)}
    unquoted = re.sub(r"\"[^\"]*\"|'[^']*'", "", text)
    names = Counter(piece.partition("=")[0].strip() for piece in unquoted.split(",") if "=" in piece)
    twice = [name for name, n in names.items() if n > 1]
    if twice:
        raise UnsupportedCall(f"{twice[0]!r} stands twice in --model_args", 'put the method in quotes: method="..."')
    after = [value.partition(",")[2] for name, value in found.items() if name != "method"]
    for strange in filter(None, [first, *after]):
        name = strange.partition("=")[0].strip(" ,")
        raise UnsupportedCall(f"--model_args has no {name!r}", did_you_mean(name, ARGUMENTS))
    if not found.get("pretrained"):
        raise UnsupportedCall("--model_args names no model", "add pretrained=NAME; pretrained=demo is bundled")
    if not found.get("method"):
        hint = "add method=evocut:keep=64; method=none is the plain model"
        raise UnsupportedCall("--model_args names no method", hint)
    return {name: value.strip("\"'") for name, value in found.items()}


def read_options(asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return a task's ``generation_kwargs`` as `generate` takes them, the strings that end an answer, and the rest.

    A temperature above zero samples, unless ``do_sample`` says no; all else is greedy.

    Raises:
        UnsupportedCall: If several answers to one request are wanted.

    Example:
        >>> read_options({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "until": "USER:", "seed": 1})
        ({'max_new_tokens': 16, 'do_sample': False}, ['USER:'], ['seed'])
    """
    from transformers import GenerationConfig

    asked = {name: value for name, value in asked.items() if value is not None}
    until = asked.pop("until", [])
    ends = [end for end in ([until] if isinstance(until, str) else until) if end]
    temperature, wanted = asked.pop("temperature", None), asked.pop("do_sample", None)
    sampled = temperature != 0 and (temperature is not None if wanted is None else bool(wanted))
    options: dict[str, Any] = {"max_new_tokens": asked.pop("max_gen_toks", LONGEST), "do_sample": sampled}
    if sampled and temperature is not None:
        options["temperature"] = float(temperature)
    if not sampled:
        asked = {name: value for name, value in asked.items() if name not in ("top_p", "top_k")}
    known = vars(GenerationConfig())
    options |= {name: value for name, value in asked.items() if name in known}
    if options.get("num_return_sequences", 1) != 1:
        raise UnsupportedCall("a request has one answer, got num_return_sequences above 1", "pass --repeats instead")
    return options, ends, [name for name in asked if name not in known]


def cut_at(text: str, ends: Iterable[str]) -> str:
    """Return the text up to the first of some strings.

    Example:
        >>> cut_at("blue. USER: and", ["ASSISTANT:", " USER:"])
        'blue.'
    """
    return text[: min((at for at in map(text.find, ends) if at >= 0), default=len(text))]


def batches(items: Iterable[T], kind: Callable[[T], Hashable], size: int) -> Iterator[list[T]]:
    """Yield groups of at most ``size`` items of one kind, each as soon as it is full.

    Example:
        >>> list(batches([1, 2, 3, 5, 7, 4], lambda n: n % 2, 2))
        [[1, 3], [5, 7], [2, 4]]
    """
    waiting: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        waiting[kind(item)].append(item)
        if len(waiting[kind(item)]) == size:
            yield waiting.pop(kind(item))
    yield from waiting.values()


# -- what lmms-eval calls


class _Model(lmms):
    def __init__(self, pretrained: str, method: str, batch_size: int | str = 1, **options: Any) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UnsupportedCall(f"batch_size is a number of prompts, got {batch_size}", "pass --batch_size 8")
        self.batch_size = int(batch_size)
        self.reader = Reader(pretrained, method, **options)
        self.device = self.reader.network.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> _Model:
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if given.pop("max_batch_size", None) is not None:
            raise UnsupportedCall("--max_batch_size is for --batch_size auto", "pass --batch_size 8")
        return cls(**read_arguments(arg_string), **given)

    def prompt(self, request: Any) -> tuple[Prompt, Mapping[str, Any]]:
        """Return what a request asks, and how it wants to be answered."""
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[Any]:
        from lmms_eval.api.instance import GenerationResult, TokenCounts
        from transformers.utils.logging import tqdm

        def kind(one: tuple[int, Prompt, Mapping[str, Any]]) -> Hashable:
            return repr(one[2]), len(one[1].images), len(one[1].videos)

        start, strange = time.perf_counter(), set[str]()
        results: list[Any] = [""] * len(requests)
        # A process with fewer requests than others is given some again, to no purpose here.
        asked = [i for i, request in enumerate(requests) if not request.metadata.get("__padding_only__")]
        with tqdm(total=len(asked), desc="foveate", disable=self.rank != 0) as bar:
            for batch in batches(((i, *self.prompt(requests[i])) for i in asked), kind, self.batch_size):
                options, ends, rest = read_options(batch[0][2])
                strange.update(rest)
                answers = self.reader.answer([prompt for _, prompt, _ in batch], **options)
                for (i, _, _), answer in zip(batch, answers, strict=True):
                    counts = TokenCounts(input_tokens=answer.read, output_tokens=answer.written)
                    results[i] = GenerationResult(cut_at(answer.text, ends), counts)
                bar.update(len(batch))
        if strange:
            warnings.warn(
                f"generate has no {', '.join(sorted(strange))}; these generation_kwargs did nothing", stacklevel=2
            )
        self._log(time.perf_counter() - start, sum(results[i].token_counts.output_tokens for i in asked))
        return results

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Score answers; as with lmms-eval's own models the number is a loss, and its tasks take the least."""
        from lmms_eval.api.instance import GenerationResult
        from transformers.utils.logging import tqdm

        start, results = time.perf_counter(), list[Any]()
        for request in tqdm(requests, desc="foveate", disable=self.rank != 0):
            if len(request.args) < 6:
                raise UnsupportedCall("an answer is to be scored without its question", "leave out acc_mutual_info")
            text, answer, to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            prompt = Prompt.about(to_visual(doc) or [], text)
            scored = self.reader.loss(prompt, str(answer(doc) if callable(answer) else answer))
            results.append(GenerationResult(scored))  # a bare pair would be turned into text
        self._log(time.perf_counter() - start, 0)
        return results

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise UnsupportedCall("this task asks in rounds, each about the answer before", "choose tasks of one round")

    def clean(self) -> None:
        self.reader.close()
        super().clean()

    def _log(self, seconds: float, written: int) -> None:
        """Say what compression did, in the log and in the results under "throughput"."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        tally, self.reader.tally = self.reader.tally, Tally()
        measured = {"pictures": tally.pictures, **tally.means()} if tally.pictures else {}
        log_metrics(seconds, written, written / max(seconds, 1e-9), {"method": self.reader.method, **measured})


class ChatModel(_Model):
    """Pictures stand where a task's messages put them."""

    is_simple = False

    def prompt(self, request: Any) -> tuple[Prompt, Mapping[str, Any]]:
        _, to_messages, options, doc_id, task, split = request.args
        return Prompt.of(to_messages(self.task_dict[task][split][doc_id])), options


class SimpleModel(_Model):
    """Pictures first, then the text: lmms-eval's ``--force_simple``, and the only way to tasks that score answers."""

    is_simple = True

    def prompt(self, request: Any) -> tuple[Prompt, Mapping[str, Any]]:
        text, options, to_visual, doc_id, task, split = request.args
        return Prompt.about(to_visual(self.task_dict[task][split][doc_id]) or [], text), options
