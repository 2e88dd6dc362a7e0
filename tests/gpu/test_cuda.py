"""The engine on a GPU: the same reference, flash attention where it is installed, memory, no wait for the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import is_flash_attn_2_available

from foveate.engines.base import compress
from tests.engine.oracle import GREEDY, cache_lengths, differ, pair
from tests.engine.test_oracle import CASES, TOLERANCE
from tests.models import tiny_inputs

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def _moved(inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {n: v.to(DEVICE, dtype if v.is_floating_point() else v.dtype) for n, v in inputs.items()}


def _prove(case: str, model: Any, oracle: Any, tolerance: float, **options: Any) -> None:
    (method, positions), inputs = CASES[case], tiny_inputs()
    with compress(model, method) as handle:
        output = model.generate(**_moved(inputs, model.dtype), **GREEDY, **options, max_new_tokens=16)
    logits = [step.float().cpu() for step in output.logits]
    reference = oracle.logits(inputs, output.sequences.cpu(), handle.report, positions)
    if tolerance <= TOLERANCE:
        assert differ(logits, reference) <= tolerance
    assert (torch.stack(logits, 1) - reference[:, -17:-1]).abs().max() <= tolerance
    if not options:
        lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
        assert lengths == cache_lengths(handle.report, inputs, 6, decoded=15)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_dropped_equals_masked(case: str, impl: str) -> None:
    model, oracle = pair(impl)
    _prove(case, copy.deepcopy(model).to(DEVICE), oracle, TOLERANCE)


@pytest.mark.parametrize("case", ["evocut", "v2drop to nothing", "evocut original + v2drop"])
def test_a_static_cache(case: str) -> None:
    model, oracle = pair()
    options = {"cache_implementation": "static", "disable_compile": True}
    _prove(case, copy.deepcopy(model).to(DEVICE), oracle, TOLERANCE, **options)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
@pytest.mark.parametrize("case", CASES)
def test_flash_attention_in_half_precision(case: str) -> None:
    model, oracle = pair()
    half = copy.deepcopy(model).to(DEVICE, torch.bfloat16)
    half.set_attn_implementation("flash_attention_2")
    _prove(case, half, oracle, 0.3)


@pytest.mark.parametrize("name", ["evocut", "todre", "adav", "v2drop", "random", "grid", "pool"])
def test_keeping_everything_changes_no_bit(name: str) -> None:
    model, inputs = copy.deepcopy(pair()[0]).to(DEVICE), _moved(tiny_inputs())
    plain = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    with compress(model, f"{name}:keep=1.0" + (",tau=0.0" if name == "todre" else "")):
        output = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits))


def _large() -> Any:
    """The shape of LLaVA-1.5 with a shallow, narrow decoder: 576 tokens for each picture."""
    vision = CLIPVisionConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=500, image_seq_length=576)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def large() -> tuple[Any, dict[str, Any]]:
    rows = 8
    ids = torch.tensor([[1, 5, 6, *[500] * 576, *range(10, 40)]] * rows)
    pixels = torch.randn(rows, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return _large().to(DEVICE), _moved(inputs, torch.bfloat16)


def _peak(model: Any, inputs: dict[str, Any]) -> int:
    model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)  # workspaces are made once
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize(
    "spec",
    [
        "evocut:keep=64",
        "todre:keep=64",
        "todre:keep=1.0,tau=1.0",
        "adav:keep=64",
        "v2drop:keep=192",
        "random:keep=64",
        "pool:keep=64",
        "evocut:keep=128 + v2drop:keep=64",
    ],
)
def test_peak_memory_is_not_above_the_plain_models(spec: str, large: Any) -> None:
    model, inputs = large
    plain = _peak(model, inputs)
    with compress(model, spec) as handle:
        compressed = _peak(model, inputs)
    assert compressed <= plain, f"{compressed / 2**20:.0f} MiB, plain {plain / 2**20:.0f} MiB"
    report = handle.report
    assert report.mean_alive < report.tokens
    assert min(report.encode_ms or 0, report.select_ms or 0, report.prefill_ms or 0) > 0


def test_select_times_are_events(large: Any) -> None:
    model, inputs = large
    with compress(model, "evocut:keep=64") as handle:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    frame = handle.frame
    assert frame is not None
    assert {"encode", "select", "prefill"} <= set(frame.clock._pairs)
    assert all(
        isinstance(stamp, torch.cuda.Event) for pairs in frame.clock._pairs.values() for p in pairs for stamp in p
    )
