"""Training: the fast passes are the stock model's, labels say what is in a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from foveate.demo import MODEL, build, load
from foveate.demo.data import IGNORE, KINDS, LABELS, Mix, Stream, label, pack
from foveate.demo.guide import GROUPED, REST, SINK, Guide, Probes, astray, point, together, uneven
from foveate.demo.loop import CAREFUL, Loop, Phase, command
from foveate.demo.network import encode, judge, pixels, read
from foveate.demo.paint import paint
from foveate.demo.questions import TYPES
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
    text = [f"USER: <image>\n{q.text} ASSISTANT:" for q in questions]
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
def test_the_mean_has_shares_of_right_ones_alone(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.demo.train.VALIDATION", range(20_000_000, 20_000_001))
    told = Trainer(tmp_path, stage, 1, "cpu").validate(1)
    main = {name: value for name, value in told.items() if name != "mean" and not name.startswith("_")}
    assert set(main) <= ({*LABELS, "counts"} if stage == "see" else {*TYPES}) and len(main) > 3
    assert told["mean"] == pytest.approx(sum(main.values()) / len(main))
    prefix = "_" if stage == "see" else "_see_"
    assert {f"{prefix}{name}" for name in ("offset", "mass", "stray")} <= set(told)
    assert not any("__" in name for name in told)


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


class Tiny(Loop):
    """A recipe whose steps take half a minute; its head has nothing to learn on the first worker."""

    plan: ClassVar = {"one": (Phase(1.0, None, 2),), "two": (Phase(1.0, None, 2),)}
    rates: ClassVar = {"one": (0.1, 0.1), "two": (0.1, 0.1)}
    reached = 0.5

    def build(self, seed: int) -> None:
        self.seeds: list[int] = []
        self.processor = None
        self.model = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
        self.heads = nn.ModuleList([nn.Linear(1, 1)])

    def parts(self) -> list[nn.Module]:
        return [self.model, self.heads]

    def stream(self, phase: Phase, batch: int, seed: int) -> Any:
        self.seeds.append(seed)
        return Ones()

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        self.elapsed += 30
        loss = self.model["layers"](batch["x"]).sum()
        return loss + self.heads[0](batch["x"][:1, :1]).sum() * 2 if self.rank else loss, {}

    def validate(self) -> dict[str, float]:
        return {"mean": self.reached}


class Ones(IterableDataset[dict[str, Any]]):
    """The same batch without end."""

    def __iter__(self) -> Any:
        while True:
            yield {"x": torch.ones(2, 4)}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> type[Tiny]:
    """The recipe, in this process alone; of a model that it saves there is only the name of the file."""

    def save(network: Any, processor: Any, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_text("")

    monkeypatch.setattr("foveate.demo.loop.WORKERS", 0)
    monkeypatch.setattr(build, "save", save)
    return Tiny


def weights(loop: Loop) -> Tensor:
    """All that it has learned."""
    return torch.cat([p.detach().flatten() for p in loop.learning])


def test_a_finished_stage_stays_finished(tiny: type[Tiny], tmp_path: Path) -> None:
    first = tiny(tmp_path, "one", 1, "cpu")
    first.run(None)
    assert first.step == 2
    again = tiny(tmp_path, "one", 1, "cpu")
    again.run(None)
    assert again.step == 2 and torch.equal(weights(again), weights(first))
    longer = tiny(tmp_path, "one", 2, "cpu")
    longer.run(None)
    assert longer.step == 4 and not torch.equal(weights(longer), weights(first))
    other = tiny(tmp_path, "two", 1, "cpu")
    assert other.step == 0 and torch.equal(weights(other), weights(longer))


def test_the_command_says_that_a_stage_is_finished(
    tiny: type[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    line = f"train --out {tmp_path} --stage one --minutes 1 --device cpu --save {tmp_path}/m"
    monkeypatch.setattr("sys.argv", line.split())
    command(tiny, None)
    assert not capsys.readouterr().err and (tmp_path / "m" / "model.safetensors").exists()
    log = (tmp_path / "log.jsonl").read_text()
    command(tiny, None)
    said = capsys.readouterr().err
    assert "one is finished" in said and "hint:" in said and (tmp_path / "log.jsonl").read_text() == log


def test_the_best_of_a_stage_is_its_own(tiny: type[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worse model of the same stage is not written, unless nothing is there; another stage begins anew."""
    written: list[tuple[str, str]] = []
    place = build.save

    def save(network: Any, processor: Any, folder: Path) -> None:
        written.append((stage, folder.name))
        place(network, processor, folder)

    monkeypatch.setattr(build, "save", save)
    for stage, minutes, name, reached in (
        ("one", 1, "a", 0.9), ("one", 2, "a", 0.8), ("one", 3, "b", 0.7), ("one", 4, "b", 0.75), ("two", 1, "b", 0.2),
    ):  # fmt: skip
        monkeypatch.setattr(tiny, "reached", reached)
        tiny(tmp_path, stage, minutes, "cpu").run(tmp_path / name)
    assert written == [("one", "a"), ("one", "b"), ("one", "b"), ("two", "b")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "log.jsonl", "state.pt"]


def test_a_checkpoint_of_a_finished_stage_tells_what_was_saved(tiny: type[Tiny], tmp_path: Path) -> None:
    """What dies while it validates has not finished: started again it validates, and saves."""
    loop = tiny(tmp_path, "one", 1, "cpu")
    loop.validate = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        loop.run(tmp_path / "m")
    again = tiny(tmp_path, "one", 1, "cpu")
    again.run(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_every_seed_worker_and_step_has_data_of_its_own(tiny: type[Tiny], tmp_path: Path) -> None:
    seeds = []
    for seed, step, rank in [(s, t, r) for s in (0, 1) for t in (0, 1) for r in range(3)]:
        loop = tiny(tmp_path, "one", 0.5, "cpu", seed)
        loop.step, loop.rank = step, rank
        loop.run(None)
        (tmp_path / "state.pt").unlink(missing_ok=True)
        seeds += loop.seeds
    assert len(seeds) == len(set(seeds)) == 12


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_share_what_only_one_of_them_learned(
    tiny: type[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Both hand over equally much; in place of their meeting one adds what the other has handed over."""

    def learned(rank: int) -> Tiny:
        loop = tiny(tmp_path, "one", 1, "cpu")
        loop.rank, loop.world = rank, 2
        loop.loss(next(iter(Ones())))[0].backward()
        assert (loop.heads[0].weight.grad is None) == (rank == 0)
        return loop

    given: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda flat: given.append(flat.clone()))
    learned(1 - rank).share(2.0 - rank, rank == 0)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.add_(given[0]))
    loop = learned(rank)
    assert loop.share(1.0 + rank, rank == 1) == (1.5, True)
    assert loop.heads[0].bias.grad.tolist() == [1.0]
