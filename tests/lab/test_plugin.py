"""A method of somebody else's, in a package of its own: installed, it is everywhere, and nothing here was edited."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "foveate-corner"
version = "1.0"

[project.entry-points."foveate.methods"]
corner = "foveate_corner:Corner"
"""

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from foveate import PromptMethod, Selection, register


@register
@dataclass(frozen=True, kw_only=True)
class Corner(PromptMethod):
    """Keep the first tokens in reading order.

    Paper: None: a toy.
    """

    name: ClassVar[str] = "corner"

    def select(self, evidence, site):
        return Selection(keep=torch.arange(self.count(evidence.n), device=evidence.features.device))
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the package is installed."""
    package, site = tmp_path_factory.mktemp("foveate_corner"), tmp_path_factory.mktemp("site")
    (package / "pyproject.toml").write_text(PROJECT)
    (package / "foveate_corner.py").write_text(MODULE)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, package], check=True, capture_output=True)
    paths = os.pathsep.join([str(site), str(ROOT / "src")])
    return os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def shell(env: dict[str, str], *arguments: str | Path) -> str:
    command = [sys.executable, "-m", "foveate", *map(str, arguments)]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def test_it_is_listed_and_answers(installed: dict[str, str]) -> None:
    assert "corner:keep=64" in shell(installed, "methods")
    picture = ROOT / "src" / "foveate" / "demo" / "picture.png"
    assert "corner:keep=9" in shell(installed, "run", picture, "how many?", "--method", "corner:keep=9")


def test_it_is_evaluated_with_all_others(installed: dict[str, str], tmp_path: Path) -> None:
    shell(installed, "eval", "--n", "1", "--keep", "20", "--max-new-tokens", "2", "--out", tmp_path)
    with (tmp_path / "accuracy.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert {"corner", "evocut", "random", "full"} <= rows.keys() and rows["corner"]["tokens_per_layer"] == "20.0"
    page = (tmp_path / "accuracy.html").read_text()
    assert "corner" in page and "corner" in (tmp_path / "accuracy.md").read_text()


def test_it_is_timed_with_all_others(installed: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "speed.csv"
    shell(
        installed,
        "bench",
        "--shape",
        "tiny",
        "--keep",
        "12",
        "--repeats",
        "1",
        "--steps",
        "1",
        "--no-memory",
        "--out",
        out,
    )
    assert any("corner:keep=12" in line for line in out.read_text().splitlines())
