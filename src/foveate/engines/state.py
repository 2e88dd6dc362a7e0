"""What one call leaves behind: the frame that the engine's parts share, and the record that becomes the report."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import Evidence, Selection
from foveate.engines.masks import layer_kinds
from foveate.engines.sequence import Layout
from foveate.errors import UnsupportedCall
from foveate.families import Picture
from foveate.report import ImageReport, Report, StageReport

Stamp = float | torch.cuda.Event


class Clock:
    """Time by section, in milliseconds; on CUDA by events, so that nothing waits for the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pairs: dict[str, list[tuple[Stamp, Stamp]]] = {}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        start = self._stamp()
        yield
        self._pairs.setdefault(name, []).append((start, self._stamp()))

    def ran(self, name: str) -> bool:
        """Whether a section ran at all."""
        return name in self._pairs

    def ms(self, name: str) -> float | None:
        """Return the time spent in a section, None if it never ran."""
        if name not in self._pairs:
            return None
        return sum(_elapsed(start, end) for start, end in self._pairs[name])

    def _stamp(self) -> Stamp:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _elapsed(start: Stamp, end: Stamp) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return float(start.elapsed_time(end))
    assert isinstance(start, float) and isinstance(end, float)
    return (end - start) * 1000.0


@dataclass(frozen=True)
class Stage:
    """What one method did to one image at one site, still on the device; indices are the image's original ones."""

    site: int
    method: str
    candidates: Tensor
    kept: Tensor
    selection: Selection


@dataclass
class Seen:
    """One image of a call.

    Args:
        row: Row of the batch.
        modality: ``image`` or ``video``.
        number: Which of the call's images (or videos) it is.
        tokens: Tokens the encoder made.
        picture: What the family knows of it.
        evidence: What methods may see of the tokens that entered the LLM.
        origin: Original indices of the tokens still alive.
        stages: What happened to it so far.
    """

    row: int
    modality: str
    number: int
    tokens: int
    picture: Picture
    evidence: Evidence
    origin: Tensor
    stages: list[Stage] = field(default_factory=list)


@dataclass
class Frame:
    """One call of ``generate`` or ``forward`` with pictures in it.

    Args:
        layout: Where things are in the prompt the language model gets.
        images: The call's images, in the order of the prompts.
        clock: Times of the call.
        prompt_tokens: Real tokens of each prompt as the caller passed it.
        pending: Sites at which tokens must still leave during prefill.
    """

    layout: Layout
    images: list[Seen]
    clock: Clock
    prompt_tokens: tuple[int, ...]
    pending: set[int]

    def report(self, method: str, model: Any, layers: int, calls: int) -> Report:
        """Return the report of this call; this is where the device is waited for."""
        rows = [seen.row for seen in self.images]
        images = tuple(_image_report(rows[:i].count(seen.row), seen, layers) for i, seen in enumerate(self.images))
        staying = [len(row) for row in self.layout.staying]
        per_token = kv_bytes_per_token(model)
        holds = [kind != "linear_attention" for kind in layer_kinds(model.config.get_text_config(), layers)]
        after = sum(sum(compress(image.alive, holds)) for image in images)
        alive_at_0 = [sum(image.alive[0] for image in images if image.row == row) for row in range(self.layout.batch)]
        return Report(
            method=method,
            model=type(model).__name__,
            layers=layers,
            images=images,
            prompt_tokens=self.prompt_tokens,
            prompt_tokens_after=tuple(text + alive for text, alive in zip(staying, alive_at_0, strict=True)),
            kv_bytes_before=per_token * sum(holds) * sum(self.prompt_tokens),
            kv_bytes_after=per_token * (sum(holds) * sum(staying) + after),
            encode_ms=self.clock.ms("encode"),
            select_ms=self.clock.ms("select"),
            prefill_ms=self.clock.ms("prefill"),
            calls=calls,
        )


def _image_report(index: int, seen: Seen, layers: int) -> ImageReport:
    alive, counts = seen.tokens, []
    for layer in range(layers):
        for stage in seen.stages:
            if stage.site == layer:
                alive = len(stage.kept)
        counts.append(alive)
    return ImageReport(
        row=seen.row,
        index=index,
        modality=seen.modality,
        grid=seen.evidence.grid,
        tokens=seen.tokens,
        stages=tuple(_stage_report(stage) for stage in seen.stages),
        alive=tuple(counts),
        merged_into=_merged_into(seen),
        frames=_frame_sizes(seen),
    )


def _frame_sizes(seen: Seen) -> tuple[tuple[int, int], ...] | None:
    """Rows and columns of each frame where tokens do not fill the grid."""
    places = seen.picture.places
    if places is None:
        return None
    each = [places[places[:, 0] == frame] for frame in range(seen.picture.grid[0])]
    return tuple((int(mine[:, 1].max()) + 1, int(mine[:, 2].max()) + 1) for mine in each)


def _merged_into(seen: Seen) -> tuple[int, ...] | None:
    """Follow each original token through the stages before the LLM, to its slot among those that entered it."""
    stages = [stage for stage in seen.stages if stage.site == 0]
    if all(stage.selection.merged_into is None for stage in stages):
        return None
    holder = dict(enumerate(range(seen.tokens)))  # which token carries it on
    for stage in stages:
        kept, slots = stage.kept.tolist(), stage.selection.merged_into
        carries = {token: token for token in kept}
        if slots is not None:
            pairs = zip(stage.candidates.tolist(), slots.tolist(), strict=True)
            carries = {token: kept[slot] for token, slot in pairs if slot >= 0}
        holder = {token: carries[by] for token, by in holder.items() if by in carries}
    slot = {token: i for i, token in enumerate(seen.origin.tolist())}
    return tuple(slot[holder[token]] if token in holder else -1 for token in range(seen.tokens))


def _stage_report(stage: Stage) -> StageReport:
    scores = stage.selection.scores
    return StageReport(
        site=stage.site,
        method=stage.method,
        kept=tuple(stage.kept.tolist()),
        candidates=tuple(stage.candidates.tolist()),
        scores=None if scores is None else tuple(scores.detach().tolist()),
        measures={name: float(value.detach()) for name, value in stage.selection.measures.items()},
    )


def kv_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that one token takes in one decoder layer that holds them."""
    config = model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None):  # both are kept in one short row, from which they are made
        return int((config.kv_lora_rank + config.qk_rope_head_dim) * model.dtype.itemsize)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * heads * width * model.dtype.itemsize)


class _Watch(threading.local):
    depth = 0


_WATCH = _Watch()


def attended() -> bool:
    """Whether this thread is in a call that goes through a handle."""
    return _WATCH.depth > 0


@contextmanager
def attending() -> Iterator[None]:
    """Mark what runs now as a call that goes through a handle."""
    _WATCH.depth += 1
    try:
        yield
    finally:
        _WATCH.depth -= 1


class Frames:
    """A stack of frames per thread. None on top means: inside a call that is none of our business."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def _stack(self) -> list[Frame | None]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[Frame | None] = self._local.stack
        return stack

    @property
    def inside(self) -> bool:
        return bool(self._stack)

    @property
    def top(self) -> Frame | None:
        return self._stack[-1] if self._stack else None

    @contextmanager
    def entered(self, frame: Frame | None) -> Iterator[None]:
        self._stack.append(frame)
        try:
            with attending():
                yield
        finally:
            self._stack.pop()


class Attachment:
    """Everything that was put on a model, and how to take it off again."""

    def __init__(self) -> None:
        self._undo: list[Any] = []

    def wrap(self, module: nn.Module, name: str, wrapper: Any) -> None:
        """Replace a method on this instance only."""
        before = module.__dict__.get(name)
        setattr(module, name, wrapper)

        def undo() -> None:
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)

        self._undo.append(undo)
        if "__deepcopy__" not in module.__dict__:
            module.__dict__["__deepcopy__"] = _no_copy
            self._undo.append(lambda: module.__dict__.pop("__deepcopy__"))

    def add(self, undo: Any) -> None:
        """Remember a function that undoes something."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Undo everything, last first; a second time does nothing."""
        while self._undo:
            self._undo.pop()()


def _no_copy(memo: Any) -> Any:
    raise UnsupportedCall(
        "a compressed model cannot be copied: the copy would call what is wrapped around this one",
        "copy it before foveate.compress, or after handle.remove()",
    )


def bind(signature: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return positional and keyword arguments as one dict by name."""
    bound = signature.bind_partial(*args, **kwargs).arguments
    extra = {name: bound.pop(name) for name in list(bound) if signature.parameters[name].kind.name == "VAR_KEYWORD"}
    return {**bound, **{key: value for pack in extra.values() for key, value in pack.items()}}
