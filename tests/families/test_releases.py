"""What an older transformers cannot read is refused by name, with what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

import foveate
from foveate.families import FAMILIES, family_of, releases
from tests.families.matrix import model_of
from tests.zoo.inputs import batch
from tests.zoo.models import GREEDY, VIDEO_TOKEN, tiny


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda version: monkeypatch.setattr(transformers, "__version__", version)


@pytest.mark.parametrize("version", ["5.18.0", "5.18.0.dev0", "5.100.0", "6.0.0rc1"])
def test_what_is_new_enough_is_served(version: str, older: Any) -> None:
    older(version)
    releases.check()


@pytest.mark.parametrize("version", ["5.17.3", "4.57.1", "5.2.0"])
def test_what_is_too_old_for_all_is_refused(version: str, older: Any) -> None:
    older(version)
    with pytest.raises(ImportError, match=rf"foveate needs transformers >= 5\.18, found {version}") as error:
        releases.check()
    assert error.value.hint == "pip install -U 'transformers>=5.18'"  # type: ignore[attr-defined]


def test_it_is_refused_before_anything_is_sought_in_it(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text('__version__ = "4.57.1"')
    path = os.pathsep.join([str(tmp_path), str(Path(foveate.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", "from foveate import compress"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "MissingDependency: foveate needs transformers >= 5.18, found 4.57.1" in done.stderr


def test_a_model_that_needs_a_newer_one_is_refused(older: Any) -> None:
    model = tiny("minicpmv4_6", layers=3)
    older("5.18.0")
    with pytest.raises(foveate.UnsupportedModel, match=r"minicpmv4_6 needs transformers >= 5\.19, found 5\.18\.0") as e:
        foveate.compress(model, "random:keep=3")
    assert e.value.hint == "pip install -U 'transformers>=5.19'"
    older("5.19.0")
    assert family_of(model).name == "minicpmv4_6"


def test_videos_that_need_a_newer_one_are_refused_in_the_call(older: Any) -> None:
    model, ids = model_of("gemma4", "sdpa"), torch.tensor([[1, VIDEO_TOKEN, 5]])
    older("5.22.2")
    with foveate.compress(model, "random:keep=3"), pytest.raises(foveate.UnsupportedCall) as error:
        model.generate(input_ids=ids, pixel_values_videos=torch.zeros(1, 4, 48), max_new_tokens=1)
    assert error.value.message == "videos of gemma4 need transformers >= 5.23, found 5.22.2"
    assert error.value.hint == "pip install -U 'transformers>=5.23'"


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 4}, {"generation_config": GenerationConfig(prefill_chunk_size=99)}]
)
def test_chunks_of_prompts_with_pictures_need_a_newer_one(options: dict[str, Any], older: Any) -> None:
    """Older releases drop the pictures, and misread a later turn too."""
    model, inputs = model_of("llava", "sdpa"), batch("llava", (1,))
    older("5.22.2")
    with foveate.compress(model, "random:keep=3,positions=original") as handle:
        first = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6]])], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        for call in (inputs, turn):
            with pytest.raises(foveate.UnsupportedCall) as error:
                model.generate(**call, **options)
            assert error.value.message == "prefill_chunk_size with pictures needs transformers >= 5.23, found 5.22.2"
            assert error.value.hint == "leave it out, or pip install -U 'transformers>=5.23'"
        assert handle.report.calls == 1
        again = model.generate(**inputs, **GREEDY, max_new_tokens=3)
    assert torch.equal(torch.stack(again.logits), torch.stack(first.logits))


def test_of_two_that_are_alike_one_needs_a_newer_one(older: Any) -> None:
    """Both are built here: a model of the older release would refuse the shorter prompt in words of its own."""
    older("5.20.0")
    assert family_of(tiny("idefics3", layers=3)).name == "idefics3"
    with pytest.raises(foveate.UnsupportedModel, match=r"smolvlm needs transformers >= 5\.21, found 5\.20\.0"):
        family_of(tiny("smolvlm", layers=3))


def test_limits_name_what_a_family_reads() -> None:
    assert all(set(family.since) <= set(family.modalities) for family in FAMILIES)
