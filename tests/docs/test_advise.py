"""What the adviser takes from papers is what the ledger holds, and its page shows what its check wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from docs import advise
from foveate.lab.advice import check


def test_what_papers_print_is_fresh() -> None:
    assert advise.PUBLISHED.read_text(encoding="utf-8") == advise.published(), "make docs"
    rows = json.loads(advise.PUBLISHED.read_text(encoding="utf-8"))
    one = next(r for r in rows if (r["model_type"], r["method"], r["keep"]) == ("llava", "evocut", 0.1111))
    assert (one["share"], one["reading"]) == (0.944, round(55.7 / 58.2, 4))
    assert all(0 < row["keep"] <= 1 and 0 < row["share"] < 1.1 for row in rows)


def test_the_page_is_fresh() -> None:
    text = advise.PAGE.read_text(encoding="utf-8")
    assert advise.page(text) == text, "make docs"


def test_the_table_shows_every_call_and_marks_what_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "advise.csv"
    monkeypatch.setattr(check, "POINTS", check.POINTS[:1] + check.POINTS[3:4])
    check.main(["--models", "shape", "--shape", "tiny", "--seconds", "0", "--rounds", "1", "--out", str(out)])
    text = out.read_text().replace(",yes,", ",no,", 1)
    out.write_text(text)
    monkeypatch.setattr(advise, "RESULTS", out)
    page = advise.page("<!-- check: begin -->\nold\n<!-- check: end -->\n")
    assert "old" not in page
    assert len(re.findall(r"^\| `", page, re.MULTILINE)) == 2
    assert "**" in page.split("|", 1)[1]  # an error in bold
    assert "of 4 times within 10 %" in page
    assert "before the points" in page and "after the points" in page
    assert f"{torch.get_num_threads()} threads" in page
