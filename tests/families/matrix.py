"""Dropped against masked on a small model of each family: what the contract tests check and the results table records.

python -m tests.families.matrix                # measure every combination, write results/oracle.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import foveate
from foveate.families import FAMILIES
from tests.zoo.inputs import batch, mixed
from tests.zoo.models import GREEDY, MIXED, NAMES, VIDEO, model_type, placeholders, tiny
from tests.zoo.reference import reference_logits

SERVED = frozenset(kind for family in FAMILIES for kind in family.model_types)

#: Small models of all of them that let tokens leave everywhere; what gemma4 with shared keys refuses is tested there.
WHOLE = tuple(name for name in NAMES if model_type(name) in SERVED and name != "gemma4_shared")

#: One spec per method of the matrix; sites fit six layers, of which some families need the first three whole.
METHODS = (
    "evocut:keep=0.4",
    "todre:keep=0.5,exit=0.5,tau=0.9",
    "adav:keep=5",
    "v2drop:stages=3@0.5/4@0.3",
    "random:keep=3",
)
ATTENTION = ("sdpa", "eager")

#: Rows of another number of images; a row without any where the model's processor allows it.
ROWS = {"paligemma": (1, 1, 2)}

Case = tuple[str, str, str, str]


def cases() -> Iterator[Case]:
    """Every family, what it reads, method and attention implementation."""
    for name in WHOLE:
        kinds = ["image"] + ["video"] * (name in VIDEO) + ["both"] * (name in MIXED)
        for kind in kinds:
            for spec in METHODS:
                if works(name, spec):
                    yield from ((name, kind, spec, impl) for impl in ATTENTION)


def works(name: str, spec: str) -> bool:
    """Whether a method is offered on a family; what is not is refused by name, see the families' own tests."""
    return not (name == "mllama" and spec.startswith(("v2drop", "todre:keep=0.5,exit=0.5")))


@cache
def model_of(name: str, impl: str) -> Any:
    """A small model; every test gets the same one, so nothing may be left on it."""
    return tiny(name, impl)


def inputs_of(name: str, kind: str) -> Any:
    """A left-padded batch of prompts of different lengths with different numbers of images or videos."""
    if kind == "both":
        return mixed(name)
    if kind == "video":
        return batch(name, (1, 2), video=True)
    return batch(name, ROWS.get(name, (0, 1, 2)))


def kept_in(report: foveate.Report) -> list[list[tuple[int, tuple[int, ...]]]]:
    """What a report says of each image, as the reference wants to be told."""
    return [
        [(site, image.after(site)) for site in sorted({stage.site for stage in image.stages})]
        for image in report.images
    ]


@torch.no_grad()
def measure(name: str, kind: str, spec: str, impl: str, **options: Any) -> tuple[float, Any]:
    """Return the largest logit difference between dropped and masked over 16 new tokens, and the report."""
    model, inputs = model_of(name, impl), inputs_of(name, kind)
    settings = {**GREEDY, "max_new_tokens": 16, "suppress_tokens": placeholders(model), **options}
    with foveate.compress(model, spec) as handle:
        output = model.generate(**inputs, **settings)
    report = handle.report
    logits = torch.stack(output.logits, 1)
    reference = reference_logits(
        model,
        inputs,
        output.sequences[:, :-1],
        kept_in(report),
        handle.positions,
        window="packed",
    )
    return float((logits - reference[:, -logits.shape[1] :]).abs().max()), report


def main() -> None:
    """Write one row for each family and attention implementation: what was compared and the largest difference."""
    path = Path(__file__).parents[2] / "results" / "oracle.csv"
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    rows: dict[tuple[str, ...], list[float]] = {}
    for name, kind, spec, impl in cases():
        difference, _ = measure(name, kind, spec, impl)
        rows.setdefault((name, kind, spec.split(":")[0], impl), []).append(difference)
        sys.stderr.write(f"{name} {kind} {spec} {impl} {difference:.1e}\n")
    earlier = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    made = [
        {
            "model_type": model_type(n),
            "family": n,
            "reads": k,
            "method": m,
            "attention": i,
            "new_tokens": 16,
            "largest_difference": f"{max(v):.1e}",
        }
        | versions
        for (n, k, m, i), v in rows.items()
    ]
    kept = [row for row in earlier if row["transformers"] != versions["transformers"]]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(made[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *made])


if __name__ == "__main__":
    main()
