"""One question on one page: answers, kept tokens, stages, the fate of every token; a file that needs no network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from foveate.draw.ground import Frames, films
from foveate.draw.panels import panels
from foveate.draw.scene import RAMP
from foveate.draw.svg import data_uri
from foveate.report import ImageReport, Report, StageReport, milliseconds

#: Colours of the page, in the light and in the dark.
COLOURS = {
    "ink": ("#17191d", "#e9ebee"),
    "muted": ("#5d6470", "#a3abb8"),
    "line": ("#dde1e6", "#343a44"),
    "paper": ("#fefefd", "#14171c"),
    "card": ("#f4f5f7", "#1d2128"),
    "accent": ("#0b66a8", "#5cb2ee"),
}
#: Pixels of a picture's longer side, at most; larger ones are stored smaller.
LARGEST = 2048
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Run:
    """A compressed call.

    Args:
        report: What it did.
        answer: What it said; None where that was not recorded.
    """

    report: Report
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The same call with all tokens.

    Args:
        answer: What it said; None where that was not recorded.
        encode_ms: Time in the vision encoder.
        prefill_ms: Time in the decoder for the prompt.
    """

    answer: str | None = None
    encode_ms: float | None = None
    prefill_ms: float | None = None


def save(
    path: Path | str,
    pictures: Sequence[Frames],
    runs: Sequence[Run],
    *,
    question: str = "",
    plain: Plain | None = None,
    crop: bool = False,
    start: int = 0,
) -> None:
    """Write the page; arguments as in `render`."""
    text = render(pictures, runs, question=question, plain=plain, crop=crop, start=start)
    Path(path).write_text(text, encoding="utf-8")


def render(
    pictures: Sequence[Frames],
    runs: Sequence[Run],
    *,
    question: str = "",
    plain: Plain | None = None,
    crop: bool = False,
    start: int = 0,
) -> str:
    """Return the page as HTML.

    Args:
        pictures: What was asked about, in the order of the prompt: one entry for each in ``Report.images``, a picture
            or the frames of a video. Where a model counts tiles as pictures, so that there are more in the report,
            tokens are shown on plain ground.
        runs: Calls that differ in method or budget, in the order in which the page shows them.
        question: What was asked.
        plain: What the model says with all tokens.
        crop: The processor cut pictures to their central square.
        start: Which run is shown first.

    Raises:
        ValueError: If there is nothing to show, or the runs are not about the same tokens.
    """
    shapes = {tuple((image.grid, image.tokens, image.frames) for image in run.report.images) for run in runs}
    if len(shapes) != 1 or not runs[0].report.images:
        raise ValueError(f"a page shows calls about the same pictures, got {len(runs)} with {len(shapes)} shapes")
    if not 0 <= start < len(runs):
        raise ValueError(f"start is one of {len(runs)} runs, got {start}")
    images = runs[0].report.images
    known = len(pictures) == len(images)
    data = {
        "images": [_image(*pair, crop) for pair in zip(images, films(pictures, images), strict=True)],
        "runs": [_run(run) for run in runs],
        "start": start,
        "ramp": [f"rgb({red},{green},{blue})" for red, green, blue in RAMP],
    }
    template, script = (
        resources.files(__name__).joinpath(name).read_text("utf-8") for name in ("page.html.j2", "page.js")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        title=question or runs[start].report.method,
        question=question,
        model=runs[0].report.model,
        colours=COLOURS,
        known=known,
        plain=plain,
        tokens=runs[0].report.tokens,
        start=start,
        rows=[_plain_row(runs[0].report, plain), *map(_row, runs)],
        runs=runs,
        several=len(images) > 1,
        stages=[list(_stage_rows(run.report)) for run in runs],
        inside=any(stage.site for run in runs for image in run.report.images for stage in image.stages),
        scored=any(image.scores() is not None for run in runs for image in run.report.images),
        script=script,
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    )


# -- tables


def _row(run: Run) -> dict[str, str]:
    report = run.report
    share = f"{100 * report.kept / report.tokens:.1f} %" if report.tokens else "-"
    return {
        "name": report.method,
        "answer": "-" if run.answer is None else run.answer,
        "enter the LLM": f"{report.kept} ({share})",
        "mean per layer": f"{report.mean_alive:.1f}",
        "KV cache": f"{report.kv_bytes_after / _MIB:.2f} MiB",
        **_times(report.encode_ms, report.select_ms, report.prefill_ms),
    }


def _plain_row(report: Report, plain: Plain | None) -> dict[str, str]:
    return {
        "name": "all tokens",
        "answer": "-" if plain is None or plain.answer is None else plain.answer,
        "enter the LLM": f"{report.tokens} (100 %)",
        "mean per layer": f"{float(report.tokens):.1f}",
        "KV cache": f"{report.kv_bytes_before / _MIB:.2f} MiB",
        **_times(None if plain is None else plain.encode_ms, None, None if plain is None else plain.prefill_ms),
    }


def _times(*times: float | None) -> dict[str, str]:
    names = ("encode", "select", "prefill")
    return {name: "-" if ms is None else milliseconds(ms) for name, ms in zip(names, times, strict=True)}


def _stage_rows(report: Report) -> Iterator[dict[str, str]]:
    for image in report.images:
        before = image.tokens
        for stage in image.stages:
            yield {
                "image": _name(image),
                "where": f"before layer {stage.site}" if stage.site else "before the LLM",
                "method": stage.method,
                "tokens": f"{before} → {len(stage.kept)}",
                "measures": ", ".join(f"{name} {value:.4g}" for name, value in stage.measures.items()),
            }
            before = len(stage.kept)


def _name(image: ImageReport) -> str:
    return f"{image.modality} {image.index + 1}" + (f" of row {image.row + 1}" if image.row else "")


# -- what the script reads


def _image(image: ImageReport, film: list[Image.Image], crop: bool) -> dict[str, Any]:
    shown = panels(image, film[0].size, crop=crop)
    frames = 1 + max(panel.frame for panel in shown)
    used = [film[frame * len(film) // frames] for frame in range(frames)]
    return {
        "name": _name(image),
        "tokens": image.tokens,
        "video": image.modality == "video",
        "pictures": [data_uri(_smaller(picture)) for picture in used],
        "panels": [
            {"picture": panel.frame, "box": panel.box, "columns": panel.columns, "title": panel.title}
            | {"tokens": list(panel.order)}
            for panel in shown
        ],
    }


def _smaller(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((LARGEST, LARGEST))
    return small


def _run(run: Run) -> dict[str, Any]:
    return {
        "name": run.report.method,
        "answer": run.answer,
        "layers": run.report.layers,
        "images": [
            {
                "stages": [{"site": stage.site, "kept": len(stage.kept)} for stage in image.stages],
                "left": _left(image.tokens, image.stages),
                "scores": _scores(image),
                "alive": image.alive,
                "merged": _holders(image),
            }
            for image in run.report.images
        ],
    }


def _left(tokens: int, stages: Sequence[StageReport]) -> list[int]:
    """Return for each token the stage at which it left, -1 where it stayed."""
    left = [-1] * tokens
    alive = set(range(tokens))
    for number, stage in enumerate(stages):
        for token in alive - set(stage.kept):
            left[token] = number
        alive &= set(stage.kept)
    return left


def _scores(image: ImageReport) -> list[float | str | None] | None:
    """Return scores to four digits; infinite ones as words, unknown ones as None."""
    scores = image.scores()
    if scores is None:
        return None
    words: Mapping[float, str] = {math.inf: "always", -math.inf: "never"}
    return [None if math.isnan(score) else words.get(score, float(f"{score:.4g}")) for score in scores]


def _holders(image: ImageReport) -> list[int] | None:
    """Return for each token the one that carries it on, -1 where none does."""
    if image.merged_into is None:
        return None
    kept = image.kept
    return [kept[slot] if slot >= 0 else -1 for slot in image.merged_into]
