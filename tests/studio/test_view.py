"""What the studio shows of answers."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from foveate.errors import BudgetError
from foveate.report import ImageReport, Report, StageReport
from foveate.studio import view
from foveate.studio.session import Answer

NAMES = ("all tokens", "evocut:keep=2", "v2drop:keep=2")
PICTURE = Image.new("RGB", (90, 60), (90, 120, 150))


def report(kept: tuple[int, ...], site: int, alive: tuple[int, ...]) -> Report:
    stage = StageReport(site=site, method="some", kept=kept)
    image = ImageReport(row=0, index=0, modality="image", grid=(1, 2, 3), tokens=6, stages=(stage,), alive=alive)
    sizes = {"kv_bytes_before": 6 * 2**20, "kv_bytes_after": 2 * 2**20}
    return Report(method="some:keep=2", model="Small", layers=len(alive), images=(image,), **sizes)


FULL = Answer("red", None, 100.0, False, 0.0, 300.0, 50.0)
EARLY = Answer("blue", report((0, 1), 0, (2, 2)), 100.0, False, 1.0, 60.0, 40.0)
LATE = Answer("red", report((1, 5), 1, (6, 2)), 100.0, True, 2.0, 80.0, 40.0)


def rows(html: str) -> dict[str, list[str]]:
    """Return the table's cells by the names of their rows."""
    lines = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", html)
    return {_text(name): [_text(cell) for cell in re.findall(r"<td>(.*?)</td>", cells)] for name, cells in lines}


def _text(html: str) -> str:
    return re.sub("<[^>]*>", "", html)


def test_numbers_stand_side_by_side() -> None:
    table = rows(view.numbers(NAMES, (FULL, EARLY, LATE)))
    assert table["visual tokens"] == ["6", "2", "6"]
    assert table["mean per layer"] == ["6.0", "2.0", "4.0"]
    assert table["KV cache of prompt"] == ["6.0 MiB", "2.0 MiB", "2.0 MiB"]
    assert table["encode"] == ["100 ms", "100 ms", "re-used"]
    assert table["select"] == ["-", "1.0 ms", "2.0 ms"]
    assert table["first token"] == ["400 ms", "161 ms", "82 ms"]  # nothing was encoded for the last
    assert table["total"] == ["450 ms", "201 ms", "122 ms"]


def test_bars_have_one_scale_and_show_what_was_saved() -> None:
    bars = re.findall(r'<div class="fv-bar">(.*?)</div>', view.numbers(NAMES, (FULL, EARLY, LATE)))
    lengths = [sum(map(float, re.findall(r"width:([\d.]+)%", bar))) for bar in bars]
    assert lengths == pytest.approx([100, 100 * 201 / 450, 100 * 222 / 450], abs=0.05)
    assert ["fv-reused" in bar for bar in bars] == [False, False, True]


def test_where_there_is_no_answer_there_is_a_reason() -> None:
    reason = BudgetError("keep must be at least 1 token, got <0>", "keep=64 keeps 64 tokens")
    card = view.card("evocut:keep=0", reason)
    assert "error: keep must be at least 1 token, got &lt;0&gt;" in card
    assert "hint: keep=64 keeps 64 tokens" in card
    table = rows(view.numbers(NAMES, (FULL, reason, None)))
    assert table["total"] == ["450 ms", "-", "-"]
    assert table["visual tokens"] == ["-", "-", "-"]  # only a report counts them
    assert view.difference(PICTURE, (reason, LATE), ("a", "b"), False) == (None, "")
    assert view.kept(PICTURE, reason, False) is None
    assert view.numbers(NAMES, (None, reason, None)) == ""
    assert view.layers((None, reason)) == ""


def test_what_the_model_says_is_text() -> None:
    card = view.card("a<b", Answer("<img src=x onerror=alert(1)>", None, None, False, 0.0, 1.0, 1.0))
    assert "<img" not in card
    assert "a&lt;b" in card


def test_what_only_one_kept_is_counted_and_drawn() -> None:
    picture, words = view.difference(PICTURE, (EARLY, LATE), ("first", "second"), False)
    assert words == "Kept by both: 1. Only by first: 1. Only by second: 1."
    assert picture is not None


def test_layers_show_all_tokens_beside_the_methods() -> None:
    drawn = view.layers((EARLY, LATE))
    assert drawn.count("<svg") == 1
    assert "all tokens" in drawn
    assert drawn.count("some:keep=2") == 2


def test_the_plain_picture_is_shown_as_it_is() -> None:
    assert view.kept(PICTURE, FULL, True) is PICTURE
    drawn = view.kept(PICTURE, EARLY, False)
    assert drawn is not None
    assert drawn is not PICTURE
