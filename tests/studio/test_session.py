"""Who answers in the studio: one model for three ways of answering, and an encoder that runs no more than it must."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from foveate import demo
from foveate.errors import BudgetError, UnknownMethod
from foveate.lab import chat
from foveate.studio.app import Studio
from foveate.studio.errors import StudioError
from foveate.studio.pictures import examples, opened
from foveate.studio.session import Answer, Session, written

QUESTION, TRUTH = demo.QUESTIONS[0]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return demo.load()


@pytest.fixture
def session(loaded: tuple[Any, Any]) -> Iterator[Session]:
    session = Session(*loaded, limit=4)
    yield session
    session.close()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return opened(demo.PICTURE)


@pytest.fixture
def encoded(session: Session) -> Callable[[], int]:
    """How often an encoder has run since the last time somebody asked."""
    towers = [session._plain.model, *(arm.model for arm in session._arms.values())]
    count = 0

    def ran(*_: Any) -> None:
        nonlocal count
        count += 1

    for model in towers:
        model.model.vision_tower.register_forward_hook(ran)

    def since() -> int:
        nonlocal count
        seen, count = count, 0
        return seen

    return since


def test_all_tokens_are_the_plain_model(loaded: tuple[Any, Any], session: Session, picture: Image.Image) -> None:
    model, processor = loaded
    session.answer("a", "evocut:keep=64", picture, QUESTION)  # a method is attached elsewhere meanwhile
    answer = session.plain(picture, QUESTION)
    inputs = chat.prepare(model, processor, [[picture]], [QUESTION])
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert [answer.text] == chat.answers(processor, inputs, output) == [TRUTH]
    assert answer.report is None
    assert not [name for name in vars(model) if "foveate" in name]


def test_no_weight_is_there_twice(loaded: tuple[Any, Any], session: Session) -> None:
    model, _ = loaded
    for arm in session._arms.values():
        assert arm.model is not model
        for name, tensor in model.state_dict(keep_vars=True).items():
            assert arm.model.state_dict(keep_vars=True)[name] is tensor, name


def test_a_moved_budget_reads_what_the_encoder_made(
    session: Session, picture: Image.Image, encoded: Callable[[], int]
) -> None:
    first = session.answer("a", "evocut:keep=64", picture, QUESTION)
    other = session.answer("b", "adav:keep=64", picture, QUESTION)
    assert (first.reused, other.reused, encoded()) == (False, False, 2)
    for keep in (32, 16):
        moved = session.answer("a", f"evocut:keep={keep}", picture, QUESTION)
        assert moved.report is not None
        assert (moved.reused, moved.report.kept, encoded()) == (True, keep, 0)
        assert moved.encode == first.encode  # what it took when it ran
        assert moved.first_token == pytest.approx(moved.select + moved.prefill)
    again = session.answer("b", "adav:keep=64", picture, "what word is written?")
    assert (again.reused, again.text, encoded()) == (True, "dog", 0)


def test_what_was_kept_is_the_same_with_a_new_encoding(session: Session, picture: Image.Image) -> None:
    session.answer("a", "evocut:keep=64", picture, QUESTION)
    reused = session.answer("a", "evocut:keep=32", picture, QUESTION)
    anew = session.answer("b", "evocut:keep=32", picture, QUESTION)
    assert (reused.reused, anew.reused) == (True, False)
    assert reused.report is not None
    assert anew.report is not None
    assert reused.report.images[0].kept == anew.report.images[0].kept


@pytest.mark.parametrize("spec", ["todre:keep=64", "visionzip:keep=64"])
def test_a_method_that_reads_something_else_encodes_again(
    session: Session, picture: Image.Image, encoded: Callable[[], int], spec: str
) -> None:
    session.answer("a", "evocut:keep=64", picture, QUESTION)
    assert not session.answer("a", spec, picture, QUESTION).reused
    assert encoded() == 2


def test_another_picture_is_encoded(session: Session, picture: Image.Image, encoded: Callable[[], int]) -> None:
    session.answer("a", "evocut:keep=64", picture, QUESTION)
    assert not session.answer("a", "evocut:keep=64", picture.transpose(Image.Transpose.ROTATE_90), QUESTION).reused
    assert encoded() == 2


def test_after_an_error_the_next_budget_is_answered(session: Session, picture: Image.Image) -> None:
    session.answer("a", "v2drop:keep=64", picture, QUESTION)
    with pytest.raises(BudgetError, match="out of reach"):
        session.answer("a", "v2drop:keep=1", picture, QUESTION)
    with pytest.raises(UnknownMethod):
        session.answer("a", "evcut:keep=64", picture, QUESTION)
    report = session.answer("a", "v2drop:keep=96", picture, QUESTION).report
    assert report is not None
    assert report.mean_alive == pytest.approx(96, abs=0.5)


def test_any_thread_may_ask(session: Session, picture: Image.Image) -> None:
    def ask(keep: int) -> Answer:
        return session.answer("a", f"grid:keep={keep}", picture, QUESTION)

    with ThreadPoolExecutor(3) as many:
        answers = list(many.map(ask, (9, 16, 25)))
    assert sorted(answer.reused for answer in answers) == [False, True, True]


def test_stages_add_up(session: Session, picture: Image.Image) -> None:
    for answer in (session.plain(picture, QUESTION), session.answer("a", "evocut:keep=64", picture, QUESTION)):
        assert answer.encode is not None
        assert min(answer.encode, answer.prefill, answer.decode) > 0
        assert answer.total == pytest.approx(answer.encode + answer.select + answer.prefill + answer.decode)


def test_what_nobody_foresaw_is_one_line(
    session: Session, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("by zero\nin three places")

    monkeypatch.setattr(chat, "prepare", broken)
    with pytest.raises(StudioError) as caught:
        session.plain(picture, QUESTION)
    assert caught.value.message == "the model failed: ZeroDivisionError: by zero"
    assert "in three places" in caplog.text  # for the terminal


def test_memory_that_is_not_there_has_a_hint(
    session: Session, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(chat, "prepare", full)
    with pytest.raises(StudioError, match="too little memory") as caught:
        session.plain(picture, QUESTION)
    assert caught.value.hint is not None
    assert "--device cpu" in caught.value.hint


def test_methods_are_those_that_run_here(session: Session) -> None:
    names = session.methods()
    assert {"evocut", "adav", "todre", "v2drop", "random"} <= set(names)
    assert names == sorted(names)


def test_a_closed_session_says_so(loaded: tuple[Any, Any], picture: Image.Image) -> None:
    session = Session(*loaded)
    session.close()
    with pytest.raises(StudioError, match="closed"):
        session.plain(picture, QUESTION)


def test_the_end_of_a_budget_is_the_pictures_tokens(session: Session, picture: Image.Image) -> None:
    assert session.tokens(picture) == 576


def test_only_the_moved_place_is_asked_again(session: Session) -> None:
    studio = Studio(session, crop=True)
    steps = list(studio.ask(str(demo.PICTURE), QUESTION, "evocut", 64, "grid", 64))
    assert [sum(each is not None for each in asked.shown) for asked, _ in steps if asked] == [1, 2, 3]
    asked = steps[-1][0]
    moved = studio.again("b", asked, "evocut", 64, "grid", 16)
    assert asked is not None
    assert moved is not None
    assert moved.shown[:2] == asked.shown[:2]
    assert isinstance(moved.shown[2], Answer)
    assert moved.shown[2].report is not None
    assert moved.shown[2].report.kept == 16
    assert studio.again("a", None, "evocut", 64, "grid", 16) is None


@pytest.mark.parametrize(
    ("path", "question", "message"),
    [(None, "what?", "no picture"), (str(demo.PICTURE), " ", "no question"), (__file__, "what?", "not a readable")],
)
def test_what_cannot_be_asked_is_said(session: Session, path: str | None, question: str, message: str) -> None:
    ((asked, wrong),) = Studio(session, crop=True).ask(path, question, "evocut", 64, "adav", 64)
    assert asked is None
    assert message in wrong
    assert "hint:" in wrong


def test_pictures_that_are_too_large_are_refused_unread(tmp_path: Path) -> None:
    Image.new("1", (6001, 6001)).save(tmp_path / "large.png")
    with pytest.raises(StudioError, match="too large"):
        opened(tmp_path / "large.png")


def test_offered_pictures_have_questions() -> None:
    offered = examples()
    assert len(offered) == 4
    assert all(example.image.size == (336, 336) and len(example.questions) >= 3 for example in offered)


def test_a_spec_that_says_what_it_keeps_stays() -> None:
    assert written(" evocut ", 9) == "evocut:keep=9"
    assert written("v2drop:stages=3@0.5", 9) == "v2drop:stages=3@0.5"
