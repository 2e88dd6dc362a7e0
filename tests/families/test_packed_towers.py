"""Kimi K2.5 and MiniCPM-V 4.6: the patches under each token, where pictures of many sizes are one sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import foveate
from foveate.engines.verify import random_inputs, verify
from tests.engine.probes import peek, watch
from tests.families.matrix import model_of
from tests.zoo.inputs import batch
from tests.zoo.models import GREEDY, placeholders, reads

#: Rows and columns of patches of each picture, as the last layer of the tower sees them.
SIZES: dict[tuple[str, str], list[tuple[int, int]]] = {
    ("kimi_k25", "image"): [(8, 8), (4, 8), (8, 12)],
    ("minicpmv4_6", "image"): [(8, 8), (4, 8), (4, 8), (8, 6), (8, 8)],
    ("minicpmv4_6", "video"): [(4, 8)] * 8,
}

CASES = [case for case in SIZES if reads(*case)]

needs_minicpm = pytest.mark.skipif(not reads("minicpmv4_6"), reason="transformers is too old for minicpmv4_6")


def layers_of(model: Any) -> Any:
    tower = model.model.vision_tower
    return tower.layers if hasattr(tower, "layers") else tower.encoder.layers


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_patches_of_each_token(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of the tower's last layer changes one token: what the encoder shows of it, and what the LLM reads."""
    model, sizes = model_of(name, "sdpa"), SIZES[name, kind]
    inputs = batch(name, (1, 0, 2)) if kind == "image" else batch(name, (1,), video=True)
    seen, place = watch(monkeypatch), torch.tensor(0)

    def nudge(module: Any, args: Any, output: Any) -> Any:
        output = output.clone()
        output.view(-1, output.shape[-1])[place] += torch.linspace(1.0, 2.0, output.shape[-1])
        return output

    with foveate.compress(model, peek(0, "encoder_fold")):
        model(**inputs)
        before = seen["peek", 0]
        assert [e.grid for e in before] == [(1, high // 2, wide // 2) for high, wide in sizes]
        hook = layers_of(model)[-1].register_forward_hook(nudge, prepend=True)
        start = 0
        for number, (high, wide) in enumerate(sizes):
            for row, column in ((0, 0), (1, 3), (2, 5), (high - 1, wide - 1)):
                place = torch.tensor(start + row * wide + column)
                model(**inputs)
                expected = [[row // 2 * (wide // 2) + column // 2] if i == number else [] for i in range(len(sizes))]
                pairs = list(zip(seen["peek", 0], before, strict=True))
                for what in ("encoder_fold", "features"):
                    differ = [getattr(now, what) != getattr(then, what) for now, then in pairs]
                    assert [d.reshape(len(d), -1).any(1).nonzero()[:, 0].tolist() for d in differ] == expected
            start += high * wide
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, kind in CASES if kind == "image"])
def test_saliency_stays_within_a_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture is a forward of its own: the mean that its patches receive is one over their number."""
    model, inputs, seen = model_of(name, "eager"), batch(name, (1, 2)), watch(monkeypatch)
    with foveate.compress(model, peek(0, "encoder_saliency", "encoder_keys")):
        model(**inputs)
    for evidence, (high, wide) in zip(seen["peek", 0], SIZES[name, "image"], strict=True):
        assert evidence.encoder_saliency is not None and evidence.encoder_keys is not None
        assert evidence.encoder_saliency.mean() == pytest.approx(1 / (high * wide), rel=1e-5)
        assert len(evidence.encoder_keys) == high * wide // 4


@needs_minicpm
@pytest.mark.parametrize("where", ["config", "call"])
def test_minicpm_without_its_own_merger(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("minicpmv4_6", "sdpa"), batch("minicpmv4_6", (1, 1))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    token, rows = model.config.image_token_id, []
    for row, real in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        rows.append([i for i in row[len(row) - real :] for _ in range(4 if i == token else 1)])
    length = max(map(len, rows))
    longer = {
        **inputs,
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "mm_token_type_ids": None,
    }
    longer = {key: value for key, value in longer.items() if value is not None}
    if where == "config":
        monkeypatch.setattr(model.config, "downsample_mode", "4x")
    else:
        longer["downsample_mode"] = "4x"
    settings = {**GREEDY, "max_new_tokens": 3, "suppress_tokens": placeholders(model)}
    plain = model.generate(**longer, **settings)
    with foveate.compress(model, "evocut:keep=1.0") as handle:
        same = model.generate(**longer, **settings)
    assert torch.equal(torch.stack(same.logits), torch.stack(plain.logits))
    with foveate.compress(model, "evocut:keep=7") as handle:
        model.generate(**longer, **settings)
    assert [(image.grid, image.n_kept) for image in handle.report.images] == [
        ((1, 8, 8), 7),
        ((1, 4, 8), 7),
        ((1, 4, 8), 7),
        ((1, 8, 6), 7),
    ]


def test_the_report_counts_what_latent_attention_keeps() -> None:
    model, inputs = model_of("kimi_k25", "sdpa"), batch("kimi_k25", (1,))

    def held(output: Any) -> int:
        return sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in output.past_key_values.layers)

    settings = {**GREEDY, "max_new_tokens": 1, "suppress_tokens": placeholders(model)}
    plain = model.generate(**inputs, **settings)
    with foveate.compress(model, "grid:keep=6") as handle:
        short = model.generate(**inputs, **settings)
    assert (handle.report.kv_bytes_before, handle.report.kv_bytes_after) == (held(plain), held(short))


@pytest.mark.parametrize("spec", ["evocut:keep=4", "adav:keep=8 + v2drop:stages=2@0.5"])
def test_verify(spec: str) -> None:
    result = verify(model_of("kimi_k25", "sdpa"), spec)
    assert result.difference <= 1e-4 and result.effect > 1e-2


@needs_minicpm
def test_random_prompts_for_minicpm() -> None:
    model = model_of("minicpmv4_6", "sdpa")
    with foveate.compress(model, "evocut:keep=4") as handle:
        model.generate(**random_inputs(model, handle.family), max_new_tokens=1, do_sample=False)
    assert [image.n_kept for image in handle.report.images] == [4, 4, 4]
