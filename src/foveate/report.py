"""What a compressed call did: tokens, indices, scores, bytes and times. Data only, to and from JSON.

A `Report` holds one `ImageReport` for each image or video of the call, and that holds one `StageReport` for each site
where tokens left. All indices name the ORIGINAL tokens of their image, in reading order.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

_MIB = 2**20
_FORMAT = 1
_NON_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """What one stage kept of one image.

    Args:
        site: Decoder layer before which the tokens left; 0 = before the LLM.
        method: Name of the method that chose.
        kept: Tokens that stayed, as indices into the image's original tokens.
        scores: One score per candidate, higher means keep; None when the method has none.
        candidates: Tokens alive before the stage, as original indices; None = all tokens of the image.
        measures: Named scalars that the method wanted to show.
    """

    site: int
    method: str
    kept: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    candidates: tuple[int, ...] | None = None
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ImageReport:
    """What happened to one image or video.

    Args:
        row: Row of the batch.
        index: Place among the images of that row.
        modality: ``image`` or ``video``.
        grid: Frames (or crops), rows, columns of the original tokens.
        tokens: Visual tokens before any drop.
        stages: One entry per site where tokens could leave, in order.
        alive: Tokens in each decoder layer.
        merged_into: For merging methods: the slot among ``kept`` that took each original token in, -1 = none.
        frames: Rows and columns of each frame, where they differ (a thumbnail, and the picture put together of tiles);
            None: as ``grid`` says. Tokens are frame by frame, each in reading order.
    """

    row: int
    index: int
    modality: str
    grid: tuple[int, int, int]
    tokens: int
    stages: tuple[StageReport, ...] = ()
    alive: tuple[int, ...] = ()
    merged_into: tuple[int, ...] | None = None
    frames: tuple[tuple[int, int], ...] | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The tokens that entered the LLM, as original indices."""
        return self.after(0)

    @property
    def n_kept(self) -> int:
        """How many tokens entered the LLM."""
        return len(self.kept)

    @property
    def mean_alive(self) -> float:
        """Mean tokens per decoder layer: the number that budgets are compared by."""
        return sum(self.alive) / len(self.alive) if self.alive else float(self.n_kept)

    def after(self, site: int) -> tuple[int, ...]:
        """Return the tokens alive in decoder layer ``site``, as original indices."""
        kept = tuple(range(self.tokens))
        for stage in self.stages:
            if stage.site <= site:
                kept = stage.kept
        return kept

    def lives(self) -> tuple[float, ...]:
        """Return for each original token the share of decoder layers in which it was alive."""
        layers = len(self.alive)
        if not layers:
            kept = set(self.kept)
            return tuple(float(token in kept) for token in range(self.tokens))
        ends = [layers] * self.tokens
        alive = set(range(self.tokens))
        for stage in self.stages:
            for token in alive - set(stage.kept):
                ends[token] = min(stage.site, layers)
            alive &= set(stage.kept)
        return tuple(end / layers for end in ends)

    def scores(self) -> tuple[float, ...] | None:
        """Return the last score of each original token, NaN where there is none; None when no stage scored."""
        scores: list[float] | None = None
        for stage in self.stages:
            if stage.scores is not None:
                scores = scores or [math.nan] * self.tokens
                candidates = range(self.tokens) if stage.candidates is None else stage.candidates
                for token, score in zip(candidates, stage.scores, strict=True):
                    scores[token] = score
        return None if scores is None else tuple(scores)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the last compressed call did. ``print(report)`` shows it, `draw` paints it, `to_json` stores it.

    Args:
        method: Spec of the method.
        model: Class or name of the model.
        layers: Decoder layers.
        images: One entry per image or video, in the order of the prompt.
        prompt_tokens: Prompt length of each row, padding left out.
        prompt_tokens_after: The same after site 0.
        kv_bytes_before: KV cache of the prompt if nothing had been dropped.
        kv_bytes_after: KV cache of the prompt as it was.
        encode_ms: Time in the vision encoder and projector; None when nothing was encoded.
        select_ms: Time in the method's selection, all sites.
        prefill_ms: Time in the decoder for the prompt.
        calls: Calls with images since `compress`; the report shows the last.
    """

    method: str
    model: str
    layers: int
    images: tuple[ImageReport, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    prompt_tokens_after: tuple[int, ...] = ()
    kv_bytes_before: int = 0
    kv_bytes_after: int = 0
    encode_ms: float | None = None
    select_ms: float | None = None
    prefill_ms: float | None = None
    calls: int = 0

    @property
    def tokens(self) -> int:
        """Visual tokens of all images before any drop."""
        return sum(image.tokens for image in self.images)

    @property
    def kept(self) -> int:
        """Visual tokens of all images that entered the LLM."""
        return sum(image.n_kept for image in self.images)

    @property
    def mean_alive(self) -> float:
        """Mean visual tokens per decoder layer, all images together."""
        return math.fsum(image.mean_alive for image in self.images)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain lists, dicts and numbers, ready for JSON."""
        return {"format": _FORMAT, **_pack(dataclasses.asdict(self))}

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the report as JSON; infinite scores become the strings ``"Infinity"`` and ``"-Infinity"``."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Build a report from what `to_dict` returned.

        Raises:
            ValueError: If ``data`` is not a report of this format.
        """
        if data.get("format") != _FORMAT:
            raise ValueError(f"not a foveate report of format {_FORMAT}, got format {data.get('format')!r}")
        fields = _fields(cls, {key: value for key, value in data.items() if key != "format"})
        fields["images"] = tuple(_image(image) for image in fields["images"])
        for name in ("encode_ms", "select_ms", "prefill_ms"):
            fields[name] = None if fields[name] is None else _number(fields[name])
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Build a report from what `to_json` returned.

        Raises:
            ValueError: If ``text`` is not JSON, or not a report of this format.
        """
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"not a foveate report: expected a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)

    def draw(
        self, image: Image | str | Path | Sequence[Image | str | Path], index: int = 0, *, crop: bool = False
    ) -> Image:
        """Return the picture with the kept tokens crisp and the others dimmed.

        Where tokens leave inside the LLM, a token is the brighter the more layers it lives through.

        Args:
            image: The picture that was asked about, or its path; of a video, all frames.
            index: Which entry of ``images``.
            crop: The processor cut the picture to its central square before it made tokens, as CLIP's does.

        Raises:
            IndexError: If the report has no such image.
        """
        from foveate import draw

        if not -len(self.images) <= index < len(self.images):
            raise IndexError(f"the report has {len(self.images)} images, got index {index}")
        return draw.tokens(image, self.images[index], crop=crop)

    def save_html(
        self,
        path: str | Path,
        *images: Image | str | Path | Sequence[Image | str | Path],
        question: str = "",
        answer: str | None = None,
        full_answer: str | None = None,
        crop: bool = False,
    ) -> None:
        """Write one page that shows this call: answers, kept tokens, stages, the fate of each token.

        It needs no server and no network. A page with several budgets: `foveate.page`.

        Args:
            path: The file.
            images: What was asked about, one for each of ``images``: a picture or its path, or the frames of a video.
            question: What was asked.
            answer: What the compressed model said.
            full_answer: What it says with all tokens.
            crop: The processor cut pictures to their central square before it made tokens, as CLIP's does.

        Raises:
            ValueError: If nothing has run yet.
        """
        from foveate import page

        run, plain = page.Run(report=self, answer=answer), page.Plain(answer=full_answer)
        page.save(path, images, [run], question=question, plain=plain, crop=crop)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(report: Report) -> Iterator[str]:
    if not report.images:
        yield f"{report.method} on {report.model}: nothing has run yet, no image was seen"
        return
    if len(report.images) == 1:
        yield f"{_name(report.images[0])}: {_summary(report)}"
    else:
        yield f"{len(report.images)} images: {_summary(report)}"
        yield from _table(report.images)
    for image in report.images:
        before = image.tokens
        for stage in image.stages:
            if stage.site > 0 or stage.measures:
                place = f"before layer {stage.site}" if stage.site else "before the LLM"
                which = f"{_name(image)}, " if len(report.images) > 1 else ""
                measures = "".join(f", {name} {value:.4g}" for name, value in stage.measures.items())
                yield f"  {which}{place}: {before} -> {len(stage.kept)} tokens ({stage.method}){measures}"
            before = len(stage.kept)
    if report.calls > 1:
        yield f"  last of {report.calls} calls"


def _name(image: ImageReport) -> str:
    return f"{image.modality} {image.index}" + (f" of row {image.row}" if image.row else "")


def _summary(report: Report) -> str:
    share = report.kept / report.tokens if report.tokens else 1.0
    parts = [
        f"{report.tokens} -> {report.kept} tokens ({100 * share:.1f} %)",
        f"mean per layer {report.mean_alive:.1f}",
        f"KV {report.kv_bytes_before / _MIB:.1f} -> {report.kv_bytes_after / _MIB:.1f} MiB",
    ]
    for name, ms in (("encode", report.encode_ms), ("select", report.select_ms), ("prefill", report.prefill_ms)):
        if ms is not None:
            parts.append(f"{name} {milliseconds(ms)}")
    return ", ".join(parts)


def milliseconds(ms: float) -> str:
    """Return a time with two digits below ten and none above.

    Example:
        >>> milliseconds(3.14159), milliseconds(81.4)
        ('3.1 ms', '81 ms')
    """
    return f"{ms:.1f} ms" if ms < 10 else f"{ms:.0f} ms"


def _table(images: Sequence[ImageReport]) -> list[str]:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("row", "image", "grid", "tokens", "kept", "share", "mean per layer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for image in images:
        table.add_row(
            str(image.row),
            str(image.index),
            " x ".join(map(str, image.grid if image.grid[0] > 1 else image.grid[1:])),
            str(image.tokens),
            str(image.n_kept),
            f"{100 * image.n_kept / image.tokens:.1f} %" if image.tokens else "-",
            f"{image.mean_alive:.1f}",
        )
    console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    return ["  " + line.rstrip() for line in capture.get().splitlines() if line.strip()]


def _pack(value: Any) -> Any:
    """Return tuples as lists and non-finite floats as words, all the way down."""
    if isinstance(value, dict):
        return {key: _pack(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _number(value: float | str) -> float:
    return _NON_FINITE[value] if isinstance(value, str) else float(value)


def _fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``data`` with lists as tuples, after checking that it has exactly the fields of ``cls``."""
    names = [f.name for f in dataclasses.fields(cls)]
    if set(names) != set(data):
        odd = ", ".join(sorted(set(names) ^ set(data)))
        raise ValueError(f"not a foveate report: {cls.__name__} with missing or unknown fields: {odd}")
    return {name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in names}


def _image(data: Mapping[str, Any]) -> ImageReport:
    fields = _fields(ImageReport, data)
    fields["stages"] = tuple(_stage(stage) for stage in fields["stages"])
    fields["frames"] = None if fields["frames"] is None else tuple(map(tuple, fields["frames"]))
    return ImageReport(**fields)


def _stage(data: Mapping[str, Any]) -> StageReport:
    fields = _fields(StageReport, data)
    fields["scores"] = None if fields["scores"] is None else tuple(map(_number, fields["scores"]))
    fields["measures"] = {name: _number(value) for name, value in fields["measures"].items()}
    return StageReport(**fields)
