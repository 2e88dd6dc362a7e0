"""Answers as HTML and pictures; knows no browser and no Gradio."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from foveate import draw
from foveate.errors import FoveateError
from foveate.report import ImageReport, Report, milliseconds
from foveate.studio.session import Answer

if TYPE_CHECKING:
    from PIL import Image

#: What one place shows: an answer, why there is none, or nothing yet.
Shown = Answer | FoveateError | None

_MIB = 2**20
_STAGES = ("encode", "select", "prefill", "decode")
_ALL = "all tokens"


def error(reason: FoveateError) -> str:
    """Return a message and its hint."""
    hint = f'<p class="hint">hint: {escape(reason.hint)}</p>' if reason.hint else ""
    return f'<div class="fv-error" role="alert"><p>error: {escape(reason.message)}</p>{hint}</div>'


def card(title: str, shown: Shown) -> str:
    """Return what one way of answering said, or why it did not."""
    head = f'<p class="fv-title">{escape(title)}</p>'
    if shown is None:
        return f'<div class="fv-card">{head}<p class="fv-answer fv-none">…</p></div>'
    if isinstance(shown, FoveateError):
        return f'<div class="fv-card">{head}{error(shown)}</div>'
    answer = escape(shown.text) if shown.text else '<span class="fv-none">(no word)</span>'
    return f'<div class="fv-card">{head}<p class="fv-answer">{answer}</p>{_counted(shown.report)}</div>'


def _counted(report: Report | None) -> str:
    if report is None:
        return '<p class="fv-note">reads every token in every layer</p>'
    entered, mean = f"{report.kept} of {report.tokens} tokens enter the LLM", f"{report.mean_alive:.1f} per layer"
    return f'<p class="fv-note">{entered}, {mean}</p>'


def numbers(names: Sequence[str], shown: Sequence[Shown]) -> str:
    """Return a table of what each way cost, all tokens first, with a bar of its stages; empty where none answered."""
    answers = [each if isinstance(each, Answer) else None for each in shown]
    if not any(answers):
        return ""
    told = next((each.report for each in answers if each is not None and each.report is not None), None)
    longest = max(each.first_token + each.decode + _saved(each) for each in answers if each is not None) or 1.0
    rows = [
        ("visual tokens", [_tokens(each, told) for each in answers]),
        ("mean per layer", [_mean(each, told) for each in answers]),
        ("KV cache of prompt", [_kv(each, told) for each in answers]),
        *((_legend(stage), [_time(each, stage) for each in answers]) for stage in _STAGES),
        ("first token", [milliseconds(each.first_token) if each else "-" for each in answers]),
        ("total", [milliseconds(each.total) if each else "-" for each in answers]),
        ("", [_bar(each, longest) if each else "" for each in answers]),
    ]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for name, cells in rows
    )
    return f'<table class="fv-numbers"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'


def layers(shown: Sequence[Shown]) -> str:
    """Return a curve of the tokens alive in each layer as SVG; empty where no method answered."""
    reports = [each.report for each in shown if isinstance(each, Answer) and each.report is not None]
    if not reports:
        return ""
    lines = [_whole(reports[0]), *reports] if len({report.layers for report in reports}) == 1 else reports
    return f'<div class="fv-paper">{draw.alive.svg(lines[0], *lines[1:], size=(560, 240))}</div>'


def kept(picture: Image.Image, shown: Shown, crop: bool) -> Image.Image | None:
    """Return the picture with what a method kept; as it is where all was read, none where there is no answer."""
    if not isinstance(shown, Answer):
        return None
    return picture if shown.report is None else shown.report.draw(picture, crop=crop)


def difference(
    picture: Image.Image, shown: Sequence[Shown], names: tuple[str, str], crop: bool
) -> tuple[Image.Image | None, str]:
    """Return a picture of what only one of two methods kept, and the same in words."""
    reports = [each.report for each in shown if isinstance(each, Answer) and each.report is not None]
    if len(reports) < 2:
        return None, ""
    first, second = (report.images[0] for report in reports)
    one, other = (_longest(report) for report in (first, second))
    words = (
        f"Kept by both: {len(one & other)}. Only by {names[0]}: {len(one - other)}. "
        f"Only by {names[1]}: {len(other - one)}."
    )
    return draw.compare(picture, first, second, names, crop=crop), words


def caption(text: str) -> str:
    """Return a line beside a picture."""
    return f'<p class="fv-words">{escape(text)}</p>'


def _longest(report: ImageReport) -> set[int]:
    lives = report.lives()
    longest = max(lives, default=0.0)
    return {token for token, life in enumerate(lives) if life == longest > 0}


def _whole(report: Report) -> Report:
    """Return what a report would say if every token had stayed."""
    images = [
        dataclasses.replace(image, stages=(), alive=(image.tokens,) * len(image.alive), merged_into=None)
        for image in report.images
    ]
    return dataclasses.replace(report, method=_ALL, images=tuple(images))


def _tokens(answer: Answer | None, told: Report | None) -> str:
    if answer is None or told is None:
        return "-"
    return str(told.tokens if answer.report is None else answer.report.kept)


def _mean(answer: Answer | None, told: Report | None) -> str:
    if answer is None or told is None:
        return "-"
    return f"{told.tokens if answer.report is None else answer.report.mean_alive:.1f}"


def _kv(answer: Answer | None, told: Report | None) -> str:
    if answer is None or told is None:
        return "-"
    return f"{(told.kv_bytes_before if answer.report is None else answer.report.kv_bytes_after) / _MIB:.1f} MiB"


def _time(answer: Answer | None, stage: str) -> str:
    spent: float | None = getattr(answer, stage, None)
    if answer is None or spent is None or (stage == "select" and answer.report is None):
        return "-"
    if stage == "encode" and answer.reused:
        return f'<span title="{milliseconds(spent)} when it ran">re-used</span>'
    return milliseconds(spent)


def _legend(stage: str) -> str:
    return f'<span class="fv-key fv-{stage}"></span>{stage}'


def _saved(answer: Answer) -> float:
    return answer.encode or 0.0 if answer.reused else 0.0


def _bar(answer: Answer, longest: float) -> str:
    pieces = []
    for stage in _STAGES:
        spent: float = getattr(answer, stage) or 0.0
        reused = stage == "encode" and answer.reused
        kind, label = f"fv-{stage}" + (" fv-reused" if reused else ""), f"{stage} {milliseconds(spent)}"
        label += ", re-used" if reused else ""
        pieces.append(f'<span class="{kind}" style="width:{100 * spent / longest:.2f}%" title="{label}"></span>')
    return f'<div class="fv-bar">{"".join(pieces)}</div>'
