"""The command line: ``foveate run | demo | methods | families | verify | serve``.

Data goes to stdout, everything else to stderr. A mistake of the user ends in ``error:``, ``hint:`` and exit code 2.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from foveate.cli.advise import advise
from foveate.cli.ask import Arm, UserError, ask, build, conditions, crops, load, open_picture, prepare
from foveate.cli.bench import bench
from foveate.cli.evaluate import evaluate
from foveate.cli.record import around, record
from foveate.cli.serve import serve
from foveate.cli.studio import studio
from foveate.cli.tables import family_rows, method_rows
from foveate.errors import FoveateError

if TYPE_CHECKING:
    from PIL import Image

    from foveate.report import Report

DEMO_METHODS = ("evocut:keep=64", "todre:keep=64", "adav:keep=64", "v2drop:keep=64")
PICTURE_FORMATS = (".png", ".jpg", ".jpeg", ".webp")
_MIB = 2**20


class _Group(TyperGroup):
    """Turns what the user can mend into ``error:`` and ``hint:``; everything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FoveateError as error:
            _note(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group,
    help="Let a vision-language model read a picture with a fraction of its visual tokens, without training.",
    epilog='Start here: foveate demo. Then: foveate run picture.jpg "What is on the sign?"',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Option(help="'demo' (bundled), a folder with a saved model, or the name of a model on the Hugging Face hub."),
]
Spec = Annotated[
    str,
    typer.Option(
        help="Method and its options, for example 'evocut:keep=64' (64 tokens per image) or 'todre:keep=0.1' (a tenth "
        "of them). See: foveate methods."
    ),
]
Device = Annotated[str | None, typer.Option(help="'cpu', 'cuda', ...; the GPU when there is one.", show_default=False)]


def main() -> None:
    """Run the command line."""
    app(prog_name="foveate")


def _version(asked: bool | None) -> None:
    if asked:
        from importlib.metadata import version

        import foveate

        typer.echo(f"foveate {foveate.__version__} (torch {version('torch')}, transformers {version('transformers')})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = None,
) -> None:
    pass


@app.command()
def run(
    image: Annotated[Path, typer.Argument(help="A picture file: PNG, JPEG, WebP ...", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask about it.", show_default=False)],
    model: Model = "demo",
    method: Spec = "evocut:keep=64",
    draw: Annotated[
        Path | None, typer.Option(help="Write a picture of the kept tokens to this file.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page to this file: answers and kept tokens at several budgets.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    device: Device = None,
) -> None:
    """Answer a question about a picture with all visual tokens and with few, side by side."""
    from foveate.registry import to_spec

    picture, built = open_picture(image), build(method)
    if draw is not None:
        _check_writable(draw, (*PICTURE_FORMATS, ".svg"))
    if html is not None:
        _check_writable(html, (".html", ".htm"))
    network, processor = load(model, device)
    inputs = prepare(network, processor, picture, question)
    plain, _ = ask(network, processor, inputs, None, max_new_tokens)
    timed, report = ask(network, processor, inputs, built, max_new_tokens)
    full, short = Arm.of(plain, report, compressed=False), Arm.of(timed, report)
    if draw is not None:
        _draw(draw, picture, report, crops(processor))
        _note(f"wrote {draw}")
    if html is not None:
        from foveate import page

        methods = around(built, min(seen.tokens for seen in report.images))
        runs, refused = record(network, processor, inputs, methods, built, max_new_tokens)
        full_arm = page.Plain(answer=full.answer, encode_ms=full.encode_ms, prefill_ms=full.prefill_ms)
        start = [run.report.method for run in runs].index(to_spec(built))
        page.save(html, [picture], runs, question=question, plain=full_arm, crop=crops(processor), start=start)
        _note(f"wrote {html}" + "".join(f"; {to_spec(each)} cannot be met" for each in refused))
    spec, setting = to_spec(built), conditions(network)
    if as_json:
        answer = {"image": str(image), "question": question, "model": model, "method": spec, "conditions": setting}
        arms = {"full": dataclasses.asdict(full), "compressed": dataclasses.asdict(short)}
        typer.echo(json.dumps(answer | arms | {"report": report.to_dict()}, allow_nan=False))
        return
    table = _table("", "all tokens", spec)
    for name, one, other in zip(_ROWS, _cells(full), _cells(short), strict=True):
        table.add_row(name, one, other)
    _print(table)
    _note(f"one timed run each after an untimed one, {setting}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo-out"),
    device: Device = None,
) -> None:
    """Answer three questions about the bundled picture with 576 visual tokens, and with 64 by each method."""
    from PIL import Image

    from foveate import demo as bundle
    from foveate import draw
    from foveate.registry import from_spec

    _make_folder(out)
    network, processor = load("demo", device)
    picture = Image.open(bundle.PICTURE).convert("RGB")
    arms: dict[str, list[Arm]] = {"all tokens": []}
    panels: dict[str, Image.Image] = {"all tokens": picture}
    score_map = picture
    for i, (question, truth) in enumerate(bundle.QUESTIONS):
        typer.echo(f"{i + 1}. {question} ({truth})")
        inputs = prepare(network, processor, picture, question)
        plain, _ = ask(network, processor, inputs, None, 8)
        for spec in DEMO_METHODS:
            timed, report = ask(network, processor, inputs, from_spec(spec), 8)
            arms.setdefault(spec, []).append(Arm.of(timed, report))
            panels.setdefault(spec, report.draw(picture, crop=crops(processor)))
            scores = report.images[0].scores()
            if i == 0 and spec == DEMO_METHODS[0] and scores is not None:
                score_map = draw.heat(picture, report.images[0].grid, scores, crop=crops(processor))
        arms["all tokens"].append(Arm.of(plain, report, compressed=False))
    truths = [truth for _, truth in bundle.QUESTIONS]
    table = _table("", *(f"answer {i + 1}" for i in range(len(truths))), "per layer", "first token", "KV cache")
    items = []
    for name, answered in arms.items():
        said = [_mark(arm.answer, truth) for arm, truth in zip(answered, truths, strict=True)]
        mean = f"{sum(arm.mean_tokens for arm in answered) / len(answered):.1f}"
        first = sorted(arm.first_token_ms for arm in answered)[len(answered) // 2]
        kv = max(arm.kv_bytes for arm in answered) / _MIB
        table.add_row(name, *map(escape, said), mean, f"{first:.0f} ms", f"{kv:.2f} MiB")
        items.append((f"{name}\n{mean} tokens per layer\n{', '.join(said)}", panels[name]))
    _print(table)
    items.append((f"scores of {DEMO_METHODS[0]}\nyellow = keep", score_map))
    heading = [f"{i + 1}. {question} ({truth})" for i, (question, truth) in enumerate(bundle.QUESTIONS)]
    heading.append("Outlined tokens are read longest; of the others, the sooner dropped, the darker (question 1).")
    draw.sheet(items, 3, heading="\n".join(heading)).save(out / "kept.png")
    _note("per layer = mean visual tokens per decoder layer; a wrong answer is marked with (x)")
    _note(f"first token = encode + select + prefill, median of the questions, {conditions(network)}")
    typer.echo(f"what each method kept for question 1: {out / 'kept.png'}")


@app.command()
def methods() -> None:
    """List the methods: what each keeps, where tokens leave, what it reads."""
    table = _table("method", "what it does", "paper", "leaves before layer", "reads")
    for row in method_rows():
        table.add_row(*map(escape, row))
    _print(table)
    _note("layers are those of a 32-layer LLM, 0 is before the LLM; for a method's options: help(foveate.EvoCut)")


@app.command()
def families() -> None:
    """List the model families that can be compressed, as measured: dropped against masked on small random models."""
    table = _table("config.model_type", "reads", "methods", "positions", "difference", "transformers")
    for row in family_rows():
        table.add_row(*map(escape, row))
    _print(table)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="'demo', a folder with a saved model, or a name on the hub.")] = "demo",
    method: Spec = "evocut:keep=64",
    device: Device = None,
) -> None:
    """Prove on your own model that dropping tokens equals masking them; exit code 1 if it does not."""
    from foveate.engines.verify import verify as prove

    built = build(method)
    network, _ = load(model, device, exact=True)
    proof = prove(network, built)
    typer.echo(proof)
    if not proof.ok:
        raise typer.Exit(1)


app.command("eval")(evaluate)
app.command()(serve)
app.command()(studio)
app.command("advise")(advise)
app.command("bench")(bench)

_ROWS = ("answer", "visual tokens", "per layer", "encode", "select", "prefill", "decode", "total", "KV cache of prompt")


def _cells(arm: Arm) -> list[str]:
    from foveate.report import milliseconds

    select = milliseconds(arm.select_ms) if arm.select_ms else "-"
    prefill, decode, total = map(milliseconds, (arm.prefill_ms, arm.decode_ms, arm.total_ms))
    times = (milliseconds(arm.encode_ms), select, prefill, decode, total)
    kv = f"{arm.kv_bytes / _MIB:.1f} MiB"
    return [escape(arm.answer), str(arm.tokens), f"{arm.mean_tokens:.1f}", *times, kv]


def _mark(answer: str, truth: str) -> str:
    return answer if answer.lower() == truth.lower() else f"{answer} (x)"


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=place == 0)
    return table


def _print(table: Table) -> None:
    Console().print(table)


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _draw(path: Path, picture: Image.Image, report: Report, crop: bool) -> None:
    from foveate import draw

    if path.suffix.lower() == ".svg":
        path.write_text(draw.tokens.svg(picture, report.images[0], crop=crop), encoding="utf-8")
    else:
        report.draw(picture, crop=crop).save(path)


def _check_writable(path: Path, formats: tuple[str, ...]) -> None:
    if path.suffix.lower() not in formats:
        what = "a page" if ".html" in formats else "a picture"
        raise UserError(f"cannot write {what} to {path}", f"let the name end in one of {', '.join(formats)}")
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}", f"create it: mkdir -p {path.parent}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {path}: {error.strerror}", "pass another folder: --out pictures"
        ) from error
