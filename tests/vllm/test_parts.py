"""The parts of the vLLM plugin that need no vLLM."""

from __future__ import annotations

import dataclasses
import importlib.util
import zlib
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import foveate
from foveate import registry
from foveate.engines import vllm
from foveate.engines.vllm import asked, places
from foveate.engines.vllm.processor import Context, Processor
from foveate.engines.vllm.tower import _by_head, _flat, _sizes
from foveate.engines.vllm.view import View
from foveate.errors import BudgetError, MissingDependency, UnknownMethod, UnsupportedCall, UnsupportedMethod
from foveate.errors import UnsupportedModel as NotServed
from foveate.families import Picture
from tests.models import IMAGE, TOKENS, one_row, tiny_inputs, tiny_llava
from tests.zoo.inputs import batch
from tests.zoo.models import tiny


@pytest.fixture(scope="module")
def view() -> View:
    return View(tiny_llava().config)


@pytest.fixture(scope="module")
def in_axes() -> View:
    return View(tiny("qwen2_5_vl").config)


# -- what is allowed


def test_a_view_has_no_weights_and_knows_the_depth(view: View) -> None:
    assert all(parameter.is_meta for parameter in view.model.parameters())
    assert (view.depth, view.token, view.positions, view.family.name) == (6, IMAGE, "packed", "llava")


@pytest.mark.parametrize("name", registry.names())
def test_every_method_is_accepted_or_refused_with_the_sentence_why(name: str, view: View) -> None:
    inside = {"dart", "fastv", "pyramiddrop", "sparsevlm", "todre", "v2drop", "vscan"}
    if name not in inside:
        method = view.accept(f"{name}:keep=0.25")
        assert view.places(TOKENS, {}, method) == TOKENS // 4
        return
    with pytest.raises(UnsupportedMethod, match="drops inside the LLM, before layer") as refused:
        view.accept(f"{name}:keep=0.8")
    assert "exit=none" in str(refused.value)


def test_the_halves_of_methods_that_act_before_the_llm_are_accepted(view: View) -> None:
    for spec in ("todre:keep=4,exit=none", "vscan:keep=4,inner=1.0", "evocut:keep=8 + cdpruner:keep=4"):
        assert view.places(TOKENS, {}, view.accept(spec)) == 4


@pytest.mark.parametrize(
    ("spec", "error", "why"),
    [
        ("prumerge:keep=8,fence=1.5", UnsupportedMethod, "reserves their places before the encoder runs"),
        ("evocut:keep=8,positions=original", UnsupportedMethod, "only packed positions"),
        ("evocut:keep=8 + v2drop:keep=6", UnsupportedMethod, "drops inside the LLM"),
        ("evocut:keep=-1", BudgetError, "at least 1 token"),
        ("evocat:keep=8", UnknownMethod, "evocat"),
    ],
)
def test_wrong_specs_are_refused(spec: str, error: type[Exception], why: str, view: View) -> None:
    with pytest.raises(error, match=why):
        view.accept(spec)


def test_positions_in_axes_are_the_original_ones(in_axes: View) -> None:
    assert in_axes.positions == "original"
    in_axes.accept("evocut:keep=4")
    with pytest.raises(UnsupportedMethod, match="only original positions"):
        in_axes.accept("evocut:keep=4,positions=packed")


def test_ranks_that_encode_different_pictures_allow_features_only() -> None:
    view = View(tiny_llava().config, split=True)
    view.accept("divprune:keep=4")
    with pytest.raises(UnsupportedMethod, match="its own share of the pictures"):
        view.accept("evocut:keep=4")


def test_a_tower_that_vllm_runs_otherwise_is_refused() -> None:
    config = AutoConfig.for_model("llava", vision_config={"model_type": "pixtral"})
    config.vision_feature_select_strategy = "full"
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    with pytest.raises(NotServed, match="pixtral"):
        View(config)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_row_breaks_always_keep_their_places(name: str) -> None:
    model, inputs = tiny(name), batch(name, rows=(1,))
    view, told = View(model.config), {"image_sizes": inputs["image_sizes"]}
    with foveate.compress(model, "grid:keep=5") as handle, torch.no_grad():
        model(**inputs)
    full = int((inputs["input_ids"] == model.config.image_token_id).sum())
    left = full - (handle.report.prompt_tokens[0] - handle.report.prompt_tokens_after[0])
    assert view.places(full, told, view.accept("grid:keep=5")) == left > 5


# -- what is asked


def test_what_is_asked_is_what_the_transformers_engine_reads() -> None:
    inputs = one_row(tiny_inputs(), 2)
    ids = inputs["input_ids"][0].tolist()
    short = [word for i, word in enumerate(ids) if word != IMAGE or ids[i - 1] != IMAGE]
    model, seen = tiny_llava(), []

    class Spy(registry.get("random")):  # type: ignore[misc]
        name = "spy"
        needs = frozenset({"seed", "text", "coordinates"})

        def select(self, evidence: Any, site: int) -> Any:
            seen.append(evidence)
            return foveate.Grid(keep=4).select(evidence, site)

    method = dataclasses.make_dataclass("Spy", [], bases=(Spy,), frozen=True)(keep=4)
    with foveate.compress(model, method), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("foveate.selection._vmapped", lambda m, group, site: [m.select(each, site) for each in group])
        model(**inputs)
    made = asked.ask(method, short, IMAGE, 2, None)
    embed = model.get_input_embeddings()
    for each, evidence in zip(made, seen, strict=True):
        torch.testing.assert_close(embed(torch.tensor(each.text)), evidence.text)
    assert made[0].seed == int(seen[0].seed) and made[0].seed != made[1].seed


def test_only_what_a_method_reads_is_part_of_a_picture() -> None:
    prompt, other = [1, IMAGE, 5, 6], [1, IMAGE, 7]
    blind, reads, draws = (registry.from_spec(f"{name}:keep=4") for name in ("evocut", "cdpruner", "random"))
    assert asked.ask(blind, prompt, IMAGE, 1, None) == asked.ask(blind, other, IMAGE, 1, None)
    assert asked.ask(reads, prompt, IMAGE, 1, None) != asked.ask(reads, other, IMAGE, 1, None)
    assert asked.ask(reads, prompt, IMAGE, 1, [9]) == asked.ask(reads, other, IMAGE, 1, [9])
    assert asked.ask(draws, prompt, IMAGE, 1, None) != asked.ask(draws, other, IMAGE, 1, None)
    assert asked.ask(blind, prompt, IMAGE, 1, None) != asked.ask(reads, prompt, IMAGE, 1, None)
    (one,) = asked.ask(draws, prompt, IMAGE, 1, None)
    assert one.seed == zlib.crc32(np.array([1, 5, 6], dtype=np.int64).tobytes(), 1)


def test_what_is_asked_travels_as_tensors() -> None:
    first, second = asked.Asked("evocut:keep=4"), asked.Asked("cdpruner:keep=4", (5, 6, 7), 2**32 - 1)
    fields: dict[str, Any] = dict(zip(asked.FIELDS, zip(first.tensors(), second.tensors(), strict=True), strict=True))
    fields["pixel_values"] = None
    assert asked.take(fields) == [first, second]
    assert list(fields) == ["pixel_values"] and asked.take(fields) == []


# -- what requests say; vLLM's own classes are stood in for by small ones


class Merging:
    """As vLLM's context: a request's options over the server's."""

    server: ClassVar[dict[str, Any]] = {"foveate": "evocut:keep=4", "crop": True}

    def get_merged_mm_kwargs(self, kwargs: dict[str, Any], **options: Any) -> dict[str, Any]:
        return self.server | kwargs


class Hiding(Context, Merging):
    pass


def test_processors_of_transformers_never_see_our_options() -> None:
    context = Hiding()
    assert context.get_merged_mm_kwargs({"foveate_question": "what?", "foveate_asked": []}) == {"crop": True}
    assert context.ours({}) == ("evocut:keep=4", None)
    assert context.ours({"foveate": "grid:keep=2", "foveate_question": "what?"}) == ("grid:keep=2", "what?")


class Plain:
    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Any:
        return inputs


class Reading(Processor, Plain):
    pass


def test_pictures_from_the_cache_take_their_questions_along() -> None:
    kwargs = {"crop": True, asked.ASKED: ["first", "second", "third"]}
    rest = Reading()._get_cache_missing_processor_kwargs(kwargs, {"image": [True, False, True]})
    assert rest == {"crop": True, asked.ASKED: ["second"]}


def test_no_method_and_no_spec_are_refused() -> None:
    with pytest.raises(UnsupportedCall, match="neither the server nor the request"):
        Reading()._spec(None)
    with pytest.raises(BudgetError, match="written as a spec"):
        Reading()._spec({"keep": 4})


# -- positions in three axes


def test_places_survive_every_floating_type() -> None:
    where = torch.tensor([[0, 0, 0], [3, 255, 256], [65535, 257, 12345]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rows = torch.randn(3, 8).to(dtype)
        got, found = places.split_places(places.with_places(rows, where))
        assert torch.equal(got, rows) and torch.equal(found, where)


@pytest.mark.parametrize("name", ["qwen2_5_vl"])
def test_positions_of_whole_pictures_are_those_of_transformers(name: str) -> None:
    model, inputs = tiny(name), batch(name, rows=(2,))
    ids, side = inputs["input_ids"][0], model.config.vision_config.spatial_merge_size
    visual = ids == model.config.image_token_id
    starts = (visual & ~visual.roll(1)).nonzero()[:, 0].tolist()
    grids = [(t, h // side, w // side) for t, h, w in inputs["image_grid_thw"].tolist()]
    pictures = [(start, t * h * w, (t, h, w)) for start, (t, h, w) in zip(starts, grids, strict=True)]
    wanted = model._prepare_position_ids_for_generation(ids[None], inputs)[-3:, 0]
    got, after = places.count(len(ids), pictures)
    assert torch.equal(got, wanted) and after == int(wanted[:, -1].max()) + 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_kept_tokens_stand_where_they_stood_however_the_prompt_is_chunked(chunk: int) -> None:
    grids, lead = [(1, 3, 4), (1, 5, 2)], 2
    keeps = [torch.tensor([0, 5, 11]), torch.tensor([1, 8])]
    whole, _ = places.count(30, [(2, 12, grids[0]), (16, 10, grids[1])])
    stays = torch.ones(30, dtype=torch.bool)
    stays[2:14] = stays[16:26] = False
    stays[2 + keeps[0]] = stays[16 + keeps[1]] = True
    wanted, visual = whole[:, stays], torch.zeros(13, dtype=torch.bool)
    visual[[2, 3, 4, 7, 8]] = True
    full = [torch.cartesian_prod(*[torch.arange(size) for size in grid]) for grid in grids]
    where = torch.cat([each[keep] for each, keep in zip(full, keeps, strict=True)])
    positions, after = places.count(13, [(lead, 3, grids[0]), (7, 2, grids[1])])
    text = ~visual
    assert torch.equal(positions[:, text], wanted[:, text]) and after == int(whole.max()) + 1
    for start in range(0, 13, chunk):
        before, now = int(visual[:start].sum()), int(visual[start : start + chunk].sum())
        positions = places.move(positions, visual, where[before : before + now], start)
    assert torch.equal(positions, wanted)


def test_a_picture_at_the_very_beginning_counts_from_zero() -> None:
    positions, _ = places.count(4, [(0, 2, (1, 2, 2))])
    visual = torch.tensor([True, True, False, False])
    moved = places.move(positions, visual, torch.tensor([[0, 0, 1], [0, 1, 1]]), 0)
    assert moved.tolist() == [[0, 0, 2, 3], [0, 1, 2, 3], [1, 1, 2, 3]]


# -- what the tower shows


def test_packed_sequences_are_told_apart() -> None:
    assert _sizes(None, None) is None
    assert _sizes(torch.tensor([0, 4, 4, 10]), None) == [4, 6]
    assert _sizes(torch.tensor([0, 64, 160]), torch.tensor([4, 6, 0])) == [4, 6]  # borders in units of a kernel's own
    assert _by_head(torch.zeros(2, 5, 12), 4).shape == (2, 3, 5, 4) == _by_head(torch.zeros(2, 5, 3, 4), 4).shape
    assert _flat(torch.zeros(7, 1, 3)).shape == (7, 3) and _flat(torch.zeros(2, 7, 3)).shape == (2, 7, 3)


def test_names_of_weights_from_transformers_5_and_of_layers_behind() -> None:
    from types import SimpleNamespace

    from foveate.engines.vllm.models import LlavaLike

    encoder = SimpleNamespace(layers=[0, 1, 2])
    model: Any = SimpleNamespace(vision_tower=SimpleNamespace(vision_model=SimpleNamespace(encoder=encoder)))
    given = [
        "vision_tower.encoder.layers.3.mlp.fc1.bias",
        "model.vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias",
        "vision_tower.pre_layrnorm.bias",
        "language_model.model.encoder.layers.9.bias",
    ]
    names = [name for name, _ in LlavaLike._renamed(model, ((name, torch.zeros(1)) for name in given))]
    assert names == [
        "vision_tower.vision_model.encoder.behind.0.mlp.fc1.bias",
        "model.vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias",
        "vision_tower.vision_model.pre_layrnorm.bias",
        "language_model.model.encoder.layers.9.bias",
    ]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_the_plugin_says_what_to_install() -> None:
    with pytest.raises(MissingDependency, match="vllm is not installed") as missing:
        vllm.register()
    assert 'pip install "foveate[vllm]"' in str(missing.value)


def test_a_picture_of_no_rows_is_enough_to_count(view: View) -> None:
    (picture,) = view.pictures([torch.empty(TOKENS, 0)], {})
    assert isinstance(picture, Picture) and picture.grid == (1, 4, 4)
