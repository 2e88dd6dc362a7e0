from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.report import ImageReport, Report, StageReport

SITE_0 = ImageReport(
    row=0,
    index=0,
    modality="image",
    grid=(1, 24, 24),
    tokens=576,
    stages=(StageReport(site=0, method="evocut", kept=tuple(range(64)), scores=tuple(map(float, range(576)))),),
    alive=(64,) * 32,
)
INNER = ImageReport(
    row=1,
    index=2,
    modality="image",
    grid=(1, 2, 2),
    tokens=4,
    stages=(
        StageReport(site=1, method="v2drop", kept=(0, 2, 3), scores=(0.0, 1.0, 2.0, 3.0)),
        StageReport(
            site=3, method="v2drop", kept=(3,), scores=(5.0, 6.0, 7.0), candidates=(0, 2, 3), measures={"a_tv": 0.0312}
        ),
    ),
    alive=(4, 3, 3, 1),
)
ONE = Report(
    method="evocut:keep=64",
    model="LlavaForConditionalGeneration",
    layers=32,
    images=(SITE_0,),
    prompt_tokens=(604,),
    prompt_tokens_after=(92,),
    kv_bytes_before=302 * 2**20,
    kv_bytes_after=46 * 2**20,
    encode_ms=81.2,
    select_ms=3.14,
    prefill_ms=140.0,
    calls=1,
)


def test_one_image_is_one_line() -> None:
    assert str(ONE) == (
        "image 0: 576 -> 64 tokens (11.1 %), mean per layer 64.0, KV 302.0 -> 46.0 MiB, "
        "encode 81 ms, select 3.1 ms, prefill 140 ms"
    )


def test_times_that_were_not_measured_are_left_out() -> None:
    report = dataclasses.replace(ONE, encode_ms=None, select_ms=None, prefill_ms=None)
    assert str(report).endswith("KV 302.0 -> 46.0 MiB")


def test_stages_inside_the_llm_and_measures_have_a_line_each() -> None:
    lines = str(dataclasses.replace(ONE, images=(INNER,), calls=3)).splitlines()
    assert lines[0].startswith("image 2 of row 1: 4 -> 4 tokens (100.0 %), mean per layer 2.8")
    assert lines[1:] == [
        "  before layer 1: 4 -> 3 tokens (v2drop)",
        "  before layer 3: 3 -> 1 tokens (v2drop), a_tv 0.0312",
        "  last of 3 calls",
    ]


def test_several_images_are_rows_of_a_table() -> None:
    text = str(dataclasses.replace(ONE, images=(SITE_0, INNER)))
    lines = text.splitlines()
    assert lines[0].startswith("2 images: 580 -> 68 tokens (11.7 %), mean per layer 66.8")
    assert lines[1].split() == ["row", "image", "grid", "tokens", "kept", "share", "mean", "per", "layer"]
    assert lines[3].split() == ["0", "0", "24", "x", "24", "576", "64", "11.1", "%", "64.0"]
    assert "image 2 of row 1, before layer 3: 3 -> 1 tokens (v2drop), a_tv 0.0312" in text


def test_an_empty_report_says_that_nothing_has_run() -> None:
    report = Report(method="evocut:keep=64", model="Llava", layers=32)
    assert str(report) == "evocut:keep=64 on Llava: nothing has run yet, no image was seen"
    assert (report.tokens, report.kept, report.mean_alive) == (0, 0, 0.0)
    with pytest.raises(IndexError, match="0 images, got index 0"):
        report.draw("whatever.png")


def test_counts_follow_the_stages() -> None:
    assert (SITE_0.kept, SITE_0.n_kept, SITE_0.mean_alive) == (tuple(range(64)), 64, 64.0)
    assert (INNER.kept, INNER.n_kept, INNER.mean_alive) == ((0, 1, 2, 3), 4, 2.75)
    assert [INNER.after(layer) for layer in range(4)] == [(0, 1, 2, 3), (0, 2, 3), (0, 2, 3), (3,)]
    assert INNER.lives() == (0.75, 0.25, 0.75, 1.0)
    assert sum(INNER.lives()) * 4 == sum(INNER.alive)
    assert INNER.scores() == (5.0, 1.0, 6.0, 7.0)


def test_lives_without_decoder_layers_are_zero_or_one() -> None:
    assert sum(dataclasses.replace(SITE_0, alive=()).lives()) == 64
    assert dataclasses.replace(SITE_0, alive=()).mean_alive == 64.0


counts = st.integers(0, 2**40)
indices = st.lists(st.integers(0, 10_000), max_size=6).map(tuple)
floats = st.floats(allow_nan=False)
stages = st.builds(
    StageReport,
    site=st.integers(0, 80),
    method=st.text(max_size=8),
    kept=indices,
    scores=st.none() | st.lists(floats, max_size=6).map(tuple),
    candidates=st.none() | indices,
    measures=st.dictionaries(st.text(max_size=8), floats, max_size=3),
)
images = st.builds(
    ImageReport,
    row=counts,
    index=counts,
    modality=st.sampled_from(["image", "video"]),
    grid=st.tuples(counts, counts, counts),
    tokens=counts,
    stages=st.lists(stages, max_size=3).map(tuple),
    alive=indices,
    merged_into=st.none() | indices,
)
reports = st.builds(
    Report,
    method=st.text(),
    model=st.text(),
    layers=counts,
    images=st.lists(images, max_size=3).map(tuple),
    prompt_tokens=indices,
    prompt_tokens_after=indices,
    kv_bytes_before=counts,
    kv_bytes_after=counts,
    encode_ms=st.none() | floats,
    select_ms=st.none() | floats,
    prefill_ms=st.none() | floats,
    calls=counts,
)


@given(reports)
def test_json_round_trip(report: Report) -> None:
    text = report.to_json()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert Report.from_json(text) == report
    assert Report.from_dict(report.to_dict()) == report


def test_nan_survives_json() -> None:
    stage = StageReport(site=0, method="x", kept=(0,), scores=(math.nan, -math.inf))
    report = dataclasses.replace(ONE, images=(dataclasses.replace(SITE_0, stages=(stage,)),))
    scores = Report.from_json(report.to_json()).images[0].stages[0].scores
    assert scores is not None
    assert math.isnan(scores[0])
    assert scores[1] == -math.inf


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "expected a JSON object, got list"),
        ("{}", "got format None"),
        ('{"format": 1, "method": "x"}', "Report with missing or unknown fields: calls, encode_ms"),
        ("not json", "Expecting value"),
    ],
)
def test_what_is_not_a_report_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Report.from_json(text)
