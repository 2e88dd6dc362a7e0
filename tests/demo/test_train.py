"""Training: the fast passes are the stock model's, labels say what is in a patch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.demo import MODEL, build, load
from foveate.demo.data import IGNORE, KINDS, LABELS, Mix, Stream, label, pack
from foveate.demo.guide import GROUPED, REST, SINK, Guide, Probes, astray, point, together, uneven
from foveate.demo.loop import CAREFUL, Phase
from foveate.demo.network import encode, judge, pixels, read
from foveate.demo.paint import paint
from foveate.demo.train import Trainer
from foveate.demo.world import GRID, SHAPES, SIDE, Print, Question, Thing, scene

OBJECTS = (
    Thing("square", "blue", 60, 70, 70), Thing("star", "red", 14, 203, 203), Thing("star", "green", 30, 203, 60),
    Thing("star", "red", 45, 60, 280),
)  # fmt: skip
PRINTS = (Print("42", "number", 30, 270, 70), Print("17", "number", 30, 270, 270))


def patches() -> dict[str, np.ndarray]:
    """Labels of a hand-made picture."""
    _, owner = paint(np.random.default_rng(0), OBJECTS, PRINTS)
    return label(OBJECTS, PRINTS, owner, (0, 0, SIDE, SIDE))


def batch_of(*questions: Question) -> dict[str, torch.Tensor]:
    """The hand-made picture with questions, as training sees it."""
    return {k: torch.from_numpy(v)[None] for k, v in patches().items()} | pack([questions], build.tokenizer())


def test_packed_questions_equal_single_prompts_of_the_stock_model() -> None:
    """Many questions behind one picture give the logits of each question alone, and no visual token is missing."""
    tokens, picture = build.tokenizer(), scene(5)
    processor, model = build.processor(), build.model(tokens, seed=1).eval()
    questions = picture.questions[:4]
    text = [f"<s>USER: <image>\n{q.text} ASSISTANT:" for q in questions]
    inputs = processor(images=[picture.image] * 4, text=text, return_tensors="pt", padding=True)
    batch = {"pixels": torch.from_numpy(np.array(picture.image))[None]} | pack([questions], tokens)
    _, owner = paint(np.random.default_rng(0), picture.objects, picture.prints)
    labels = label(picture.objects, picture.prints, owner, (0, 0, SIDE, SIDE))
    batch |= {name: torch.from_numpy(values)[None] for name, values in labels.items()}
    with torch.no_grad():
        image = pixels(batch, "cpu")
        assert torch.equal(image[0], inputs["pixel_values"][0])
        states = encode(model.model.vision_tower, image, torch.zeros(1, 2, dtype=torch.long))
        stock = model.model.vision_tower(image, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[-2], stock[-2], atol=1e-5, rtol=1e-4)
        logits, _, where, _, _ = read(model, states[-2][:, 1:], batch, tokens, Probes(256))
        asker = batch["segment"][0, where[:, 1]]
        first = torch.tensor([(asker == k).nonzero()[0, 0] for k in range(1, 5)])
        torch.testing.assert_close(logits[first], model(**inputs).logits[:, -1], atol=1e-5, rtol=1e-4)


def test_labels_of_a_hand_made_picture() -> None:
    labels = {k: v.reshape(GRID, GRID, -1)[..., 0] for k, v in patches().items()}
    assert set(labels) == {*LABELS, "item", "cover", "mass", "offset"} and labels["kind"].max() < KINDS
    assert labels["kind"][5, 5] == 1 + SHAPES.index("square") and labels["colour"][5, 5] == 4
    assert labels["kind"][14, 14] == 1 + SHAPES.index("star") and labels["smallest"][14, 14] == 1
    assert labels["kind"][20, 10] == 0 and labels["colour"][20, 10] < 0
    assert labels["tens"][5, 19] == 4 and labels["ones"][5, 19] == 2
    assert (labels["row"][7], labels["column"][:, 7]) == (pytest.approx(7), pytest.approx(7))
    assert labels["ninth"][5, 5] == 0 and labels["ninth"][14, 14] == 4 and labels["ninth"][0, 0] == IGNORE
    assert labels["item"][5, 5] == 1 and labels["item"][14, 14] == 2 and labels["item"][20, 10] == 0
    assert labels["cover"][5, 5] == 1 and 0 < labels["cover"][14, 14] < 1


def test_every_item_is_shared_out_over_its_patches() -> None:
    batch = {name: torch.from_numpy(values)[None] for name, values in patches().items()}
    share = batch["mass"]
    for item in range(1, 7):
        torch.testing.assert_close(share[batch["item"] == item].sum(), torch.tensor(1.0))
    assert not share[batch["item"] <= 0].any()


def test_heads_of_the_tower_are_led_to_the_item_of_a_patch() -> None:
    """No loss where the first head looks at the item as it covers patches, and the second at CLS with its weight."""
    batch = {name: torch.from_numpy(values)[None] for name, values in patches().items()}
    item, cover = batch["item"][0], batch["cover"][0]
    goal = torch.zeros(2, 1 + len(item), 1 + len(item))
    goal[:, 1:, 1:] = (item[:, None] == item) * cover
    goal[1, 1:, 0] = REST
    keys = torch.eye(1 + len(item)).expand(1, 2, -1, -1)
    queries = (goal.clamp(1e-9).log() * len(goal[0]) ** 0.5)[None]
    assert together(GROUPED[0], queries, keys, batch) < 1e-3 < together(GROUPED[0], 0 * queries, keys, batch)
    assert together(0, queries, keys, batch) == 0


def test_where_a_question_looks() -> None:
    """The name of a shape is about its patches, the end of a question about what lies at its place."""
    tokens = build.tokenizer()
    batch = batch_of(
        Question("is the green star above the blue square?", "no", "relation"),
        Question("what number is written at the bottom right?", "17", "number"),
        Question("how many stars are there?", "3", "count"),
    )
    named, names = point(batch, tokens)
    words = tokens.convert_ids_to_tokens(batch["ids"][0])
    star, square, stars = (words.index(w) for w in ("▁star", "▁square", "▁stars"))
    assert names.nonzero()[:, 1].tolist() == [star, square, stars]
    assert batch["colour"][named[:, star]].unique().tolist() == [3]
    digits = [j for j in range(len(words)) if words[j] in "?▁1" and batch["segment"][0, j] == 2]
    for j in digits:
        assert batch["ones"][named[:, j]].unique().tolist() == [7]
    assert batch["hint"][0, digits].tolist() == tokens.convert_tokens_to_ids(["1", "1", "7"])
    assert batch["other"][0, square] == star
    prefix = torch.ones(1, len(words), 3 + GRID**2 + len(words), dtype=torch.bool)
    guide = Guide(batch, tokens, 3, prefix)
    assert guide.first.nonzero()[0, 1] == 3 + GRID**2 + star
    assert guide.count.tolist() == [1, 1, 3] and guide.counts[:, 0].unique().tolist() == [SINK]
    torch.testing.assert_close(guide.counts[2, 1:].sum(), torch.tensor(3.0))
    assert (guide.place[0, star] - guide.place[0, square])[1] > 0


def test_attention_is_led_to_its_goal() -> None:
    goal = torch.tensor([[True, True, False]])
    assert astray(torch.tensor([[9.0, 0.0, -9.0]]), goal) < 1e-3 < astray(torch.zeros(1, 3), goal)
    share = torch.tensor([[3.0, 1.0, 0.0]])
    assert uneven(share.clamp(1e-9).log(), share) < 1e-5 < uneven(torch.zeros(1, 3), share)


def test_an_answer_is_right_as_a_whole() -> None:
    """Of two rows with two questions each: one wrong token makes its answer wrong, and no other."""
    where = torch.tensor([[0, 1], [0, 2], [0, 4], [1, 0], [1, 3], [1, 4]])
    batch = {"segment": torch.tensor([[1, 1, 1, 2, 2]] * 2), "type": torch.tensor([[0, 0, 0, 2, 2], [2, 2, 2, 2, 2]])}
    target = torch.tensor([3, 1, 2, 0, 2, 1])
    said = torch.tensor([3, 0, 2, 0, 2, 0])
    found = judge(torch.eye(4)[said], target, where, batch, ("count", "place", "word"))
    assert {name: each.tolist() for name, each in found.items()} == {"count": [0.0], "word": [1.0, 1.0, 0.0]}


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


def test_a_stage_starts_with_a_model_but_for_a_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, "read", 1, "cpu")
    trainer.start(MODEL)
    for a, b in zip(trainer.model.parameters(), load()[0].parameters(), strict=True):
        assert torch.equal(a, b)
    torch.nn.init.zeros_(next(trainer.model.parameters()))
    trainer.checkpoint()
    again = Trainer(tmp_path, "read", 1, "cpu")
    again.start(MODEL)
    assert not next(again.model.parameters()).any()


def test_the_tower_learns_slowly_once_it_sees(tmp_path: Path) -> None:
    shares = {}
    for stage in ("see", "joint"):
        trainer = Trainer(tmp_path, stage, 1, "cpu")
        tower = {id(p) for p in trainer.tower.parameters()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        shares[stage] = {group["share"] for group in groups if id(group["params"][0]) in tower}
        assert sum(len(group["params"]) for group in groups) == len(trainer.learning)
    assert shares == {"see": {1.0}, "joint": {CAREFUL}}
