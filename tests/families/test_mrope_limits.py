"""Where Qwen-VL and GLM-V set limits: recurrent layers, layers that need all tokens, calls and options refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import foveate
from foveate.engines.masks import Cutting, Masks
from foveate.engines.sequence import Plan
from foveate.engines.verify import verify
from tests.engine.probes import Coin, peek, watch
from tests.families.matrix import model_of
from tests.families.test_mrope_line import NAMES, options
from tests.zoo.inputs import batch, one_row
from tests.zoo.items import items

DEEP = ("qwen3_vl", "qwen3_vl_moe")
RECURRENT = ("qwen3_5", "qwen3_5_moe")

# -- recurrent layers


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_attention_is_read_where_there_is_some(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers 3 and 4 are recurrent: before layer 5 a method sees what layer 2 attended to, of what is alive by then."""
    model, inputs, seen, weights = model_of(name, "eager"), one_row(name, batch(name), 1), watch(monkeypatch), []
    attention = model.model.language_model.layers[2].self_attn
    hook = attention.register_forward_hook(lambda module, args, output: weights.append(output[1][0].mean(0)))
    with foveate.compress(model, foveate.Chain(Coin(at="4"), peek(5, "relevance", "text_mass"))) as handle:
        model.generate(**inputs, **options(model, 1))
    hook.remove()
    text = (inputs["mm_token_type_ids"][0] == 0).nonzero()[:, 0]
    assert handle.report.mean_alive < handle.report.tokens
    for evidence, image, item in zip(seen["peek", 5], handle.report.images, items(model, inputs), strict=True):
        alive, after = item.columns[list(image.after(4))], text[text > item.columns.max()]
        torch.testing.assert_close(evidence.relevance, weights[0][after][:, alive])
        torch.testing.assert_close(evidence.text_mass, weights[0][alive][:, after].sum(1))


@pytest.mark.parametrize("name", RECURRENT)
def test_only_layers_with_keys_count_as_cache(name: str) -> None:
    model, inputs = model_of(name, "sdpa"), batch(name)
    with foveate.compress(model, "v2drop:stages=3@0.5/4@0.25") as handle:
        model.generate(**inputs, **options(model, 1))
    report, per_token = handle.report, 2 * 2 * 16 * 4
    prompt = sum(report.prompt_tokens)
    assert report.kv_bytes_before == 2 * prompt * per_token, "layers 2 and 5"
    gone = sum(image.tokens - len(image.after(5)) for image in report.images)
    assert report.kv_bytes_after == (2 * prompt - gone) * per_token


def test_a_later_turn_may_be_padded() -> None:
    masks = Masks(model_of("qwen3_5", "sdpa").config.get_text_config(), 6)
    cutting = Cutting(3, Plan(torch.tensor([[0, 2], [1, 3]]), None), 4)
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    assert torch.equal(masks.decode({}, cutting, mask, torch.zeros(2, 3, 8), None, 4), mask[:, 4:])
    assert masks.decode({}, cutting, mask, torch.zeros(2, 1, 8), None, 4) is None


# -- what is refused, and what is chosen


def refused(error: type[foveate.FoveateError], words: str, call: Any) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert caught.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_packed_positions_are_refused_and_never_chosen(name: str) -> None:
    model = model_of(name, "sdpa")
    refused(
        foveate.UnsupportedMethod,
        "only original positions, got 'packed'",
        lambda: foveate.compress(model, "evocut:keep=4,positions=packed"),
    )
    for spec in ("evocut:keep=4", "todre:keep=4", "evocut:keep=8,positions=original + adav:keep=4"):
        with foveate.compress(model, spec) as handle:  # whose papers number tokens anew
            assert handle.positions == "original"


@pytest.mark.parametrize(("name", "first"), [(name, 2) for name in DEEP] + [(name, 3) for name in RECURRENT])
def test_layers_that_need_all_tokens(name: str, first: int) -> None:
    model = model_of(name, "sdpa")
    for stages in (f"{first - 1}@0.5", f"{first - 1}@0.5/4@0", "1@0.5/5@0.5"):
        refused(
            foveate.UnsupportedMethod,
            rf"allowed are 0 alone, or layers {first}\.\.5",
            lambda stages=stages: foveate.compress(model, f"v2drop:stages={stages}"),
        )
    foveate.compress(model, f"v2drop:stages={first}@0.5").remove()


@pytest.mark.parametrize("name", NAMES)
def test_without_token_types_positions_are_unknown(name: str) -> None:
    model, inputs = model_of(name, "sdpa"), dict(batch(name))
    del inputs["mm_token_type_ids"]
    with foveate.compress(model, "random:keep=4"):
        refused(foveate.UnsupportedCall, "mm_token_type_ids", lambda: model.generate(**inputs, **options(model)))


@pytest.mark.parametrize("name", ["glm4v", "glm46v"])
def test_images_and_videos_share_a_placeholder(name: str) -> None:
    model, images, videos = model_of(name, "sdpa"), batch(name, (1,)), batch(name, (1,), video=True)
    both = {key: value for inputs in (videos, images) for key, value in inputs.items()}
    joined = {
        key: torch.cat([images[key], videos[key]], 1) for key in images if images[key].dim() == 2 and key[0] in "am"
    }
    both |= joined | {"input_ids": torch.cat([images["input_ids"], videos["input_ids"]], 1)}
    with pytest.raises(ValueError, match="do not match"):
        model.generate(**both, **options(model))
    with foveate.compress(model, "random:keep=4"):
        refused(foveate.UnsupportedCall, "images or videos", lambda: model.generate(**both, **options(model)))
        refused(
            foveate.UnsupportedCall,
            "image tokens",
            lambda: model.generate(
                **{**images, "mm_token_type_ids": 2 * images["mm_token_type_ids"]}, **options(model)
            ),
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", ["evocut:keep=0.3", "v2drop:stages=3@0.5/4@0.3"])
def test_verify(name: str, spec: str) -> None:
    model = model_of(name, "sdpa")
    if name in RECURRENT:
        refused(foveate.UnsupportedModel, "recurrent layer", lambda: verify(model, spec))
        return
    found = verify(model, spec, new_tokens=3)
    assert found.ok and found.effect > 1e-2
    assert verify(model, spec, batch(name, video=True), new_tokens=3).ok
