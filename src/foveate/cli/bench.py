"""``foveate bench``: what methods cost and save on this machine, beside the arms that bound them."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from foveate.cli.ask import UserError, load, read_budget, usable
from foveate.cli.options import MODELS, Device, Dtype
from foveate.errors import did_you_mean

if TYPE_CHECKING:
    from PIL import Image

    from foveate.budget import Keep
    from foveate.lab.speed.work import Work

QUESTION = "What is in this picture, and where is it?"

#: Where the output is no terminal, tables are this wide.
_WIDTH = 180


def bench(
    model: Annotated[
        str | None,
        typer.Argument(help=f"{MODELS} Unless told 'demo', or what --shape says."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights instead of a model: llava-1.5-7b, qwen2.5-vl-3b, tiny ..., with a decoder "
            "of 12 x 2048 unless told."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of the shape.", show_default=False)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Decoder width of the shape.", show_default=False)] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "--methods", help="A method and its options; again for more. All methods unless told."
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Budget: mean of visual tokens per decoder layer (64), or a fraction (0.1).")
    ] = "64",
    batch: Annotated[list[int], typer.Option(min=1, help="Pictures answered at once; again for more sizes.")] = [1],  # noqa: B006 - typer copies it
    image: Annotated[
        Path | None, typer.Option(help="The picture; a bundled one unless told.", show_default=False)
    ] = None,
    side: Annotated[
        int | None, typer.Option(min=1, help="Side of a picture of noise, in pixels.", show_default=False)
    ] = None,
    dtype: Dtype = None,
    attention: Annotated[
        str | None, typer.Option(help="'sdpa', 'eager', ...; the model's own unless told.", show_default=False)
    ] = None,
    device: Device = None,
    steps: Annotated[int, typer.Option(min=0, help="Decode steps after the first token.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 7,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds that do not.")] = 1,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Begin no round after so long, but the first.", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights, noise, and the order of the arms.")] = 0,
    out: Annotated[Path, typer.Option(help="The CSV; written after every round.")] = Path("bench.csv"),
    memory: Annotated[bool, typer.Option(help="Peak memory too, each arm in a process of its own.")] = True,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what each method costs and saves: stages, throughput, memory, beside full, random and ideal.

    Arms take turns in a new random order each round. A ratio is printed only where the two spreads do not overlap.
    """
    import torch

    from foveate.lab.speed.bench import Bench
    from foveate.lab.speed.rounds import Pace

    if threads is not None:
        torch.set_num_threads(threads)
    budget = read_budget(keep)
    subject = Subject(model, shape, layers, width, image, side, dtype, attention, device, seed)
    if memory_of is not None:
        _weigh(subject.work(), memory_of, budget, batch[0], min(steps, 2))
        return
    _check_writable(out)
    console = Console(stderr=True, log_path=False)
    run = Bench(
        methods=method,
        keep=budget,
        batches=batch,
        steps=steps,
        pace=Pace(repeats=repeats, warmup=warmup, seconds=math.inf if seconds is None else seconds, seed=seed),
        out=out,
        about={"model": subject.name, "seed": str(seed)},
        say=lambda line: console.log(escape(line)),
    )
    console.log(f"making {escape(subject.name)}")
    whole = run.measure(subject.work())
    gc.collect()  # every process makes a model of its own
    if whole and memory:
        same = subject.options() | {"--keep": keep, "--steps": steps, "--batch": batch[0]}
        same |= {"--threads": torch.get_num_threads()}
        run.weigh(lambda arm: _command(model, {**same, "--memory-of": arm}))
    if run.lines:
        _show(run.lines)
        typer.echo(f"wrote {out}", err=True)
    if not whole:
        raise typer.Exit(130)


def _show(lines: Sequence[dict[str, str]]) -> None:
    from foveate.lab.speed.tables import Lines, costs, promises, sizes, stages, throughput

    console, each = Console(width=None if sys.stdout.isatty() else _WIDTH), Lines(lines)
    first = min(each.batches)
    tables = [stages(each, first), costs(each, first), sizes(each)]
    for table in [*tables, *([throughput(each)] if len(each.batches) > 1 else [])]:
        console.print(table.rich())
    if each.get("media", "read"):
        typer.echo(
            f"opening and preparing a picture: {each.median('media', 'read')} ms, the same for every arm, not above"
        )
    for line in each.refused:
        typer.echo(f"refused: {line['arm']} (batch {line['batch']}): {line['note']}")
    for text in promises(lines, first):
        typer.echo(text)
    names = ("model", "layers", "width", "visual_tokens", "text_tokens", "steps", "dtype", "attention", "device", "cpu")
    more = ("threads", "load_before", "load_after", "torch", "transformers", "commit")
    typer.echo(" ".join(f"{name}={lines[0][name]}" for name in names + more))


# -- what is measured


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and a picture, as the command line names them."""

    model: str | None
    shape: str | None
    layers: int | None
    width: int | None
    image: Path | None
    side: int | None
    dtype: str | None
    attention: str | None
    device: str | None
    seed: int

    def __post_init__(self) -> None:
        if self.shape is not None:
            _exclude("--shape", {"a model": self.model, "--image": self.image})
        else:
            _exclude("a model", {"--layers": self.layers, "--width": self.width})
            _exclude("--image", {"--side": self.side if self.image is not None else None})

    @property
    def name(self) -> str:
        return self.shape or self.model or "demo"

    def options(self) -> dict[str, object]:
        """Return the options that name it again."""
        return {f"--{name}": value for name, value in dataclasses.asdict(self).items() if name != "model"}

    def work(self) -> Work:
        """Make or load the model, and encode the picture once."""
        return self._random() if self.shape is not None else self._loaded()

    def _random(self) -> Work:
        import torch

        from foveate.lab import shapes
        from foveate.lab.speed.work import Work

        if self.shape not in shapes.SHAPES:
            raise UserError(f"no such shape: {self.shape!r}", did_you_mean(str(self.shape), shapes.SHAPES))
        where, kind = usable(self.device, self.dtype)
        changed = {"layers": self.layers, "width": self.width, "side": self.side}
        shape = dataclasses.replace(
            shapes.SHAPES[self.shape], **{name: value for name, value in changed.items() if value is not None}
        )
        kind = kind or (torch.float32 if where == "cpu" else torch.bfloat16)
        with _attention(self.attention):
            network = shapes.build(shape, kind, self.attention or "sdpa", self.seed).to(where)
        inputs = shapes.inputs(shape, kind, self.seed)
        return Work.of(network, {name: value.to(where) for name, value in inputs.items()})

    def _loaded(self) -> Work:
        from foveate import demo
        from foveate.lab.chat import prepare
        from foveate.lab.media import open_picture
        from foveate.lab.speed.work import Work

        path = demo.PICTURE if self.image is None else self.image
        noise = None if self.side is None else _noise(self.side, self.seed)
        first = noise or open_picture(path)  # before the model: a wrong path should not wait for it
        network, processor = load(self.name, self.device, dtype=self.dtype, pictures=True)
        if self.attention is not None:
            with _attention(self.attention):
                network.set_attn_implementation(self.attention)

        def read() -> Any:
            return prepare(network, processor, [[noise or open_picture(path)]], [QUESTION])

        return Work.of(network, prepare(network, processor, [[first]], [QUESTION]), read)


def _noise(side: int, seed: int) -> Image.Image:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@contextmanager
def _attention(name: str | None) -> Iterator[None]:
    """Turn what transformers says of an attention implementation that it lacks into an error of the user."""
    try:
        yield
    except (ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"attention {name!r} cannot be used: {first}", "pass --attention sdpa or eager") from error


def _check_writable(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}", "pass another file: --out bench.csv") from error


def _exclude(given: str, others: Mapping[str, object]) -> None:
    for name, value in others.items():
        if value is not None:
            raise UserError(f"{name} does not go with {given}", "leave one of them out")


# -- memory, in processes of their own


def _command(model: str | None, options: Mapping[str, object]) -> list[str]:
    given = [str(word) for name, value in options.items() if value is not None for word in (name, value)]
    return [sys.executable, "-m", "foveate", "bench", *([] if model is None else [model]), *given]


def _weigh(work: Work, arm: str, budget: Keep, batch: int, steps: int) -> None:
    """Print what one arm needs."""
    from foveate.lab.speed.arms import Arms
    from foveate.lab.speed.memory import peak

    arms = Arms(work, steps)
    if arm.partition(":")[0] == "ideal":
        keep = int(arm.partition("keep=")[2] or work.budget(budget))
        arms.ready(keep, batch)
        found = peak(work.model.device, lambda: arms.ideal(keep, batch))
    else:
        found = peak(work.model.device, lambda: arms.full(batch) if arm == "full" else arms.method(arm, batch))
    typer.echo(json.dumps(found))
