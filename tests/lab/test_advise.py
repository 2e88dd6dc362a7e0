"""The adviser on profiles whose numbers are known: what it predicts, where it sees break-evens, and what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.lab.advice import costs as costs_module
from foveate.lab.advice.advise import SHARES, WORTH, Adviser
from foveate.lab.advice.costs import Costs, Work, least_squares
from foveate.lab.advice.evidence import Evidence, EvidenceError, Retention, gather, measured, published
from foveate.lab.advice.profile import MethodPoint, Point, Profile, ProfileError
from foveate.lab.advice.timing import Call

N, TEXT, QUESTION, LAYERS = 576, 20, 30, 32
PIXELS, KV, WEIGHTS = 338_688, 1000, 5_000_000
Row = Callable[[float, float], float]


def encode(b: float, p: float) -> float:
    return 4 + 3e-4 * b * p


def prefill(b: float, s: float) -> float:
    return 10 + 0.5 * b * s + 1e-4 * b * s * s


def step(b: float, c: float) -> float:
    return 30 + b + 0.001 * b * c


def rest(b: float, s: float) -> float:
    return 8 + 2 * b


def profile(encode: Row = encode, prefill: Row = prefill, step: Row = step, spread: float = 0.0) -> Profile:
    """A profile of a machine that follows these laws, with runs that differ by so much."""

    def point(stage: Any, row: Row, b: int, size: int) -> Point:
        value = row(b, size)
        return Point(stage, b, size, (value * (1 - 2 * spread), value, value * (1 + 2 * spread)))

    lengths, full = (70, 120, 220, 340, 800), N + TEXT + QUESTION
    points = [point("encode", encode, b, PIXELS) for b in (1, 2)] + [point("rest", rest, b, full) for b in (1, 2)]
    points += [point("prefill", prefill, b, s) for b in (1, 2) for s in (*lengths, full)]
    points += [point("step", step, b, s) for b in (1, 2) for s in (*lengths, full)]
    points += [point("first", lambda b, s: encode(b, PIXELS) + prefill(b, s) + rest(b, s), b, full) for b in (1, 2)]
    points += [Point("memory: encode", b, PIXELS, (20.0 * b * PIXELS,)) for b in (1, 2)]
    points += [Point("memory: read", 1, s, (2e4 * s + 1000,)) for s in lengths]
    methods = [_method("evocut", keep, encode, prefill, step) for keep in (64, 288)]
    methods += [_method("fastv", keep, encode, prefill, step) for keep in (64, 288)]
    return Profile(
        setting={"model": "toy", "device": "cpu", "hardware": "none", "dtype": "float32", "attention": "sdpa"},
        layers=LAYERS,
        tokens=N,
        pictures=1,
        text=TEXT,
        question=QUESTION,
        pixels=PIXELS,
        kv_bytes=KV,
        weight_bytes=WEIGHTS,
        device_bytes=2**30,
        limit=4096,
        points=tuple(points),
        methods=tuple(methods),
        rounds=5,
    )


def _method(name: str, keep: int, encode: Row, prefill: Row, step: Row) -> MethodPoint:
    """EvoCut adds 5 ms to the encoder and 1 + 0.05 K to the rest; FastV reads two layers whole, adds 3 ms inside."""
    if name == "evocut":
        alive, fold, choice, inner = [keep] * LAYERS, 5.0 if keep == 64 else 0.0, 1 + 0.05 * keep, 0.0
    else:
        few = (keep * LAYERS - 2 * N) // (LAYERS - 2)
        alive, fold, choice, inner = [N, N, *[few] * (LAYERS - 2)], 0.0, 0.0, 3.0
    lengths = [TEXT + QUESTION + n for n in alive]
    read = sum(prefill(1, s) for s in lengths) / LAYERS + inner
    seen = encode(1, PIXELS) + fold if keep == 64 else 0.0  # the second budget selects again
    first = seen + read + rest(1, 0) + choice
    call = Call(first, seen, read, step(1, sum(lengths) / LAYERS), first)
    return MethodPoint(name, keep, 1, tuple(alive), (call,) * 5, (choice,) * 5)


def work(**changes: Any) -> Work:
    return dataclasses.replace(Work(tokens=N, pixels=PIXELS, question=QUESTION, output=64), **changes)


def known(method: str, keep: int | float, share: float, reading: float | None = None) -> Retention:
    return Retention(method, keep, share, reading, "a test", measured=True)


# -- the model of costs


def test_it_predicts_what_it_has_not_seen() -> None:
    it = Costs(profile())
    for case in (work(), work(batch=3, question=200), work(tokens=1000, output=1), work(pixels=2 * PIXELS, batch=5)):
        cost, length, b = it.predict(case), case.tokens + TEXT + case.question, case.batch
        assert cost.prefill == pytest.approx(prefill(b, length), rel=1e-6)
        assert cost.rest == pytest.approx(rest(b, 0), rel=1e-6)
        assert cost.decode == pytest.approx(step(b, length + case.output / 2) * (case.output - 1), rel=1e-6)
        assert cost.encode == pytest.approx(encode(b, case.pixels), rel=1e-6)
        assert cost.total == pytest.approx(cost.encode + cost.rest + cost.prefill + cost.decode)
        assert cost.total_error < 1e-3 * cost.total


def test_a_method_before_the_llm_adds_its_fold_and_its_choice() -> None:
    cost, full = Costs(profile()).predict(work(), "evocut", 100), Costs(profile()).predict(work())
    assert cost.encode - full.encode == pytest.approx(5, abs=1e-6)
    assert cost.rest - full.rest == pytest.approx(1 + 0.05 * 100, abs=0.01)
    assert cost.prefill == pytest.approx(prefill(1, 100 + TEXT + QUESTION), rel=1e-6)
    assert cost.alive == (100,) * LAYERS


def test_a_method_inside_the_llm_is_read_layer_by_layer() -> None:
    cost = Costs(profile()).predict(work(), "fastv", 192)
    assert cost.alive[:3] == (N, N, cost.alive[2])
    assert cost.mean_alive == pytest.approx(192, abs=0.5)
    read = sum(prefill(1, n + TEXT + QUESTION) for n in cost.alive) / LAYERS
    assert cost.prefill == pytest.approx(read + 3, rel=1e-6)


def test_tiles_that_count_by_themselves_add_up() -> None:
    it = Costs(profile())
    one, four = it.predict(work()), it.predict(work(tokens=N // 4, pictures=4))
    assert (one.prefill, one.memory, one.decode) == (four.prefill, four.memory, four.decode)
    assert it.predict(work(tokens=N // 4, pictures=4), "evocut", 16).rest == pytest.approx(
        it.predict(work(), "evocut", 64).rest
    )


def test_memory_is_the_weights_and_the_largest_of_its_phases() -> None:
    it, length = Costs(profile()), N + TEXT + QUESTION
    assert it.predict(work(output=1)).memory == pytest.approx(WEIGHTS + max(20 * PIXELS, 2e4 * length + 1000))
    long = it.predict(work(output=100_000))
    assert long.kv == KV * (length + 100_000)
    assert long.memory > WEIGHTS + long.kv
    inside, before = it.predict(work(output=1), "fastv", 64), it.predict(work(output=1), "evocut", 64)
    assert before.memory == pytest.approx(WEIGHTS + 20 * PIXELS)  # the encoder is what is left
    read = 2 * length * KV / LAYERS + (2e4 - KV) * length + 1000  # two layers see everything
    assert inside.memory == pytest.approx(WEIGHTS + max(20 * PIXELS, read), rel=0.02)


def test_what_lies_beyond_the_profile_is_named() -> None:
    it = Costs(profile())
    assert it.predict(work()).beyond == ()
    assert it.predict(work(output=5000)).beyond == ("cache",)
    assert it.predict(work(batch=8)).beyond == ("pixels", "prompt", "cache")


def test_uncertainty_grows_with_the_spread_and_is_not_hidden_by_few_rounds() -> None:
    calm, rough = (Costs(profile(spread=spread)).predict(work()) for spread in (0.01, 0.05))
    assert 0.005 < calm.total_error / calm.total < 0.02
    assert rough.total_error == pytest.approx(5 * calm.total_error, rel=0.01)
    once = Costs(dataclasses.replace(profile(), rounds=1))
    assert once.noise == costs_module._UNKNOWN
    assert once.predict(work()).first_error > 0.05 * once.predict(work()).first


def test_coefficients_are_never_negative() -> None:
    assert least_squares([(1, 1), (1, 2), (1, 3)], [3.0, 2.0, 1.0])[1] == 0.0


# -- where it stops paying


def test_break_evens_are_where_the_predictions_put_them() -> None:
    it = Adviser(Costs(profile(spread=0.01)), work(), Evidence())
    most = it.largest_keep("evocut")
    assert most is not None and 64 < most < N
    assert it.option("evocut", most).pays
    assert not it.option("evocut", most + N // 90).pays
    output = it.longest_output("evocut", 64)
    assert output is not None and output > 0
    at, beyond = (
        Adviser(it.costs, work(output=n), Evidence()).option("evocut", 64).total[0] for n in (output, output + 1)
    )
    assert at >= WORTH > beyond
    assert it.least_batch("evocut", 64) == 1
    fits, more = it.largest_batch(None), it.largest_batch("evocut", 64)
    assert 0 < fits < more
    assert it.costs.predict(work(batch=fits)).memory <= 2**30 < it.costs.predict(work(batch=fits + 1)).memory


def test_a_batch_can_be_what_makes_it_worth_it() -> None:
    slow = profile(step=lambda b, c: 200 + 0.01 * b * c)  # a step costs nearly the same for a batch
    it = Adviser(Costs(slow), work(output=32), Evidence())
    batch = it.least_batch("evocut", 64)
    assert batch is not None and batch > 1


# -- what it says


def said(it: Adviser, topic: str) -> str:
    return " ".join(sentence.text for sentence in it.sentences() if sentence.topic == topic)


def test_it_recommends_the_fastest_that_keeps_enough() -> None:
    evidence = Evidence((known("evocut", 64, 0.90), known("evocut", 192, 0.97), known("fastv", 64, 0.80)))
    it = Adviser(Costs(profile(spread=0.01)), work(output=16), evidence)
    assert it.chosen is not None
    assert it.chosen.spec == "evocut:keep=192"
    assert said(it, "use").startswith("Use evocut:keep=192: the answer comes 1.")
    assert "keeps 97.0% of the accuracy at 33% of the tokens (a test)" in said(it, "use")
    assert Adviser(it.costs, it.work, evidence, loss=0.1).chosen.spec == "evocut:keep=64"  # type: ignore[union-attr]


def test_it_recommends_nothing_without_evidence_or_gain() -> None:
    it = Adviser(Costs(profile(spread=0.01)), work(output=16), Evidence())
    assert it.chosen is None
    assert "No recommendation: nothing is known" in said(it, "use")
    assert "foveate eval toy" in said(it, "use")
    low = Adviser(it.costs, it.work, Evidence((known("evocut", 64, 0.6),)))
    assert "Nothing that pays is known to keep 95% of the accuracy. The least loss: evocut:keep=" in said(low, "use")


def test_it_says_when_decoding_or_encoding_is_all() -> None:
    evidence = Evidence((known("evocut", 64, 1.0),))
    long = Adviser(Costs(profile(spread=0.01)), work(output=2000), evidence)
    assert "This is decode-bound (9" in said(long, "not")
    assert said(long, "use").startswith("Do not compress for speed: the fastest, ")
    heavy = profile(encode=lambda b, p: 6000 * b, spread=0.01)
    tower = Adviser(Costs(heavy), work(output=1), evidence)
    assert "This is encoder-bound (9" in said(tower, "not")
    assert tower.chosen is None


def test_noise_makes_it_undecided() -> None:
    it = Adviser(Costs(profile(spread=0.4)), work(output=16), Evidence((known("evocut", 64, 1.0),)))
    assert it.chosen is None
    assert said(it, "use").startswith("Undecided: the fastest, ")


def test_few_tokens_and_text_are_reasons_not_to() -> None:
    it = Adviser(Costs(profile()), work(tokens=40), Evidence())
    assert "The picture is few tokens already: 40, beside 50 of text." in said(it, "not")
    text = Adviser(Costs(profile()), work(output=16), Evidence((known("evocut", 64, 0.99, 0.7),)), text_rich=True)
    assert said(text, "use").startswith("Do not compress text that is to be read")
    assert "70.0% of the accuracy on questions about text" in said(text, "use")
    assert "OCRBench falls from 85.3" in said(text, "use")


def test_memory_is_a_reason_where_it_is_the_limit() -> None:
    easy = Adviser(Costs(profile()), work(), Evidence((known("evocut", 64, 1.0),)))
    assert "Memory is not the limit" in said(easy, "memory")
    reading = dataclasses.replace(profile(), device_bytes=80_000_000)
    points = [p for p in reading.points if p.stage != "memory: encode"]
    points += [Point("memory: encode", b, PIXELS, (b * 1e6,)) for b in (1, 2)]
    tight = Costs(dataclasses.replace(reading, points=tuple(points)))
    it = Adviser(tight, work(batch=8, output=4), Evidence((known("evocut", 64, 1.0),)))
    assert it.largest_batch(None) < 8
    assert "Compress for memory" in said(it, "memory")


def test_every_sentence_has_a_number() -> None:
    for evidence in (Evidence(), Evidence((known("evocut", 64, 0.99),)), published("llava")):
        for text_rich in (False, True):
            it = Adviser(Costs(profile()), work(), evidence, text_rich=text_rich)
            for sentence in it.sentences():
                assert any(letter.isdigit() for letter in sentence.text) or sentence.topic == "accuracy", sentence


def test_a_budget_out_of_reach_is_left_out_by_name() -> None:
    it = Adviser(Costs(profile()), work(), Evidence())
    few = round(N * SHARES[-1])
    assert f"fastv:keep={few}" in it.out_of_reach
    assert f"evocut:keep={few}" in [one.spec for one in it.options]


# -- what it knows of accuracy


def test_a_budget_has_the_evidence_of_the_nearest_below() -> None:
    it = Evidence((known("evocut", 64, 0.9), known("evocut", 192, 0.97), known("evocut", 0.5, 0.99)))
    shares = {keep: it.of("evocut", keep, N) for keep in (63, 64, 191, 192, 288)}
    found = {keep: one.share if one is not None else None for keep, one in shares.items()}
    assert found == {63: 0.9, 64: 0.9, 191: 0.97, 192: 0.97, 288: 0.99}
    assert it.of("evocut", 32, N) is None
    assert it.of("fastv", 288, N) is None


def test_of_several_figures_the_lowest_counts() -> None:
    it = Evidence((known("fastv", 192, 0.95), known("fastv", 192, 0.88)))
    found = it.of("fastv", 192, N)
    assert found is not None and found.share == 0.88


@pytest.mark.parametrize("prefix", ["", "type_"])
def test_tables_of_answers_are_read(tmp_path: Path, prefix: str) -> None:
    table = tmp_path / "accuracy.csv"
    model = "model" if not prefix else "run_model"
    table.write_text(
        f"method,budget,n,accuracy,{prefix}word,{prefix}number,{model}\n"
        "full,,100,0.8,0.9,0.6,mine\n"
        "evocut,64,100,0.6,0.45,0.6,mine\n"
        "evocut,0.5,100,0.72,0.9,0.6,mine\n"
        "evocut,64,100,0.1,0.1,0.1,other\n"
    )
    it = measured(table, "mine")
    assert [(one.keep, round(one.share, 3), round(one.reading or 0, 3)) for one in it.known] == [
        (64, 0.75, 0.75),
        (0.5, 0.9, 1.0),
    ]
    assert it.known[0].measured and "100 questions" in it.known[0].source
    assert measured(table, "nobody").known == ()
    assert gather("mine", "llava", [table]).known == it.known  # what is published for others is no evidence then
    assert gather("nobody", "llava", [table]) == published("llava")


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(EvidenceError, match="no table of accuracy"):
        measured(other, "mine")
    with pytest.raises(EvidenceError, match="no table of accuracy"):
        measured(tmp_path / "missing.csv", "mine")


def test_what_papers_print_is_there_by_type_of_model() -> None:
    found = published("llava").of("evocut", 64, 576)
    assert found is not None and not found.measured
    assert found.share == pytest.approx(0.944)
    assert "published by EvoCut" in found.source
    assert published("nothing").known == ()


# -- profiles on disk


def test_a_profile_survives_the_disk(tmp_path: Path) -> None:
    before, path = profile(spread=0.01), tmp_path / "new" / "profile.json"
    before.save(path)
    after = Profile.read(path, before.setting)
    assert after == before
    assert Costs(after).predict(work()) == Costs(before).predict(work())


def test_a_profile_of_other_conditions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    with pytest.raises(ProfileError, match="dtype was float32, is bfloat16") as caught:
        Profile.read(path, profile().setting | {"dtype": "bfloat16"})
    assert "rm " in str(caught.value.hint)
    for content in ("", "{}", "[1]", '{"format": 1}', '{"format": 99}'):
        path.write_text(content)
        with pytest.raises(ProfileError, match="not a profile"):
            Profile.read(path)
