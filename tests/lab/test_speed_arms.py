"""What the arms of the speed lab do: the same work, only shorter; watched without being changed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import foveate
from foveate.errors import UnsupportedMethod
from foveate.lab.shapes import SHAPES, Llava, build, inputs
from foveate.lab.speed.arms import Arms
from foveate.lab.speed.operations import Operations
from foveate.lab.speed.plan import Plan, with_budget
from foveate.lab.speed.work import Work
from tests.zoo.inputs import batch
from tests.zoo.models import NAMES, tiny

SMALL = ["tiny", "tiny-next", "tiny-qwen"]

every_shape = pytest.mark.parametrize("name", SMALL)


def work(name: str = "tiny", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Work:
    shape = SHAPES[name]
    return Work.of(build(shape, dtype, attention, 0), inputs(shape, dtype, 0))


def quiet(line: str) -> None:
    """Say nothing."""


@every_shape
def test_a_shape_makes_the_tokens_it_says(name: str) -> None:
    it, shape = work(name), SHAPES[name]
    assert (it.tokens, it.prompt) == (shape.tokens, shape.text + shape.placeholders)
    with torch.no_grad():
        logits = it.model(**it.inputs).logits
    assert bool(logits.isfinite().all()) and logits.std() > 0.05
    weights = [layer.mlp.down_proj.weight for layer in it.family.layers(it.model)]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])


@every_shape
@pytest.mark.parametrize("size", [1, 3])
def test_the_ideal_reads_what_random_kept(name: str, size: int) -> None:
    """The same tokens, and nothing of the engine: the same answers, at every step."""
    arms = Arms(work(name), 2)
    ideal, (plumbed, _, _) = arms.ideal(9, size), arms.method("random:keep=9", size)
    assert ideal.answer == plumbed.answer and len(ideal.answer) == size
    assert ideal.select == 0.0 and len(ideal.steps) == 2
    ready = arms.ready(9, size)
    assert ready.arguments["input_ids"].shape == (size, arms.work.prompt - arms.work.tokens + 9)
    assert "generate" not in vars(arms.work.model)


def test_the_ideal_answers_with_the_tokens_it_is_given() -> None:
    arms = Arms(work(), 0)
    answers = set()
    for keep in range(1, 30, 4):
        sample = arms.ideal(keep, 1)
        assert sample.answer == arms.method(f"random:keep={keep}", 1)[0].answer
        answers.add(sample.answer)
    assert len(answers) > 1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mllama"])
def test_every_family_has_an_ideal_and_batches(name: str) -> None:
    arms = Arms(Work.of(tiny(name), dict(batch(name, rows=(1,)))), 1)
    assert arms.full(2).answer == arms.full(1).answer * 2
    for size in (1, 2):
        assert arms.ideal(3, size).answer == arms.method("random:keep=3", size)[0].answer


def test_a_picture_that_is_several_images_has_a_budget_for_each() -> None:
    arms = Arms(Work.of(tiny("idefics3"), dict(batch("idefics3", rows=(1,)))), 0)
    assert arms.work.sizes == (9, 9, 9)
    plan = Plan.make(arms, ["grid", "v2drop:keep=0.5"], 3, quiet)
    assert plan.entrants["grid:keep=3"].mean == 9 and plan.kept(3) == 9
    assert plan.ideals == {"ideal": 3, "ideal:keep=5": 5}  # half of nine


def test_where_text_looks_across_there_is_no_ideal() -> None:
    model, picture = tiny("mllama"), batch("mllama", rows=(1,))
    arms = Arms(Work.of(model, dict(picture)), 1)
    with pytest.raises(UnsupportedMethod, match="looks across"):
        arms.ideal(4, 1)
    plan = Plan.make(arms, ["grid"], 4, quiet)
    assert plan.ideals == {} and "looks across" in plan.refused["ideal"]
    assert set(plan.entrants) == {"grid:keep=4", "random:keep=4"}


@pytest.mark.parametrize("spec", ["v2drop:keep=12", "fastv:keep=12", "dart:keep=12", "pyramiddrop:keep=12"])
def test_the_model_cut_by_hand_computes_what_the_method_does(spec: str) -> None:
    arms = Arms(work(), 2)
    sample, handle, _ = arms.method(spec, 1)
    cut = arms.hand_cut(arms.columns(handle))
    assert cut.answer == sample.answer and len(cut.steps) == 2
    assert arms.hand_cut({1: torch.arange(9)}).answer != sample.answer  # what is cut matters


@every_shape
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_watching_changes_nothing_and_leaves_nothing(name: str, attention: str) -> None:
    it = work(name, attention)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in it.model.modules()]
    plain = it.model.generate(**it.inputs, max_new_tokens=1, do_sample=False)[:, -1].tolist()
    arms = Arms(it, 1)
    full = arms.full(1)
    assert list(full.answer) == plain
    for spec in ("evocut:keep=9", "fastv:keep=20", "visionzip:keep=9"):
        with foveate.compress(it.model, spec):
            alone = it.model.generate(**it.inputs, max_new_tokens=1, do_sample=False)[:, -1].tolist()
        sample, _, _ = arms.method(spec, 1)
        assert list(sample.answer) == alone
        assert sample.evidence > full.evidence  # folds and taps are seen, with either attention
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in it.model.modules()] == hooks
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
    assert not any(name in vars(it.family.base(it.model)) for name in ("get_image_features", "forward"))


@every_shape
def test_operations_by_formula_are_those_that_torch_counts(name: str) -> None:
    it = work(name, "eager")
    layers = len(it.family.layers(it.model))
    counted = Operations.of(it)
    assert counted is not None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        it.model(**it.inputs, logits_to_keep=1)
    formula = counted.first_token_gflop([it.tokens] * layers)
    assert formula == pytest.approx(counter.get_total_flops() / 1e9, rel=0.02)  # windows at a border are smaller
    shape = SHAPES[name]
    if isinstance(shape, Llava):
        assert formula == pytest.approx(shape.first_token_gflop(it.tokens), rel=1e-9)


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl_moe", "video_llava", "kimi_k25"])
def test_operations_of_tiles_experts_two_towers_and_latent_heads(name: str) -> None:
    model = tiny(name, "eager")
    model.set_experts_implementation("eager")  # torch does not count the grouped kernel
    it = Work.of(model, dict(batch(name, rows=(1,))))
    counted = Operations.of(it)
    assert counted is not None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**it.inputs, logits_to_keep=1)
    formula = counted.first_token_gflop([it.tokens] * len(it.family.layers(model)))
    assert formula == pytest.approx(counter.get_total_flops() / 1e9, rel=0.05)


def test_formulas_are_not_for_recurrent_layers() -> None:
    assert Operations.of(Work.of(tiny("qwen3_5"), dict(batch("qwen3_5", rows=(1,))))) is None


@every_shape
def test_keys_and_values_by_formula_are_those_in_the_cache(name: str) -> None:
    it = work(name, dtype=torch.bfloat16)
    counted = Operations.of(it)
    assert counted is not None
    for spec in ("grid:keep=9", "v2drop:keep=30"):
        with foveate.compress(it.model, spec) as handle:
            options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
            cache = it.model.generate(**it.inputs, **options).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert counted.kv_mib(handle.report.images[0].alive) == pytest.approx(held / 2**20)


@pytest.mark.parametrize(
    ("spec", "whole"),
    [
        ("evocut", "evocut:keep=9"),
        ("todre:exit=none", "todre:keep=9,exit=none"),
        ("evocut:keep=5", "evocut:keep=5"),
        ("v2drop:stages=2@0.5", "v2drop:stages=2@0.5"),
        ("evocut:keep=12 + v2drop:keep=5", "evocut:keep=12 + v2drop:keep=5"),
    ],
)
def test_a_budget_is_added_where_there_is_none(spec: str, whole: str) -> None:
    assert with_budget(spec, 9) == whole
