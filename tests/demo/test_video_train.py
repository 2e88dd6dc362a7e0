"""Training of the video model: the fast passes are the stock model's, labels say what has happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import foveate.demo as demo
from foveate.demo.data import IGNORE
from foveate.demo.loop import Phase
from foveate.demo.video import build
from foveate.demo.video.data import CELLS, LABELS, Mix, Stream, collate, covers, describe, goal, label
from foveate.demo.video.network import LABELLED, Heads, features, read
from foveate.demo.video.paint import film
from foveate.demo.video.train import Trainer
from foveate.demo.video.world import GRID, Life, clip
from foveate.demo.world import COLOURS, SHAPES, Question

LIVES = (
    Life("square", "red", 30, 40, 40, "moves", 2, 2, "right", 60, "red"),
    Life("circle", "blue", 30, 40, 100, "changes", 3, 0, "", 0, "green"),
    Life("star", "white", 34, 100, 100, "vanishes", 4, 0, "", 0, "white"),
    Life("heart", "black", 34, 140, 140, "appears", 5, 0, "", 0, "black"),
    Life("moon", "yellow", 34, 40, 140, "appears", 6, 0, "", 0, "yellow"),
)
"""A clip of eight frames in which everything happens once, and one thing twice."""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    built: nn.Module = build.model(build.tokenizer()).eval()
    return built


def labels() -> dict[str, np.ndarray]:
    _, owners = film(np.random.default_rng(0), 8, LIVES)
    return {name: values.reshape(8, GRID, GRID) for name, values in label(covers(owners, LIVES), LIVES).items()}


def test_the_model_starts_as_the_demo_model(model: nn.Module) -> None:
    source = demo.load("demo")[0].state_dict()
    weights = model.state_dict()
    words = "model.language_model.embed_tokens.weight"
    assert torch.equal(weights[words][:666], source[words]) and len(weights[words]) == len(build.tokenizer())
    for name, value in source.items():
        if "layers" in name or "projector" in name:
            assert torch.equal(weights[name], value)


def test_words_of_the_demo_keep_their_tokens() -> None:
    old, new = demo.load("demo")[1].tokenizer, build.tokenizer()
    text = "USER: what colour is the star at the right? is there an orange heart in the car? ASSISTANT: left 42"
    assert old(text).input_ids == new(text).input_ids
    assert all(len(new(f" {word}", add_special_tokens=False).input_ids) == 1 for word in build.NEW)


def test_packed_questions_equal_single_prompts_of_the_stock_model(model: nn.Module) -> None:
    """Many questions behind one clip give the logits of each question alone, and no visual token is missing."""
    tokens, processor, shown = build.tokenizer(), build.processor(), clip(5)
    sample = describe(len(shown.frames), shown.lives, np.random.default_rng([5, 12]), shown.questions[:4])
    text = [f"USER: <video>\n{q.text} ASSISTANT:" for q in sample["questions"]]
    inputs = processor(text=text, videos=[shown.frames] * 4, padding=True)
    batch = collate([sample], tokens)
    with torch.no_grad():
        rows = features(model.model.vision_tower, batch, "cpu")
        probes = nn.ModuleList([Heads(256) for _ in LABELLED])
        logits, _, where, _, _ = read(model, rows, batch, tokens, probes)
        asker = batch["segment"][0, where[:, 1]]
        first = torch.tensor([(asker == k).nonzero()[0, 0] for k in range(1, 5)])
        torch.testing.assert_close(logits[first], model(**inputs).logits[:, -1], atol=2e-5, rtol=1e-4)


def test_labels_of_a_hand_made_clip() -> None:
    found = labels()
    assert set(found) == set(LABELS) and all(v.max() < LABELS[k] for k, v in found.items())
    square, circle, star = (1 + SHAPES.index(s) for s in ("square", "circle", "star"))
    assert found["kind"][0, 1, 1] == square and found["state"][0, 1, 1] == 0
    assert found["kind"][4, 1, 3] == square and found["state"][4, 1, 3] == 3
    assert found["kind"][4, 1, 1] == 0 and found["gone"][4, 1, 1] == 0
    assert (found["kind"][2:, 3, 1] == circle).all()
    assert found["colour"][2, 3, 1] == COLOURS.index("blue") and found["colour"][3, 3, 1] == COLOURS.index("green")
    assert found["state"][2, 3, 1] == 0 and found["state"][3, 3, 1] == 6
    assert found["former"][3, 3, 1] == COLOURS.index("blue") and found["former"][2, 3, 1] == IGNORE
    assert found["kind"][3, 3, 3] == star and found["gone"][3, 3, 3] == IGNORE
    assert found["gone"][4, 3, 3] == IGNORE and (found["gone"][5:, 3, 3] == star).all()
    assert found["rank"][6, 5, 5] == 0 and found["rank"][6, 5, 1] == 1
    assert (found["first"][0] == 1).all() and (found["first"][1:] == 0).all()


@pytest.mark.parametrize(
    ("kind", "text", "answer", "frames", "cell"),
    [
        ("start", "what colour is the circle at the start?", "blue", range(3), (3, 1)),
        ("end", "what colour is the circle at the end?", "green", range(3, 8), (3, 1)),
        ("vanishes", "what shape vanishes?", "star", range(5, 8), (3, 3)),
        ("order", "what appears first, the moon or the heart?", "heart", range(5, 8), (5, 5)),
        ("count", "how many shapes appear?", "2", range(6, 8), (5, 1)),
        ("there", "was there a green circle at the start?", "no", range(3), (3, 1)),
        ("there", "is there a white star at the end?", "no", range(5, 8), (3, 3)),
        ("direction", "which way does the square move?", "right", range(2, 8), (1, 3)),
    ],
)
def test_where_a_question_is_answered(kind: str, text: str, answer: str, frames: range, cell: tuple[int, int]) -> None:
    _, owners = film(np.random.default_rng(0), 8, LIVES)
    best = covers(owners, LIVES)
    looked = goal(Question(text, answer, kind), best, LIVES, label(best, LIVES)).reshape(8, GRID, GRID)
    assert set(np.nonzero(looked.any((1, 2)))[0]) <= set(frames) and looked[frames[-1]][cell]


def test_a_batch_has_clips_of_one_length() -> None:
    stream = iter(Stream(Mix((4, 8), (2, 3)), 2, 0, build.tokenizer()))
    batches = [next(stream) for _ in range(4)]
    lengths = {b["pixels"].shape[1] for b in batches}
    assert lengths == {4, 8}
    for batch in batches:
        clips, frames = batch["pixels"].shape[:2]
        assert clips * frames == 24 and batch["kind"].shape == (clips, frames * CELLS)
        assert batch["goal"].shape[::2] == (clips, frames * CELLS) and not batch["goal"][:, 0].any()


def test_a_step_and_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.demo.loop.WORKERS", 0)
    monkeypatch.setitem(Trainer.plan, "read", (Phase(1.0, Mix((4,), (2, 2), types=("start", "count")), 1),))
    trainer = Trainer(tmp_path, "read", 0.01, "cpu")
    monkeypatch.setattr(trainer, "validate", lambda: {"mean": 0.5})
    tower = trainer.model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.clone()
    trainer.run(None)
    assert trainer.step >= 1 and (tmp_path / "log.jsonl").read_text()
    assert torch.equal(tower, trainer.model.model.vision_tower.encoder.layers[0].mlp.fc1.weight)  # frozen
    again = Trainer(tmp_path, "read", 10, "cpu")
    assert again.step == trainer.step
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_best_is_kept(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, "read", 1, "cpu")
    place = tmp_path / "weights" / "video"
    place.mkdir(parents=True)
    (place / "CARD.md").write_text("what it is")
    for reached, kept in ((0.5, 0.5), (0.4, 0.5), (0.6, 0.6)):
        with torch.no_grad():
            trainer.model.model.image_newline.fill_(reached)
        trainer.save(place, reached)
        loaded = type(trainer.model).from_pretrained(place)
        assert loaded.model.image_newline[0].item() == pytest.approx(kept, abs=0.01)
    assert (place / "CARD.md").read_text() == "what it is"
