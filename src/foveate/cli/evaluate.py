"""``foveate eval``: methods, budgets and baselines on the same questions."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.ask import UserError, load, read_budget

if TYPE_CHECKING:
    from foveate.lab.evaluate import Run

BUDGETS = ("192", "128", "64", "32")


def evaluate(
    model: Annotated[str, typer.Argument(help="'demo', a folder with a saved model, or a name on the hub.")] = "demo",
    task: Annotated[
        str,
        typer.Option(help="'demo', or a folder, JSONL or parquet file whose rows have image, question and answer."),
    ] = "demo",
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method and its options, without its budget; again for more. All methods unless told."),
    ] = None,
    keep: Annotated[
        list[str],
        typer.Option(help="A budget: mean of visual tokens per decoder layer and picture (64), or a fraction (0.1)."),
    ] = list(BUDGETS),  # noqa: B006 - typer copies it
    n: Annotated[int | None, typer.Option(min=1, help="Ask the first n questions only.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder for the answers, the tables and the page.")] = Path("eval-out"),
    score: Annotated[str, typer.Option(help="What counts as right: 'exact', or 'contains'.")] = "exact",
    batch: Annotated[int, typer.Option(min=1, help="Pictures that are read together.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 16,
    dtype: Annotated[str | None, typer.Option(help="'bfloat16', 'float32', ...", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="'cpu', 'cuda', ...", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.", show_default=False)] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say how long it will take, and stop.")] = False,
) -> None:
    """Ask methods at equal budgets the same questions: accuracy with intervals, as tables and one page.

    Answers are written as they come: after Ctrl-C or a kill the same command goes on, and asks nothing twice.
    """
    from foveate.lab.answers import read
    from foveate.lab.contest import contest
    from foveate.lab.environment import environment
    from foveate.lab.evaluate import Run, tokens_of
    from foveate.lab.page import write
    from foveate.lab.tasks import load_task

    questions, budgets = load_task(task, n), [read_budget(text) for text in keep]
    network, processor = load(model, device, dtype=dtype)
    if threads is not None:
        _set_threads(threads)
    arms, refused = contest(network, method, budgets, tokens_of(network, processor, questions))
    for name, why in refused.items():
        _note(f"left out: {name}: {why}")
    header = environment() | {"model": model, "command": shlex.join(["foveate", *sys.argv[1:]]), "refused": refused}
    log = out / "accuracy.jsonl"
    run = Run(network, processor, questions, arms, log, header, score=score, batch=batch, limit=max_new_tokens)
    total = len(arms) * len(questions.items)
    if run.left:
        took = f"about {_duration(run.estimate())}"
        _note(f"{len(arms)} arms x {len(questions.items)} questions: {run.left} of {total} answers to give, {took}")
    if estimate:
        return
    _ask(run, log)
    header, given = read(log)
    for path in write(given, header, out):
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
