"""vLLM with the plugin against the transformers engine, on small random models; `make test-vllm` runs it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: make test-vllm")

from PIL import Image

import foveate
from foveate import demo
from tests.vllm.answers import ENVIRONMENT, NEW, ROOT, Answer, Request, answers, request
from tests.vllm.reference import Reference, difference
from tests.vllm.tiny import FAMILIES, architecture, folder, prompt

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = (
    "evocut:keep=0.25",
    "todre:keep=0.25,exit=none",
    "adav:keep=0.25",
    "divprune:keep=0.25",
    "cdpruner:keep=0.1",  # beyond the rank of random features its choices are rounding
    "visionzip:keep=0.25",
    "vispruner:keep=0.25",
    "holov:keep=0.25",
    "prumerge:keep=0.25",
    "prumerge_plus:keep=0.25",
    "vscan:keep=0.25,inner=1.0",
    "random:keep=0.25",
    "grid:keep=0.25",
    "pool:keep=0.25",
    "evocut:keep=0.5 + cdpruner:keep=0.5",
)
TWO = ("evocut:keep=0.25", "adav:keep=0.25", "cdpruner:keep=0.1", "visionzip:keep=0.25")
WHOLE = "evocut:keep=1.0"
CLOSE = 2e-5
FIRST, SECOND = [1, 240, 320], [2, 300, 130]
COLOUR, WORD = "what colour is the circle?", "which word is written at the top?"

Case = tuple[Request, Answer, Answer]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def compared(family: str, root: Path, rounds: list[list[Request]], **engine: Any) -> list[list[Case]]:
    """Each request with vLLM's answer and that of the transformers engine."""
    model = folder(family, root)
    made, reference = answers(model, architecture(family), rounds, root, **engine), Reference(model)
    return [
        [(r, a, reference.answer(r)) for r, a in zip(*both, strict=True)] for both in zip(rounds, made, strict=True)
    ]


def check(cases: list[Case]) -> None:
    for asked, answer, reference in cases:
        told = f"{asked['kwargs']}, {len(asked['pictures'])} pictures"
        assert answer["length"] == reference["length"], told
        assert answer["tokens"] == reference["tokens"], told
        assert difference(answer, reference) < CLOSE, told


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_those_of_the_transformers_engine(family: str, root: Path) -> None:
    one, two = prompt(family, COLOUR), prompt(family, COLOUR, 2)
    batch = [request(one, [FIRST], method) for method in (WHOLE, *METHODS)]
    batch += [request(two, [FIRST, SECOND], method) for method in TWO]  # they differ in size, and in tiles
    batch += [request(one, [SECOND], method) for method in TWO]
    (cases,) = compared(family, root, [batch])
    check(cases)
    assert cases[0][2]["length"] == cases[0][2]["full"] > 60
    kept = [reference["length"] < reference["full"] for _, _, reference in cases[1:]]
    assert all(kept)
    steps = [answer["logprobs"][0] for _, answer, _ in cases[: len(METHODS) + 1]]
    assert len({tuple(step.values()) for step in steps}) == len(steps)  # each method its own answer


@pytest.mark.parametrize(("family", "ranks"), [("llava", 2), ("llava_onevision", 1), ("qwen2_5_vl", 2)])
def test_chunks_cached_prefixes_and_ranks_change_nothing(family: str, ranks: int, root: Path) -> None:
    one, other, two = prompt(family, COLOUR), prompt(family, WORD), prompt(family, COLOUR, 2)
    seen = [request(one, [FIRST], f"{method}:keep=0.8") for method in ("evocut", "adav", "divprune")]
    changed = [request(other, [FIRST], "adav:keep=0.8"), seen[0]]  # another question for the same picture
    rounds = [seen, seen, changed, [request(two, [FIRST, SECOND], method) for method in TWO]]
    engine = {"long_prefill_token_threshold": 16, "block_size": 32, "enable_prefix_caching": True}
    made = compared(family, root, rounds, **engine, tensor_parallel_size=ranks)
    for cases in made:
        check(cases)
    first, again, mixed = ([answer for _, answer, _ in cases] for cases in made[:3])
    assert [answer["cached"] for answer in first] == [0, 0, 0]
    assert first[0]["steps"] >= NEW - 1 + first[0]["length"] // 16 > NEW  # it came in chunks
    assert all(answer["cached"] >= 32 for answer in again) and again[0]["steps"] < first[0]["steps"]
    assert mixed[0]["cached"] == 0 and mixed[1]["cached"] >= 32  # that of another question is another picture


def test_the_question_decides_and_no_picture_is_served_to_another_question(root: Path) -> None:
    text = prompt("llava", COLOUR)
    spec, plain = "cdpruner:keep=0.25", "evocut:keep=0.25"
    rounds = [[request(text, [FIRST], spec, foveate_question=q)] for q in (COLOUR, WORD, COLOUR)]
    rounds += [[request(text, [FIRST], plain, foveate_question=q)] for q in (COLOUR, WORD)]
    rounds += [[request(text, [FIRST])]]
    engine = {"block_size": 32, "enable_prefix_caching": True, "mm_processor_kwargs": {"foveate": plain}}
    made = [each[0] for each in answers(folder("llava", root), architecture("llava"), rounds, root, **engine)]
    colour, word, again, blind, still, server = [each["logprobs"][0] for each in made]
    assert colour == again and max(abs(colour.get(token, -99.0) - value) for token, value in word.items()) > 1e-3
    assert [each["length"] for each in made] == [made[0]["length"]] * 6
    assert blind == still == server  # a method that reads no text, and what the server says where a request does not


def test_what_cannot_be_served_is_refused_and_the_engine_lives_on(root: Path) -> None:
    text = prompt("llava", COLOUR)
    wrong: list[tuple[Any, str]] = [
        ("fastv:keep=0.5", "drops inside the LLM"),
        ("todre:keep=0.25", "todre:keep=0.1,exit=none"),
        ("prumerge:keep=0.25,fence=1.5", "depends on the picture"),
        ("evocut:keep=0.25,positions=original", "only packed positions"),
        ("evocat:keep=0.25", "did you mean `evocut`?"),
        ("evocut:keep=0", "keep must be at least 1 token"),
        ({"keep": 0.25}, "a method is written as a spec"),
        (None, "neither the server nor the request names a method"),
    ]
    rounds = [[request(text, [FIRST], spec)] for spec, _ in wrong] + [[request(text, [FIRST], WHOLE)]]
    *refused, (good,) = answers(folder("llava", root), architecture("llava"), rounds, root)
    for (spec, why), (answer,) in zip(wrong, refused, strict=True):
        assert why in answer.get("error", ""), spec
    assert len(good["tokens"]) == NEW


def offline(question: str) -> str:
    """What the transformers engine answers about the demo picture with 64 tokens; it is wrong twice."""
    model, processor = demo.load()
    text = f"USER: <image>\n{question} ASSISTANT:"
    inputs = processor(images=Image.open(demo.PICTURE), text=text, return_tensors="pt")
    with foveate.compress(model, "evocut:keep=64"):
        output = model.generate(**inputs, max_new_tokens=8)
    answer: str = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


@contextmanager
def served(*options: str) -> Iterator[str]:
    """vLLM's own server, in a process; yields its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), "--host", "127.0.0.1"]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen([*command, *options], cwd=ROOT, env=environment, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_the_demo_model_is_served_and_answers_the_official_client() -> None:
    import base64

    from openai import APIConnectionError, BadRequestError, OpenAI

    picture = "data:image/png;base64," + base64.b64encode(demo.PICTURE.read_bytes()).decode()
    options = ["--model", str(demo.MODEL), "--dtype", "float32", "--enforce-eager", "--served-model-name", "demo"]
    options += ["--hf-overrides", '{"architectures": ["FoveateLlavaForConditionalGeneration"]}']
    options += ["--mm-processor-kwargs", '{"foveate": "adav:keep=64"}', "--trust-request-mm-kwargs"]
    options += ["--max-model-len", "1024", "--limit-mm-per-prompt", '{"image": 2}']
    with served(*options) as address:
        client = OpenAI(base_url=address, api_key="none", max_retries=0)
        for _ in range(300):
            try:
                client.models.list()
                break
            except APIConnectionError:
                time.sleep(1)

        def ask(question: str, **extra: Any) -> tuple[str, int]:
            content: Any = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
            messages: Any = [{"role": "user", "content": content}]
            options = {"max_tokens": 8, "temperature": 0.0, "extra_body": extra}
            made: Any = client.chat.completions.create(model="demo", messages=messages, **options)
            return made.choices[0].message.content.strip(), made.usage.prompt_tokens

        for question, truth in demo.QUESTIONS:
            whole, full = ask(question, mm_processor_kwargs={"foveate": "evocut:keep=1.0"})
            assert (whole, full > 576) == (truth, True)
            answer, length = ask(question)
            assert (answer, full - length) == (truth, 576 - 64)
            assert ask(question, mm_processor_kwargs={"foveate": "evocut:keep=64"})[0] == offline(question)
        with pytest.raises(BadRequestError, match="drops inside the LLM"):
            ask("what is it?", mm_processor_kwargs={"foveate": "fastv:keep=64"})
        assert ask(demo.QUESTIONS[0][0])[0] == demo.QUESTIONS[0][1]
