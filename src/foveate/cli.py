"""The command line: ``foveate run | demo | methods | families | verify``.

Data goes to stdout, everything else to stderr. A mistake of the user ends in ``error:``, ``hint:`` and exit code 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from foveate.errors import FoveateError, UnsupportedModel

if TYPE_CHECKING:
    from PIL import Image

    from foveate.core import Method
    from foveate.report import Report

DEMO_METHODS = ("evocut:keep=64", "todre:keep=64", "adav:keep=64", "v2drop:keep=64")
PICTURE_FORMATS = (".png", ".jpg", ".jpeg", ".webp")
TOLERANCE = 1e-4
_MIB = 2**20


class _Group(TyperGroup):
    """Turns what the user can mend into ``error:`` and ``hint:``; everything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FoveateError as error:
            _fail(error.message, error.hint)


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


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        import foveate

        typer.echo(f"foveate {foveate.__version__} (torch {version('torch')}, transformers {version('transformers')})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = False,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    device: Device = None,
) -> None:
    """Answer a question about a picture with all visual tokens and with few, side by side."""
    from foveate.registry import to_spec

    picture, built = _picture(image), _method(method)
    if draw is not None:
        _check_writable(draw)
    network, processor = _load(model, device)
    inputs = _inputs(network, processor, picture, question)
    plain, _ = _ask(network, processor, inputs, None, max_new_tokens)
    timed, report = _ask(network, processor, inputs, built, max_new_tokens)
    full, short = Arm.of(plain, report, compressed=False), Arm.of(timed, report)
    if draw is not None:
        report.draw(picture, crop=_crops(processor)).save(draw)
        _note(f"wrote {draw}")
    spec, conditions = to_spec(built), _conditions(network)
    if as_json:
        answer = {"image": str(image), "question": question, "model": model, "method": spec, "conditions": conditions}
        arms = {"full": dataclasses.asdict(full), "compressed": dataclasses.asdict(short)}
        typer.echo(json.dumps(answer | arms | {"report": report.to_dict()}, allow_nan=False))
        return
    table = _table("", "all tokens", spec)
    for name, one, other in zip(_ROWS, _cells(full), _cells(short), strict=True):
        table.add_row(name, one, other)
    _print(table)
    _note(f"one timed run each after an untimed one, {conditions}")


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
    network, processor = _load("demo", device)
    picture = Image.open(bundle.PICTURE).convert("RGB")
    arms: dict[str, list[Arm]] = {"all tokens": []}
    panels: dict[str, Image.Image] = {"all tokens": picture}
    for i, (question, truth) in enumerate(bundle.QUESTIONS):
        typer.echo(f"{i + 1}. {question} ({truth})")
        inputs = _inputs(network, processor, picture, question)
        plain, _ = _ask(network, processor, inputs, None, 8)
        for spec in DEMO_METHODS:
            timed, report = _ask(network, processor, inputs, from_spec(spec), 8)
            arms.setdefault(spec, []).append(Arm.of(timed, report))
            panels.setdefault(spec, report.draw(picture, crop=_crops(processor)))
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
    heading = "\n".join(f"{i + 1}. {question} ({truth})" for i, (question, truth) in enumerate(bundle.QUESTIONS))
    draw.sheet(items, 3, heading=heading).save(out / "kept.png")
    _note("per layer = mean visual tokens per decoder layer; a wrong answer is marked with (x)")
    _note(f"first token = encode + select + prefill, median of the questions, {_conditions(network)}")
    typer.echo(f"what each method kept for question 1: {out / 'kept.png'}")


@app.command()
def methods() -> None:
    """List the methods: what each keeps, where tokens leave, what it reads."""
    table = _table("method", "what it does", "paper", "tokens leave before layer", "reads")
    for row in method_rows():
        table.add_row(*map(escape, row))
    _print(table)
    _note("options of a method: python -c 'import foveate; help(foveate.EvoCut)'")


@app.command()
def families() -> None:
    """List the model families that can be compressed."""
    table = _table("family", "config.model_type", "compresses", "positions")
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

    built = _method(method)
    network, _ = _load(model, device, exact=True)
    proof = prove(network, built)
    difference = proof.difference
    verdict = "dropped == masked" if difference <= TOLERANCE else "dropped != masked"
    typer.echo(f"{verdict}: largest logit difference {difference:.1e}, allowed {TOLERANCE:.0e}, {_conditions(network)}")
    if difference > TOLERANCE:
        raise typer.Exit(1)


# -- tables that the command line, the README and the docs share

_READS = {
    "encoder_fold": "encoder layers",
    "encoder_keys": "encoder keys",
    "encoder_saliency": "encoder attention",
    "text": "question embeddings",
    "hidden": "decoder states",
    "previous": "decoder states",
    "relevance": "decoder attention",
    "text_mass": "decoder attention",
    "coordinates": "token places",
    "seed": "a seed",
}


def method_rows() -> list[tuple[str, str, str, str, str]]:
    """Return one row per method: example spec, what it does, paper, sites of a 32-layer LLM, what it reads."""
    import foveate  # noqa: F401 - registers the built-in methods
    from foveate import registry

    rows = []
    for name in registry.names():
        cls = registry.get(name)
        spec = f"{name}:keep=64" if any(f.name == "keep" for f in dataclasses.fields(cls)) else name
        method = registry.from_spec(spec)
        what = (cls.__doc__ or "").strip().split("\n")[0].rstrip(".")
        paper = re.search(r"^ *Paper: (.*?[^.\d](?=[.;,] |\.$|$)|.*)", cls.__doc__ or "", re.MULTILINE)
        needs = sorted({_READS[need] for part in method.parts for need in part.needs})
        sites = ", ".join(map(str, method.sites(32)))
        rows.append((spec, what, paper[1].rstrip(".") if paper else "-", sites, ", ".join(needs) or "features only"))
    return rows


def family_rows() -> list[tuple[str, str, str, str]]:
    """Return one row per family: name, model types, modalities, legal position policies."""
    from foveate.families import FAMILIES

    return [
        (family.name, ", ".join(family.model_types), ", ".join(family.modalities), ", ".join(family.positions))
        for family in FAMILIES
    ]


# -- one question, one way of answering


@dataclasses.dataclass(frozen=True)
class Timed:
    """An answer and its times in milliseconds, as read from outside the model."""

    answer: str
    encode_ms: float
    first_token_ms: float
    total_ms: float


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one way of answering said and cost: `first_token_ms` is encode + select + prefill, all in milliseconds."""

    answer: str
    tokens: int
    mean_tokens: float
    encode_ms: float
    select_ms: float
    prefill_ms: float
    decode_ms: float
    first_token_ms: float
    total_ms: float
    kv_bytes: int

    @classmethod
    def of(cls, timed: Timed, report: Report, *, compressed: bool = True) -> Arm:
        """Join the times of one way with what the compressed way's report counted before and after."""
        select = (report.select_ms or 0.0) if compressed else 0.0
        return cls(
            answer=timed.answer,
            tokens=report.kept if compressed else report.tokens,
            mean_tokens=report.mean_alive if compressed else float(report.tokens),
            encode_ms=timed.encode_ms,
            select_ms=select,
            prefill_ms=timed.first_token_ms - timed.encode_ms - select,
            decode_ms=timed.total_ms - timed.first_token_ms,
            first_token_ms=timed.first_token_ms,
            total_ms=timed.total_ms,
            kv_bytes=report.kv_bytes_after if compressed else report.kv_bytes_before,
        )


def _ask(network: Any, processor: Any, inputs: Any, method: Method | None, limit: int) -> tuple[Timed, Report]:
    """Answer once untimed and once timed; without a method the report is empty."""
    from foveate.engines.base import compress
    from foveate.report import Report

    with contextlib.nullcontext() if method is None else compress(network, method) as handle:
        network.generate(**inputs, max_new_tokens=1, do_sample=False)
        timed = _timed(network, processor, inputs, limit)
        report = Report(method="none", model="", layers=0) if handle is None else handle.report
    return timed, report


def _timed(network: Any, processor: Any, inputs: Any, limit: int) -> Timed:
    from transformers import LogitsProcessorList

    def now() -> float:
        if network.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    class FirstToken:
        at: float | None = None

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.at = self.at or now()
            return scores

    base, spent = network.base_model, 0.0
    encode = base.get_image_features

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        begin = now()
        features = encode(*args, **kwargs)
        spent += now() - begin
        return features

    first = FirstToken()
    base.get_image_features = watched
    try:
        begin = now()
        output = network.generate(
            **inputs, max_new_tokens=limit, do_sample=False, logits_processor=LogitsProcessorList([first])
        )
        end = now()
    finally:
        del base.get_image_features
    answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    return Timed(answer, spent, (first.at or end) - begin, end - begin)


_ROWS = ("answer", "visual tokens", "per layer", "encode", "select", "prefill", "decode", "total", "KV cache of prompt")


def _cells(arm: Arm) -> list[str]:
    from foveate.report import milliseconds

    times = (arm.encode_ms, arm.select_ms, arm.prefill_ms, arm.decode_ms, arm.total_ms)
    kv = f"{arm.kv_bytes / _MIB:.1f} MiB"
    return [escape(arm.answer), str(arm.tokens), f"{arm.mean_tokens:.1f}", *map(milliseconds, times), kv]


def _mark(answer: str, truth: str) -> str:
    return answer if answer.lower() == truth.lower() else f"{answer} (x)"


# -- what the user passes in


def _picture(path: Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except FileNotFoundError:
        _fail(f"no such picture: {path}", "check the path, or try the bundled picture: foveate demo")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        _fail(f"not a readable picture: {path} ({_first_line(error)})", "pass a complete PNG, JPEG or WebP file")


def _method(spec: str) -> Method:
    import foveate  # noqa: F401 - registers the built-in methods
    from foveate.registry import from_spec

    return from_spec(spec)


def _load(name: str, device: str | None, *, exact: bool = False) -> tuple[Any, Any]:
    """Return the model and its processor; on a CPU, or where ``exact``, in float32."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    from foveate import demo as bundle
    from foveate.families import family_of

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        _fail(f"device {where!r} cannot be used: {_first_line(error)}", "leave --device out, or pass --device cpu")
    source: str | Path = bundle.MODEL if name == "demo" else name
    disable_progress_bar()
    try:
        dtype = torch.float32 if exact or name == "demo" or where == "cpu" else "auto"
        network = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        hint = (
            "pass 'demo', a folder that holds config.json, or the hub name of a vision-language model (needs a network)"
        )
        raise UnsupportedModel(
            f"cannot load a vision-language model from {name!r}: {_first_line(error)}", hint
        ) from error
    family_of(network)
    return network.to(where).eval(), processor


def _inputs(network: Any, processor: Any, picture: Image.Image, question: str) -> Any:
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        text = f"USER: {getattr(processor, 'image_token', '<image>')}\n{question} ASSISTANT:"
    return processor(images=picture, text=text, return_tensors="pt").to(network.device, network.dtype)


def _crops(processor: Any) -> bool:
    return bool(getattr(getattr(processor, "image_processor", None), "do_center_crop", False))


def _check_writable(path: Path) -> None:
    if path.suffix.lower() not in PICTURE_FORMATS:
        _fail(f"cannot write a picture to {path}", f"let the name end in one of {', '.join(PICTURE_FORMATS)}")
    if not path.parent.is_dir():
        _fail(f"no such folder: {path.parent}", f"create it: mkdir -p {path.parent}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"cannot make the folder {path}: {error.strerror}", "pass another folder: --out pictures")


# -- what the user gets to see


def _fail(message: str, hint: str | None = None) -> NoReturn:
    typer.echo(f"error: {message}" + (f"\nhint: {hint}" if hint else ""), err=True)
    raise typer.Exit(2)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _conditions(network: Any) -> str:
    import torch

    dtype = str(network.dtype).removeprefix("torch.")
    if network.device.type == "cuda":
        return f"{torch.cuda.get_device_name(network.device)}, {dtype}"
    return f"{network.device.type} with {torch.get_num_threads()} threads, {dtype}"


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _print(table: Table) -> None:
    Console().print(table)


def _note(text: str) -> None:
    typer.echo(text, err=True)
