"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

MODELS = (
    "'demo', 'demo-hd' (large pictures, pairs), 'demo-video' (clips), a folder with a saved model, or the name of a "
    "model on the Hugging Face hub."
)

Model = Annotated[str, typer.Option(help=MODELS)]
ModelArgument = Annotated[str, typer.Argument(help=MODELS)]
Spec = Annotated[
    str,
    typer.Option(
        help="Method and its options, for example 'evocut:keep=64' (64 tokens per image) or 'todre:keep=0.1' (a tenth "
        "of them). See: foveate methods."
    ),
]
Device = Annotated[str | None, typer.Option(help="'cpu', 'cuda', ...; the GPU when there is one.", show_default=False)]
Dtype = Annotated[
    str | None,
    typer.Option(help="'bfloat16', 'float32', ...; float32 on a CPU, else as they are saved.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Limit = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
