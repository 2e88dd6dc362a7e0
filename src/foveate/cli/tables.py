"""Tables made from the registries, for the command line, the README and the docs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from importlib import resources
from typing import Any

_READS = {
    "encoder_fold": "encoder layers",
    "encoder_keys": "encoder keys",
    "encoder_saliency": "encoder attention",
    "encoder_shallow": "encoder attention",
    "text": "question embeddings",
    "hidden": "decoder states",
    "previous": "decoder states",
    "keys": "decoder keys",
    "text_hidden": "decoder states",
    "text_keys": "decoder keys",
    "relevance": "decoder attention",
    "text_mass": "decoder attention",
    "coordinates": "token places",
    "seed": "a seed",
}


def method_rows() -> list[tuple[str, str, str, str, str]]:
    """Return one row per method: example spec, what it does, paper, sites of a 32-layer LLM, what it reads."""
    import foveate.methods  # noqa: F401 - registers the built-in methods
    from foveate import registry

    rows = []
    for name in registry.names():
        cls = registry.get(name)
        spec = f"{name}:keep=64" if any(f.name == "keep" for f in dataclasses.fields(cls)) else name
        method = registry.from_spec(spec)
        what = (cls.__doc__ or "").strip().split("\n")[0].rstrip(".")
        needs = sorted({_READS[need] for part in method.parts for need in part.needs})
        sites = ", ".join(map(str, method.sites(32)))
        rows.append((spec, what, _paper(cls.__doc__), sites, ", ".join(needs) or "features only"))
    return sorted(rows, key=lambda row: (row[2] == "-", row[0]))


def _paper(docstring: str | None) -> str:
    """Return what a docstring's ``Paper:`` section cites: the leading names, venues and numbers; ``-`` for none.

    Example:
        >>> _paper("Paper: V2Drop, CVPR 2026, arXiv 2509.01552, method section; timing from the code.")
        'V2Drop, CVPR 2026, arXiv 2509.01552'
    """
    found = re.search(r"^ *Paper: ([^;(\n]*)", docstring or "", re.MULTILINE)
    parts = found[1].strip().rstrip(".").split(", ") if found else ["None"]
    cited = itertools.takewhile(lambda part: part[:1].isupper() or part[:1].isdigit() or "arXiv" in part, parts)
    return "-" if parts == ["None"] else ", ".join(cited) or "-"


def family_rows() -> list[tuple[str, str, str, str, str, str]]:
    """Return one row per model type: what it reads, methods that work, positions, largest difference, versions.

    The last four come of the contract tests: `make oracle` measures them, `make docs` brings them here.
    """
    from foveate.families import FAMILIES

    text = (resources.files("foveate.families") / "measured.json").read_text(encoding="utf-8")
    measured: dict[str, dict[str, Any]] = json.loads(text)
    rows = []
    for family in FAMILIES:
        for kind in family.model_types:
            seen = measured.get(kind)
            if seen is None:
                rows.append((kind, "not measured", "-", ", ".join(family.positions), "-", "-"))
                continue
            first, last = seen["transformers"]
            versions = first if first == last else f"{first} to {last}"
            reads, methods = ", ".join(seen["reads"]), ", ".join(seen["methods"])
            rows.append((kind, reads, methods, ", ".join(family.positions), seen["largest_difference"], versions))
    return sorted(rows)
