from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import foveate
from foveate import errors, registry

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_names_what_is_public_and_nothing_else() -> None:
    assert len(set(foveate.__all__)) == len(foveate.__all__)
    for name in foveate.__all__:
        assert getattr(foveate, name) is not None
    code = (
        "import inspect, foveate;"
        "seen = [n for n in dir(foveate) if not n.startswith('_') and not inspect.ismodule(getattr(foveate, n))];"
        "print(*sorted(set(seen) - set(foveate.__all__) - {'annotations', 'Any', 'TYPE_CHECKING'}))"
    )
    assert python(code) == ""


def test_every_error_and_every_method_is_exported() -> None:
    for name, cls in vars(errors).items():
        if inspect.isclass(cls) and issubclass(cls, errors.FoveateError):
            assert name in foveate.__all__
    for name in registry.names():
        cls = registry.get(name)
        if cls.__module__.startswith("foveate."):
            assert getattr(foveate, cls.__name__) is cls


def test_the_verb_and_its_nouns_are_exported() -> None:
    assert {
        "Chain",
        "Evidence",
        "Handle",
        "Method",
        "PromptMethod",
        "Report",
        "Selection",
        "compress",
        "verify",
    } <= set(foveate.__all__)


def test_import_is_light() -> None:
    heavy = {"torch", "transformers", "PIL", "rich", "typer", "matplotlib", "foveate.engines.base", "foveate.families"}
    assert python(f"import foveate, sys; print(*({heavy!r} & set(sys.modules)))") == ""


def test_the_command_line_imports_torch_only_inside_commands() -> None:
    assert python("import foveate.cli, sys; print({'torch', 'transformers'} & set(sys.modules))") == "set()"


def test_importing_foveate_changes_nothing() -> None:
    code = (
        "import logging, os, warnings, torch;"
        "state = lambda: (dict(os.environ), list(warnings.filters), logging.root.handlers[:], torch.get_num_threads());"
        "before = state(); import foveate; print(before == state(), logging.getLogger('foveate').handlers)"
    )
    assert python(code) == "True []"


def test_the_version_is_that_of_the_changelog() -> None:
    assert f"## [{foveate.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
