"""One question, one way of answering: what the user passes in, and what the answer cost as seen from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from foveate.errors import FoveateError, UnsupportedModel, did_you_mean

if TYPE_CHECKING:
    from foveate.budget import Keep
    from foveate.core import Method
    from foveate.report import Report


DTYPES = ("float32", "bfloat16", "float16")


class UserError(FoveateError):
    """What the user passed to the command line cannot be used."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """An answer and its times in milliseconds, as read from outside the model."""

    answer: str
    encode_ms: float
    first_token_ms: float
    total_ms: float


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one way of answering said and cost: `first_token_ms` is encode + select + prefill, all in milliseconds."""

    answer: str
    tokens: int
    mean_tokens: float
    encode_ms: float
    select_ms: float
    prefill_ms: float
    decode_ms: float
    first_token_ms: float
    total_ms: float
    kv_bytes: int

    @classmethod
    def of(cls, timed: Timed, report: Report, *, compressed: bool = True) -> Arm:
        """Join the times of one way with what the compressed way's report counted before and after."""
        select = (report.select_ms or 0.0) if compressed else 0.0
        return cls(
            answer=timed.answer,
            tokens=report.kept if compressed else report.tokens,
            mean_tokens=report.mean_alive if compressed else float(report.tokens),
            encode_ms=timed.encode_ms,
            select_ms=select,
            prefill_ms=timed.first_token_ms - timed.encode_ms - select,
            decode_ms=timed.total_ms - timed.first_token_ms,
            first_token_ms=timed.first_token_ms,
            total_ms=timed.total_ms,
            kv_bytes=report.kv_bytes_after if compressed else report.kv_bytes_before,
        )


def ask(network: Any, processor: Any, inputs: Any, method: Method | None, limit: int) -> tuple[Timed, Report]:
    """Answer once untimed and once timed; without a method the report is empty."""
    from foveate.engines.base import compress
    from foveate.report import Report

    with contextlib.nullcontext() if method is None else compress(network, method) as handle:
        network.generate(**inputs, max_new_tokens=1, do_sample=False)
        timed = _timed(network, processor, inputs, limit)
        report = Report(method="none", model="", layers=0) if handle is None else handle.report
    return timed, report


def _timed(network: Any, processor: Any, inputs: Any, limit: int) -> Timed:
    from transformers import LogitsProcessorList

    from foveate.lab import chat
    from foveate.lab.advice.timing import watched_calls

    def now() -> float:
        if network.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    class FirstToken:
        at: float | None = None

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.at = self.at or now()
            return scores

    spent, first = list[float](), FirstToken()
    encoder = "get_video_features" if "pixel_values_videos" in inputs else "get_image_features"
    with watched_calls(network.base_model, encoder, spent, now):
        begin = now()
        output = network.generate(
            **inputs, max_new_tokens=limit, do_sample=False, logits_processor=LogitsProcessorList([first])
        )
        end = now()
    (answer,) = chat.answers(processor, inputs, output)
    return Timed(answer, sum(spent), (first.at or end) - begin, end - begin)


# -- what the user passes in


def read_budget(text: str) -> Keep:
    """Return a budget as it is typed: 64 is tokens, 0.1 a share of them."""
    from foveate.budget import check_keep

    try:
        keep: Keep = int(text) if text.strip().isdigit() else float(text)
    except ValueError as error:
        raise UserError(f"a budget is a number, got {text!r}", "--keep 64 is 64 tokens, --keep 0.1 a tenth") from error
    check_keep(keep)
    return keep


def build(spec: str) -> Method:
    """Return the method of a spec."""
    import foveate.methods  # noqa: F401 - registers the built-in methods
    from foveate.registry import from_spec

    try:
        return from_spec(spec)
    except FoveateError:
        raise
    except (TypeError, ValueError) as error:  # an option of the wrong kind, met by the method's own checks
        hint = "options are numbers or words: evocut:keep=64, v2drop:stages=3@0.5/17@0.3/22@0"
        raise UserError(f"cannot read the method {spec!r}: {_first_line(error)}", hint) from error


def usable(device: str | None, dtype: str | None) -> tuple[str, Any]:
    """Return where tensors go, and torch's dtype of a name; None where none was told."""
    import torch

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"no such dtype: {dtype!r}", did_you_mean(dtype, DTYPES))
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by the kind of device
        hint = "leave --device out, or pass --device cpu"
        raise UserError(f"device {where!r} cannot be used: {_first_line(error)}", hint) from error
    return where, None if dtype is None else getattr(torch, dtype)


def load(
    name: str, device: str | None, *, exact: bool = False, dtype: str | None = None, pictures: bool = False
) -> tuple[Any, Any]:
    """Return a supported model and its processor.

    Args:
        name: Of a demo model or of one on the hub, or a folder.
        device: Where it goes; the GPU when there is one.
        exact: In float32, where no dtype is told; on a CPU it is anyway.
        dtype: Of its weights.
        pictures: Whether it will be shown pictures, whatever it is.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    from foveate import demo
    from foveate.families import FAMILIES, family_of

    where, wanted = usable(device, dtype)
    disable_progress_bar()
    if pictures and name == "demo-video":
        raise UnsupportedModel(
            "demo-video reads clips, not pictures", "show it a video: foveate run CLIP QUESTION --model demo-video"
        )
    if name in demo.MODELS:
        return demo.load(name, where, wanted)
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        known = [model_type for family in FAMILIES for model_type in family.model_types]
        if kind not in known:  # before gigabytes of weights are read
            raise UnsupportedModel(f"no family serves model_type {kind!r}", did_you_mean(kind, known))
        kept = torch.float32 if exact or where == "cpu" else "auto"
        network: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=wanted or kept)
        processor: Any = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:  # transformers raises any of them
        hint = f"pass {', '.join(map(repr, demo.MODELS))}, a folder with config.json, or a hub name (needs a network)"
        raise UnsupportedModel(
            f"cannot load a vision-language model from {name!r}: {_first_line(error)}", hint
        ) from error
    family_of(network)
    return network.to(where).eval(), processor


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def conditions(network: Any) -> str:
    """Return what times depend on: the device, threads and dtype."""
    import torch

    dtype = str(network.dtype).removeprefix("torch.")
    if network.device.type == "cuda":
        return f"{torch.cuda.get_device_name(network.device)}, {dtype}"
    threads = torch.get_num_threads()
    return f"{network.device.type}, {threads} thread{'s' if threads > 1 else ''}, {dtype}"
