"""The index of papers, from docstrings: the equation of each, the function that is it, where the two differ."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from foveate import registry

ROOT = Path(__file__).parent.parent
_SECTION = r"^{name}: ?(.*?)(?=^\S|\Z)"
_HEAD = """# Papers

Generated from the docstrings by `make docs`; do not edit.
Every method is written anew from its paper's equations, and tested against a second derivation of them in numpy loops.
Options and examples: [methods](methods.md). What the papers print, and what we got: [ledger](ledger.md).
"""


def page(prose: Callable[[str], str]) -> str:
    """Return the page.

    Args:
        prose: Makes a docstring's text Markdown on one line.
    """
    methods = [registry.get(name) for name in registry.names()]
    ours = [cls for cls in methods if cls.__module__.startswith("foveate.methods") and _section(cls, "Paper") != "None"]
    rows = [f"| [{cls.__name__}](#{cls.__name__.lower()}) | {_linked(_cited(cls))} | {_where(cls)} |" for cls in ours]
    lines = [_HEAD, "| method | paper | function |", "| --- | --- | --- |", *rows, ""]
    for cls in ours:
        test = f"tests/methods/test_{Path(inspect.getfile(cls)).stem}.py"
        assert (ROOT / test).is_file(), test
        lines += [
            f"## {cls.__name__}\n",
            f"**Paper:** {_linked(prose(_section(cls, 'Paper')))}\n",
            f"**Equation:** {prose(_section(cls, 'Keeps'))}\n",
            f"**Function:** {_where(cls)}{_shared(cls)}; tested in `{test}`.\n",
            f"**Differs:** {prose(_section(cls, 'Differs from the paper'))}\n",
        ]
    lines += ["Without a paper: " + ", ".join(f"`{cls.name}`" for cls in methods if _section(cls, "Paper") == "None")]
    return "\n".join(lines) + ".\n"


def _section(cls: type, name: str) -> str:
    """Return a section of a docstring on one line; "None" for a paper that does not exist."""
    found = re.search(_SECTION.format(name=name), inspect.getdoc(cls) or "", re.MULTILINE | re.DOTALL)
    assert found, f"{cls.__name__} says nothing of `{name}`"
    text = " ".join(found[1].split())
    return "None" if name == "Paper" and text.startswith("None") else text


def _cited(cls: type) -> str:
    """Return name, venue and number of a paper, without the parts of it that are meant."""
    found = re.match(r".*?arXiv \d{4}\.\d{5}(?: v\d)?|[^;]*", _section(cls, "Paper"))
    assert found
    return found[0]


def _linked(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _where(cls: type) -> str:
    """Return the functions that choose, and their file."""
    names = [f"`{name}.{function}`" for name, function in _functions(cls)]
    return f"{', '.join(names)} in `methods/{Path(inspect.getfile(cls)).name}`"


def _functions(cls: type) -> Iterator[tuple[str, str]]:
    """Yield class and name of what computes a method's scores and choice: its own, its parts', or the class's above."""
    for node in _tree(cls).body:
        if isinstance(node, ast.ClassDef) and node.name in _classes(cls):
            for function in node.body:
                if isinstance(function, ast.FunctionDef) and function.name in ("select", "fold", "sure"):
                    yield node.name, function.name


def _classes(cls: type) -> set[str]:
    """Return a class's name, those above it in its file, and those of the parts that it builds."""
    names = {base.__name__ for base in cls.__mro__ if base.__module__ == cls.__module__}
    built = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    return names | {node.func.id for node in built if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def _shared(cls: type) -> str:
    """Return what of `ops` its file uses."""
    imports = [node for node in _tree(cls).body if isinstance(node, ast.ImportFrom) and node.module == "foveate.ops"]
    names = [f"[`{name.name}`](api/ops.md#foveate.ops.{name.name})" for node in imports for name in node.names]
    return f", with {', '.join(names)}" if names else ""


def _tree(cls: Any) -> ast.Module:
    return ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))
