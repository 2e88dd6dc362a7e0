"""FlashAttention's plumbing, on a CPU: its kernels are replaced by one that computes attention from the 2-D mask."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from foveate.core import Method
from foveate.engines.base import compress
from tests.engine.oracle import GREEDY, Oracle, cache_lengths, differ, vivid
from tests.engine.probes import peek, watch
from tests.engine.test_oracle import CASES, TOLERANCE
from tests.models import chunked, one_row, tiny_inputs, tiny_llava

FLASH = "flash_attention_2"


class StandIn:
    """What the kernels do with a mask of [batch, keys], and a note of what each layer handed over."""

    def __init__(self) -> None:
        self.calls: dict[int, list[tuple[int, int, tuple[int, ...] | None]]] = defaultdict(list)

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        rows, columns = query.shape[2], key.shape[2]
        allowed = torch.ones(rows, columns, dtype=torch.bool)[None, None]
        if module.is_causal:
            assert module.config._attn_implementation == FLASH, "the kernels read their own name from the config"
            shape = None if attention_mask is None else tuple(attention_mask.shape)
            self.calls[module.layer_idx].append((rows, columns, shape))
            positions = kwargs.get("position_ids")  # gaps here would look like several prompts packed into one row
            gaps = positions is not None and bool((positions.diff(dim=-1) != 1).any())
            assert not gaps or attention_mask is not None
            allowed = allowed.tril(columns - rows)
        if attention_mask is not None:
            assert attention_mask.shape == (len(query), columns), "one entry for each key of this layer"
            allowed = allowed & attention_mask[:, None, None, :].bool()
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scores = (query @ key.transpose(2, 3)) * scaling
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
        return (weights @ value).transpose(1, 2), None


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Oracle, StandIn]:
    kernels = StandIn()
    monkeypatch.setitem(AttentionInterface._global_mapping, FLASH, kernels)
    model = vivid(tiny_llava())
    oracle = Oracle(model)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation_internal = FLASH
    return model, oracle, kernels


@pytest.mark.parametrize("rows", [(0, 1, 2), (2,)], ids=["batch", "single"])
@pytest.mark.parametrize("case", [name for name in CASES if name not in ("grid", "random", "v2drop by mean")])
def test_dropped_equals_masked(case: str, rows: tuple[int, ...], flash: Any) -> None:
    (method, positions), (model, oracle, kernels), inputs = CASES[case], flash, tiny_inputs(rows)
    with compress(model, method) as handle:
        output = model.generate(**inputs, **GREEDY, max_new_tokens=5)
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE
    lengths = cache_lengths(handle.report, inputs, 6, decoded=0)
    for layer, length in enumerate(lengths):
        wanted = [(length, length)] + [(1, length + step) for step in range(1, 5)]
        assert [(q, k) for q, k, _ in kernels.calls[layer]] == wanted
        for q, k, shape in kernels.calls[layer]:
            assert shape in (None, (len(rows), k)), "the mask is 2-D and as long as this layer's keys"
            assert q == k or len(rows) > 1 or shape is None, "nothing padded, no mask"


@pytest.mark.parametrize(
    ("case", "chunk"),
    [
        ("evocut original", None),
        pytest.param("evocut original", 6, marks=chunked),
        ("v2drop", None),
        ("evocut original + v2drop", None),
    ],
)
def test_positions_with_gaps_are_hidden_from_the_kernels(case: str, chunk: int | None, flash: Any) -> None:
    (method, positions), (model, oracle, _), inputs = CASES[case], flash, one_row(tiny_inputs(), 2)
    seen: list[Any] = []
    with compress(model, method) as handle, torch.no_grad():
        hooks = [
            layer.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True)
            for layer in list(model.model.language_model.layers)[4:]
        ]
        output = model.generate(**inputs, **GREEDY, max_new_tokens=5, prefill_chunk_size=chunk)
        bare = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], use_cache=False).logits
        for hook in hooks:
            hook.remove()
    assert set(seen) == {None}
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE
    reference = oracle.logits(inputs, inputs["input_ids"], handle.report, positions)[0]
    assert (bare[0] - reference[~reference.isnan().any(-1)]).abs().max() <= TOLERANCE


def test_taps_see_what_flash_sees(flash: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, oracle, _), inputs, seen = flash, tiny_inputs(), watch(monkeypatch)
    probe: Method = peek(3, "relevance", "text_mass", together=True)
    with compress(model, probe) as handle:
        model.generate(**inputs, **GREEDY, max_new_tokens=2)
    for evidence, row in zip(seen["peek", 3], (1, 2), strict=True):
        read = oracle.read(inputs, inputs["input_ids"], row, handle.report)
        visual, words = torch.cat(read.visual), len(read.column)
        text = torch.tensor([i for i in range(words) if i > visual[15] and i not in visual])
        assert (evidence.relevance - read.maps[2][text][:, visual]).abs().max() <= 5e-6
        assert (evidence.text_mass - read.maps[2][visual][:, text].sum(1)).abs().max() <= 5e-6


def test_three_turns(flash: Any) -> None:
    model, oracle, _ = flash
    for case in ("evocut original", "v2drop to nothing", "ragged everywhere"):
        (method, positions), inputs = CASES[case], tiny_inputs()
        with compress(model, method) as handle:
            first = model.generate(**inputs, **GREEDY, max_new_tokens=3)
            sequences, mask = first.sequences, inputs["attention_mask"]
            for _ in range(2):
                ids = torch.cat([sequences, torch.tensor([[44, 45, 46]] * 3)], 1)
                mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=first.past_key_values,
                    **GREEDY,
                    max_new_tokens=3,
                )
                sequences = output.sequences
                assert differ(output.logits, oracle.logits(inputs, sequences, handle.report, positions)) <= TOLERANCE
