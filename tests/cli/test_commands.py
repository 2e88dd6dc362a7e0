"""The commands, through the same code that the installed ``foveate`` runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import foveate
from foveate import demo, registry
from foveate.cli import app
from foveate.report import Report

ROOT = Path(__file__).parents[2]
SHORT = ("--json", "--max-new-tokens", "3")
GREY = Image.new("RGB", (336, 336), (120, 130, 140))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "grey.png"
    GREY.save(path)
    return path


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def shell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, without the shape checks of the tests."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "foveate", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_run_answers_with_all_tokens_and_with_few(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.png"
    result = call("run", picture, "What color is the circle?", "--method", "evocut:keep=64", "--draw", out)
    assert result.exit_code == 0
    rows = {line.split("  ")[0].strip(): line.split()[-2:] for line in result.stdout.splitlines() if line.strip()}
    assert rows["visual tokens"] == ["576", "64"]
    assert rows["per layer"] == ["576.0", "64.0"]
    assert set(rows) >= {"answer", "encode", "select", "prefill", "decode", "total", "KV cache of prompt"}
    with Image.open(out) as kept:
        assert kept.size == (336, 336)
    assert "wrote" not in result.stdout
    assert "after an untimed one, cpu" in result.stderr


def test_run_prints_nothing_but_json(picture: Path) -> None:
    result = call("run", picture, "How many?", "--method", "v2drop:keep=96", *SHORT)
    answer = json.loads(result.stdout)
    assert answer["method"] == "v2drop:keep=96"
    assert answer["full"]["tokens"] == 576
    assert answer["compressed"]["tokens"] == 576
    assert answer["compressed"]["mean_tokens"] == pytest.approx(96, abs=0.5)
    assert answer["compressed"]["kv_bytes"] < answer["full"]["kv_bytes"]
    for arm in (answer["full"], answer["compressed"]):
        parts = arm["encode_ms"] + arm["select_ms"] + arm["prefill_ms"] + arm["decode_ms"]
        assert parts == pytest.approx(arm["total_ms"])
        assert min(arm["encode_ms"], arm["prefill_ms"], arm["decode_ms"]) > 0
    assert len(Report.from_dict(answer["report"]).images[0].alive) == answer["report"]["layers"]


def test_run_takes_a_folder_with_a_saved_model(picture: Path) -> None:
    result = call("run", picture, "How many?", "--model", demo.MODEL, *SHORT)
    assert json.loads(result.stdout)["compressed"]["tokens"] == 64


def test_run_leaves_the_model_as_it_was(picture: Path) -> None:
    first, second = (
        json.loads(call("run", picture, "How many?", *SHORT, "--method", spec).stdout)["full"]["answer"]
        for spec in ("evocut:keep=1", "grid:keep=64")
    )
    assert first == second


def test_keeping_all_changes_no_answer(picture: Path) -> None:
    answer = json.loads(call("run", picture, "What is it?", *SHORT, "--method", "evocut:keep=1.0").stdout)
    assert answer["full"]["answer"] == answer["compressed"]["answer"]


def test_demo_answers_every_question_by_every_method_and_draws_a_sheet(tmp_path: Path) -> None:
    result = call("demo", "--out", tmp_path / "new" / "folder")
    assert result.exit_code == 0
    for question, truth in demo.QUESTIONS:
        assert f"{question} ({truth})" in result.stdout
    for name in ("all tokens", "evocut:keep=64", "todre:keep=64", "adav:keep=64", "v2drop:keep=64"):
        assert name in result.stdout
    with Image.open(tmp_path / "new" / "folder" / "kept.png") as sheet:
        assert min(sheet.size) > 600


def test_methods_lists_every_method() -> None:
    result = call("methods")
    assert result.exit_code == 0
    for name in registry.names():
        assert re.search(rf"^ *{name}\b", result.stdout, re.MULTILINE), name


def test_families_says_what_was_measured() -> None:
    assert re.search(r"llava +image +adav, evocut, random.*original, packed", call("families").stdout)


@pytest.mark.parametrize("spec", ["evocut:keep=64", "v2drop:keep=96"])
def test_verify_prints_the_largest_difference(spec: str) -> None:
    result = call("verify", "demo", "--method", spec)
    assert result.exit_code == 0
    found = re.search(r"dropped == masked, largest logit difference (\S+)", result.stdout)
    assert found is not None
    assert float(found[1]) <= 1e-4


def test_verify_fails_where_dropping_is_not_masking(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.engines import verify

    monkeypatch.setattr(verify, "TOLERANCE", dict.fromkeys(verify.TOLERANCE, 0.0))
    result = call("verify", "demo")
    assert result.exit_code == 1
    assert "dropped != masked" in result.stdout


def test_the_version_names_what_it_runs_on() -> None:
    done = shell("--version")
    assert done.returncode == 0
    assert re.fullmatch(rf"foveate {re.escape(foveate.__version__)} \(torch \S+, transformers \S+\)\n", done.stdout)


def test_the_installed_command_is_the_module() -> None:
    command = shutil.which("foveate", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("foveate is not installed, only importable")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"foveate {foveate.__version__} ")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run", "--help"], ["demo", "--help"], ["verify", "-h"]])
def test_help_explains_every_command(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    assert len(result.stdout) > 300
