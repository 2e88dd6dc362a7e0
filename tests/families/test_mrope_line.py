"""Qwen-VL and GLM-V: merged units, windows, deepstack, positions in three axes, videos by frame."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import foveate
from foveate.families import family_of
from foveate.families.releases import CHUNKS, older_than
from tests.engine.probes import Coin, peek, watch
from tests.families.matrix import model_of
from tests.zoo.inputs import Batch, batch, mixed, one_row
from tests.zoo.items import items
from tests.zoo.models import GREEDY, MIXED, placeholders, tiny
from tests.zoo.reference import reference_logits

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v")
TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")  # those with code of their own
FLASH = "flash_attention_2"
TOLERANCE = 1e-4

READS = [(name, kind) for name in TOWERS for kind in ("image", "video", "both") if kind != "both" or name in MIXED]


def read(name: str, kind: str, rows: tuple[int, ...] = (1, 2)) -> Batch:
    return mixed(name) if kind == "both" else batch(name, rows, video=kind == "video")


def options(model: Any, new: int = 4) -> dict[str, Any]:
    return {**GREEDY, "max_new_tokens": new, "suppress_tokens": placeholders(model)}


def kept_of(report: foveate.Report) -> list[list[tuple[int, tuple[int, ...]]]]:
    """What stayed of each image and video, as the reference is told."""
    sites = [sorted({stage.site for stage in image.stages}) for image in report.images]
    return [[(site, image.after(site)) for site in each] for each, image in zip(sites, report.images, strict=True)]


def columns_of(model: Any, inputs: Batch, report: foveate.Report) -> list[Tensor]:
    """For each prompt the columns of its tokens that entered the LLM."""
    stays = inputs["attention_mask"].bool().clone()
    for item, image in zip(items(model, inputs), report.images, strict=True):
        stays[item.row, item.columns] = False
        stays[item.row, item.columns[list(image.kept)]] = True
    return [row.nonzero()[:, 0] for row in stays]


# -- what lies under a token


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in TOWERS for kind in ("image", "video")])
def test_patches_under_a_token_are_those_it_is_made_of(name: str, kind: str) -> None:
    """The gradient of each token reaches just the rows of the last block that the family names."""
    model, leaves = model_of(name, "sdpa"), []
    family = family_of(model)
    inputs: Any = batch(name, (2,), video=True)
    if kind == "image":  # of sizes that windows do not divide
        inputs, _ = family.example(model, 2, torch.Generator().manual_seed(0))

    def cut(module: Any, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    last = family.encoder_layers(model, kind)[-1].register_forward_hook(cut)
    output, _ = family.encode(model, kind, inputs)
    last.remove()
    pictures = family.pictures(model, kind, output, inputs)
    for picture in pictures:
        assert picture.patches.shape == (len(picture.rows), 4)
        for row, patches in zip(picture.rows, picture.patches, strict=True):
            (gradient,) = torch.autograd.grad(row.square().sum(), leaves, retain_graph=True)
            assert gradient.any(1).nonzero()[:, 0].tolist() == sorted(patches.tolist())
    every = torch.cat([picture.patches.flatten() for picture in pictures])
    assert torch.equal(every.sort().values, torch.arange(len(leaves[0])))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in TOWERS for kind in ("image", "video")])
def test_a_patch_moves_the_evidence_of_its_token(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, seen = model_of(name, "sdpa"), read(name, kind), watch(monkeypatch)
    block = family_of(model).encoder_layers(model, kind)[-1]

    def see(row: int | None) -> tuple[Tensor, Tensor]:
        def shift(module: Any, args: Any, output: Tensor) -> Tensor | None:
            return None if row is None else output.index_add(0, torch.tensor([row]), torch.ones(1, output.shape[1]))

        hook = block.register_forward_hook(shift)
        with foveate.compress(model, peek(0, "encoder_fold")):
            model.generate(**inputs, **options(model, 1))
        hook.remove()
        folds, features = ([getattr(e, name) for e in seen["peek", 0]] for name in ("encoder_fold", "features"))
        return torch.cat(folds), torch.cat(features)

    fold, features = see(None)
    for row in (5, 18, 117, 4 * len(fold) - 1):
        moved, other = see(row)
        changed = (moved != fold).nonzero()[:, 0].tolist()
        assert len(changed) == 1
        assert changed == (other != features).any(1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in TOWERS for kind in ("image", "video")])
def test_saliency_is_the_column_mean_of_each_segment(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, seen = model_of(name, "eager"), read(name, kind), watch(monkeypatch)
    family, calls = family_of(model), []
    last = family.encoder_attention(family.encoder_layers(model, kind)[-1])
    code = sys.modules[type(last).__module__]
    original = code.eager_attention_forward

    def eager(module: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = original(module, *args, **kwargs)
        if module.__dict__.get("_module") is last:
            calls.append(weights)
        return output, weights

    monkeypatch.setattr(code, "eager_attention_forward", eager)
    with foveate.compress(model, peek(0, "encoder_saliency")):
        model.generate(**inputs, **options(model, 1))
    segments = [len(weights[0, 0]) for weights in calls]
    assert segments == family.segments(model, kind, inputs, torch.empty(0))
    assert segments == [int(h * w) for t, h, w in inputs[f"{kind}_grid_thw"] for _ in range(t)]
    received = torch.cat([weights[0].mean((0, 1)) for weights in calls])
    output, _ = family.encode(model, kind, inputs)
    for picture, evidence in zip(family.pictures(model, kind, output, inputs), seen["peek", 0], strict=True):
        torch.testing.assert_close(evidence.encoder_saliency, received[picture.patches].mean(1))


@pytest.mark.parametrize(("name", "kind"), [("qwen2_vl", "image"), ("qwen2_5_vl", "image"), ("glm4v", "video")])
def test_under_flash_the_tower_shows_the_same(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash kernels get all segments in one call, with their borders."""
    model, inputs, seen, borders = tiny(name), read(name, kind), watch(monkeypatch), []
    needs = ("encoder_fold", "encoder_saliency", "encoder_keys")

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        borders.append(kwargs["cu_seq_lens_q"].tolist())
        part = torch.bucketize(torch.arange(query.shape[2]), kwargs["cu_seq_lens_q"][1:], right=True)
        scores = (query @ key.transpose(2, 3) * kwargs["scaling"]).masked_fill(part != part[:, None], float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    def evidence() -> list[Any]:
        with foveate.compress(model, peek(0, *needs)):
            model.generate(**inputs, **options(model, 1))
        return seen["peek", 0]

    plain = evidence()
    monkeypatch.setitem(AttentionInterface._global_mapping, FLASH, kernel)
    model.config.vision_config._attn_implementation_internal = FLASH
    for one, other in zip(plain, evidence(), strict=True):
        for need in needs:
            torch.testing.assert_close(getattr(one, need), getattr(other, need), rtol=1e-4, atol=1e-5)
    grids = inputs[f"{kind}_grid_thw"]
    whole = [0, *torch.tensor([h * w for t, h, w in grids for _ in range(t)]).cumsum(0).tolist()]
    assert len(borders) == len(family_of(model).encoder_layers(model, kind)) and borders[-1] == whole
    assert (borders[0] != whole) == (name == "qwen2_5_vl"), "windows"


# -- positions


class Positions:
    """What the language model is told of positions, call by call."""

    def __init__(self, model: Any) -> None:
        self.calls: list[Tensor] = []
        self._hook = model.model.language_model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls.append(kwargs["position_ids"][-3:])

    def __enter__(self) -> Positions:
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()


def own_loop(model: Any, inputs: Batch, words: list[int], masked: bool) -> list[Tensor]:
    """Feed one word after another by calling the model itself; return the logits of each call's last token.

    These models count positions by themselves only where they get no mask, of prompts that are not padded.
    """
    output = model(**inputs, use_cache=True)
    mask, logits = inputs["attention_mask"], [output.logits[:, -1]]
    for word in words:
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        given = {"attention_mask": mask} if masked else {}
        output = model(input_ids=torch.full((len(mask), 1), word), past_key_values=output.past_key_values, **given)
        logits.append(output.logits[:, -1])
    return logits


@pytest.mark.parametrize("door", ["generate", "model", "base"])
@pytest.mark.parametrize(("name", "kind"), READS)
@torch.no_grad()
def test_what_stays_keeps_its_position(name: str, kind: str, door: str) -> None:
    model, inputs = model_of(name, "sdpa"), read(name, kind)

    def call() -> list[Tensor]:
        with Positions(model) as positions:
            if door == "generate":
                model.generate(**inputs, **options(model, 3))
            else:
                (model if door == "model" else model.model)(**inputs)
        return positions.calls

    plain = call()
    with foveate.compress(model, "random:keep=3") as handle:
        short = call()
    assert handle.positions == "original" and handle.report.kept < handle.report.tokens
    assert len(plain) == len(short) == (3 if door == "generate" else 1)
    for row, columns in enumerate(columns_of(model, inputs, handle.report)):
        wanted = plain[0][:, row, columns]
        assert torch.equal(short[0][:, row, -len(columns) :], wanted)
        assert bool((wanted[0] != wanted[1]).any()), "the axes differ"
    for later, wanted in zip(short[1:], plain[1:], strict=True):
        assert torch.equal(later, wanted)


@pytest.mark.parametrize(("name", "kind"), READS)
@torch.no_grad()
def test_later_calls_count_on_as_without_compression(name: str, kind: str) -> None:
    """Loops of one's own, one token at a time, and a second turn on the same cache.

    The videos of qwen2_5_vl reach further in time than the text behind them: later calls count on from their end.
    """
    model, inputs, words = model_of(name, "sdpa"), one_row(name, read(name, kind), 1), torch.tensor([[44, 45, 46]])
    settings = {**options(model, 2), "output_logits": False}

    def calls() -> list[Tensor]:
        with Positions(model) as positions:
            own_loop(model, inputs, [44, 45], masked=False)
            first = model.generate(**inputs, **settings)
            ids = torch.cat([first.sequences, words], 1)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
            model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **settings)
        return positions.calls

    plain = calls()
    with foveate.compress(model, "random:keep=3"):
        short = calls()
    assert [c.shape[-1] for c in plain[1:3]] == [c.shape[-1] for c in short[1:3]] == [1, 1]
    assert plain[5].shape[-1] == short[5].shape[-1] == 4, "a second turn reads its own words and the last one answered"
    for place in (1, 2, 5, 6):
        assert torch.equal(short[place].expand(3, -1, -1), plain[place].expand(3, -1, -1))


@pytest.mark.parametrize("spec", ["evocut:keep=0.3", "v2drop:stages=3@0.5/4@0.3", "adav:keep=5 + v2drop:stages=4@0.5"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_second_turn_on_the_same_cache(name: str, spec: str) -> None:
    model, inputs = model_of(name, "sdpa"), batch(name)
    with foveate.compress(model, spec) as handle:
        first = model.generate(**inputs, **options(model))
        ids = torch.cat([first.sequences, torch.tensor([[44, 45, 46]] * 2)], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
        cache = first.past_key_values
        out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options(model))
    wanted = reference_logits(model, inputs, out.sequences[:, :-1], kept_of(handle.report))
    assert (torch.stack(out.logits, 1) - wanted[:, -4:]).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("spec", "masked"), [("evocut:keep=0.3", True), ("evocut:keep=0.3", False), ("v2drop:stages=3@0.5/4@0.3", False)]
)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_loop_of_ones_own(name: str, spec: str, masked: bool) -> None:
    model, inputs, words = model_of(name, "sdpa"), batch(name), [44, 45, 46]
    inputs = inputs if masked else one_row(name, inputs, 1)
    with foveate.compress(model, spec) as handle:
        logits = own_loop(model, inputs, words, masked)
    sequences = torch.cat([inputs["input_ids"], torch.tensor([words] * len(logits[0]))], 1)
    wanted = reference_logits(model, inputs, sequences, kept_of(handle.report))
    assert (torch.stack(logits, 1) - wanted[:, -4:]).abs().max() <= TOLERANCE


# -- dropping


@pytest.mark.parametrize(("name", "kind"), READS)
@torch.no_grad()
def test_keeping_all_changes_nothing(name: str, kind: str) -> None:
    model, inputs = model_of(name, "sdpa"), read(name, kind)
    plain, called = model.generate(**inputs, **options(model)), model(**inputs).logits
    with foveate.compress(model, "evocut:keep=1.0"):
        same = model.generate(**inputs, **options(model))
        assert torch.equal(model(**inputs).logits, called)
    assert torch.equal(torch.stack(same.logits), torch.stack(plain.logits))


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "image") for name in NAMES), ("qwen3_vl", "both"), ("glm4v", "video")]
)
@torch.no_grad()
def test_beams_over_ragged_counts(name: str, kind: str) -> None:
    model, inputs = model_of(name, "sdpa"), read(name, kind)
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    with foveate.compress(model, Coin(share=0.4)) as handle:
        output = model.generate(**inputs, **options(model), **beams)
    assert len({image.n_kept for image in handle.report.images}) > 1, "ragged"
    logits = reference_logits(model, inputs, output.sequences[:, :-1], kept_of(handle.report))[:, -4:]
    chosen = logits.log_softmax(-1).gather(2, output.sequences[:, -4:, None])[..., 0]
    torch.testing.assert_close(chosen.mean(1), output.sequences_scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spec", ["random:keep=1,per=frame", "evocut:keep=0.5,per=frame", "adav:keep=2,per=frame"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_budget_for_each_frame(name: str, spec: str) -> None:
    model, inputs = model_of(name, "sdpa"), batch(name, (1, 2), video=True)
    with foveate.compress(model, spec) as handle:
        output = model.generate(**inputs, **options(model))
    for image in handle.report.images:
        assert (image.modality, image.grid) == ("video", (4, 2, 2))
        assert torch.tensor(image.kept).div(4, rounding_mode="floor").bincount().unique().tolist() in ([1], [2])
    wanted = reference_logits(model, inputs, output.sequences[:, :-1], kept_of(handle.report))
    assert (torch.stack(output.logits, 1) - wanted[:, -4:]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("decode", ["static", "no cache", "chunks"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
@torch.no_grad()
def test_ways_of_decoding(name: str, decode: str) -> None:
    ways = {"static": {"cache_implementation": "static"}, "no cache": {"use_cache": False}}
    model, inputs = model_of(name, "sdpa"), batch(name)
    more: dict[str, Any] = ways.get(decode, {"prefill_chunk_size": 8})
    if decode == "chunks" and older_than(CHUNKS):
        pytest.skip(f"chunks of prompts with pictures need transformers >= {CHUNKS}")
    with foveate.compress(model, "random:keep=4") as handle:
        output = model.generate(**inputs, **options(model), **more)
    wanted = reference_logits(model, inputs, output.sequences[:, :-1], kept_of(handle.report))
    assert (torch.stack(output.logits, 1) - wanted[:, -4:]).abs().max() <= TOLERANCE
