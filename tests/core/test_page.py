"""The report page: one file that says what happened and reaches for nothing outside itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate import page
from foveate.report import ImageReport, Report, StageReport

PICTURE = Image.effect_noise((300, 200), 60).convert("RGB")


def report(*stages: StageReport, name: str = "evocut:keep=2", grid: tuple[int, int, int] = (1, 2, 3)) -> Report:
    tokens = grid[0] * grid[1] * grid[2]
    alive = tuple(
        min([len(stage.kept) for stage in stages if stage.site <= layer], default=tokens) for layer in range(4)
    )
    image = ImageReport(row=0, index=0, modality="image", grid=grid, tokens=tokens, stages=stages, alive=alive)
    return Report(method=name, model="Llava", layers=4, images=(image,), kv_bytes_before=2**21, kv_bytes_after=2**20)


BEFORE = StageReport(site=0, method="evocut", kept=(1, 4), scores=(0.0, 1.0, -0.5, float("-inf"), 2.0, float("nan")))
INSIDE = (StageReport(site=1, method="v2drop", kept=(0, 1, 2)), StageReport(site=3, method="v2drop", kept=(1,)))


def data(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_says_what_was_asked_and_answered_and_what_became_of_each_token() -> None:
    runs = [page.Run(report=report(BEFORE), answer="a cat"), page.Run(report=report(*INSIDE, name="v2drop:keep=2"))]
    text = page.render([PICTURE], runs, question="what is it?", plain=page.Plain(answer="a dog", encode_ms=5.0))
    for words in ("what is it?", "a cat", "a dog", "2 (33.3 %)", "1.00 MiB", "5.0 ms", "before layer 3", "3 → 1"):
        assert words in text
    first, second = (run["images"][0] for run in data(text)["runs"])
    assert first["left"] == [0, -1, 0, 0, -1, 0]
    assert first["scores"] == [0.0, 1.0, -0.5, "never", 2.0, None]
    assert second["left"] == [1, -1, 1, 0, 0, 0]
    assert second["alive"] == [6, 3, 3, 1]
    assert second["scores"] is None
    assert data(text)["images"][0]["panels"][0]["tokens"] == list(range(6))


def test_the_page_reaches_for_nothing_outside_itself() -> None:
    text = page.render([PICTURE], [page.Run(report=report(BEFORE))])
    assert not re.search(r"(?:src|href)=|@import|url\(", text.replace("data:", ""))
    assert set(re.findall(r"https?://[^\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, nothing is loaded


def test_what_was_said_cannot_become_a_part_of_the_page() -> None:
    evil = "</script><script>alert(1)</script>"
    run = page.Run(report=report(BEFORE, name=evil), answer=evil)
    text = page.render([PICTURE], [run], question=evil, plain=page.Plain(answer=evil))
    assert "<script>alert" not in text
    assert data(text)["runs"][0]["answer"] == evil


def test_merged_tokens_name_the_one_that_carries_them() -> None:
    seen = report(BEFORE)
    image = ImageReport(**{**seen.images[0].__dict__, "merged_into": (0, 0, -1, -1, 1, 1)})
    merged = Report(**{**seen.__dict__, "images": (image,)})
    assert data(page.render([PICTURE], [page.Run(report=merged)]))["runs"][0]["images"][0]["merged"] == [
        *(1, 1, -1, -1, 4, 4)
    ]


def test_large_pictures_are_stored_smaller_and_unknown_ones_on_plain_ground() -> None:
    large = page.render([Image.new("RGB", (5000, 3000))], [page.Run(report=report(BEFORE))])
    assert len(large) < 200_000
    unknown = page.render([], [page.Run(report=report(BEFORE))])
    assert "plain ground" in unknown
    assert "plain ground" not in large


def test_what_cannot_be_one_page_is_refused() -> None:
    one, other = page.Run(report=report(BEFORE)), page.Run(report=report(grid=(1, 3, 3)))
    with pytest.raises(ValueError, match="about the same pictures, got 2 with 2 shapes"):
        page.render([PICTURE], [one, other])
    with pytest.raises(ValueError, match="about the same pictures"):
        page.render([PICTURE], [])
    with pytest.raises(ValueError, match="start is one of 1 runs, got 1"):
        page.render([PICTURE], [one], start=1)
    with pytest.raises(ValueError, match="about the same pictures"):
        Report(method="x", model="y", layers=4).save_html("x.html", PICTURE)


def test_a_report_writes_its_own_page(tmp_path: Path) -> None:
    report(BEFORE).save_html(tmp_path / "out.html", PICTURE, question="why?", answer="so", full_answer="because")
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert all(words in text for words in ("why?", "so", "because", "all 6 tokens"))
