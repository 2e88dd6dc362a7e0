"""``foveate advise``: a short profile, what it predicts for each budget and method, and what to do with that."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from foveate.cli.ask import UserError, load, usable
from foveate.cli.options import AsJson, Device, Dtype, ModelArgument
from foveate.errors import did_you_mean

if TYPE_CHECKING:
    from foveate.lab.advice.advise import Adviser, Option
    from foveate.lab.advice.costs import Cost
    from foveate.lab.advice.prompt import Prompt

_MIB = 2**20

#: Where the output is no terminal, tables are this wide.
_WIDTH = 120


def advise(
    model: ModelArgument = "demo",
    image_size: Annotated[str, typer.Option(help="Width and height of the pictures, in pixels.")] = "1024x768",
    image: Annotated[Path | None, typer.Option(help="A picture instead of a size.", show_default=False)] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens of the picture, whatever its size.", show_default=False)
    ] = None,
    output: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts read together.")] = 1,
    question_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the question.")] = 30,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method without its budget; again for more. All methods unless told.", show_default=False),
    ] = None,
    loss: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the accuracy that may be lost.")] = 0.05,
    text_rich: Annotated[
        bool, typer.Option("--text-rich", help="The pictures are text: pages, screens, charts.")
    ] = False,
    accuracy: Annotated[
        list[Path] | None, typer.Option(help="An accuracy.csv that foveate eval wrote.", show_default=False)
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Read the profile from this file, or write it there.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Begin no round of the profile after so long.")] = 60.0,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of this shape instead of a model.", show_default=False)
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of the shape.", show_default=False)] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Predict from a short profile which method and budget pay on this machine, and say when not to compress."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its profiler warns of memory that it has not seen allocated
    from foveate.lab.advice.advise import Adviser
    from foveate.lab.advice.costs import Costs, Work
    from foveate.lab.advice.evidence import gather
    from foveate.lab.advice.measure import Plan, Profiler
    from foveate.lab.advice.profile import Profile, setting

    if shape is not None:
        network, name, prompts = _shape(shape, layers, dtype, device)
    else:
        network, name, prompts = _model(model, image, image_size, dtype, device)
    plan = Plan(question=question_tokens, output=output, batch=batch, methods=method, seconds=seconds)
    profiler = Profiler(network, name, prompts[0], plan, _note, prompts[1:])
    if profile is not None and profile.exists():
        measured = Profile.read(profile, setting(network, name))
    else:
        _note(f"profiling {name}: about {seconds:.0f} s")
        measured = profiler.run()
        if profile is not None:
            measured.save(profile)
    costs = Costs(measured)
    if method is not None and (missing := [one for one in method if one not in costs.methods]):
        raise UserError(f"{profile} has no {missing[0]!r}", did_you_mean(missing[0], costs.methods))
    work = Work(
        tokens=tokens or profiler.tokens,
        pictures=1 if tokens else profiler.pictures,
        pixels=profiler.pixels * (tokens or profiler.visual) / profiler.visual,
        question=question_tokens,
        output=output,
        batch=batch,
    )
    evidence = gather(name, network.config.model_type, accuracy or ())
    adviser = Adviser(costs, work, evidence, loss=loss, text_rich=text_rich)
    if as_json:
        typer.echo(json.dumps(_data(adviser), allow_nan=False))
    else:
        _show(adviser)


# -- what is asked about


def _model(
    name: str, image: Path | None, size: str, dtype: str | None, device: str | None
) -> tuple[Any, str, list[Prompt]]:
    from PIL import Image

    from foveate.lab.advice.prompt import of_inputs
    from foveate.lab.chat import prepare
    from foveate.lab.media import open_picture

    picture = Image.new("RGB", _size(size), (120, 130, 140)) if image is None else open_picture(image)
    network, processor = load(name, device, dtype=dtype, pictures=True)
    filler = processor.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    smaller = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)))
    each = (prepare(network, processor, [[one]], ["?"]) for one in (picture, smaller))
    return network, name, [of_inputs(network, inputs, filler) for inputs in each]


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise UserError(f"a size is width x height in pixels, got {text!r}", "type --image-size 1024x768")
    return int(width), int(height)


def _shape(name: str, layers: int | None, dtype: str | None, device: str | None) -> tuple[Any, str, list[Prompt]]:
    import torch

    from foveate.lab.advice.prompt import of_shape
    from foveate.lab.shapes import SHAPES, build

    where, wanted = usable(device, dtype)

    if name not in SHAPES:
        raise UserError(f"no such shape: {name!r}", did_you_mean(name, SHAPES))
    shape = dataclasses.replace(SHAPES[name], layers=layers or SHAPES[name].layers)
    network: Any = build(shape, wanted or torch.float32, "sdpa", 0).to(where)
    return network, f"{name}, {shape.layers} layers, random weights", [of_shape(shape, network)]


# -- what is shown


def _show(adviser: Adviser) -> None:
    work, profile, example = adviser.work, adviser.costs.profile, adviser.example
    where = ", ".join(profile.setting[key] for key in ("model", "device", "hardware", "dtype", "attention"))
    typer.echo(
        f"{where}: {adviser.visual} visual tokens, {profile.text + work.question} of text, {work.output} of answer, "
        f"batch {work.batch}"
    )
    full = ("all tokens", *_figures(adviser.full), "", "")
    headings = ("first, ms", "answer, ms", "per s", "MiB", "speed-up", "accuracy")
    if example is not None:
        same = [one for one in adviser.options if one.cost.method == example.cost.method]
        _print(("budget", *headings), [full, *((one.spec, *_cells(one, adviser)) for one in same)])
        other = [one for one in adviser.options if one.cost.keep == example.cost.keep]
        other.sort(key=lambda one: -one.total[0])
        _print(("method", *headings), [(one.spec, *_cells(one, adviser)) for one in other])
    for sentence in adviser.sentences():
        typer.echo(f"- {sentence.text}")
    for name, why in profile.refused.items():
        _note(f"left out: {name}: {why}")
    if adviser.out_of_reach:
        _note(f"out of reach in {profile.layers} layers: {', '.join(adviser.out_of_reach)}")
    _note("first, answer = time to the first token and to the last, predicted, with one deviation")
    _note("per s = prompts per second; MiB = weights and the most that tensors take; accuracy = share that is kept")
    _note(f"the profile has {profile.rounds} round{'s' * (profile.rounds > 1)} in {profile.seconds:.0f} s")


def _cells(one: Option, adviser: Adviser) -> tuple[str, ...]:
    share = one.kept(adviser.text_rich)
    return (*_figures(one.cost), "{:.2f} ±{:.2f}".format(*one.total), "unknown" if share is None else f"{share:.1%}")


def _figures(cost: Cost) -> tuple[str, ...]:
    times = (f"{cost.first:.0f} ±{cost.first_error:.0f}", f"{cost.total:.0f} ±{cost.total_error:.0f}")
    return (*times, f"{1000 * cost.batch / cost.total:.2f}", f"{cost.memory / _MIB:.0f}")


def _print(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDTH)
    console.print(table)


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _data(adviser: Adviser) -> dict[str, Any]:
    profile = adviser.costs.profile
    options = [
        _cost(one.cost)
        | {"speedup": one.total, "first_speedup": one.first, "pays": one.pays}
        | {"accuracy_kept": None if one.retention is None else dataclasses.asdict(one.retention)}
        for one in adviser.options
    ]
    return {
        "setting": profile.setting,
        "work": dataclasses.asdict(adviser.work),
        "profile": {"rounds": profile.rounds, "seconds": profile.seconds, "noise": adviser.costs.noise},
        "full": _cost(adviser.full),
        "options": options,
        "left_out": {**profile.refused, **adviser.out_of_reach},
        "chosen": None if adviser.chosen is None else adviser.chosen.spec,
        "advice": [dataclasses.asdict(sentence) for sentence in adviser.sentences()],
    }


def _cost(cost: Cost) -> dict[str, Any]:
    figures = {"first": cost.first, "total": cost.total, "mean_alive": cost.mean_alive}
    return dataclasses.asdict(cost) | figures | {"first_error": cost.first_error, "total_error": cost.total_error}
