"""Training of demo-hd: the fast passes are the stock model's, labels say what is in a patch, a stage resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.demo import build as demo
from foveate.demo.data import IGNORE
from foveate.demo.hd import build
from foveate.demo.hd.data import GRID, Mix, Stream, collate, cut, label
from foveate.demo.hd.network import Heads, Probes, frames, order, read, see
from foveate.demo.hd.paint import ground, paint
from foveate.demo.hd.questions import ask
from foveate.demo.hd.train import Trainer
from foveate.demo.hd.world import PAIRS, SIZES, Item, contents, pictures
from foveate.demo.loop import Phase
from foveate.demo.world import COLOURS, SHAPES, WORDS


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """The model as its training starts."""
    return build.model(build.tokenizer()).eval()


@pytest.mark.parametrize("two", [False, True])
def test_packed_questions_equal_single_prompts_of_the_stock_model(model: torch.nn.Module, two: bool) -> None:
    """Many questions behind a picture of odd size, or a pair, give the logits of each question alone."""
    seed = next(s for s in range(100, 200) if contents(s)[0] == ((336, 448) if two else (600, 450)))
    size, items = contents(seed)
    tokens, processor = build.tokenizer(), build.processor()
    batch = collate(np.random.default_rng(3), size, (SIZES | PAIRS)[size], [items], 4, tokens)
    rng = np.random.default_rng(3)
    shown = pictures(rng, size, items)
    questions = ask(rng, items, 4)
    text = ["USER: " + "<image>\n" * len(shown) + f"{q.text} ASSISTANT:" for q in questions]
    inputs = processor(images=list(shown) * 4, text=text, return_tensors="pt", padding=True)
    with torch.no_grad():
        image = frames(batch, "cpu")
        states = see(model.model.vision_tower, image)
        stock = model.model.vision_tower(image, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[-2], stock[-2], atol=1e-4, rtol=1e-4)
        logits, _, where, _ = read(model, states[-2][:, 1:], batch, tokens, Probes(256))
        asker = batch["segment"][0, where[:, 1]]
        first = torch.tensor([(asker == k).nonzero()[0, 0] for k in range(1, 5)])
        torch.testing.assert_close(logits[first], model(**inputs).logits[:, -1], atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [*SIZES, *PAIRS])
def test_frames_and_tokens_are_those_of_the_processor(model: torch.nn.Module, size: tuple[int, int]) -> None:
    grid = (SIZES | PAIRS)[size]
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    picture = np.asarray(Image.fromarray(noise).resize(size))
    mine = cut(picture, grid)
    inputs = build.processor()(images=[Image.fromarray(picture)], text=["<image>"], return_tensors="pt")
    torch.testing.assert_close(frames({"pixels": torch.from_numpy(mine)[None]}, "cpu"), inputs["pixel_values"][0])
    packed = order(model, size, len(mine) * GRID * GRID)
    assert len(packed) == (inputs["input_ids"] == model.config.image_token_id).sum()
    assert packed[: GRID * GRID].tolist() == list(range(GRID * GRID))


def test_the_start_sees_the_picture_halved(model: torch.nn.Module) -> None:
    """A patch of 28 px is embedded as the demo embeds 14 px of the halved picture; old tokens keep their numbers."""
    from foveate.demo import load

    old, _ = load()
    image = torch.rand(1, 3, 56, 56)
    half = torch.nn.functional.avg_pool2d(image, 2)
    mine = model.model.vision_tower.embeddings.patch_embedding(image)
    torch.testing.assert_close(mine, old.model.vision_tower.embeddings.patch_embedding(half), atol=1e-4, rtol=1e-4)
    before, after = demo.tokenizer(), build.tokenizer()
    for word in (*WORDS, *SHAPES, *COLOURS, "picture", "colour"):
        assert before(f" {word}").input_ids == after(f" {word}").input_ids
    for word in build.NEW_WORDS:
        assert len(after(f" {word}", add_special_tokens=False).input_ids) == 1


def test_labels_of_a_hand_made_picture() -> None:
    items = (
        Item("shape", "square", "blue", 60, 70, 70),
        Item("faint", "star", "", 44, 350, 406),
        Item("word", "zoo", "red", 28, 518, 98),
        Item("number", "42", "green", 28, 182, 602),
    )
    _, owner = paint(np.random.default_rng(0), ground(np.random.default_rng(0), (672, 672)), items)
    labels = label(items, owner, (2, 2))
    assert labels["kind"].shape == (5, GRID * GRID)
    grids = {name: values.reshape(5, GRID, GRID, -1)[..., 0] for name, values in labels.items() if values.ndim == 2
             and values.shape[1] == GRID * GRID}  # fmt: skip
    assert grids["kind"][1, 2, 2] == 1 + SHAPES.index("square") and grids["colour"][1, 2, 2] == COLOURS.index("blue")
    assert grids["faint"][4, 2, 0] == 1 and grids["colour"][4, 2, 0] < 0 and grids["faint"][1, 2, 2] == 0
    assert grids["word"][2, 3, 6] == WORDS.index("zoo") and grids["colour"][2, 3, 6] == COLOURS.index("red")
    assert (grids["tens"][3, 9, 6], grids["ones"][3, 9, 6]) == (4, 2)
    assert grids["kind"][1, 10, 10] == 0 and (grids["word"][0] < 0).all()
    assert grids["kind"][0, 1, 1] == 1 + SHAPES.index("square")
    assert labels["words"][2].sum() == 1 and labels["words"][[1, 3, 4]].sum() == 0
    assert all((labels[name][0] == IGNORE).all() and (labels[name][1:] >= 0).all() for name in ("pairs", "words"))


def test_the_class_token_of_a_thumbnail_is_free() -> None:
    """What it says of coloured shapes and words changes no loss; that of a crop does."""
    batch = next(iter(Stream(Mix(), 24, seed=0)))
    thumbnail = int((batch["pairs"] == IGNORE).all(1).nonzero()[0, 0])
    crop = int((batch["pairs"] != IGNORE).all(1).nonzero()[0, 0])
    hidden = torch.randn(24, 1 + GRID * GRID, 192, requires_grad=True)
    Heads(192)(hidden, batch)[0].backward()
    assert hidden.grad is not None
    assert not hidden.grad[thumbnail, 0].any() and hidden.grad[crop, 0].any()
    alone = {name: values[[thumbnail]] for name, values in batch.items()}
    assert Heads(192)(hidden[[thumbnail]], alone)[0].isfinite()


def test_crowded_frames_have_one_size_of_batch() -> None:
    batch = next(iter(Stream(Mix(), 5, seed=0)))
    assert batch["pixels"].shape == (5, 336, 336, 3) and batch["kind"].shape == (5, GRID * GRID)


@pytest.mark.parametrize("stage", ["see", "read"])
def test_a_step_of_each_stage_and_resuming(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.demo.loop.WORKERS", 0)
    mix = Mix(tuple(PAIRS.items()), pair=0.5, questions=0 if stage == "see" else 4)
    monkeypatch.setitem(Trainer.plan, stage, (Phase(1.0, mix, 2),))
    trainer = Trainer(tmp_path, stage, 0.001, "cpu")
    monkeypatch.setattr(trainer, "validate", lambda: {"mean": 0.5})
    trainer.run(None)
    assert trainer.step >= 1 and (tmp_path / "log.jsonl").read_text()
    again = Trainer(tmp_path, stage, 10, "cpu")
    assert again.step == trainer.step
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
