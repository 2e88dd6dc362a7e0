"""Every mistake a user can make ends in ``error:``, ``hint:`` and exit code 2, never in a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.cli.test_commands import call, shell
from tests.models import tiny_llava


def refused(result: object, *, error: str, hint: str) -> None:
    code = getattr(result, "exit_code", None) or getattr(result, "returncode", None)
    stdout, stderr = getattr(result, "stdout", ""), getattr(result, "stderr", "")
    assert (code, stdout) == (2, ""), stderr
    lines = [line for line in stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], stderr
    assert error in lines[0]
    assert hint in lines[1]
    assert "Traceback" not in stderr


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "grey.png"
    Image.new("RGB", (336, 336), (120, 130, 140)).save(path)
    return path


@pytest.mark.parametrize(
    ("spec", "error", "hint"),
    [
        ("evocat:keep=64", "unknown method: 'evocat'", "did you mean `evocut`?"),
        ("evocut", "`evocut` needs keep", "evocut:keep=64"),
        ("evocut:keep=0", "keep must be at least 1 token, got 0", "keep=64 keeps 64 tokens"),
        ("evocut:keep=-1", "keep must be at least 1 token, got -1", "keep=64 keeps 64 tokens"),
        ("evocut:keep=64.0", "a float keep is a fraction in (0, 1], got 64.0", "a number of tokens is an int: keep=64"),
        ("evocut:kepp=64", "`evocut` has no option 'kepp'", "did you mean `keep`?"),
        ("v2drop:keep=1", "a mean of 1 of 576 tokens per layer is out of reach", "keep at least"),
    ],
)
def test_wrong_method(picture: Path, spec: str, error: str, hint: str) -> None:
    refused(call("run", picture, "How many?", "--method", spec), error=error, hint=hint)
    if not spec.startswith("v2drop"):
        refused(call("verify", "--method", spec), error=error, hint=hint)


def test_option_of_the_wrong_kind(picture: Path) -> None:
    done = shell("run", picture, "How many?", "--method", "v2drop:stages=a@0.5/17@0.3/22@0")
    refused(done, error="", hint="")


def test_missing_picture() -> None:
    refused(call("run", "nowhere.png", "How many?"), error="no such picture: nowhere.png", hint="foveate demo")
    done = shell("run", "nowhere.png", "How many?")
    refused(done, error="no such picture: nowhere.png", hint="foveate demo")
    assert done.stderr.count("\n") == 2


def test_corrupt_picture(tmp_path: Path, picture: Path) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:200])
    for path, content in [(cut, None), (tmp_path / "text.png", b"no picture"), (tmp_path / "empty.jpg", b"")]:
        if content is not None:
            path.write_bytes(content)
        refused(call("run", path, "How many?"), error=f"not a readable picture: {path}", hint="complete PNG")


def test_unknown_model(tmp_path: Path, picture: Path) -> None:
    for name in ("nobody/nothing", str(tmp_path), "not a name !"):
        result = call("run", picture, "How many?", "--model", name)
        refused(result, error=f"cannot load a vision-language model from {name!r}", hint="a folder with config.json")
    refused(shell("verify", "nobody/nothing"), error="cannot load", hint="needs a network")


def test_a_model_of_no_family_is_refused_before_its_weights_are_read(tmp_path: Path, picture: Path) -> None:
    tiny_llava().config.text_config.save_pretrained(tmp_path)
    result = call("run", picture, "How many?", "--model", tmp_path)
    refused(result, error="no family serves model_type 'llama'", hint="did you mean `mllama` or `llava`?")


def test_a_model_without_processor(tmp_path: Path, picture: Path) -> None:
    tiny_llava().save_pretrained(tmp_path)
    result = call("run", picture, "How many?", "--model", tmp_path)
    refused(result, error=f"cannot load a vision-language model from {str(tmp_path)!r}", hint="config.json")


def test_unknown_device(picture: Path) -> None:
    refused(call("run", picture, "How many?", "--device", "abacus"), error="device 'abacus'", hint="--device cpu")


def test_pictures_that_cannot_be_written(tmp_path: Path, picture: Path) -> None:
    result = call("run", picture, "How many?", "--draw", tmp_path / "kept.docx")
    refused(result, error="cannot write a picture to", hint=".png")
    result = call("run", picture, "How many?", "--draw", tmp_path / "no" / "kept.png")
    refused(result, error="no such folder", hint="mkdir -p")
    refused(call("demo", "--out", picture), error="cannot make the folder", hint="--out")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run"], "Missing argument"),
        (["run", "x.png", "q", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["run", "x.png", "q", "--max-new-tokens", "few"], "--max-new-tokens"),
        (["look"], "No such command 'look'"),
        (["run", "x.png", "q", "--metod", "evocut"], "No such option"),
    ],
)
def test_usage_errors(arguments: list[str], complaint: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr


def test_the_next_call_works_after_a_mistake(picture: Path) -> None:
    assert call("run", picture, "How many?", "--method", "evocut:keep=0").exit_code == 2
    assert call("run", picture, "How many?", "--method", "evocut:keep=8", "--max-new-tokens", "1").exit_code == 0
