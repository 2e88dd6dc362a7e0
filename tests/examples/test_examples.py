"""Every example is short, runs as it stands, and shows what its first line says."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate import demo
from tests.docs.snippets import serving

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))
Run = Callable[..., str]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return demo.load()


@pytest.fixture
def run(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run an example in an empty folder, with the demo model loaded once; return what it prints."""

    def main(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(demo, "load", lambda: loaded)
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return main


@pytest.mark.parametrize("name", EXAMPLES)
def test_short_and_tested(name: str) -> None:
    assert len((FOLDER / name).read_text(encoding="utf-8").splitlines()) <= 40
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert f'"{name}"' in tests


def test_first_steps(run: Run) -> None:
    lines = run("first_steps.py").splitlines()
    truths = [truth for _, truth in demo.QUESTIONS]
    assert lines[1].split() == ["all", "tokens:", *truths]
    assert [line.split()[0] for line in lines[2:]] == ["192", "64", "16"]


def test_batch(run: Run) -> None:
    out = run("batch.py")
    assert "3 images: 1728 -> 174 tokens" in out
    answers = re.findall(r"\? (\w+) \(it is (\w+)\)", out)
    assert len(answers) == 3
    assert all(answer == truth for answer, truth in answers)
    assert out.endswith("two pictures in one prompt: [58, 58] tokens\n")


def test_video(run: Run) -> None:
    out = run("video.py")
    counts = [[int(n) for n in found.split()] for found in re.findall(r"tokens by frame: ([\d ]+)", out)]
    assert [sum(each) for each in counts] == [128, 128]
    assert len(set(counts[0])) > 1  # the budget of a whole video goes to the frames that have most to show
    assert counts[1] == [32] * 4
    assert out.count("\ndog\n") == 2


def test_chain(run: Run, tmp_path: Path) -> None:
    out = run("chain.py")
    assert "purple (it is purple)" in out
    assert "tokens in each layer: " + " ".join(["128"] * 6 + ["32"] * 6) in out
    assert "the same in one line: todre:keep=128,positions=original,exit=none + fastv:stages=6@0.25" in out
    assert (tmp_path / "chain.png").stat().st_size > 10_000


def test_own_method(run: Run) -> None:
    out = run("own_method.py")
    assert out.startswith("what colour is the circle? purple (it is purple)")
    assert "contrast:keep=96 on LlavaForConditionalGeneration: dropped == masked" in out


def test_client(run: Run, loaded: tuple[Any, Any]) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client", "openai"):
        pytest.importorskip(package)
    with serving(*loaded) as address:
        lines = run("client.py", f"http://{address}/v1").splitlines()
    counts = [re.findall(r"(\d+) -> (\d+) tokens", line) for line in lines[:4]]
    assert counts == [[("576", kept)] for kept in ("576", "144", "64", "32")]
    assert lines[0].startswith("adav:keep=1.0: purple ")
    assert lines[4] == "purple"
