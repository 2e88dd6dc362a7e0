"""Tables made from the registries, for the command line, the README and the docs."""

from __future__ import annotations

import dataclasses
import itertools
import re

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


def family_rows() -> list[tuple[str, str, str, str]]:
    """Return one row per family: name, model types, modalities, legal position policies."""
    from foveate.families import FAMILIES

    return [
        (family.name, ", ".join(family.model_types), ", ".join(family.modalities), ", ".join(family.positions))
        for family in FAMILIES
    ]
