"""``foveate run``: one question about pictures or a video, with all visual tokens and with few."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from foveate.cli.ask import Arm, ask, build, conditions, load
from foveate.cli.media import crops, drawable, prepare, shows_video, watch
from foveate.cli.options import AsJson, Device, Limit, Model, Spec
from foveate.cli.output import MIB, check_writable, columns, note, show
from foveate.cli.record import around, record

if TYPE_CHECKING:
    from foveate.draw.ground import Frames
    from foveate.report import Report

PICTURE_FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def run(
    pictures: Annotated[
        list[Path],
        typer.Argument(
            metavar="PICTURE",
            help="Picture files: PNG, JPEG, WebP ...; or one video: MP4, MOV, WebM, MKV, a moving GIF or WebP, or a "
            "folder of frames.",
            show_default=False,
        ),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.", show_default=False)],
    model: Model = "demo",
    method: Spec = "evocut:keep=64",
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames of a video, at most, evenly spread; what suits the model unless told.",
            show_default=False,
        ),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(help="Write a picture of the kept tokens to this file.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page to this file: answers and kept tokens at several budgets.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    max_new_tokens: Limit = 32,
    device: Device = None,
) -> None:
    """Answer a question about pictures or a video with all visual tokens and with few, side by side."""
    from foveate.lab.media import Media, open_picture
    from foveate.registry import to_spec

    video, built = shows_video(pictures, question, frames), build(method)
    if draw is not None:
        check_writable(draw, (*PICTURE_FORMATS, ".svg"))
    if html is not None:
        check_writable(html, (".html", ".htm"))
    shown: list[Media] = [] if video else [open_picture(path) for path in pictures]
    network, processor = load(model, device, pictures=not video)  # after the pictures: a broken one should not wait
    film = watch(pictures[0], processor, frames) if video else None
    shown += [film] if film else []
    inputs = prepare(network, processor, shown, question)
    plain, _ = ask(network, processor, inputs, None, max_new_tokens)
    timed, report = ask(network, processor, inputs, built, max_new_tokens)
    full, short = Arm.of(plain, report, compressed=False), Arm.of(timed, report)
    seen, crop = drawable(shown), crops(processor, video=video)
    if draw is not None:
        _draw(draw, seen, report, crop)
        note(f"wrote {draw}")
    if html is not None:
        from foveate import page

        methods = around(built, min(each.tokens for each in report.images))
        runs, refused = record(network, processor, inputs, methods, built, max_new_tokens)
        full_arm = page.Plain(answer=full.answer, encode_ms=full.encode_ms, prefill_ms=full.prefill_ms)
        start = [run.report.method for run in runs].index(to_spec(built))
        page.save(html, seen, runs, question=question, plain=full_arm, crop=crop, start=start)
        note(f"wrote {html}" + "".join(f"; {to_spec(each)} cannot be met" for each in refused))
    spec, setting = to_spec(built), conditions(network)
    if as_json:
        asked: dict[str, object] = {"images": list(map(str, pictures)), "frames": len(film.frames) if film else None}
        asked |= {"question": question, "model": model, "method": spec, "conditions": setting}
        arms = {"full": dataclasses.asdict(full), "compressed": dataclasses.asdict(short)}
        typer.echo(json.dumps(asked | arms | {"report": report.to_dict()}, allow_nan=False))
        return
    table = columns("", "all tokens", spec)
    for name, one, other in zip(_ROWS, _cells(full), _cells(short), strict=True):
        table.add_row(name, one, other)
    show(table)
    note(f"one timed run each after an untimed one, {setting}")


_ROWS = ("answer", "visual tokens", "per layer", "encode", "select", "prefill", "decode", "total", "KV cache of prompt")


def _cells(arm: Arm) -> list[str]:
    from foveate.report import milliseconds

    select = milliseconds(arm.select_ms) if arm.select_ms else "-"
    prefill, decode, total = map(milliseconds, (arm.prefill_ms, arm.decode_ms, arm.total_ms))
    times = (milliseconds(arm.encode_ms), select, prefill, decode, total)
    kv = f"{arm.kv_bytes / MIB:.1f} MiB"
    return [escape(arm.answer), str(arm.tokens), f"{arm.mean_tokens:.1f}", *times, kv]


def _draw(path: Path, seen: Sequence[Frames], report: Report, crop: bool) -> None:
    from foveate import draw

    if path.suffix.lower() == ".svg":
        path.write_text(draw.prompt.svg(seen, report, crop=crop), encoding="utf-8")
    else:
        draw.prompt(seen, report, crop=crop).save(path)
