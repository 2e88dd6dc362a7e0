"""Decoding modes: what `generate` offers beside greedy search, on models from which tokens have left."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    StaticCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    cache_utils,
)
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

import foveate
from foveate.core import Method
from foveate.engines.base import compress
from tests.engine.oracle import GREEDY, Oracle, differ, pair, vivid
from tests.engine.test_oracle import CASES, TOLERANCE
from tests.families.matrix import inputs_of, measure, model_of
from tests.models import chunked, one_row, tiny_inputs, tiny_llava
from tests.zoo import inputs as zoo
from tests.zoo.models import placeholders
from tests.zoo.reference import reference_logits

#: Before the LLM with either positions, inside it, and both.
KINDS = ["evocut", "evocut original", "v2drop to nothing", "evocut original + v2drop"]
#: Positions on three axes; windows, and pictures that see both ways.
FAMILIES = ["qwen2_5_vl", "gemma3"]
SPECS = ["evocut:keep=0.4", "v2drop:stages=3@0.5/4@0.3", "evocut:keep=0.6 + v2drop:stages=3@0.5/4@0"]

PLAIN: dict[str, Any] = {**GREEDY, "return_dict_in_generate": False, "output_logits": False}


def _differ(model: Any, oracle: Oracle, method: Method | str, positions: str, **options: Any) -> float:
    inputs = tiny_inputs()
    with compress(model, method) as handle:
        output = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 8, **options})
    return differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions))


# -- which token comes next


WARPERS = LogitsProcessorList([TemperatureLogitsWarper(1.3), TopKLogitsWarper(40), TopPLogitsWarper(0.95)])
SAMPLING = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95}


def _drawn(reference: Tensor, prompt: int, steps: int, seed: int) -> Tensor:
    """What sampling draws, step by step, from what a reference says of each next token."""
    torch.manual_seed(seed)
    scores = [WARPERS(None, reference[:, prompt - 1 + step].float()) for step in range(steps)]
    return torch.cat([torch.multinomial(each.softmax(-1), 1) for each in scores], 1)


@pytest.mark.parametrize("case", KINDS)
def test_sampling_draws_from_the_masked_models_probabilities(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    prompt, steps = inputs["input_ids"].shape[1], 12
    with compress(model, method) as handle:
        torch.manual_seed(7)
        sequences = model.generate(**inputs, **{**PLAIN, **SAMPLING}, max_new_tokens=steps)
        greedy = model.generate(**inputs, **PLAIN, max_new_tokens=steps)
    reference = oracle.logits(inputs, sequences, handle.report, positions)
    assert torch.equal(sequences[:, prompt:], _drawn(reference, prompt, steps, 7))
    assert not torch.equal(sequences, greedy)
    whole = oracle.logits(inputs, sequences)
    assert not torch.equal(sequences[:, prompt:], _drawn(whole, prompt, steps, 7)), "nothing would be noticed"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_in_other_families(name: str, spec: str) -> None:
    model, inputs = model_of(name, "sdpa"), inputs_of(name, "image")
    prompt, steps, hidden = inputs["input_ids"].shape[1], 8, placeholders(model)
    with compress(model, spec) as handle:
        torch.manual_seed(7)
        sequences = model.generate(**inputs, **{**PLAIN, **SAMPLING}, suppress_tokens=hidden, max_new_tokens=steps)
    sites = [sorted({stage.site for stage in image.stages}) for image in handle.report.images]
    kept = [[(s, image.after(s)) for s in each] for each, image in zip(sites, handle.report.images, strict=True)]
    reference = reference_logits(model, inputs, sequences[:, :-1], kept, handle.positions, window="packed")
    reference[..., hidden] = float("-inf")
    assert torch.equal(sequences[:, prompt:], _drawn(reference, prompt, steps, 7))


@pytest.mark.parametrize("case", KINDS)
def test_guidance_reads_text_beside_the_prompt(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    negative = torch.arange(60, 150).expand(3, -1)  # longer than the prompts
    options = {"guidance_scale": 1.5, "negative_prompt_ids": negative, "output_scores": True, "max_new_tokens": 4}
    with compress(model, method) as handle:
        output = model.generate(**inputs, **GREEDY, **options)
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE
    guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model, negative)
    for step, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
        ids = output.sequences[:, : inputs["input_ids"].shape[1] + step]
        torch.testing.assert_close(guide(ids, logits), scores)


def _text_model(model: Any) -> LlamaForCausalLM:
    text = LlamaForCausalLM(model.config.text_config).eval()
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    return text


#: Who proposes tokens: the prompt, a model with pictures, a model without. All agree with the model now and then.
PROPOSALS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "pictures": lambda model: {"assistant_model": copy.deepcopy(model)},
    "text": lambda model: {"assistant_model": _text_model(model)},
}


@pytest.mark.parametrize("who", PROPOSALS)
@pytest.mark.parametrize("case", KINDS)
@pytest.mark.filterwarnings("ignore:Passing `generation_config`")
def test_proposed_tokens_leave_the_greedy_answer_as_it_is(case: str, who: str) -> None:
    (model, _), inputs = pair(), one_row(tiny_inputs(), 2)
    proposing, passes = PROPOSALS[who](model), []
    with compress(model, CASES[case][0]):
        greedy = model.generate(**inputs, **PLAIN, max_new_tokens=24)
        hook = model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
        try:
            output = model.generate(**inputs, **PLAIN, **proposing, max_new_tokens=24)
        finally:
            hook.remove()
    assert torch.equal(output, greedy)
    assert len(passes) < 24, "no proposal was ever taken"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:Passing `generation_config`")
def test_proposals_in_other_families(name: str, spec: str) -> None:
    model, inputs = model_of(name, "sdpa"), zoo.one_row(name, inputs_of(name, "image"), 1)
    options = {**PLAIN, "suppress_tokens": placeholders(model), "max_new_tokens": 16}
    with compress(model, spec):
        greedy = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), greedy)
        assistant = model_of(name, "eager")
        assert torch.equal(model.generate(**inputs, **options, assistant_model=assistant), greedy)


def test_an_assistant_needs_no_handle_of_its_own() -> None:
    (model, _), inputs = pair(), one_row(tiny_inputs(), 2)
    assistant = tiny_llava(layers=2)
    refused = pytest.raises(foveate.UnsupportedCall, match="mm_encoder_outputs")
    with compress(model, "evocut:keep=5"), compress(assistant, "grid:keep=4"), refused as caught:
        model.generate(**inputs, **PLAIN, assistant_model=assistant, max_new_tokens=4)
    assert "assistant" in str(caught.value.hint)


def _look_ahead(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **options: Any) -> Tensor:
    """Of the four likeliest tokens take the one that makes its own successor surest; rows of the cache are repeated."""
    kwargs = {
        name: options[name] for name in ("attention_mask", "position_ids", "mm_encoder_outputs") if name in options
    }
    cache: Any = options["past_key_values"]
    inputs = model.prepare_inputs_for_generation(
        input_ids, past_key_values=cache, is_first_iteration=True, use_cache=True, **kwargs
    )
    logits = model(**inputs).logits[:, -1]
    for _ in range(options["generation_config"].max_new_tokens):
        tried = logits.topk(4).indices
        cache.batch_repeat_interleave(4)
        at = int(kwargs["position_ids"][0, -1]) + 1 + input_ids.shape[1] - len(inputs["input_ids"][0])
        after = model(
            input_ids=tried.reshape(-1, 1),
            past_key_values=cache,
            position_ids=torch.full((tried.numel(), 1), at),
        ).logits[:, -1]
        best = after.amax(-1).view_as(tried).argmax(-1)
        cache.batch_select_indices(torch.arange(len(best)) * 4 + best)
        input_ids = torch.cat([input_ids, tried.gather(1, best[:, None])], 1)
        logits = after.view(*tried.shape, -1)[torch.arange(len(best)), best]
    return input_ids


@pytest.mark.parametrize("case", KINDS)
def test_a_custom_loop_may_repeat_the_caches_rows(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), one_row(tiny_inputs(), 2)
    prompt = inputs["input_ids"].shape[1]
    with compress(model, method) as handle:
        ids = model.generate(**inputs, **PLAIN, custom_generate=_look_ahead, max_new_tokens=4)

    def surest(ids: Tensor) -> Tensor:
        tried = oracle.logits(inputs, ids, handle.report, positions)[0, -1].topk(4).indices
        longer = torch.cat([ids.expand(4, -1), tried[:, None]], 1)
        sure = [oracle.read(inputs, longer, i, handle.report, positions, source=0).logits[-1].max() for i in range(4)]
        return longer[torch.stack(sure).argmax()][None]

    for length in range(prompt, prompt + 4):
        assert torch.equal(surest(ids[:, :length]), ids[:, : length + 1])


# -- what holds keys and values


@pytest.mark.parametrize("case", KINDS)
def test_a_static_cache(case: str) -> None:
    assert _differ(*pair(), *CASES[case], cache_implementation="static") <= TOLERANCE


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"do_sample": True}], ids=str
)
@pytest.mark.parametrize("case", KINDS)
def test_beams_and_samples_on_a_static_cache(case: str, options: dict[str, Any]) -> None:
    (model, _), inputs, answers = pair(), tiny_inputs(), []
    options = {**PLAIN, **options, "num_return_sequences": 2, "max_new_tokens": 8}
    with compress(model, CASES[case][0]):
        for kind in ("dynamic", "static"):
            torch.manual_seed(7)
            answers.append(model.generate(**inputs, **options, cache_implementation=kind))
    assert torch.equal(*answers)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_static_cache_in_other_families(name: str, spec: str) -> None:
    assert measure(name, "image", spec, "sdpa", cache_implementation="static", max_new_tokens=6)[0] <= 1e-5


@pytest.mark.parametrize("case", KINDS)
def test_two_turns_on_a_static_cache(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    with compress(model, method) as handle:
        first = model.generate(**inputs, **GREEDY, past_key_values=cache, max_new_tokens=4)
        ids = torch.cat([first.sequences, torch.tensor([[44, 45]] * 3)], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
        output = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY, max_new_tokens=4)
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE


@chunked
@pytest.mark.parametrize("case", ["evocut", "evocut original"])
def test_a_static_cache_filled_in_chunks(case: str) -> None:
    options = {"cache_implementation": "static", "prefill_chunk_size": 7}
    assert _differ(*pair(), *CASES[case], **options) <= TOLERANCE


#: Package that quantises, and what it is told.
QUANTISED: dict[str, tuple[str | None, dict[str, Any]]] = {
    "fp8": (None, {"backend": "fp8"}),
    "quanto": ("optimum.quanto", {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}),
    "hqq": ("hqq", {"backend": "hqq", "nbits": 8, "q_group_size": 16, "residual_length": 4}),
}


@pytest.mark.parametrize("backend", QUANTISED)
def test_a_quantised_cache_is_as_exact_as_without_dropping(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.engine.oracle.DIFFERENCES", [])  # these are no rounding of ours
    (model, oracle), inputs = pair(), tiny_inputs()
    package, config = QUANTISED[backend]
    if package is not None:
        pytest.importorskip(package, reason=f"quantises with {package}")
    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers quantises nothing to fp8")
    options = {"cache_implementation": "quantized", "cache_config": config, "max_new_tokens": 8}
    plain = model.generate(**inputs, **GREEDY, **options)
    error = differ(plain.logits, oracle.logits(inputs, plain.sequences))
    assert error > TOLERANCE
    for case in KINDS:
        assert _differ(model, oracle, *CASES[case], **options) <= 2 * error


@pytest.mark.parametrize("case", KINDS)
def test_a_prefix_read_once_is_asked_twice(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), one_row(tiny_inputs(), 2)
    with compress(model, method) as handle, torch.no_grad():
        prefix = model(**inputs, past_key_values=DynamicCache()).past_key_values
        for words in ([44, 45, 46], [7]):
            ids = torch.cat([inputs["input_ids"], torch.tensor([words])], 1)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, len(words)), value=1)
            asked = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
            output = model.generate(**asked, past_key_values=copy.deepcopy(prefix), **GREEDY, max_new_tokens=5)
            assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE
        assert handle.report.calls == 1


# -- compiled


def _compiled(backend: str, *checks: str) -> dict[str, list[tuple[float, int]]]:
    options: dict[str, Any] = {"cwd": Path(__file__).parents[2], "capture_output": True, "text": True, "check": False}
    environment = {**os.environ, "PYTHONPATH": "src", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-m", "tests.engine.compiled", backend, *checks], env=environment, **options)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[tuple[float, int]]] = json.loads(done.stdout)
    return found


def test_compiled_steps_are_one_graph_for_calls_of_equal_length() -> None:
    found = _compiled("none")
    assert all(difference <= TOLERANCE for calls in found.values() for difference, _ in calls)
    graphs = {name: [count for _, count in calls] for name, calls in found.items()}
    assert graphs["decode_steps before"] == graphs["decode_steps inside"] == [1, 1, 2], "another batch, another graph"
    assert graphs["gemma3"] == [2, 2], "as without compression"
    assert graphs["qwen2_5_vl"] == [1, 1]
    assert graphs["whole_graph before"] == [2], "the prompt, and all steps after it"
    assert graphs["broken_graph inside"][0] > 0


@pytest.mark.slow
def test_compiled_code_computes_the_same() -> None:
    found = _compiled("inductor", "decode_steps inside", "whole_graph before")
    assert all(difference <= TOLERANCE for calls in found.values() for difference, _ in calls)


# -- where the weights are


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # older ones warn
def test_weights_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, oracle = pair()
    model.save_pretrained(tmp_path / "model")
    place = {"model.vision_tower": "disk", "model.multi_modal_projector": "disk", "lm_head": "disk"}
    place |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    place |= {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)}
    offloaded = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=place, offload_folder=tmp_path / "weights", attn_implementation="sdpa"
    )
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"cpu", "meta"}
    for case in KINDS:
        assert _differ(offloaded.eval(), oracle, *CASES[case]) <= TOLERANCE


def test_weights_of_eight_bits() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model, dense = vivid(tiny_llava()), vivid(tiny_llava())
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    weights = {name: w.dequantize() if hasattr(w, "dequantize") else w for name, w in model.state_dict().items()}
    dense.load_state_dict(weights)
    for case in KINDS:
        assert _differ(model, Oracle(dense), *CASES[case]) <= TOLERANCE
