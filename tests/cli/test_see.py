"""What `foveate run` writes for the eye: pictures and the page."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from foveate.cli import app


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    Image.effect_noise((336, 336), 60).convert("RGB").save(path)
    return path


def run(picture: Path, *arguments: str | Path) -> Result:
    asked = ["run", picture, "How many?", "--max-new-tokens", "2", *arguments]
    return CliRunner().invoke(app, [str(a) for a in asked], catch_exceptions=False)


def data(path: Path) -> Any:
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_budgets_around_the_one_asked_for_and_starts_there(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    result = run(picture, "--method", "evocut:keep=0.25", "--html", out)
    assert result.exit_code == 0
    assert f"wrote {out}" in result.stderr
    made = data(out)
    assert [each["name"] for each in made["runs"]] == [f"evocut:keep={keep}" for keep in (0.0625, 0.125, 0.25, 0.5)]
    assert made["start"] == 2
    assert [each["images"][0]["left"].count(-1) for each in made["runs"]] == [36, 72, 144, 288]
    (panel,) = made["images"][0]["panels"]
    assert len(panel["tokens"]) == 576


def test_budgets_that_cannot_be_met_are_named_and_left_out(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    result = run(picture, "--method", "v2drop:keep=128", "--html", out)
    assert result.exit_code == 0
    assert "v2drop:keep=32 cannot be met" in result.stderr
    assert [each["name"] for each in data(out)["runs"]] == [f"v2drop:keep={keep}" for keep in (64, 128, 256, 512)]


def test_kept_tokens_are_written_as_svg(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.svg"
    assert run(picture, "--draw", out).exit_code == 0
    assert ElementTree.parse(out).getroot().get("width") == "336"


@pytest.mark.parametrize(("option", "name", "hint"), [("--html", "out.png", ".html"), ("--draw", "out.html", ".svg")])
def test_a_name_that_does_not_fit_is_refused_before_anything_runs(
    picture: Path, tmp_path: Path, option: str, name: str, hint: str
) -> None:
    result = run(picture, option, tmp_path / name)
    assert result.exit_code == 2
    assert "cannot write a p" in result.stderr
    assert hint in result.stderr
