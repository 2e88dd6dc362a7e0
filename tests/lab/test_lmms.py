"""lmms-eval asks foveate: what it says is read right, and what it is told is what `generate` says.

What needs lmms-eval itself runs in an environment of its own: ``make test-lmms``.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import foveate
from foveate import demo
from foveate.demo.evaluate import answer, prompt
from foveate.demo.video import QUESTIONS as CLIP_QUESTIONS
from foveate.demo.video import frames
from foveate.demo.world import held_out, scene
from foveate.errors import NothingCompressed, UnknownMethod, UnsupportedCall, UnsupportedModel
from foveate.lab.chat import answers, prepare
from foveate.lab.lmms import batches, read_arguments, read_options
from foveate.lab.media import Video
from foveate.lab.reader import Prompt, Reader

TASKS = Path(__file__).parent / "lmms_task"
QUESTIONS = 9
"""Odd, so that one of two processes is given a request twice."""

needs_lmms_eval = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs lmms-eval: make test-lmms")


def ask(*messages: Any) -> Prompt:
    return Prompt.of([{"role": "user", "content": list(messages)}])


def image(picture: Any = "a.png") -> dict[str, Any]:
    return {"type": "image", "url": picture}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


# -- what lmms-eval says


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ("pretrained=a/b,method=evocut:keep=64", "evocut:keep=64"),
        ("method=todre:keep=0.1,exit=0.875,pretrained=a/b", "todre:keep=0.1,exit=0.875"),
        ("pretrained=a/b, method=v2drop:stages=3@0.5/17@0.3/22@0", "v2drop:stages=3@0.5/17@0.3/22@0"),
        ("pretrained=a/b,method=evocut:keep=128 + v2drop:keep=64", "evocut:keep=128 + v2drop:keep=64"),
        ('pretrained=a/b,method="todre:keep=8,exit=none"', "todre:keep=8,exit=none"),
        (
            "pretrained=a/b,method='evocut:keep=9,seed=1 + random:keep=4,seed=2'",
            "evocut:keep=9,seed=1 + random:keep=4,seed=2",
        ),
        ("pretrained=a/b,method=none", "none"),
    ],
)
def test_a_method_is_written_as_everywhere_else(given: str, method: str) -> None:
    assert read_arguments(given) == {"pretrained": "a/b", "method": method}


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ("pretrained=demo", "names no method", "method=none is the plain model"),
        ("method=evocut:keep=64", "names no model", "pretrained=demo"),
        ("pretrained=demo,dtipe=float32,method=none", "no 'dtipe'", "`dtype`"),
        ("pretraned=demo,method=none", "no 'pretraned'", "`pretrained`"),
        ("pretrained=demo,method=evocut:keep=9,seed=1 + random:keep=4,seed=2", "'seed' stands twice", "in quotes"),
        ("", "names no model", "pretrained=demo"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: str, message: str, hint: str) -> None:
    with pytest.raises(UnsupportedCall, match=message) as caught:
        read_arguments(given)
    assert hint in str(caught.value.hint)


def test_no_option_of_a_method_is_taken_for_an_argument() -> None:
    from foveate import registry
    from foveate.lab.lmms import ARGUMENTS

    assert not {f for name in registry.names() for f in registry.get(name).__dataclass_fields__} & set(ARGUMENTS)


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"max_gen_toks": 5}, {"max_new_tokens": 5, "do_sample": False}),
        ({"max_new_tokens": 8, "temperature": 0, "top_p": None, "num_beams": 2},
         {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}),
        ({"temperature": 0.7, "max_new_tokens": 8}, {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": False}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0, "do_sample": True}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"do_sample": True, "top_k": 5}, {"max_new_tokens": 1024, "do_sample": True, "top_k": 5}),
    ],
)  # fmt: skip
def test_generation_options(asked: dict[str, Any], options: dict[str, Any]) -> None:
    assert read_options(asked) == (options, [], [])


def test_options_that_end_answers_or_do_nothing() -> None:
    _, ends, rest = read_options({"until": ["</s>", "", "\n\n"], "image_aspect_ratio": "original"})
    assert (ends, rest) == (["</s>", "\n\n"], ["image_aspect_ratio"])
    with pytest.raises(UnsupportedCall, match="one answer"):
        read_options({"num_return_sequences": 2, "do_sample": True})


def test_pictures_stand_where_the_text_marks_them() -> None:
    marked = ask(image("a"), image("b"), text("is <image> or <image> larger?"))
    kinds = [part.get("text", part["type"]) for part in marked.messages[0]["content"]]
    assert kinds == ["is ", "image", " or ", "image", " larger?"]
    assert marked.images == ["a", "b"]
    unmarked = ask(text("before"), image("a"), text("what does <image> mean, and <image>?"))
    assert [part["type"] for part in unmarked.messages[0]["content"]] == ["text", "image", "text"]


def test_visuals_come_first_and_sounds_are_refused() -> None:
    seen = Prompt.about([Image.new("RGB", (2, 2)), "b.JPG", "c.mp4"], "what?")
    assert [part["type"] for part in seen.messages[0]["content"]] == ["image", "image", "video", "text"]
    assert (len(seen.images), seen.videos) == (2, ["c.mp4"])
    for strange in ({"type": "audio", "url": "a.wav"}, {"type": "video", "url": {"path": "a.mp4", "video_start": 3}}):
        with pytest.raises(UnsupportedCall, match=r"audio|part of a video"):
            ask(strange)
    with pytest.raises(UnsupportedCall, match="dict"):
        Prompt.about([{"array": [], "sampling_rate": 1}], "what?")


def test_batches_are_of_one_kind_and_lose_nothing() -> None:
    kinds = "aabbbcab"
    found = list(batches(enumerate(kinds), lambda item: item[1], 2))
    assert sorted(i for batch in found for i, _ in batch) == list(range(len(kinds)))
    assert all(len({kind for _, kind in batch}) == 1 and len(batch) <= 2 for batch in found)


# -- what is answered


@pytest.fixture(scope="module")
def asked() -> list[tuple[Image.Image, str]]:
    return [(scene(seed).image, question.text) for seed, question in held_out(8)[3:6]]


@pytest.fixture
def reader() -> Iterator[Callable[[str], Reader]]:
    made = []

    def make(method: str) -> Reader:
        made.append(Reader("demo", method, device="cpu"))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("method", ["none", "evocut:keep=16", "v2drop:keep=64"])
def test_a_batch_says_what_generate_says(reader: Any, asked: list[tuple[Image.Image, str]], method: str) -> None:
    it = reader(method)
    prompts = [ask(image(picture), text(question)) for picture, question in asked]
    given = it.answer(prompts, max_new_tokens=6, do_sample=False)
    model, processor = demo.load()
    if method != "none":
        foveate.compress(model, method)
    assert [one.text for one in given] == answer(model, processor, *map(list, zip(*asked, strict=True)))
    entered = {"none": 576, "evocut:keep=16": 16, "v2drop:keep=64": 576}[method]
    for one, (picture, question) in zip(given, asked, strict=True):
        start = processor.apply_chat_template(prompt(question), add_generation_prompt=True)
        whole = processor(text=start, images=picture).input_ids[0]
        assert one.read == len(whole) - 576 + entered
    assert it.tally.pictures == (0 if method == "none" else len(asked))


def test_two_pictures_one_picture_and_none(reader: Any, asked: list[tuple[Image.Image, str]]) -> None:
    it = reader("evocut:keep=16")
    (one, question), (two, _) = asked[0], asked[-1]
    (both,) = it.answer([ask(image(one), image(two), text(question))], max_new_tokens=4, do_sample=False)
    assert it.tally.means() == {"visual_tokens": 576.0, "visual_entered": 16.0, "visual_per_layer": 16.0}
    assert it.tally.pictures == 2
    (single,) = it.answer([ask(image(one), text(question))], max_new_tokens=4, do_sample=False)
    (blind,) = it.answer([ask(text(question))], max_new_tokens=4, do_sample=False)
    assert both.read > single.read > blind.read
    assert it.tally.pictures == 3


@pytest.mark.parametrize("method", ["none", "evocut:keep=576"])
def test_loss_of_an_answer(reader: Any, asked: list[tuple[Image.Image, str]], method: str) -> None:
    """The forced answer has the likelihood that one plain pass over prompt and answer gives it."""
    it = reader(method)
    picture, question = asked[0]
    model, processor = demo.load()
    start = processor.apply_chat_template(prompt(question), add_generation_prompt=True)
    for words in (" yes", " purple dog"):
        inputs = processor(images=picture, text=start + words, return_tensors="pt")
        wanted = processor.tokenizer(words, add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -len(wanted) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(wanted))
        loss, greedy = it.loss(ask(image(picture), text(question)), words)
        assert loss == pytest.approx(float(expected), abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == wanted)


def test_the_greedy_answer_is_greedy_and_another_is_not(reader: Any, asked: list[tuple[Image.Image, str]]) -> None:
    it = reader("fastv:keep=64")
    asks = ask(image(asked[0][0]), text(asked[0][1]))
    (said,) = it.answer([asks], max_new_tokens=6, do_sample=False)
    best, greedy = it.loss(asks, f" {said.text}")
    worse, other = it.loss(asks, " zebra")
    assert (greedy, other) == (True, False)
    assert best < worse
    with pytest.raises(UnsupportedCall, match="empty"):
        it.loss(asks, "")


def test_a_call_that_goes_by_the_method_is_an_error(reader: Any, asked: list[tuple[Image.Image, str]]) -> None:
    it = reader("evocut:keep=16")
    it.handle.remove()
    with pytest.raises(NothingCompressed, match="went by"):
        it.answer([ask(image(asked[0][0]), text(asked[0][1]))], max_new_tokens=1)


def test_pixels_that_the_family_leaves_alone_are_refused(reader: Any) -> None:
    inputs = {"input_ids": torch.ones(1, 4), "pixel_values_videos": torch.zeros(1)}
    with pytest.raises(UnsupportedModel, match=r"only image tokens .* pixel_values_videos"):
        reader("evocut:keep=16")._generate(inputs)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Qwen2.5-VL, its processor, and a film of twelve grey pictures, ``film.mp4``."""
    av = pytest.importorskip("av", reason="needs PyAV: make test-lmms")
    pytest.importorskip("torchvision", reason="needs torchvision: make test-lmms", exc_type=ImportError)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    from tests.zoo.models import tiny

    folder = tmp_path_factory.mktemp("films")
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = ["<pad>", "<s>", *(f"w{i}" for i in range(2, 150)), *marks, *(f"w{i}" for i in range(154, 159)), "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", additional_special_tokens=marks
    )
    each = "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% else %}"
    each += "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|> {% endif %}{% endfor %}"
    template = "{% for message in messages %}" + each + "{% endfor %}w3"
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 1, "max_pixels": 32 * 32}
    seeing = (Qwen2VLImageProcessor(**sizes), fast, Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=True))
    Qwen2_5_VLProcessor(*seeing, chat_template=template).save_pretrained(folder)
    tiny("qwen2_5_vl").save_pretrained(folder)
    with av.open(str(folder / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(12):
            grey = torch.full((32, 32, 3), 20 * i, dtype=torch.uint8).numpy()
            film.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        film.mux(stream.encode())
    return folder


def test_films_are_read_and_compressed(films: Path) -> None:
    asks = Prompt.about([str(films / "film.mp4")], "w5 w6")
    plain = Reader(str(films), "none", max_num_frames=6)
    grid = plain._inputs([asks])["video_grid_thw"][0].tolist()
    assert grid[0] == 3  # two frames make one
    whole = grid[0] * grid[1] * grid[2] // 4
    assert plain.answer([asks], max_new_tokens=3)[0].read == whole + 5
    it = Reader(str(films), "evocut:keep=4", max_num_frames=6)
    (answer,) = it.answer([asks], max_new_tokens=3)
    assert answer.read == 4 + 5
    assert it.tally.means() == {"visual_tokens": whole, "visual_entered": 4, "visual_per_layer": 4}


def test_the_demo_model_of_clips_reads_films(tmp_path: Path) -> None:
    """With its own processor, which needs no torchvision."""
    av = pytest.importorskip("av", reason="needs PyAV: make test-lmms")
    shown = frames()
    with av.open(str(tmp_path / "clip.mov"), "w") as film:
        stream = film.add_stream("png", rate=4)
        stream.width, stream.height, stream.pix_fmt = *shown[0].size, "rgb24"
        for frame in shown:
            film.mux(stream.encode(av.VideoFrame.from_image(frame)))
        film.mux(stream.encode())
    asks = [Prompt.about([str(tmp_path / "clip.mov")], question) for question, _ in CLIP_QUESTIONS]
    plain = Reader("demo-video", "none", device="cpu")
    model, processor = demo.load("demo-video")
    inputs = [prepare(model, processor, [[Video(tuple(shown))]], [question]) for question, _ in CLIP_QUESTIONS]
    said = [answers(processor, one, model.generate(**one, max_new_tokens=6, do_sample=False))[0] for one in inputs]
    assert [one.text for one in plain.answer(asks, max_new_tokens=6)] == said
    it = Reader("demo-video", "evocut:keep=16", device="cpu")
    it.answer(asks, max_new_tokens=1)
    assert it.tally.means()["visual_tokens"] == len(shown) * 36 and it.tally.means()["visual_entered"] == 16
    with pytest.raises(UnsupportedCall, match="clips, not pictures"):
        it.answer([ask(image(shown[0]), text("what?"))])


def test_a_model_that_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownMethod):
        Reader("demo", "evocute:keep=16")
    shutil.copytree(demo.MODEL, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedModel, match="no chat template") as caught:
        Reader(str(tmp_path), "evocut:keep=16")
    assert "chat_template=FILE" in str(caught.value.hint)
    Reader(str(tmp_path), "evocut:keep=16", chat_template=str(demo.MODEL / "chat_template.jinja"))


def test_a_model_is_loaded_as_told() -> None:
    told = {"dtype": "bfloat16", "attn_implementation": "eager", "device_map": "meta"}
    network = Reader("demo", "evocut:keep=16", **told).network
    assert (network.dtype, network.config._attn_implementation) == (torch.bfloat16, "eager")
    assert network.device.type == "meta"


# -- lmms-eval itself


@dataclass(frozen=True)
class Told:
    """What lmms-eval says in the end: answers by task and question, its results, and all that it printed."""

    given: dict[str, dict[int, str]]
    results: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def lmms_eval(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Told]:
    """Ask lmms-eval for tasks, on its own command line; the same again is not asked twice."""
    from pyarrow import Table, parquet

    folder = tmp_path_factory.mktemp("lmms")
    rows = [{"picture": png(seed), "question": q.text, "answer": q.answer} for seed, q in held_out(16)]
    closed = [row for row in rows if row["answer"] in ("yes", "no")]
    parquet.write_table(Table.from_pylist(rows[:QUESTIONS]), folder / "world.parquet")
    parquet.write_table(Table.from_pylist(closed), folder / "closed.parquet")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    runs = itertools.count()

    @cache
    def run(method: str, tasks: str, *options: str, processes: int = 1) -> Told:
        out = folder / f"out{next(runs)}"
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29641"]
        command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "lmms_eval", "--model", "foveate"]
        command += ["--model_args", f"pretrained=demo,method={method}", "--tasks", tasks, "--include_path", str(TASKS)]
        command += ["--output_path", str(out), "--log_samples", *options]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | offline, capture_output=True, text=True, timeout=600, check=False
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed
        given = {}
        for file in out.rglob("*_samples_*.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            given[file.stem.partition("_samples_")[2]] = {line["doc_id"]: line["filtered_resps"] for line in lines}
        results = [json.loads(file.read_text()) for file in out.rglob("*_results.json")]
        return Told(given, results[0] if results else {}, printed)

    return run


def png(seed: int) -> bytes:
    file = io.BytesIO()
    scene(seed).image.save(file, "PNG")
    return file.getvalue()


METHOD, IN_FOURS = "evocut:keep=24", ("--batch_size", "4")


@needs_lmms_eval
def test_one_process_two_processes_and_generate_agree(lmms_eval: Callable[..., Told]) -> None:
    alone = lmms_eval(METHOD, "world,world_pair", *IN_FOURS)
    shared = lmms_eval(METHOD, "world,world_pair", *IN_FOURS, processes=2)
    pairs = held_out(16)[:QUESTIONS]
    model, processor = demo.load()
    with foveate.compress(model, METHOD):
        direct = answer(model, processor, [scene(seed).image for seed, _ in pairs], [q.text for _, q in pairs])
    assert alone.given["world"] == shared.given["world"] == dict(enumerate(direct))
    assert alone.given["world_pair"] == shared.given["world_pair"] != alone.given["world"]
    right = sum(text == q.answer for text, (_, q) in zip(direct, pairs, strict=True)) / QUESTIONS
    for told in (alone, shared):
        assert told.results["results"]["world"]["right,none"] == pytest.approx(right)
        throughput = told.results["throughput"]
        assert [throughput[f"avg_visual_{name}"] for name in ("tokens", "entered", "per_layer")] == [576, 24, 24]
    assert alone.results["throughput"]["avg_pictures"] == 3 * QUESTIONS


@needs_lmms_eval
def test_another_method_answers_otherwise_and_is_not_served_from_the_cache(
    lmms_eval: Callable[..., Told], tmp_path: Path
) -> None:
    kept = ("--use_cache", str(tmp_path))
    few = lmms_eval(METHOD, "world", *IN_FOURS, *kept)
    every = lmms_eval("evocut:keep=576", "world", *IN_FOURS, *kept)
    plain = lmms_eval("none", "world", *IN_FOURS)
    assert few.given["world"] != every.given["world"] == plain.given["world"]
    assert "served from cache" not in every.printed


@needs_lmms_eval
def test_the_simple_way_of_asking_and_scored_answers(lmms_eval: Callable[..., Told]) -> None:
    told = lmms_eval(METHOD, "world,world_choice", *IN_FOURS, "--force_simple")
    assert told.given["world"] == lmms_eval(METHOD, "world,world_pair", *IN_FOURS).given["world"]
    closed = [(seed, q) for seed, q in held_out(16) if q.answer in ("yes", "no")]
    it = Reader("demo", METHOD, device="cpu")
    right = 0
    for seed, question in closed:
        asks = ask(image(scene(seed).image), text(question.text))
        losses = {words: it.loss(asks, f" {words}")[0] for words in ("yes", "no")}
        right += min(losses, key=lambda words: losses[words]) == question.answer
    assert told.results["results"]["world_choice"]["acc,none"] == pytest.approx(right / len(closed))


@needs_lmms_eval
def test_a_mistake_is_named_on_the_command_line(lmms_eval: Callable[..., Told]) -> None:
    told = lmms_eval("evocut:kep=24", "world")
    assert not told.given
    assert "`evocut` has no option 'kep'\nhint: did you mean `keep`?" in told.printed


@needs_lmms_eval
@pytest.mark.parametrize(
    ("given", "said"), [({"batch_size": "auto"}, "number of prompts"), ({"max_batch_size": 8}, "--batch_size auto")]
)
def test_batches_of_unknown_size_are_refused(given: dict[str, Any], said: str) -> None:
    from lmms_eval.models import get_model

    with pytest.raises(UnsupportedCall, match=said):
        get_model("foveate").create_from_arg_string("pretrained=demo,method=none", given)
