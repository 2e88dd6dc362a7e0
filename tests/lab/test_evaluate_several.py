"""The contest on pairs of pictures in tiles, and on clips: small random models, the demo models' processors."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from typer.testing import CliRunner

import foveate
from foveate.cli import app
from foveate.demo.hd import build as hd
from foveate.demo.video import build as clips
from foveate.errors import BudgetError, TaskError, UnknownMethod, UnsupportedCall
from foveate.families import family_of
from foveate.lab import downscale, evaluate, page, tables
from foveate.lab.answers import Answer, read
from foveate.lab.chat import answers, prepare, visual_tokens
from foveate.lab.contest import BLIND, BUDGETS, FULL, Arm, contest, expected_mean, read_arms
from foveate.lab.downscale import downscaled
from foveate.lab.evaluate import Run, tokens_of
from foveate.lab.media import Media, Video
from foveate.lab.summary import summarise
from foveate.lab.tasks import Item, Task
from tests.cli.test_bad_input import refused
from tests.cli.test_commands import call

SIDE, PATCH = 56, 14  # 16 tokens a crop
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
LIMIT = 3


def parts(tokens: Any, side: int, layers: tuple[int, int]) -> dict[str, Any]:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers[0],
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers[1],
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return {
        "vision_config": vision,
        "text_config": text,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_token_index": tokens.convert_tokens_to_ids("<image>"),
    }


def reader_of_tiles(tokens: Any, *layers: int) -> Any:
    torch.manual_seed(0)
    config = LlavaNextConfig(**parts(tokens, SIDE, layers), image_grid_pinpoints=PINPOINTS)
    return LlavaNextForConditionalGeneration(config).eval()


def reader_of_clips(tokens: Any, *layers: int) -> Any:
    torch.manual_seed(0)
    video = tokens.convert_tokens_to_ids("<video>")
    config = LlavaNextVideoConfig(
        **parts(tokens, 168, layers), video_token_index=video, image_grid_pinpoints=[[168, 336]]
    )
    return LlavaNextVideoForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def tiled() -> Any:
    size, tokens = {"height": SIDE, "width": SIDE}, hd.tokenizer()
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size=size, crop_size=size, do_center_crop=False, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokens,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=hd.build.CHAT_TEMPLATE,
    )
    return reader_of_tiles(tokens, 4, 6), processor


@pytest.fixture(scope="module")
def moving() -> Any:
    processor = clips.processor()
    return reader_of_clips(processor.tokenizer, 4, 6), processor


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def task_of(shown: list[list[Media]], each: int = 2) -> Task:
    """Questions about some groups of pictures, or videos."""
    opened = {f"{group}/{place}": one for group, row in enumerate(shown) for place, one in enumerate(row)}
    items = [
        Item(f"{group}.{q}", tuple(f"{group}/{i}" for i in range(len(row))), f"what {'is ' * q}?", ("x",), f"t{q}")
        for group, row in enumerate(shown)
        for q in range(each)
    ]
    return Task("some", tuple(items), opened.__getitem__)


def pairs() -> Task:
    sizes = [[(112, 112)], [(112, 56), (112, 56)], [(100, 75)], [(56, 112)], [(40, 90), (40, 90)]]
    return task_of([[noise(10 * i + j, *size) for j, size in enumerate(row)] for i, row in enumerate(sizes)])


def videos(*lengths: int) -> Task:
    return task_of([[Video(tuple(noise(100 * i + f, 168, 168) for f in range(n)))] for i, n in enumerate(lengths)])


def alone(model: Any, arm: Arm, task: Task, item: Item) -> tuple[str, float, float]:
    """What is said where one question is asked by itself, and the tokens per layer, with all and with few."""
    network, processor = model
    inputs = prepare(network, processor, [[task.open(key) for key in item.pictures]], [item.question])
    with foveate.compress(network, "random:keep=1.0" if arm is FULL else arm.name) as handle, torch.inference_mode():
        output = network.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
    seen = handle.report.images
    (said,) = answers(processor, inputs, output)
    return said, sum(image.tokens for image in seen), sum(image.mean_alive for image in seen)


def run(model: Any, task: Task, arms: list[Arm], log: Path, **options: Any) -> dict[tuple[str, str], Answer]:
    asked = Run(*model, task, arms, log, {"model": "tiny"}, limit=LIMIT, **options)
    total = asked.left
    assert sum(n for _, n in asked.answers()) == total and asked.left == 0
    return {(one.arm, one.item): one for one in read(log)[1]}


METHODS = [
    Arm("evocut:keep=0.25", "evocut", 0.25),
    Arm("fastv:keep=0.5", "fastv", 0.5),
    Arm("todre:keep=6", "todre", 6),
]


def test_pairs_of_pictures_in_tiles_of_many_sizes(tiled: Any, tmp_path: Path) -> None:
    task = pairs()
    found = run(tiled, task, [FULL, BLIND, *METHODS], tmp_path / "a.jsonl", batch=3)
    assert len(found) == 5 * 10
    for item in task.items:
        for arm in (FULL, *METHODS):
            said, tokens, alive = alone(tiled, arm, task, item)
            one = found[arm.name, item.name]
            assert (one.given, one.mean_alive) == (said, pytest.approx(alive))
        assert found["blind", item.name].mean_alive == found["full", item.name].mean_alive == tokens
        assert found["todre:keep=6", item.name].mean_alive <= 6 * len(item.pictures), "a budget is for each picture"
    assert found["full", "1.0"].picture == "1/0+1/1"
    assert found["full", "0.0"].mean_alive == 16 + 64 and found["full", "1.0"].mean_alive == 2 * (16 + 32)


def test_clips_share_a_batch_only_with_those_of_their_length(moving: Any, tmp_path: Path) -> None:
    network, _ = moving
    task, seen = videos(4, 2, 4, 3, 2, 4), list[tuple[int, ...]]()
    tower = family_of(network).tower(network, "video")
    hook = tower.register_forward_hook(
        lambda _, args, kwargs, output: seen.append(len(output.last_hidden_state)), with_kwargs=True
    )
    found = run(moving, task, [FULL, BLIND, *METHODS], tmp_path / "a.jsonl", batch=3)
    hook.remove()
    assert set(seen) == {2 * 2, 1 * 3, 3 * 4}, "frames of each batch"
    for item in task.items:
        for arm in (FULL, *METHODS[:2]):
            said, _, alive = alone(moving, arm, task, item)
            assert (found[arm.name, item.name].given, found[arm.name, item.name].mean_alive) == (
                said,
                pytest.approx(alive),
            )
    assert found["full", "3.0"].mean_alive == 3 * 36
    blind = {found["blind", f"{group}.0"].given for group in (0, 2, 5)}
    assert len(blind) == 1, "of grey clips of one length none differs"


def test_a_smaller_tiled_picture_is_the_whole_without_tiles(tiled: Any) -> None:
    network, processor = tiled
    pictures = [[noise(1, 112, 112)], [noise(2, 112, 56), noise(3, 100, 75)]]
    inputs = downscaled(network, processor, pictures, ["what?", "which is it?"], 16)
    rows = inputs["mm_encoder_outputs"]["image"].pooler_output
    assert [len(one) for one in rows] == [16, 16, 16] and visual_tokens(network, inputs) == [16, 32]
    whole = prepare(network, processor, pictures, ["what?", "which is it?"])
    encoded = network.get_image_features(whole["pixel_values"], whole["image_sizes"]).pooler_output
    for mine, its in zip(rows, encoded, strict=True):
        torch.testing.assert_close(mine, its[:16])  # a packed picture begins with the whole
    kept = whole["input_ids"][1][whole["attention_mask"][1].bool()]
    text = processor.tokenizer.decode(kept[kept != network.config.image_token_id])
    mine = inputs["input_ids"][1][inputs["attention_mask"][1].bool()]
    assert processor.tokenizer.decode(mine[mine != network.config.image_token_id]) == text
    few = downscaled(network, processor, pictures, ["what?", "which is it?"], 0.1, [[80], [48, 60]])
    assert visual_tokens(network, few) == [4, 4 + 4]
    output = network.generate(**few, max_new_tokens=LIMIT, do_sample=False)
    assert len(output) == 2


def test_a_smaller_video_has_fewer_frames(moving: Any, tmp_path: Path) -> None:
    task = videos(8, 4, 8)
    arms = [Arm(f"downscale:keep={keep}", "downscale", keep) for keep in (0.5, 80, 0.1)]
    found = run(moving, task, [FULL, *arms], tmp_path / "a.jsonl", batch=4)
    alive = {arm.name: [found[arm.name, f"{group}.0"].mean_alive / 36 for group in range(3)] for arm in arms}
    assert alive == {"downscale:keep=0.5": [4, 2, 4], "downscale:keep=80": [2, 2, 2], "downscale:keep=0.1": [1, 1, 1]}


def test_videos_of_several_sizes_are_made_smaller_each_by_its_own_tokens(
    moving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor brings all frames to one size; here a large frame counts as twice as many tokens."""
    large, small = ([[Video((noise(f, side, side),) * 8)] for f in range(2)] for side in (168, 84))
    task, counted = task_of([large[0], small[0], large[1], small[1]], each=1), downscale._tokens

    def tokens(network: Any, processor: Any, one: Media) -> int:
        return counted(network, processor, one) * (1 if one.size == (84, 84) else 2)

    monkeypatch.setattr(downscale, "_tokens", tokens)
    found = run(moving, task, [Arm("downscale:keep=144", "downscale", 144)], tmp_path / "a.jsonl", batch=4)
    assert [one.mean_alive / 36 for _, one in sorted(found.items())] == [2, 4, 2, 4]


def test_where_nothing_can_be_made_smaller_the_others_go_on(
    moving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> Any:
        raise UnsupportedCall("the prompts have no places")

    monkeypatch.setattr(evaluate, "downscaled", refuses)
    log = tmp_path / "a.jsonl"
    asked = Run(*moving, videos(2), [FULL, Arm("downscale:keep=0.5", "downscale", 0.5), METHODS[0]], log, {}, limit=1)
    assert sum(n for _, n in asked.answers()) == 4
    assert read(log)[0]["refused"] == {"downscale:keep=0.5": "the prompts have no places"}


def test_methods_may_be_asked_less_and_later_more(tiled: Any, tmp_path: Path) -> None:
    task, log = pairs(), tmp_path / "a.jsonl"
    arms = [FULL, BLIND, METHODS[0]]
    short = run(tiled, task, arms, log, first=4)
    assert len(short) == 10 + 10 + 4 and {item for arm, item in short if arm == "evocut:keep=0.25"} == {
        "0.0", "0.1", "1.0", "1.1"
    }  # fmt: skip
    header, given = read(log)
    assert header["first"] == 4 and header["n"] == 10
    whole = run(tiled, task, arms, log, first=6)
    assert len(whole) == 26 and all(whole[key] == one for key, one in short.items())

    summary = summarise(given, first=4)
    assert summary.items == 4 and {row.score.n for row in summary.rows} == {4}
    assert [(row.arm, row.score.n) for row in summary.whole] == [("full", 10), ("blind", 10)]
    assert not tables.unfinished(summary, header)
    assert not tables.unfinished(summary, {"first": 1000, "n": 4})
    table, markdown, _ = page.write(given, header, tmp_path, "few")
    rows = {row["arm"]: row for row in csv.DictReader(table.read_text().splitlines())}
    assert table.name == "few.csv" and [rows[arm]["n"] for arm in ("full", "full, all")] == ["4", "10"]
    assert "right over all of them: full" in markdown.read_text() and "## All questions" in markdown.read_text()


def test_the_estimate_and_the_count_know_of_both(tiled: Any, moving: Any, tmp_path: Path) -> None:
    for model, task, tokens in ((tiled, pairs(), 80), (moving, videos(4, 2), 4 * 36)):
        asked = Run(*model, task, [FULL, *METHODS], tmp_path / "a.jsonl", {}, limit=LIMIT)
        assert asked.estimate() > 0 and tokens_of(*model, task) == tokens


def test_arms_from_a_file(tiled: Any, tmp_path: Path) -> None:
    file = tmp_path / "arms.txt"
    file.write_text(
        "# design\n\n0.25 evocut:alpha=0  # no memory\n12  grid\n0.5 v2drop:stages=1@0.4\n- todre:keep=1.0\n"
    )
    more = read_arms(file)
    assert more == [
        Arm("evocut:keep=0.25,alpha=0", "evocut:alpha=0", 0.25),
        Arm("grid:keep=12", "grid", 12),
        Arm("v2drop:stages=1@0.4", "v2drop:stages=1@0.4", 0.5),
        Arm("todre:keep=1.0", "todre:keep=1.0", None),
    ]
    arms, refused = contest(tiled[0], ["grid"], [12], 80, more)
    assert not refused and arms[5:] == [more[0], *more[2:]], "an arm takes part once"
    wrong = [("evocut", TaskError), ("0.2 evocat", UnknownMethod), ("x evocut", TaskError)]
    wrong += [(f"{budget} v2drop:stages=1@0.1", BudgetError) for budget in ("-0.3", "0", "1.5", "nan")]
    for line, kind in wrong:
        file.write_text(line)
        with pytest.raises(kind):
            read_arms(file)
    with pytest.raises(TaskError, match="cannot read"):
        read_arms(tmp_path / "none.txt")


def test_of_arms_with_one_name_the_first_takes_part(tiled: Any, tmp_path: Path) -> None:
    file = tmp_path / "arms.txt"
    file.write_text("12 evocut:alpha=0.95\n12 evocut:alpha=0.5\n12 evocut:alpha=0.50\n")
    arms, _ = contest(tiled[0], ["evocut"], [12], 80, read_arms(file))
    assert [(arm.name, arm.method) for arm in arms[4:]] == [
        ("evocut:keep=12", "evocut"),
        ("evocut:keep=12,alpha=0.5", "evocut:alpha=0.5"),
    ]


@pytest.mark.parametrize("name", ["demo-hd", "demo-video"])
def test_the_arms_of_the_demo_models_contests_can_run(name: str) -> None:
    file = Path(__file__).parents[2] / "benchmarks" / "contests" / f"{name}.txt"
    large = name == "demo-hd"
    network = reader_of_tiles(hd.tokenizer(), 8, 12) if large else reader_of_clips(clips.tokenizer(), 8, 12)
    more, tokens = read_arms(file), 720 if large else 288
    arms, refused = contest(network, ["random"], BUDGETS[name], tokens, more)
    assert not refused and set(more) < set(arms)
    for arm in more:
        if "stages" in arm.name and arm.budget is not None:
            mean = expected_mean(foveate.from_spec(arm.name), tokens, 12) / tokens
            assert mean == pytest.approx(arm.budget, abs=0.002), arm.name


def test_the_command_asks_a_demo_model_about_its_own_world(tmp_path: Path) -> None:
    asked = ["eval", "demo-video", "--n", "4", "--method", "grid", "--max-new-tokens", "2", "--out", str(tmp_path)]
    told = CliRunner().invoke(app, [*asked, "--estimate"], catch_exceptions=False)
    # full, blind; downscale, random and grid at three shares
    assert told.exit_code == 0 and "11 arms, 4 questions: 44 of 44 answers to give" in told.stderr
    short = ["--keep", "0.05", "--method", "fastv", "--first", "1", "--name", "clips", "--dtype", "bfloat16"]
    ran = CliRunner().invoke(app, [*asked, *short], catch_exceptions=False)
    assert "left out: fastv:keep=0.05" in ran.stderr
    assert ran.exit_code == 0 and {file.name for file in tmp_path.iterdir()} == {
        f"clips.{kind}" for kind in ("jsonl", "csv", "md", "html")
    }
    header, given = read(tmp_path / "clips.jsonl")
    assert header["task"] == header["model"] == "demo-video" and header["about"] == "clips" and len(given) == 4 + 4 + 3


def test_a_task_of_videos_is_refused_to_a_model_of_pictures(tmp_path: Path) -> None:
    asked = ["eval", "demo", "--task", "demo-video", "--n", "1", "--method", "grid", "--out", str(tmp_path)]
    hint = "show it pictures, or take a model that reads videos"
    refused(call(*asked), error="LlavaForConditionalGeneration reads no videos", hint=hint)
