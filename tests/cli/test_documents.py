"""What the documents show is run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run(*arguments: str | Path, cwd: Path) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    examples = FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(examples) == 1
    out = run("-c", examples[0], cwd=tmp_path)
    assert "image 0: 576 -> 64 tokens (11.1 %), mean per layer 64.0, KV " in out
    assert (tmp_path / "kept.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]), ids=lambda path: path.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
