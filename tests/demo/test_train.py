"""Training: the fast passes are the stock model's, labels say what is in a patch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.demo import build
from foveate.demo.data import KINDS, LABELS, Mix, Stream, label, pack
from foveate.demo.loop import Phase
from foveate.demo.network import encode, pixels, read
from foveate.demo.paint import paint
from foveate.demo.train import Trainer
from foveate.demo.world import GRID, SHAPES, SIDE, Print, Thing, scene


def test_packed_questions_equal_single_prompts_of_the_stock_model() -> None:
    """Many questions behind one picture give the logits of each question alone, and no visual token is missing."""
    tokens, picture = build.tokenizer(), scene(5)
    processor, model = build.processor(), build.model(tokens, seed=1).eval()
    questions = picture.questions[:4]
    text = [f"<s>USER: <image>\n{q.text} ASSISTANT:" for q in questions]
    inputs = processor(images=[picture.image] * 4, text=text, return_tensors="pt", padding=True)
    batch = {"pixels": torch.from_numpy(np.array(picture.image))[None]} | pack([questions], tokens)
    _, owner = paint(np.random.default_rng(0), picture.objects, picture.prints)
    patches = label(picture.objects, picture.prints, owner, (0, 0, SIDE, SIDE))
    batch |= {name: torch.from_numpy(values)[None] for name, values in patches.items()}
    with torch.no_grad():
        image = pixels(batch, "cpu")
        assert torch.equal(image[0], inputs["pixel_values"][0])
        states = encode(model.model.vision_tower, image, torch.zeros(1, 2, dtype=torch.long))
        stock = model.model.vision_tower(image, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[-2], stock[-2], atol=1e-5, rtol=1e-4)
        probes = torch.nn.ModuleList([torch.nn.Linear(256, 2), torch.nn.Linear(256, 2)])
        logits, _, where, _ = read(model, states[-2][:, 1:], batch, tokens, probes)
        asker = batch["segment"][0, where[:, 1]]
        first = torch.tensor([(asker == k).nonzero()[0, 0] for k in range(1, 5)])
        torch.testing.assert_close(logits[first], model(**inputs).logits[:, -1], atol=1e-5, rtol=1e-4)


def test_labels_of_a_hand_made_picture() -> None:
    objects = (Thing("square", "blue", 60, 70, 70), Thing("star", "red", 14, 203, 203))
    prints = (Print("42", "number", 30, 270, 70),)
    _, owner = paint(np.random.default_rng(0), objects, prints)
    labels = {
        k: v.reshape(GRID, GRID, -1)[..., 0] for k, v in label(objects, prints, owner, (0, 0, SIDE, SIDE)).items()
    }
    assert set(labels) == {*LABELS, "offset"} and labels["kind"].max() < KINDS
    assert labels["kind"][5, 5] == 1 + SHAPES.index("square") and labels["colour"][5, 5] == 4
    assert labels["kind"][14, 14] == 1 + SHAPES.index("star") and labels["smallest"][14, 14] == 1
    assert labels["kind"][20, 3] == 0 and labels["colour"][20, 3] < 0
    assert labels["tens"][5, 19] == 4 and labels["ones"][5, 19] == 2
    assert (labels["centre"] == 1).sum() == 3
    assert (labels["row"][7], labels["column"][:, 7]) == (pytest.approx(7), pytest.approx(7))


def test_windows_keep_their_place_on_the_canvas() -> None:
    batch = next(iter(Stream(Mix(6, (1, 2), (0, 0), largest=30), 3, seed=0)))
    assert batch["pixels"].shape == (3, 84, 84, 3)
    assert torch.equal(batch["row"].view(3, 6, 6)[:, 0, 0], batch["corner"][:, 0])
    assert torch.equal(batch["column"].view(3, 6, 6)[:, 5, 5], batch["corner"][:, 1] + 5)


@pytest.mark.parametrize("stage", ["see", "joint"])
def test_a_step_of_each_stage_and_resuming(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.demo.loop.WORKERS", 0)
    monkeypatch.setitem(Trainer.plan, stage, (Phase(1.0, Mix(6, (1, 2), (1, 1), largest=30, per_type=1), 2),))
    trainer = Trainer(tmp_path, stage, 0.01, "cpu")
    monkeypatch.setattr(trainer, "validate", lambda: {"mean": 0.5})
    trainer.run(None)
    assert trainer.step >= 1 and (tmp_path / "log.jsonl").read_text()
    again = Trainer(tmp_path, stage, 10, "cpu")
    assert again.step == trainer.step
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
