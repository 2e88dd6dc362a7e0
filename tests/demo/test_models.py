"""Demo models by name: where their weights are found, what is said where they are not, what their package holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from foveate import demo
from foveate.errors import MissingDependency, UnsupportedModel
from tests.vllm import tiny

PACKAGE = Path(__file__).parents[2] / "demo-models"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as if it were installed, with a tiny model in place of each of its own."""
    package = tmp_path / "site" / "foveate_demo_models"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    return package


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the package nor a checkout."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "_CHECKOUT", tmp_path / "nothing")


def test_the_small_model_is_loaded_unless_told_otherwise() -> None:
    model, processor = demo.load()
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert processor.image_processor.size["height"] == 336


def test_the_installed_package_is_found(installed: Path) -> None:
    shutil.copytree(tiny.folder("llava_next", installed), installed / "hd")
    assert demo.folder("demo-hd") == installed / "hd"
    model, processor = demo.load("demo-hd")
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    assert not model.training
    assert processor(text="<image>", images=tiny.picture(0), return_tensors="pt")["pixel_values"].shape[2:] == (
        3,
        64,
        64,
    )


def test_in_a_checkout_the_package_need_not_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo._CHECKOUT == PACKAGE / "src" / "foveate_demo_models"
    assert (demo._CHECKOUT / "__init__.py").is_file()
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / "config.json").touch()
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "_CHECKOUT", tmp_path)
    assert demo.folder("demo-video") == tmp_path / "video"


@pytest.mark.parametrize("name", ["demo-hd", "demo-video"])
def test_without_weights_the_hint_says_what_to_install(bare: None, name: str) -> None:
    with pytest.raises(MissingDependency, match=f"the weights of {name}") as caught:
        demo.load(name)
    assert str(caught.value.hint).endswith("pip install ./demo-models")


def test_a_package_without_the_weights_is_as_good_as_none(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installed / "hd").mkdir()
    monkeypatch.setattr(demo, "_CHECKOUT", tmp_path / "nothing")
    with pytest.raises(MissingDependency):
        demo.folder("demo-hd")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnsupportedModel, match="no such demo model: 'demo-vidoe'") as caught:
        demo.load("demo-vidoe")
    assert caught.value.hint == "did you mean `demo-video`?"


def test_the_wheel_holds_weights_processors_and_cards(tmp_path: Path) -> None:
    source = tmp_path / "demo-models"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("hd*", "video*", "dist", "__pycache__"))
    names = [f"{kind}/{name}" for kind in ("hd", "video") for name in ("CARD.md", "config.json", "model.safetensors")]
    for name in names:
        stand_in = source / "src" / "foveate_demo_models" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_bytes(b"as large as you like")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("foveate_demo_models-*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    assert {f"foveate_demo_models/{name}" for name in ("__init__.py", *names)} <= set(inside)
