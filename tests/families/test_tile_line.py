"""Families whose images come in tiles, cells or packed rows: what lies under a token, what is special about each."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageTextToText

import foveate
from foveate.core import Evidence, Method
from foveate.engines import capture
from foveate.families import family_of
from tests.engine.probes import Coin, peek, watch
from tests.families.matrix import inputs_of, measure, model_of
from tests.zoo.inputs import batch, one_row
from tests.zoo.models import GREEDY, IMAGE, placeholders, reads, tiny, vivid
from tests.zoo.reference import reference_logits

NAMES = ("internvl", "idefics3", "smolvlm", "gemma3", "gemma4", "paligemma", "mistral3")
FAMILIES = tuple(filter(reads, NAMES))
CASES = [*((name, "image") for name in FAMILIES), *[("gemma4", "video")] * reads("gemma4", "video")]
IMPLS = ["sdpa", "eager"]

#: Side of the square of patches that becomes a token.
CELL = dict.fromkeys(FAMILIES, 2) | {"paligemma": 1}


def see(model: Any, method: Method, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> list[Evidence]:
    """Read a prompt once and return what the method was shown of each image."""
    seen = watch(monkeypatch)
    with foveate.compress(model, method), torch.no_grad():
        model(**inputs)
    ((_, evidences),) = seen.items()
    return evidences


def encoded(name: str, kind: str, inputs: Any, **more: Any) -> Any:
    """What the stock model's encoder gives, with eager attention."""
    base = model_of(name, "eager").model
    function = getattr(base, f"get_{kind}_features")
    media = {key: inputs[key] for key in inspect.signature(function).parameters if key in inputs}
    with torch.no_grad():
        return function(**media, return_dict=True, **more)


def by_image(name: str, kind: str, inputs: Any, values: Tensor) -> list[Tensor]:
    """Values of encoder rows, [forwards, rows, ...], image by image: of patches alone, [rows, columns, ...]."""
    if name == "mistral3":
        sides = (inputs["image_sizes"] // 4).tolist()
        pieces = values[0].split([rows * columns for rows, columns in sides])
        return [piece.unflatten(0, side) for piece, side in zip(pieces, sides, strict=True)]
    if name == "gemma4":
        places = inputs[f"{kind}_position_ids"]
        sides = (places.amax(1).flip(-1) + 1).tolist()
        real = [(place >= 0).all(-1) for place in places]
        return [row[here].unflatten(0, side) for row, here, side in zip(values, real, sides, strict=True)]
    rows = values[:, 1:] if name == "internvl" else values
    side = round(rows.shape[1] ** 0.5)
    return list(rows.unflatten(1, (side, side)))


def by_token(name: str, maps: list[Tensor], evidences: list[Evidence]) -> list[Tensor]:
    """Means over the cells of patches that become tokens, for each image (whose tiles or frames stand in a row)."""
    tokens = [functional.avg_pool2d(piece[None].float(), CELL[name])[0].flatten() for piece in maps]
    frames = iter(tokens)
    return [torch.cat([next(frames) for _ in range(evidence.grid[0])]) for evidence in evidences]


# -- what lies under a token


def paint(name: str, kind: str, inputs: Any, forward: int, row: int, column: int) -> Any:
    """Inputs in which one patch of one encoder forward is another."""
    key = "pixel_values" if kind == "image" else "pixel_values_videos"
    pixels = inputs[key].clone()
    if name == "gemma4":
        place = inputs[f"{kind}_position_ids"][forward]
        pixels[forward, (place == torch.tensor([column, row])).all(-1)] = 0.9
    else:
        whole = pixels.flatten(0, -4)[pixels.flatten(0, -4).flatten(1).any(1).nonzero()[forward, 0]]
        side = 3 if name == "gemma3" else 4
        whole[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = 0.9
    return {**inputs, key: pixels}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_evidence_of_a_token_is_that_of_the_patches_under_it(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, probe = tiny(name), inputs_of(name, kind), peek(0, "encoder_fold", "encoder_keys", "coordinates")
    family = family_of(model)
    for layer in family.encoder_layers(model, kind):  # patches that cannot see each other
        family.encoder_attention(layer).register_forward_hook(lambda m, a, out: (torch.zeros_like(out[0]), *out[1:]))
    before = see(model, probe, inputs, monkeypatch)
    frames = [(image, frame) for image, evidence in enumerate(before) for frame in range(evidence.grid[0])]
    for forward in {0, 1, len(frames) - 1}:
        image, frame = frames[forward]
        rows, columns = (side * CELL[name] for side in before[image].grid[1:])
        for row, column in ((0, 0), (1, columns - 2), (rows - 1, columns - 1)):
            after = see(model, probe, paint(name, kind, inputs, forward, row, column), monkeypatch)
            for what in ("features", "encoder_fold", "encoder_keys"):
                changed = [
                    (i, tuple(evidence.coordinates[token].tolist()))
                    for i, evidence in enumerate(after)
                    for token in range(evidence.n)
                    if not torch.equal(getattr(evidence, what)[token], getattr(before[i], what)[token])
                ]
                assert changed == [(image, (frame, row // CELL[name], column // CELL[name]))], what


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_saliency_is_the_attention_of_the_same_image(
    name: str, kind: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_CHUNK", 7)
    inputs = inputs_of(name, kind)
    evidences = see(model_of(name, impl), peek(0, "encoder_saliency"), inputs, monkeypatch)
    attention = encoded(name, kind, inputs, output_attentions=True).attentions[-1].mean(1)
    maps = []
    for forward, piece in enumerate(by_image(name, kind, inputs, attention)):
        if name == "internvl":  # what its CLS token looks at
            maps.append(attention[forward, 0, 1:].unflatten(0, piece.shape[:2]))
        else:  # rows of the image, mean over its patches; all of it stays within the image
            given = piece.flatten(0, 1)
            assert torch.allclose(given.sum(1), torch.ones(len(given)))
            inside = given[:, given.amax(0) > 0] if name in ("gemma4", "mistral3") else given
            maps.append(inside.mean(0).unflatten(0, piece.shape[:2]))
    for evidence, wanted in zip(evidences, by_token(name, maps, evidences), strict=True):
        assert (evidence.require("encoder_saliency") - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_each_image_is_folded_alone(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, method = inputs_of(name, kind), foveate.from_spec("evocut:keep=2,start=1,last=2")
    evidences = see(model_of(name, "sdpa"), method, inputs, monkeypatch)
    states = encoded(name, kind, inputs, output_hidden_states=True).hidden_states
    pieces = zip(*(by_image(name, kind, inputs, state) for state in states[:3]), strict=True)
    maps = []
    for first, second, third in pieces:
        carry = method.fold(None, first.flatten(0, 1), second.flatten(0, 1))
        carry = method.fold(carry, second.flatten(0, 1), third.flatten(0, 1))
        maps.append(carry.unflatten(0, first.shape[:2]))
    for evidence, wanted in zip(evidences, by_token(name, maps, evidences), strict=True):
        torch.testing.assert_close(evidence.require("encoder_fold"), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flat", [True, False], ids=["flash", "sdpa"])
def test_what_fills_an_image_up_has_no_voice(flat: bool) -> None:
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    got = capture._column_mean(query, key, None, mask if flat else mask[:, None, None])
    alone = capture._column_mean(query[1:, :, :4], key[1:, :, :4], None, None)
    torch.testing.assert_close(got[1:, :4], alone)
    torch.testing.assert_close(got[:1], capture._column_mean(query[:1], key[:1], None, None))


# -- what images are


def tokens(report: foveate.Report) -> list[int]:
    return [image.tokens for image in report.images]


def test_internvl_images_are_runs_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("internvl", "sdpa"), batch("internvl", (1, 2))
    evidences = see(model, peek(0, "coordinates"), inputs, monkeypatch)
    assert [evidence.crops for evidence in evidences] == [(9,) * 3, (9,), (9,) * 4]
    assert [evidence.grid for evidence in evidences] == [(3, 3, 3), (1, 3, 3), (4, 3, 3)]
    assert [evidence.thumbnail for evidence in evidences] == [2, None, 3]
    with foveate.compress(model, "evocut:keep=0.35") as handle, torch.no_grad():
        model(**inputs)
    for image in handle.report.images:  # every tile has its share
        counts = torch.tensor(image.kept).div(9, rounding_mode="floor").bincount()
        assert counts.max() - counts.min() <= 1 and len(counts) == image.tokens // 9
    frames = torch.cat([torch.tensor([[1, 5]]), *[torch.tensor([[60 + f, *[IMAGE] * 9]]) for f in range(4)]], 1)
    video = {"input_ids": torch.cat([frames, torch.tensor([[7, 8]])], 1), "pixel_values": torch.randn(4, 3, 24, 24)}
    with foveate.compress(model, "random:keep=2") as handle, torch.no_grad():
        model(**video)
    assert tokens(handle.report) == [9] * 4 and handle.report.kept == 8


def test_internvl_refuses_runs_that_are_no_tiles() -> None:
    model, inputs = model_of("internvl", "sdpa"), batch("internvl", (1,))
    ids = inputs["input_ids"].clone()
    (first, second), start = ids[0, -2:].tolist(), (ids[0] == IMAGE).nonzero()[3, 0]
    ids[0] = torch.cat([ids[0, :start], torch.tensor([first, second]), ids[0, start:-2]])
    with foveate.compress(model, "random:keep=2"), pytest.raises(foveate.UnsupportedCall, match="runs of 3, 24"):
        model(**{**inputs, "input_ids": ids})


@pytest.mark.parametrize("name", [*filter(reads, ["idefics3", "smolvlm"])])
def test_every_tile_is_an_image_and_empty_slots_are_none(name: str) -> None:
    model, inputs = model_of(name, "sdpa"), batch(name, (1, 2, 0))
    slots = inputs["pixel_values"].flatten(0, 1).flatten(1)
    with foveate.compress(model, "grid:keep=2") as handle, torch.no_grad():
        model(**inputs)
    assert len(slots) > slots.any(1).sum() == len(handle.report.images) == 7
    assert tokens(handle.report) == [9] * 7
    assert [image.row for image in handle.report.images] == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.skipif(not reads("gemma4", "video"), reason="transformers is too old for videos of gemma4")
def test_gemma4_frames_share_the_budget_of_their_video(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("gemma4", "sdpa"), inputs_of("gemma4", "video")
    evidences = see(model, peek(0, "coordinates"), inputs, monkeypatch)
    assert [(e.grid, e.crops) for e in evidences] == [((8, 2, 2), (4,) * 8)] * 3
    with foveate.compress(model, "random:keep=5") as handle, torch.no_grad():
        model(**inputs)
    assert [image.n_kept for image in handle.report.images] == [5] * 3


def test_mistral3_images_keep_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    evidences = see(model_of("mistral3", "sdpa"), peek(0, "coordinates"), batch("mistral3", (1, 2)), monkeypatch)
    assert [evidence.grid for evidence in evidences] == [(1, 4, 4), (1, 2, 6), (1, 4, 3)]


# -- dropped equals masked


def compare(model: Any, inputs: Any, method: Any, new: int = 5, **options: Any) -> tuple[float, Any]:
    """Largest logit difference between dropped and masked over the new tokens, and the report."""
    settings = {**GREEDY, "max_new_tokens": new, "suppress_tokens": placeholders(model), **options}
    with foveate.compress(model, method) as handle:
        output = model.generate(**inputs, **settings)
    sequences, report = output.sequences[:, :-1], handle.report
    reference = reference_logits(model, inputs, sequences, kept(report), handle.positions, window="packed")[:, -new:]
    if "num_beams" in options:
        chosen = reference.log_softmax(-1).gather(2, output.sequences[:, -new:, None])[..., 0]
        return float((chosen.mean(1) - output.sequences_scores).abs().max()), report
    return float((torch.stack(output.logits, 1) - reference).abs().max()), report


def kept(report: foveate.Report) -> list[list[tuple[int, tuple[int, ...]]]]:
    return [[(site, i.after(site)) for site in sorted({s.site for s in i.stages})] for i in report.images]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["internvl", "gemma3", "paligemma"])
def test_beams_with_another_count_for_each_image(name: str, impl: str) -> None:
    """Features of these are one tensor, in which transformers expects images of equal size."""
    method = Coin(positions="original", share=0.6)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    difference, report = compare(model_of(name, impl), inputs_of(name, "image"), method, **options)
    assert len({image.n_kept for image in report.images}) > 1
    assert difference <= 1e-4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("window", "spec"),
    [(6, "v2drop:stages=1@0.5/5@0"), (24, "v2drop:stages=3@0.4/4@0.5"), (24, "evocut:keep=5 + v2drop:stages=3@0.5")],
)
def test_gemma3_drops_before_its_first_full_layer(window: int, spec: str, impl: str) -> None:
    config = copy.deepcopy(model_of("gemma3", impl).config)
    config.text_config.layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    config.text_config.sliding_window = window
    torch.manual_seed(0)
    model = vivid(AutoModelForImageTextToText.from_config(config, attn_implementation=impl).eval())
    difference, _ = compare(model, batch("gemma3", (0, 1, 2)), spec, new=16)
    assert difference <= 1e-4
    assert foveate.verify(model, spec, new_tokens=2).ok


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [(1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_a_static_window_that_the_survivors_do_not_fill(name: str, rows: tuple[int, ...], impl: str) -> None:
    inputs = batch(name, rows)
    assert inputs["input_ids"].shape[1] > model_of(name, impl).config.text_config.sliding_window
    options = {"new": 8, "cache_implementation": "static"}
    difference, report = compare(model_of(name, impl), inputs, "v2drop:stages=1@0.4/3@0", **options)
    assert difference <= 1e-4 and report.images


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spec", ["evocut:keep=0.4", "todre:keep=5,exit=none", "adav:keep=5", "random:keep=3"])
def test_gemma4_with_shared_keys_drops_before_the_llm(spec: str, impl: str) -> None:
    difference, report = measure("gemma4_shared", "image", spec, impl)
    assert difference <= 1e-4 and report.kept < report.tokens


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_gaps_in_positions_are_no_new_prompts(name: str, impl: str) -> None:
    """Without a cache, a mask and padding, transformers looks for packed prompts; some models do before the decoder."""
    spec = "random:keep=4,positions=original + v2drop:stages=2@0.5"
    difference, _ = compare(model_of(name, impl), batch(name, (1,)), spec, use_cache=False)
    assert difference <= 1e-4


@pytest.mark.parametrize("spec", ["evocut:keep=1.0", "v2drop:stages=2@1.0", "adav:keep=1.0,positions=original"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_keeping_everything_changes_no_bit(name: str, kind: str, spec: str) -> None:
    model, inputs = model_of(name, "sdpa"), inputs_of(name, kind)
    settings = {**GREEDY, "max_new_tokens": 3, "suppress_tokens": placeholders(model)}
    with torch.no_grad():
        plain, read = model.generate(**inputs, **settings), model(**inputs).logits
        with foveate.compress(model, spec):
            output, again = model.generate(**inputs, **settings), model(**inputs).logits
    assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits)) and torch.equal(read, again)


@pytest.mark.parametrize("spec", ["evocut:keep=0.4", "random:keep=3,positions=original + v2drop:stages=2@0.5"])
@pytest.mark.parametrize("name", FAMILIES)
def test_verify_agrees(name: str, spec: str) -> None:
    outcome = foveate.verify(model_of(name, "sdpa"), spec, new_tokens=3)
    assert outcome.difference <= 1e-4 < 1e-2 < outcome.effect, str(outcome)


# -- inside the LLM


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("site", [1, 3, 4])
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "paligemma", "mistral3"])
def test_relevance_is_the_models_own_attention(
    name: str, site: int, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where images see themselves in both directions, and where layers see a window only."""
    inputs = inputs_of(name, "image")
    evidences = see(model_of(name, impl), peek(site, "relevance", "text_mass", together=True), inputs, monkeypatch)
    with torch.no_grad():
        maps = model_of(name, "eager")(**inputs, output_attentions=True).attentions[site - 1].mean(1)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    rows = [row for row in range(len(ids)) if (ids[row] == IMAGE).any()]
    for evidence, row in zip(evidences, rows, strict=True):
        visual = (ids[row] == IMAGE).nonzero()[:, 0]
        end = visual[len(encoded(name, "image", one_row(name, inputs, row)).pooler_output[0]) - 1]
        text = (real[row] & (ids[row] != IMAGE)).nonzero()[:, 0]
        text = text[text > end]  # what follows the first image
        assert (evidence.require("relevance") - maps[row][text][:, visual]).abs().max() <= 5e-6
        assert (evidence.require("text_mass") - maps[row][visual][:, text].sum(1)).abs().max() <= 5e-6


# -- PaliGemma counts from 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("positions", ["original", "packed"])
def test_paligemma_positions_at_both_doors(positions: str, impl: str) -> None:
    model, inputs = model_of("paligemma", impl), inputs_of("paligemma", "image")
    spec, ids = f"random:keep=5,positions={positions}", inputs["input_ids"]
    counted = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    settings = {**GREEDY, "max_new_tokens": 2, "suppress_tokens": placeholders(model)}
    with foveate.compress(model, spec) as handle, torch.no_grad():
        read = model(**inputs, use_cache=True)
        stages = kept(handle.report)
        made = model.generate(**inputs, **settings)
        if positions == "original":  # each door takes what it counts itself
            assert torch.equal(model(**inputs, position_ids=counted + 1).logits, read.logits)
            again = model.generate(**inputs, **settings, position_ids=counted)
            assert torch.equal(torch.stack(again.logits), torch.stack(made.logits))
        whole = torch.cat([made.sequences, torch.tensor([[9], [8], [7]])], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
        prompt, cache = ids.shape[1], copy.deepcopy(read.past_key_values)  # each door goes on where either stopped
        turns = [
            model(input_ids=whole[:, prompt:], attention_mask=mask, past_key_values=cache).logits[:, -1],
            model(input_ids=whole[:, prompt + 1 :], attention_mask=mask, past_key_values=made.past_key_values).logits[
                :, -1
            ],
            model.generate(whole, attention_mask=mask, past_key_values=read.past_key_values, **settings).logits[0],
        ]
    reference = reference_logits(model, inputs, whole, stages, handle.positions)
    got = [read.logits[:, -1], made.logits[1], *turns]
    for logits, place in zip(got, (prompt - 1, prompt, -1, -1, -1), strict=True):
        assert (logits - reference[:, place]).abs().max() <= 1e-4


# -- refusals


@pytest.mark.parametrize("spec", ["v2drop:stages=2@0.5", "todre:keep=0.5", "random:keep=3 + v2drop:stages=2@0.5"])
def test_gemma4_with_shared_keys_lets_nothing_leave_inside(spec: str) -> None:
    with pytest.raises(foveate.UnsupportedModel, match=r"last 2 layers of this gemma4 read keys") as error:
        foveate.compress(model_of("gemma4_shared", "sdpa"), spec)
    assert "hint: use a method that selects before the LLM" in str(error.value)


def test_gemma3n_is_refused_by_name() -> None:
    class Config:
        model_type = "gemma3n"

    class Model:
        config = Config()

    with pytest.raises(foveate.UnsupportedModel, match="gemma3n is not served: between its layers every token has"):
        foveate.compress(Model(), "random:keep=3")


def test_internvl_needs_its_cls_token_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("internvl")
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(foveate.UnsupportedModel, match="makes the CLS token a part of the picture"):
        foveate.compress(model, "random:keep=3")


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "paligemma"])
def test_flex_masks_of_blocks_cannot_be_cut(name: str) -> None:
    model = tiny(name)
    model.set_attn_implementation("flex_attention")
    foveate.compress(model, "random:keep=3").remove()
    with pytest.raises(foveate.UnsupportedModel, match="flex attention hides from view"):
        foveate.compress(model, "v2drop:stages=2@0.5")


def test_capped_attention_gives_no_relevance() -> None:
    model = tiny("paligemma")
    model.config.text_config.attn_logit_softcapping = 50.0
    with pytest.raises(foveate.UnsupportedMethod, match="needs relevance, text_mass"):
        foveate.compress(model, "todre:keep=0.5")
    foveate.compress(model, "todre:keep=0.5,exit=none").remove()
