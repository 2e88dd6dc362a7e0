"""``foveate eval``: methods, budgets and baselines on the same questions."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.ask import UserError, load, read_budget
from foveate.cli.options import Device, Dtype, Limit, ModelArgument

if TYPE_CHECKING:
    from foveate.lab.evaluate import Run


def evaluate(
    model: ModelArgument = "demo",
    task: Annotated[
        str | None,
        typer.Option(
            help="'demo', 'demo-hd', 'demo-video', or a folder, JSONL or parquet file whose rows have image, images or "
            "video, question and answer. A demo model's own world unless told.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method and its options, without its budget; again for more. All methods unless told."),
    ] = None,
    arms: Annotated[
        Path | None,
        typer.Option(help="A file of further arms, in each line a budget and a method: 0.22 evocut:alpha=0.5"),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="A budget: mean of visual tokens per decoder layer and picture (64), or a fraction (0.1); again for "
            "more. 192, 128, 64 and 32 unless told, shares with 'demo-hd' and 'demo-video'."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option(min=1, help="Ask the first n questions only.", show_default=False)] = None,
    first: Annotated[
        int | None,
        typer.Option(min=1, help="Ask the first so many only, but of 'full' and 'blind' all.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the answers, the tables and the page.")] = Path("eval-out"),
    name: Annotated[str, typer.Option(help="Of the files in it, without their endings.")] = "accuracy",
    score: Annotated[str, typer.Option(help="What counts as right: 'exact', or 'contains'.")] = "exact",
    batch: Annotated[int, typer.Option(min=1, help="Pictures that are read together.")] = 20,
    max_new_tokens: Limit = 16,
    dtype: Dtype = None,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.", show_default=False)] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say how long it will take, and stop.")] = False,
) -> None:
    """Ask methods at equal budgets the same questions: accuracy with intervals, as tables and one page.

    Answers are written as they come: after Ctrl-C or a kill the same command goes on, and asks nothing twice.
    """
    from foveate.lab.answers import read
    from foveate.lab.contest import BUDGETS, PUBLISHED, contest, read_arms
    from foveate.lab.environment import environment
    from foveate.lab.evaluate import Run, tokens_of
    from foveate.lab.page import write
    from foveate.lab.tasks import WORLDS, load_task

    task = task or (model if model in WORLDS else "demo")
    budgets = [read_budget(text) for text in keep or ()] or BUDGETS.get(task, PUBLISHED)
    more, questions = [] if arms is None else read_arms(arms), load_task(task, n)
    network, processor = load(model, device, dtype=dtype)
    if threads is not None:
        _set_threads(threads)
    everyone, refused = contest(network, method, budgets, tokens_of(network, processor, questions), more)
    for left_out, why in refused.items():
        _note(f"left out: {left_out}: {why}")
    header = environment() | {"model": model, "command": shlex.join(["foveate", *sys.argv[1:]]), "refused": refused}
    log = out / f"{name}.jsonl"
    options: dict[str, Any] = {"score": score, "batch": batch, "limit": max_new_tokens, "first": first}
    run = Run(network, processor, questions, everyone, log, header, **options)
    if run.left:
        asked = f"{len(everyone)} arms, {len(questions.items)} questions"
        took = f"about {_duration(run.estimate())}"
        _note(f"{asked}: {run.left} of {run.total} answers to give, {took}")
    if estimate:
        return
    _ask(run, log)
    header, given = read(log)
    for path in write(given, header, out, name):
        _note(f"wrote {path}")


def _ask(run: Run, log: Path) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=run.left)
        try:
            for arm, answered in run.answers():
                progress.update(bar, description=arm.name, advance=answered)
        except KeyboardInterrupt as error:
            raise UserError(
                f"stopped; every answer so far is in {log}", "the same command goes on from there"
            ) from error


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _note(text: Any) -> None:
    typer.echo(text, err=True)
