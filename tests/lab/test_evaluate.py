"""The contest on the demo model: who answers what, what is written down, and what a kill cannot undo."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import foveate
from foveate import demo
from foveate.demo.evaluate import answer
from foveate.errors import TaskError
from foveate.families import family_of
from foveate.lab.answers import read
from foveate.lab.contest import BLIND, FULL, Arm
from foveate.lab.downscale import downscaled
from foveate.lab.evaluate import Run, tokens_of
from foveate.lab.tasks import Item, Task, load_task

ROOT = Path(__file__).parents[2]
SPECS = ("random:keep=40", "evocut:keep=40", "evocut:keep=20", "v2drop:keep=60", "grid:keep=20", "todre:keep=30")
ARMS = [FULL, BLIND, Arm("downscale:keep=40", "downscale", 40)]
ARMS += [Arm(spec, spec.split(":")[0], int(spec.split("=")[1])) for spec in SPECS]
HEADER = {"model": "demo", "commit": "none"}


@pytest.fixture(scope="module")
def model() -> Any:
    return demo.load()


def start(model: Any, log: Path, task: Task, arms: list[Arm] = ARMS, **options: Any) -> Run:
    return Run(*model, task, arms, log, HEADER, **options)


def test_every_arm_answers_what_a_user_would_get(model: Any, tmp_path: Path) -> None:
    network, processor = model
    task, log = load_task("demo", 5), tmp_path / "a.jsonl"
    passes: list[int] = []
    hook = family_of(network).tower(network, "image").register_forward_hook(lambda *_: passes.append(1))
    run = start(model, log, task)
    assert sum(answered for _, answered in run.answers()) == 5 * len(ARMS) and run.left == 0
    hook.remove()
    assert "generate" not in network.__dict__, "the model is left as it was"
    # Two pictures are asked about in the first round, one in the other three. A pass for each round in which all
    # tokens, a grey or a small picture are read; else one for the pictures of the first and one for those of the other
    # rounds: for random, grid and v2drop, which read nothing of the encoder, for evocut, for todre; and the scout's.
    assert len(passes) == 3 * 4 + 2 * 3 + 1
    header, answers = read(log)
    assert header["task"] == "demo" and header["n"] == 5 and header["dtype"] == "float32"
    found = {(a.arm, a.item): a for a in answers}
    assert len(found) == len(answers) == 5 * len(ARMS)
    pictures = [task.open(item.pictures[0]) for item in task.items]
    questions = [item.question for item in task.items]
    for arm in (FULL, *ARMS[3:]):
        if arm is FULL:
            said = answer(network, processor, pictures, questions)
            means = [576.0] * 5
        else:
            with foveate.compress(network, arm.name) as handle:
                said = answer(network, processor, pictures, questions)
            means = [image.mean_alive for image in handle.report.images]
        mine = [found[arm.name, item.name] for item in task.items]
        assert [a.given.lower() for a in mine] == said
        assert [a.mean_alive for a in mine] == means
        assert [a.right for a in mine] == [s in item.answers for s, item in zip(said, task.items, strict=True)]
    assert {found["downscale:keep=40", item.name].mean_alive for item in task.items} == {36.0}
    assert {a.picture for a in answers} == {item.pictures[0] for item in task.items}


def test_blind_sees_nothing(model: Any, tmp_path: Path) -> None:
    black, white = (Image.new("RGB", (336, 336), colour) for colour in ("black", "white"))
    items = [Item(str(i), (key,), "what colour is the circle?", ("?",)) for i, key in enumerate("bw")]
    task = Task("two", tuple(items), {"b": black, "w": white}.__getitem__)
    list(start(model, tmp_path / "b.jsonl", task, [BLIND]).answers())
    one, other = read(tmp_path / "b.jsonl")[1]
    assert one.given == other.given and one.mean_alive == 576.0


def test_rounds_of_unequal_length_and_several_pictures(model: Any, tmp_path: Path) -> None:
    open_one = {name: Image.new("RGB", (336, 336), name) for name in ("red", "blue")}.__getitem__
    asked = [(("red",), 2), (("red", "blue"), 1), (("blue",), 1)]
    items = [Item(f"{i}.{j}", keys, "what?", ("x",)) for i, (keys, n) in enumerate(asked) for j in range(n)]
    arms = [FULL, Arm("adav:keep=10", "adav", 10), Arm("adav:keep=5", "adav", 5)]
    log = tmp_path / "c.jsonl"
    list(start(model, log, Task("odd", tuple(items), open_one), arms, batch=2, limit=3).answers())
    found = {(a.arm, a.item): a for a in read(log)[1]}
    assert len(found) == 3 * 4
    assert found["full", "1.0"].mean_alive == 2 * 576 and found["adav:keep=5", "1.0"].mean_alive == 10.0
    assert found["adav:keep=10", "1.0"].picture == "red+blue"


def test_goes_on_where_it_stopped_and_asks_nothing_twice(model: Any, tmp_path: Path) -> None:
    task, whole, torn = load_task("demo", 8), tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    arms = ARMS[2:6]
    list(start(model, whole, task, arms, batch=1).answers())
    for place, _ in enumerate(start(model, torn, task, arms, batch=1).answers()):
        if place == 5:
            break
    text = torn.read_bytes()
    torn.write_bytes(text[: text.rstrip(b"\n").rfind(b"\n") + 30])  # the last line is cut short, as by a kill
    before = len(read(torn)[1])
    run = start(model, torn, task, arms, batch=1)
    assert 0 < before < 32 and run.left == 32 - before
    assert sum(answered for _, answered in run.answers()) == 32 - before
    assert _same(whole, torn)
    more = start(model, torn, task, [*arms, ARMS[7]], batch=1)
    assert more.left == 8, "an arm may join later"


def test_another_run_is_not_mixed_in(model: Any, tmp_path: Path) -> None:
    log = tmp_path / "d.jsonl"
    list(start(model, log, load_task("demo", 1), [FULL]).answers())
    for task, options in ((load_task("demo", 2), {}), (load_task("demo", 1), {"limit": 3})):
        with pytest.raises(TaskError, match="answers of another run") as refused:
            start(model, log, task, [FULL], **options)
        assert "--out" in str(refused.value.hint)
    trained = copy.deepcopy(model)
    trained[0].lm_head.weight.data += 0.01
    with pytest.raises(TaskError, match="weights was"):
        start(trained, log, load_task("demo", 1), [FULL])


def test_a_budget_that_a_picture_cannot_meet_takes_the_arm_out(model: Any, tmp_path: Path) -> None:
    log = tmp_path / "e.jsonl"
    run = start(model, log, load_task("demo", 1), [Arm("v2drop:keep=1", "v2drop", 1), FULL])
    list(run.answers())
    header, answers = read(log)
    assert [a.arm for a in answers] == ["full"] and "out of reach" in header["refused"]["v2drop:keep=1"]


def test_the_estimate_writes_nothing(model: Any, tmp_path: Path) -> None:
    run = start(model, tmp_path / "f.jsonl", load_task("demo", 4), ARMS[:5])
    assert run.estimate() > 0 and not (tmp_path / "f.jsonl").exists() and run.left == 4 * 5
    assert "generate" not in run.network.__dict__
    assert tokens_of(*model, run.task) == 576


def test_downscaled_pictures_have_their_tokens(model: Any) -> None:
    network, processor = model
    pictures = [[Image.open(demo.PICTURE).convert("RGB")], [Image.new("RGB", (336, 336), "red")]]
    inputs = downscaled(network, processor, pictures, ["what?", "what colour is this?"], 64)
    rows = inputs["mm_encoder_outputs"]["image"].pooler_output
    assert [len(row) for row in rows] == [64, 64]
    assert (inputs["input_ids"] == network.config.image_token_id).sum(-1).tolist() == [64, 64]
    assert inputs["attention_mask"][0, 0] == 0, "rows are padded on the left"
    whole = downscaled(network, processor, pictures[:1], ["what?"], 1.0)
    full = network.get_image_features(
        pixel_values=processor(images=pictures[0], text="<image>", return_tensors="pt")["pixel_values"]
    ).pooler_output
    assert torch.equal(whole["mm_encoder_outputs"]["image"].pooler_output[0], full[0])


def test_kill_minus_nine_in_the_middle(tmp_path: Path) -> None:
    """The command itself: killed while it answers, started again, compared with one that was left alone."""
    command = [sys.executable, "-m", "foveate", "eval", "--n", "4", "--batch", "1", "--keep", "40", "--max-new-tokens"]
    command += ["3", "--method", "evocut", "--method", "pool", "--threads", "1", "--out"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    once, twice = tmp_path / "once", tmp_path / "twice"
    subprocess.run([*command, once], env=env, check=True, capture_output=True)
    victim = subprocess.Popen([*command, twice], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = twice / "accuracy.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 4:
        assert victim.poll() is None, "it was to be killed before its end"
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    before = log.read_bytes().count(b'"arm"')
    again = subprocess.run([*command, twice], env=env, check=True, capture_output=True, text=True)
    total = 6 * 4
    assert 0 < before < total and f"{total - before} of {total} answers to give" in again.stderr
    assert _same(once / "accuracy.jsonl", log)
    tables = [(folder / "accuracy.csv").read_text().splitlines() for folder in (once, twice)]
    assert len(tables[0]) == len(tables[1]) == 1 + 6


def _same(one: Path, other: Path) -> bool:
    """Whether two files hold the same answers, each once."""
    counts = []
    for path in (one, other):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        counts.append(Counter(json.dumps(line, sort_keys=True) for line in lines if "arm" in line))
    return counts[0] == counts[1] and set(counts[0].values()) == {1}
