"""What comes after the first answer: later turns on the same cache, decoding loops of one's own, copies of caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList

import foveate
from foveate.core import Method
from foveate.engines.base import compress
from tests.engine.oracle import GREEDY, differ, pair, prompts
from tests.engine.probes import Coin, SharedCoin
from tests.engine.test_oracle import CASES, TOLERANCE
from tests.models import IMAGE, chunked, one_row, tiny_inputs

SPOKEN = [
    "evocut",
    "evocut original",
    "todre exits",
    "adav compat",
    "v2drop to nothing",
    "pool",
    "evocut + v2drop",
    "evocut original + v2drop",
    "ragged",
    "ragged everywhere",
]


def _more(ids: Tensor, mask: Tensor, words: list[int]) -> tuple[Tensor, Tensor]:
    """Append the same words to every row; the mask grows by all that is new."""
    ids = torch.cat([ids, torch.tensor([words] * len(ids))], 1)
    return ids, torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)


PROMPTS: dict[str, dict[str, Tensor]] = {
    "batch": tiny_inputs(),
    "single": tiny_inputs((2,)),
    "overtaken": prompts([[1, *range(60, 90)], [1, 5, IMAGE, 6, IMAGE, 7]]),  # the longest row becomes the shortest
}


@pytest.mark.parametrize("which", PROMPTS)
@pytest.mark.parametrize("case", SPOKEN)
def test_three_turns_on_one_cache(case: str, which: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), PROMPTS[which]
    with compress(model, method) as handle:
        first = model.generate(**inputs, **GREEDY, max_new_tokens=5)
        sequences, mask = first.sequences, inputs["attention_mask"]
        for words in ([44, 45, 46], [7]):
            ids, mask = _more(sequences, mask, words)
            output = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY, max_new_tokens=5
            )
            sequences = output.sequences
            assert torch.equal(sequences[:, : ids.shape[1]], ids)
            assert differ(output.logits, oracle.logits(inputs, sequences, handle.report, positions)) <= TOLERANCE
        assert handle.report.calls == 1


@pytest.mark.parametrize("case", ["evocut", "evocut original", "v2drop", "evocut + v2drop"])
def test_a_turn_of_new_tokens_only(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    new = list(range(60, 60 + inputs["input_ids"].shape[1] + 3))  # longer than the first prompt
    with compress(model, method) as handle:
        first = model.generate(**inputs, **GREEDY, max_new_tokens=5)
        ids, mask = _more(first.sequences, inputs["attention_mask"], new)
        tail = ids[:, -len(new) - 1 :]  # the last answered token is not in the cache yet
        output = model.generate(
            input_ids=tail, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY, max_new_tokens=5
        )
    assert torch.equal(output.sequences[:, : tail.shape[1]], tail)
    sequences = torch.cat([ids, output.sequences[:, tail.shape[1] :]], 1)
    assert differ(output.logits, oracle.logits(inputs, sequences, handle.report, positions)) <= TOLERANCE


@pytest.mark.parametrize("positions", ["packed", "original"])
def test_pictures_passed_again_are_known_already(positions: str) -> None:
    (model, oracle), inputs = pair(), one_row(tiny_inputs(), 2)
    with compress(model, f"evocut:keep=5,positions={positions}") as handle:
        first = model.generate(**inputs, **GREEDY, max_new_tokens=5)
        ids, mask = _more(first.sequences, inputs["attention_mask"], [44, 45])
        again = {"pixel_values": inputs["pixel_values"], "past_key_values": first.past_key_values}
        output = model.generate(input_ids=ids, attention_mask=mask, **again, **GREEDY, max_new_tokens=5)
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE


@pytest.mark.parametrize("spec", ["grid:keep=4", "v2drop:stages=2@0.5"])
def test_a_generated_placeholder_is_no_picture(spec: str) -> None:
    (model, oracle), inputs = pair(), one_row(tiny_inputs(), 1)

    def say_image(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([IMAGE]), 1e4)

    with compress(model, spec) as handle:
        first = model.generate(**inputs, **GREEDY, max_new_tokens=5, logits_processor=LogitsProcessorList([say_image]))
        assert (first.sequences[:, -5:] == IMAGE).all()
        ids, mask = _more(first.sequences, inputs["attention_mask"], [44, 45])
        output = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY, max_new_tokens=5
        )
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, handle.positions)) <= TOLERANCE


def _loop(model: Any, inputs: dict[str, Tensor], steps: int, *, masked: bool = True, **options: Any) -> Any:
    """Decode greedily by calling the model itself."""
    output = model(**inputs, use_cache=True, **options)
    cache = output[1] if isinstance(output, tuple) else output.past_key_values
    ids, mask, logits = inputs["input_ids"], inputs["attention_mask"], [output[0][:, -1]]
    for _ in range(steps):
        new = logits[-1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, new], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
        given = {"attention_mask": mask} if masked else {}
        output = model(input_ids=new, past_key_values=cache, **given, **options)
        logits.append(output[0][:, -1])
    return torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1), logits, cache


@pytest.mark.parametrize("which", PROMPTS)
@pytest.mark.parametrize("case", SPOKEN)
def test_a_decoding_loop_of_ones_own(case: str, which: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), PROMPTS[which]
    with compress(model, method) as handle, torch.no_grad():
        sequences, logits, _ = _loop(model, inputs, 5)
    assert differ(logits, oracle.logits(inputs, sequences, handle.report, positions)) <= TOLERANCE


@pytest.mark.parametrize("case", ["evocut", "evocut original", "v2drop", "evocut + v2drop"])
def test_a_loop_whose_outputs_are_tuples(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    with compress(model, method) as handle, torch.no_grad():
        sequences, logits, _ = _loop(model, inputs, 3, return_dict=False)
    assert differ(logits, oracle.logits(inputs, sequences, handle.report, positions)) <= TOLERANCE


@pytest.mark.parametrize("case", ["evocut", "evocut original", "v2drop", "evocut + v2drop"])
def test_a_loop_without_masks(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), one_row(tiny_inputs(), 2)
    with compress(model, method) as handle, torch.no_grad():
        sequences, logits, _ = _loop(model, inputs, 3, masked=False)
    assert differ(logits, oracle.logits(inputs, sequences, handle.report, positions)) <= TOLERANCE


@pytest.mark.parametrize("case", ["evocut", "evocut original", "evocut + v2drop"])
def test_generate_begins_and_a_loop_goes_on(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    with compress(model, method) as handle, torch.no_grad():
        first = model.generate(**inputs, **GREEDY, max_new_tokens=4)
        ids, mask, logits = first.sequences, inputs["attention_mask"], list(first.logits)
        for _ in range(3):
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            output = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values)
            logits.append(output.logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    assert differ(logits, oracle.logits(inputs, ids, handle.report, positions)) <= TOLERANCE


@pytest.mark.parametrize("case", ["evocut", "evocut original", "v2drop to nothing", "evocut + v2drop"])
def test_a_loop_begins_and_generate_goes_on(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), one_row(tiny_inputs(), 2)
    with compress(model, method) as handle, torch.no_grad():
        ids, _, cache = _loop(model, inputs, 2)
        ids, mask = _more(ids, inputs["attention_mask"], [44, 45])
        output = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY, max_new_tokens=4)
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE


@pytest.mark.parametrize("case", ["evocut original", "v2drop to nothing", "ragged everywhere"])
def test_copies_of_a_cache_go_their_own_ways(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    with compress(model, method) as handle:
        first = model.generate(**inputs, **GREEDY, max_new_tokens=5)
        for words in ([44, 45], [77, 78, 79]):
            ids, mask = _more(first.sequences, inputs["attention_mask"], words)
            cache = copy.deepcopy(first.past_key_values)
            output = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY, max_new_tokens=5
            )
            assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE


@pytest.mark.parametrize("spec", ["grid:keep=4", "v2drop:stages=2@0.5/4@0", "evocut:keep=8 + v2drop:stages=2@0.5"])
def test_a_reset_cache_has_forgotten_its_pictures(spec: str) -> None:
    model, _ = pair()
    text = prompts([[1, 5, 6, 7, 8], [1, 4], list(range(3, 63))])  # longer than what was in the cache
    plain = model.generate(**text, **GREEDY, max_new_tokens=4)
    with compress(model, spec):
        cache = DynamicCache(config=model.config.get_text_config())
        model.generate(**tiny_inputs(), **GREEDY, past_key_values=cache, max_new_tokens=4)
        cache.reset()
        output = model.generate(**text, **GREEDY, past_key_values=cache, max_new_tokens=4)
        assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits))
        ids, mask = _more(output.sequences, text["attention_mask"], [9, 9])
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY, max_new_tokens=4)


@chunked
@pytest.mark.parametrize("case", ["evocut", "evocut original", "pool", "ragged original"])
def test_a_prompt_read_in_chunks(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    with compress(model, method) as handle:
        output = model.generate(**inputs, **GREEDY, max_new_tokens=5, prefill_chunk_size=7)
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE


@chunked
def test_a_later_turn_read_in_chunks() -> None:
    (model, oracle), inputs = pair(), tiny_inputs()
    with compress(model, "evocut:keep=10,positions=original + v2drop:stages=2@0.5/4@0") as handle:
        first = model.generate(**inputs, **GREEDY, max_new_tokens=5)
        ids, mask = _more(first.sequences, inputs["attention_mask"], list(range(44, 54)))
        cache = first.past_key_values
        output = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY, max_new_tokens=5, prefill_chunk_size=3
        )
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, "original")) <= TOLERANCE


@pytest.mark.parametrize("method", [Coin(), Coin(at="2", least=0), SharedCoin(at="24"), "adav:keep=6"], ids=str)
def test_pictures_never_seen_stay_unseen_in_later_turns(method: Method | str) -> None:
    """A picture in a later turn would need its own cut: refused, and the model goes on working."""
    model, _ = pair()
    inputs = one_row(tiny_inputs(), 1)
    with compress(model, method):
        first = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        ids, mask = _more(first.sequences, inputs["attention_mask"], [IMAGE] * 16 + [5])
        pixels = torch.cat([inputs["pixel_values"]] * 2)
        with pytest.raises(foveate.UnsupportedCall) as error:
            model.generate(
                input_ids=ids, attention_mask=mask, pixel_values=pixels, past_key_values=first.past_key_values
            )
        assert error.value.hint
        again = model.generate(**inputs, **GREEDY, max_new_tokens=3)
    assert torch.equal(torch.stack(again.logits), torch.stack(first.logits))


@pytest.mark.parametrize("case", ["evocut", "evocut original", "v2drop to nothing", "evocut + v2drop"])
def test_every_returned_answer_can_go_on(case: str) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    sampling = {**GREEDY, "do_sample": True, "num_return_sequences": 2}
    with compress(model, method) as handle:
        first = model.generate(**inputs, **sampling, max_new_tokens=4)
        ids, mask = _more(first.sequences, inputs["attention_mask"].repeat_interleave(2, 0), [44, 45])
        cache = first.past_key_values
        output = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY, max_new_tokens=4)
    for i, sequence in enumerate(output.sequences):
        logits = oracle.read(inputs, output.sequences, i, handle.report, positions, source=i // 2).logits[-5:-1]
        assert torch.equal(sequence[: ids.shape[1]], ids[i])
        assert (torch.stack(output.logits, 1)[i] - logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("spec", ["grid:keep=4", "grid:keep=4,positions=original", "v2drop:stages=2@0.5/4@0"])
def test_a_word_that_the_mask_hides_is_not_there(spec: str) -> None:
    (model, _), inputs = pair(), one_row(tiny_inputs(), 2)
    ids = inputs["input_ids"]
    with compress(model, spec):
        for hidden in (2, 24, ids.shape[1] - 3):
            mask = torch.ones_like(ids).index_fill(1, torch.tensor([hidden]), 0)
            rest = torch.tensor([i for i in range(ids.shape[1]) if i != hidden])
            masked = model.generate(**{**inputs, "attention_mask": mask}, **GREEDY, max_new_tokens=4)
            less = {**inputs, "input_ids": ids[:, rest], "attention_mask": mask[:, rest]}
            without = model.generate(**less, **GREEDY, max_new_tokens=4)
            assert (torch.stack(masked.logits) - torch.stack(without.logits)).abs().max() <= TOLERANCE
