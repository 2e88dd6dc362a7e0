"""The doors as callers use them: lengths, streamers, pipelines, sampling, threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer

from foveate import demo
from foveate.engines.base import compress
from tests.engine.oracle import GREEDY, differ, pair
from tests.engine.test_oracle import TOLERANCE
from tests.models import PAD, one_row, tiny_inputs

KINDS = ["grid:keep=4", "v2drop:stages=2@0.5/4@0", "evocut:keep=8 + v2drop:stages=2@0.5"]
PLAIN: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 7},
        {"max_length": 60},
        {"max_length": 60, "max_new_tokens": 3},
        {"generation_config": GenerationConfig(max_length=60, **PLAIN)},
        {"generation_config": GenerationConfig(max_new_tokens=5, **PLAIN)},
    ],
    ids=["new", "length", "both", "config length", "config new"],
)
@pytest.mark.filterwarnings("ignore:Both `max_new_tokens`")
def test_lengths_count_the_callers_prompt(spec: str, options: dict[str, Any]) -> None:
    (model, _), inputs = pair(), tiny_inputs()
    plain = model.generate(**inputs, **({} if "generation_config" in options else PLAIN), **options)
    with compress(model, spec):
        output = model.generate(**inputs, **({} if "generation_config" in options else PLAIN), **options)
    assert output.shape == plain.shape
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@pytest.mark.parametrize("spec", KINDS)
def test_the_models_own_lengths_hold_too(spec: str) -> None:
    (model, _), inputs = pair(), tiny_inputs()
    before = model.generation_config
    model.generation_config = GenerationConfig(max_length=60, **PLAIN)
    try:
        plain = [model.generate(**inputs), model.generate(**inputs, generation_config=GenerationConfig())]
        with compress(model, spec):
            outputs = [model.generate(**inputs), model.generate(**inputs, generation_config=GenerationConfig())]
    finally:
        model.generation_config = before
    assert [o.shape for o in outputs] == [p.shape for p in plain] == [(3, 60)] * 2


@pytest.mark.parametrize("spec", KINDS)
def test_no_end_before_min_length(spec: str) -> None:
    (model, _), inputs = pair(), one_row(tiny_inputs(), 2)
    prompt = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "pad_token_id": PAD, "max_length": prompt + 12}
    with compress(model, spec):
        first = int(model.generate(**inputs, **options, eos_token_id=None)[0, prompt])
        assert model.generate(**inputs, **options, eos_token_id=first).shape[1] == prompt + 1
        output = model.generate(**inputs, **options, eos_token_id=first, min_length=prompt + 5)
        new = model.generate(**inputs, **options, eos_token_id=first, min_new_tokens=5)
    assert output.shape[1] >= prompt + 5
    assert torch.equal(output, new)
    assert first not in output[0, prompt : prompt + 5]


@pytest.mark.parametrize("spec", KINDS)
def test_a_prompt_too_long_for_max_length_is_refused_as_ever(spec: str) -> None:
    (model, _), inputs = pair(), one_row(tiny_inputs(), 2)
    with compress(model, spec), pytest.raises(ValueError, match="max_length"):
        model.generate(**inputs, **PLAIN, max_length=inputs["input_ids"].shape[1])


@pytest.mark.parametrize(("spec", "positions"), [("grid:keep=4", "packed"), ("v2drop:stages=2@0.5", "original")])
def test_without_a_mask_padding_is_told_by_its_id(spec: str, positions: str) -> None:
    (model, oracle), inputs = pair(), tiny_inputs()
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with compress(model, spec) as handle:
        output = model.generate(**bare, **GREEDY, max_new_tokens=5)
        assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions)) <= TOLERANCE
        by_name = model.generate(inputs=bare["input_ids"], pixel_values=bare["pixel_values"], **PLAIN, max_new_tokens=5)
        by_place = model.generate(bare["input_ids"], pixel_values=bare["pixel_values"], **PLAIN, max_new_tokens=5)
    assert torch.equal(by_name, output.sequences)
    assert torch.equal(by_place, output.sequences)


@pytest.mark.parametrize("spec", KINDS)
def test_sampling_with_a_seed_repeats_itself(spec: str) -> None:
    (model, _), inputs = pair(), tiny_inputs()
    options = {"do_sample": True, "pad_token_id": PAD, "eos_token_id": None, "max_new_tokens": 8}
    with compress(model, spec):
        outputs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            outputs.append(model.generate(**inputs, **options, num_return_sequences=2))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert len(outputs[0]) == 6
    assert torch.equal(outputs[0][:, :53], inputs["input_ids"].repeat_interleave(2, 0))


def test_text_alone_is_left_alone() -> None:
    (model, _), text = pair(), tiny_inputs((0, 0))
    plain = model.generate(**text, **GREEDY, max_new_tokens=5)
    for spec in KINDS:
        with compress(model, spec) as handle:
            output = model.generate(**text, **GREEDY, max_new_tokens=5)
            embeds = model.get_input_embeddings()(text["input_ids"])
            embedded = model.generate(**text, inputs_embeds=embeds, **GREEDY, max_new_tokens=5)
        assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits))
        assert torch.equal(torch.stack(embedded.logits), torch.stack(plain.logits))
        assert handle.report.calls == 0


@pytest.mark.parametrize("threads", [2, 6])
@pytest.mark.parametrize("spec", [*KINDS, "todre:keep=6,exit=0.5,tau=0.6"])
def test_threads_get_what_one_thread_gets(spec: str, threads: int) -> None:
    model, _ = pair()
    batches = [tiny_inputs(rows, seed=i) for i, rows in enumerate([(1,), (2, 0), (0, 1, 2), (1, 1), (2,), (0, 2)])]
    gate = threading.Barrier(threads)

    def work(i: int) -> Tensor:
        gate.wait()
        return torch.stack(model.generate(**batches[i], **GREEDY, max_new_tokens=6).logits)

    with compress(model, spec):
        alone = [torch.stack(model.generate(**batch, **GREEDY, max_new_tokens=6).logits) for batch in batches]
        with ThreadPoolExecutor(threads) as pool:
            together = list(pool.map(work, range(threads)))
    for got, wanted in zip(together, alone, strict=False):
        assert torch.equal(got, wanted)


# -- with words: the bundled model, its processor and its tokenizer

pytestmark_demo = pytest.mark.skipif(not (demo.MODEL / "model.safetensors").exists(), reason="no demo model here")
QUESTION = "is there a red circle?"


@pytest.fixture(scope="module")
def talker() -> Any:
    return demo.load()


@pytest.fixture
def asked(talker: Any) -> Any:
    from PIL import Image

    _, processor = talker
    pixels = torch.randint(0, 255, (60, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(pixels.numpy()).resize((336, 336))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return messages, inputs


WORDY = ["evocut:keep=64", "v2drop:stages=2@0.5/6@0"]


@pytestmark_demo
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("spec", WORDY)
def test_streamers_show_the_callers_prompt(spec: str, skip: bool, talker: Any, asked: Any) -> None:
    (model, processor), (_, inputs) = talker, asked
    prompt = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    class Collect(TextStreamer):
        heard = ""
        put_in: tuple[Tensor, ...] = ()

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.heard += text

        def put(self, value: Tensor) -> None:
            self.put_in = (*self.put_in, value)
            super().put(value)

    with compress(model, spec):
        wanted = model.generate(**inputs, **options)[0]
        collect = Collect(processor.tokenizer, skip_prompt=skip)
        model.generate(**inputs, **options, streamer=collect)
        iterate = TextIteratorStreamer(processor.tokenizer, skip_prompt=skip, timeout=60)
        thread = threading.Thread(target=model.generate, kwargs={**inputs, **options, "streamer": iterate})
        thread.start()
        spoken = "".join(iterate)
        thread.join()
    assert torch.equal(torch.cat([v.flatten() for v in collect.put_in]), wanted)
    text = processor.tokenizer.decode(wanted[prompt:] if skip else wanted)
    assert collect.heard.strip() == text.strip()
    assert spoken.strip() == text.strip()


@pytestmark_demo
@pytest.mark.parametrize("spec", WORDY)
def test_the_pipeline_answers_as_generate_does(spec: str, talker: Any, asked: Any) -> None:
    from transformers import pipeline

    (model, processor), (messages, inputs) = talker, asked
    prompt = inputs["input_ids"].shape[1]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with compress(model, spec) as handle:
        tokens = model.generate(**inputs, **options)[0, prompt:]
        wanted = processor.decode(tokens, skip_special_tokens=True)
        answer = pipe(text=messages, generate_kwargs=options, return_full_text=False)
        full = pipe(text=messages, generate_kwargs=options, return_full_text=True)
        assert handle.report.calls == 3
    assert answer[0]["generated_text"].strip() == wanted.strip()
    assert full[0]["generated_text"][-1]["content"].strip() == wanted.strip()
