"""The command line: ``foveate run | demo | methods | families | verify | serve``.

Data goes to stdout, everything else to stderr. A mistake of the user ends in ``error:``, ``hint:`` and exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from foveate.cli.advise import advise
from foveate.cli.ask import Arm, UserError, ask, build, conditions, load
from foveate.cli.bench import bench
from foveate.cli.evaluate import evaluate
from foveate.cli.media import crops
from foveate.cli.options import Device, ModelArgument, Spec
from foveate.cli.output import MIB, columns, note, show
from foveate.cli.run import run
from foveate.cli.serve import serve
from foveate.cli.studio import studio
from foveate.cli.tables import family_rows, method_rows
from foveate.errors import FoveateError

if TYPE_CHECKING:
    from PIL import Image

DEMO_METHODS = ("evocut:keep=64", "todre:keep=64", "adav:keep=64", "v2drop:keep=64")


class _Group(TyperGroup):
    """Turns what the user can mend into ``error:`` and ``hint:``; everything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FoveateError as error:
            note(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
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


app.command()(run)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo-out"),
    device: Device = None,
) -> None:
    """Answer three questions about the bundled picture with 576 visual tokens, and with 64 by each method."""
    from PIL import Image

    from foveate import demo as bundle
    from foveate import draw
    from foveate.lab import chat
    from foveate.registry import from_spec

    _make_folder(out)
    network, processor = load("demo", device)
    picture = Image.open(bundle.PICTURE).convert("RGB")
    arms: dict[str, list[Arm]] = {"all tokens": []}
    panels: dict[str, Image.Image] = {"all tokens": picture}
    score_map = picture
    for i, (question, truth) in enumerate(bundle.QUESTIONS):
        typer.echo(f"{i + 1}. {question} ({truth})")
        inputs = chat.prepare(network, processor, [[picture]], [question])
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
    table = columns("", *(f"answer {i + 1}" for i in range(len(truths))), "per layer", "first token", "KV cache")
    items = []
    for name, answered in arms.items():
        said = [_mark(arm.answer, truth) for arm, truth in zip(answered, truths, strict=True)]
        mean = f"{sum(arm.mean_tokens for arm in answered) / len(answered):.1f}"
        first = sorted(arm.first_token_ms for arm in answered)[len(answered) // 2]
        kv = max(arm.kv_bytes for arm in answered) / MIB
        table.add_row(name, *map(escape, said), mean, f"{first:.0f} ms", f"{kv:.2f} MiB")
        items.append((f"{name}\n{mean} tokens per layer\n{', '.join(said)}", panels[name]))
    show(table)
    items.append((f"scores of {DEMO_METHODS[0]}\nyellow = keep", score_map))
    heading = [f"{i + 1}. {question} ({truth})" for i, (question, truth) in enumerate(bundle.QUESTIONS)]
    heading.append("Outlined tokens are read longest; of the others, the sooner dropped, the darker (question 1).")
    draw.sheet(items, 3, heading="\n".join(heading)).save(out / "kept.png")
    note("per layer = mean visual tokens per decoder layer; a wrong answer is marked with (x)")
    note(f"first token = encode + select + prefill, median of the questions, {conditions(network)}")
    typer.echo(f"what each method kept for question 1: {out / 'kept.png'}")


@app.command()
def methods() -> None:
    """List the methods: what each keeps, where tokens leave, what it reads."""
    table = columns("method", "what it does", "paper", "leaves before layer", "reads")
    for row in method_rows():
        table.add_row(*map(escape, row))
    show(table)
    note("layers are those of a 32-layer LLM, 0 is before the LLM; for a method's options: help(foveate.EvoCut)")


@app.command()
def families() -> None:
    """List the model families that can be compressed, as measured: dropped against masked on small random models."""
    table = columns("config.model_type", "reads", "methods", "positions", "difference", "transformers")
    for row in family_rows():
        table.add_row(*map(escape, row))
    show(table)


@app.command()
def verify(
    model: ModelArgument = "demo",
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


def _mark(answer: str, truth: str) -> str:
    return answer if answer.lower() == truth.lower() else f"{answer} (x)"


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {path}: {error.strerror}", "pass another folder: --out pictures"
        ) from error
