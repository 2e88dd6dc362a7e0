"""Llama 3.2 Vision: text looks across at visual tokens, so that they leave beside the prompt, at every step alike."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

import foveate
from foveate.engines.verify import verify
from foveate.errors import NothingCompressed, UnsupportedCall, UnsupportedMethod
from foveate.families import Picture, family_of
from tests.engine.probes import Coin, peek, watch
from tests.engine.test_nothing_left import _state
from tests.families.matrix import model_of
from tests.models import chunked
from tests.zoo.inputs import Batch, batch, one_row
from tests.zoo.models import GREEDY, IMAGE, placeholders
from tests.zoo.reference import reference_logits

ROWS = (1, 0, 2)  # pictures of 1 x 2 tiles, 1 x 1 and 2 x 2, each tile of 4 x 4 patches and a CLS row
SIDE, PER_TILE = 4, 17
SLOT = 4 * PER_TILE
TILES = ((1, 2), (1, 1), (2, 2))
PLACES = ((0, 0), (2, 0), (2, 1))  # prompt and slot of each picture

METHODS: dict[str, Any] = {
    "evocut": "evocut:keep=6,share=global",
    "todre": "todre:keep=0.3,exit=none",
    "adav": "adav:keep=9",
    "grid": "grid:keep=5",
    "pool": "pool:keep=5",
    "chain": "evocut:keep=12 + adav:keep=5",
    "one": "random:keep=1",
    "by the picture": Coin(share=0.3),
}


def say(model: Any, inputs: Any, new: int = 6, **options: Any) -> Any:
    settings = {**GREEDY, "max_new_tokens": new, "suppress_tokens": placeholders(model), **options}
    return model.generate(**inputs, **settings)


def reference(model: Any, inputs: Batch, sequences: Tensor, handle: Any, merged: bool = False) -> Tensor:
    kept = [[(0, image.kept)] for image in handle.report.images]
    features = {i: seen.evidence.features for i, seen in enumerate(handle.frame.images)} if merged else None
    return reference_logits(model, inputs, sequences[:, :-1], kept, features=features)


def column(picture: int, row: int, column: int) -> tuple[int, int]:
    """Slot-wise tile and row of the patch at a place in a picture."""
    tile = row // SIDE * TILES[picture][1] + column // SIDE
    return tile, 1 + row % SIDE * SIDE + column % SIDE


def pictures(model: Any, inputs: Any) -> list[Picture]:
    family = family_of(model)
    return family.pictures(model, "image", family.encode(model, "image", inputs)[0], inputs)


@contextmanager
def nudged(module: nn.Module, *place: int) -> Iterator[None]:
    """Add to what a module gives at one place."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        output = output.clone()
        output[place] += torch.linspace(1.0, 2.0, output.shape[-1])
        return output

    handle = module.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
def test_dropped_equals_masked(name: str, impl: str) -> None:
    model, inputs = model_of("mllama", impl), batch("mllama", ROWS)
    with foveate.compress(model, METHODS[name]) as handle:
        output = say(model, inputs, 16)
    expected = reference(model, inputs, output.sequences, handle, merged=name == "pool")[:, -16:]
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, rtol=0, atol=1e-4)
    assert handle.report.kept < handle.report.tokens == 32 + 16 + 64
    rows = [len(image.kept) + high * wide for image, (high, wide) in zip(handle.report.images, TILES, strict=True)]
    cross = model.config.text_config.cross_attention_layers
    lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    assert {lengths[i] for i in cross} == {max(rows[0], rows[1] + rows[2])}
    assert {n for i, n in enumerate(lengths) if i not in cross} == {inputs["input_ids"].shape[1] + 15}


def test_the_comparison_can_fail() -> None:
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", ROWS)
    with foveate.compress(model, "evocut:keep=6") as handle:
        output = say(model, inputs)
    kept = [[(0, image.kept)] for image in handle.report.images]
    for item in kept:  # another token in place of the last
        item[0] = (0, [*item[0][1][:-1], next(token for token in range(16) if token not in item[0][1])])
    wrong = reference_logits(model, inputs, output.sequences[:, :-1], kept)[:, -6:]
    assert (wrong - torch.stack(output.logits, 1)).abs().amax((1, 2)).tolist() > [1e-3, -1.0, 1e-3]


def test_beams() -> None:
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", ROWS)
    with foveate.compress(model, "adav:keep=7") as handle:
        output = say(model, inputs, num_beams=3, num_return_sequences=2, output_scores=True)
    expected = reference(model, inputs, output.sequences, handle)[:, -6:].log_softmax(-1)
    chosen = expected.gather(2, output.sequences[:, -6:, None])[..., 0].mean(1)
    torch.testing.assert_close(chosen, output.sequences_scores, rtol=0, atol=1e-4)
    assert len(handle.report.images) == 3


def test_a_prompt_without_pictures_is_read_as_if_alone() -> None:
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", ROWS)
    with foveate.compress(model, "random:keep=5"):
        together = say(model, inputs)
    alone = say(model, one_row("mllama", inputs, 1))
    torch.testing.assert_close(torch.stack(together.logits)[:, 1], torch.stack(alone.logits)[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", ["evocut:keep=1.0", "adav:keep=64", "pool:keep=1.0"])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_keeping_everything_changes_no_bit(spec: str, impl: str) -> None:
    model, inputs = model_of("mllama", impl), batch("mllama", ROWS)
    plain, forward = say(model, inputs), model(**inputs).logits
    with foveate.compress(model, spec) as handle:
        same = say(model, inputs)
        assert torch.equal(model(**inputs).logits, forward)
    assert torch.equal(torch.stack(same.logits), torch.stack(plain.logits))
    assert handle.report.kv_bytes_before == handle.report.kv_bytes_after


# -- where tokens come from


def test_the_row_of_each_token() -> None:
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", ROWS)
    before = pictures(model, inputs)
    assert [picture.grid for picture in before] == [(1, SIDE * high, SIDE * wide) for high, wide in TILES]
    for number, (prompt, slot) in enumerate(PLACES):
        for token in (0, 5, len(before[number].features) - 1):
            _, row, across = before[number].coordinates[token].tolist()
            with nudged(model.model.multi_modal_projector, prompt, slot, *column(number, row, across)):
                after = pictures(model, inputs)
            pairs = zip(after, before, strict=True)
            changed = [(now.features != then.features).any(1).nonzero()[:, 0].tolist() for now, then in pairs]
            assert changed == [[token] if i == number else [] for i in range(3)]


@pytest.mark.parametrize("evidence", ["encoder_fold", "encoder_keys"])
def test_the_patch_of_each_token(evidence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, seen = model_of("mllama", "sdpa"), batch("mllama", ROWS), watch(monkeypatch)
    local = model.model.vision_model.transformer.layers
    module = local[-1] if evidence == "encoder_fold" else local[1].self_attn.k_proj
    with foveate.compress(model, peek(0, evidence)):
        model(**inputs)
        before = [getattr(e, evidence) for e in seen["peek", 0]]
        for number, (prompt, slot) in enumerate(PLACES):
            for token in (0, 6, len(before[number]) - 1):
                _, row, across = seen["peek", 0][number].coordinates[token].tolist()
                tile, place = column(number, row, across)
                with nudged(module, prompt * 2 + slot, tile * 24 + place):  # a tile is filled up to 24 rows
                    model(**inputs)
                after = [getattr(e, evidence) for e in seen["peek", 0]]
                differ = [(now != then).reshape(len(now), -1).any(1) for now, then in zip(after, before, strict=True)]
                changed = [tokens.nonzero()[:, 0].tolist() for tokens in differ]
                assert changed == [[token] if i == number else [] for i in range(3)]


@pytest.mark.parametrize("layer", ["feature", "last"])
def test_saliency_is_what_the_cls_row_of_the_own_tile_gives(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, seen = model_of("mllama", "sdpa"), batch("mllama", ROWS), watch(monkeypatch)
    attention = model.model.vision_model.transformer.layers[1 if layer == "feature" else 2].self_attn
    caught: dict[str, Tensor] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: caught.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    with foveate.compress(model, peek(0, "encoder_saliency", layer=layer)):
        model(**inputs)
    for hook in hooks:
        hook.remove()
    q, k = (caught[name].unflatten(-1, (4, 8)) for name in ("q_proj", "k_proj"))
    given = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(8**-0.5).softmax(-1).mean(1)
    for number, (prompt, slot) in enumerate(PLACES):
        evidence = seen["peek", 0][number]
        places = [column(number, row, across) for _, row, across in evidence.coordinates.tolist()]
        expected = [given[prompt * 2 + slot, tile * 24, tile * 24 + place] for tile, place in places]
        torch.testing.assert_close(evidence.encoder_saliency, torch.stack(expected))
        assert [len(crop) for crop in evidence.by_crop()] == [16] * (TILES[number][0] * TILES[number][1])
        for tile, crop in enumerate(evidence.by_crop()):
            assert {places[token][0] for token in crop.tolist()} == {tile}


@pytest.mark.parametrize(("height", "width"), [(16, 48), (32, 32), (64, 16), (30, 22)])
def test_tokens_stand_where_the_processor_cut_the_picture(height: int, width: int) -> None:
    """A bright patch is found by its coordinates in the tiles that the processor made."""
    processor = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=4, do_normalize=False)
    grey = np.random.default_rng(0).integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8)
    made = processor([[Image.fromarray(grey)]], return_tensors="pt")
    inputs = {name: made[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    (picture,) = pictures(model_of("mllama", "sdpa"), inputs)
    high, wide = (side // SIDE for side in picture.grid[1:])
    tiles = inputs["pixel_values"][0, 0, : high * wide]
    canvas = torch.cat([torch.cat(list(line), 2) for line in tiles.split(wide)], 1)
    assert picture.patches is not None
    for (_, row, across), (patch,) in zip(picture.coordinates.tolist(), picture.patches.tolist(), strict=True):
        tile, place = divmod(patch, SIDE**2)
        y, x = place // SIDE * 4, place % SIDE * 4
        here = canvas[:, row * 4 : row * 4 + 4, across * 4 : across * 4 + 4]
        assert torch.equal(tiles[tile, :, y : y + 4, x : x + 4], here)


# -- ways to call


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        pytest.param({"prefill_chunk_size": 3}, marks=chunked),
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate(options: dict[str, Any]) -> None:
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", ROWS)
    with foveate.compress(model, "evocut:keep=6"):
        expected, output = say(model, inputs), say(model, inputs, **options)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=0, atol=1e-5)
    if "cache_implementation" in options:  # short layers are made short
        cross = model.config.text_config.cross_attention_layers[0]
        assert output.past_key_values.layers[cross].keys.shape[2] == 6 + 1 + 6 + 4


@pytest.mark.parametrize(
    "given", [True, False], ids=["all is given", "the model makes a cache, no mask after the prompt"]
)
def test_a_loop_of_ones_own(given: bool) -> None:
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", ROWS if given else (1, 1))
    with foveate.compress(model, Coin(share=0.4)):
        expected = say(model, inputs)
        mask, sights = inputs["attention_mask"], inputs["cross_attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = {"past_key_values": DynamicCache()} if given else {}
        output = model(**inputs, **cache, position_ids=positions)
        for step in range(6):
            torch.testing.assert_close(output.logits[:, -1], expected.logits[step], rtol=0, atol=1e-5)
            mask = torch.cat([mask, mask[:, -1:]], 1)
            sights = torch.cat([sights, sights[:, -1:]], 1)
            positions = positions[:, -1:] + 1
            output = model(
                input_ids=expected.sequences[:, inputs["input_ids"].shape[1] + step, None],
                attention_mask=mask,
                position_ids=positions,
                cross_attention_mask=sights if given else None,
                past_key_values=output.past_key_values,
            )


@pytest.mark.parametrize("pixels", [True, False], ids=["with the picture", "without"])
def test_a_second_turn(pixels: bool) -> None:
    model, first = model_of("mllama", "sdpa"), batch("mllama", (1, 2))
    with foveate.compress(model, "random:keep=7") as handle:
        cache = DynamicCache()
        answer = say(model, first, past_key_values=cache)
        ids = torch.cat([answer.sequences, torch.tensor([[60, 61, 62]] * 2)], 1)
        new = ids.shape[1] - first["input_ids"].shape[1]
        sights = first["cross_attention_mask"]
        second = {
            **(first if pixels else {}),
            "input_ids": ids,
            "attention_mask": torch.cat([first["attention_mask"], torch.ones(2, new, dtype=torch.long)], 1),
            "cross_attention_mask": torch.cat([sights, sights[:, -1:].expand(-1, new, -1, -1)], 1),
        }
        later = say(model, second, past_key_values=cache)
        assert handle.report.calls == 1
    expected = reference(model, Batch({**first, **second}, first.rows), later.sequences, handle)[:, -6:]
    torch.testing.assert_close(torch.stack(later.logits, 1), expected, rtol=0, atol=1e-4)


def test_labels_are_welcome() -> None:
    """No token of the prompt leaves, so that each has a logit."""
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", ROWS)
    with foveate.compress(model, "random:keep=6"):
        output = model(**inputs, labels=inputs["input_ids"])
    assert output.loss.isfinite() and output.logits.shape[:2] == inputs["input_ids"].shape


def test_threads_do_not_meet() -> None:
    model = model_of("mllama", "sdpa")
    calls = [batch("mllama", rows, seed=seed) for seed, rows in enumerate([(1,), (2, 0), (1, 2), (1,)])]
    with foveate.compress(model, "evocut:keep=5"):
        alone = [say(model, inputs).sequences for inputs in calls]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda inputs: say(model, inputs).sequences, calls))
    assert all(map(torch.equal, alone, together))


# -- what is told, what is refused, what is left


def test_the_report_counts_what_the_caches_hold() -> None:
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", (2,))

    def held(output: Any) -> int:
        return sum(2 * layer.keys.numel() * 4 for layer in output.past_key_values.layers)

    plain = say(model, inputs, 1)
    with foveate.compress(model, "grid:keep=6") as handle:
        short = say(model, inputs, 1)
    report = handle.report
    assert (report.kv_bytes_before, report.kv_bytes_after) == (held(plain), held(short))
    assert report.prompt_tokens == report.prompt_tokens_after == (inputs["input_ids"].shape[1],)
    assert (report.tokens, report.kept, report.layers) == (32 + 16, 12, 2)
    assert [image.alive for image in report.images] == [(6, 6), (6, 6)]
    assert (report.mean_alive, report.images[1].index) == (12.0, 1)


@pytest.mark.parametrize("spec", ["v2drop:stages=2@0.5", "todre:keep=6", "evocut:keep=8 + v2drop:keep=4"])
def test_methods_inside_the_decoder_are_refused_by_name(spec: str) -> None:
    model = model_of("mllama", "sdpa")
    state = _state(model)
    with pytest.raises(UnsupportedMethod, match=r"(?s)`(v2drop|todre_exit)` drops between.*hint: .*exit=none"):
        foveate.compress(model, spec)
    with pytest.raises(UnsupportedMethod, match="mllama knows only original positions"):
        foveate.compress(model, "evocut:keep=6,positions=packed")
    assert _state(model) == state


def test_calls_are_refused() -> None:
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", (1, 1))
    right = {name: inputs[name].flip(1) for name in ("input_ids", "attention_mask")}
    moved = inputs["input_ids"].clone()
    moved[0, -1], moved[1][moved[1] == IMAGE] = IMAGE, 5
    ratio = inputs["aspect_ratio_ids"].clone()
    ratio[0] = 6
    states = {"cross_attention_states": torch.zeros(8, PER_TILE, 64)}
    with foveate.compress(model, "random:keep=6"):
        for changed, match in (
            (right, "padded on the right"),
            ({"input_ids": moved}, r"places for \[2, 0\] pictures, and \[1, 1\] were"),
            ({"aspect_ratio_ids": torch.tensor([[2], [0]])}, "hold 2 image tokens and the images make 1"),
            ({"cross_attention_mask": None}, "pictures were passed without `cross_attention_mask`"),
            ({"aspect_ratio_ids": ratio}, r"\[1, 1, 0, 0\] for a picture of 2 x 2 tiles"),
            ({**states, "pixel_values": None}, "ready-made `cross_attention_states`"),
        ):
            with pytest.raises(UnsupportedCall, match=match):
                say(model, {**inputs, **changed})


def test_another_conversation_on_the_cache_is_refused() -> None:
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", (1, 1))
    with foveate.compress(model, "random:keep=6"):
        answer = say(model, inputs)
        cache, longer = answer.past_key_values, torch.cat([answer.sequences, torch.tensor([[60, IMAGE, 61]] * 2)], 1)
        other = longer.clone()
        other[:, 9] += 1
        other[:, -2] = 60
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
        for ids, match in ((longer, "a picture was added"), (other, "does not begin with the one in the cache")):
            with pytest.raises(UnsupportedCall, match=match):
                say(model, {**inputs, "input_ids": ids, "attention_mask": mask}, past_key_values=cache)
        text = {"input_ids": longer[:, :-2], "attention_mask": mask[:, :-2]}
        with pytest.raises(UnsupportedCall, match="speaks of 136 rows of pictures, and 68 were read"):
            sights = torch.ones(2, text["input_ids"].shape[1], 2, 4, dtype=torch.long)
            say(model, {**text, "cross_attention_mask": sights}, past_key_values=cache)
    with pytest.raises(UnsupportedCall, match="no handle is attached any more"):
        say(model, text, past_key_values=cache)


def test_a_decoder_that_never_gets_the_rows_is_noticed() -> None:
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", (1,))
    with foveate.compress(model, "random:keep=6"), pytest.MonkeyPatch.context() as patch:
        decoder = model.model.language_model
        patch.setattr(decoder, "forward", type(decoder).forward.__get__(decoder))
        with pytest.raises(NothingCompressed):
            say(model, inputs)


def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("mllama", "sdpa"), batch("mllama", ROWS)
    before, state = say(model, inputs), _state(model)
    with foveate.compress(model, "evocut:keep=12 + todre:keep=8,exit=none + adav:keep=6"):
        assert _state(model) != state
        say(model, inputs)
    assert _state(model) == state
    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError), foveate.compress(model, "adav:keep=6") as handle:
            say(model, inputs)
    assert not handle._frames.inside
    assert _state(model) == state
    assert torch.equal(torch.stack(say(model, inputs).logits), torch.stack(before.logits))


@pytest.mark.parametrize("inputs", [None, ROWS], ids=["random prompts", "given prompts"])
def test_verify(inputs: tuple[int, ...] | None) -> None:
    model = model_of("mllama", "eager")
    for spec in ("evocut:keep=6", "pool:keep=5", "random:keep=1.0"):
        result = verify(model, spec, None if inputs is None else batch("mllama", inputs))
        assert result.ok and result.difference <= 1e-4
        assert result.effect > 1e-2 or spec == "random:keep=1.0"
