"""The pages of the demo models' contests show what the contests wrote, and are sure only of what is sure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from docs import accuracy
from foveate.lab import page
from foveate.lab.answers import Answer

SKILL = {"random": 0.5, "todre": 0.95, "evocut": 0.2, "grid": 0.5, "todre:exit=none": 0.7, "dart": 0.5}
HEADER = {"n": 800, "first": 400, "dtype": "bfloat16", "attention": "sdpa", "command": "foveate eval demo-hd"}
HEADER |= {name: "x" for name in ("cpu", "torch", "transformers", "commit")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator, answers = np.random.default_rng(0), list[Answer]()
    arms = [("full", "full", None, 0.9), ("blind", "blind", None, 0.1)]
    arms += [
        (f"{name}:keep=0.33".replace(":exit=none:keep=0.33", ":keep=0.33,exit=none"), name, 0.33, s)
        for name, s in SKILL.items()
    ]
    arms += [("todre:keep=1.0", "todre:keep=1.0", None, 0.9)]
    for arm, method, budget, skill in arms:
        for i in range(800 if arm in ("full", "blind") else 400):
            right = bool(generator.random() < skill)
            answers.append(Answer(arm, method, budget, str(i), str(i // 4), f"t{i % 2}", "x", right, 240.0))
    out = tmp_path_factory.mktemp("results")
    page.write(answers, HEADER, out, "accuracy-hd")
    return out / "accuracy-hd.csv"


def rows(text: str) -> dict[str, list[str]]:
    cells = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_who_is_best_and_who_is_surely_ahead(results: Path) -> None:
    ((best, worst, ahead, behind),) = [v for k, v in rows(accuracy.block(results, "leaders")).items() if "33" in k]
    assert best.startswith("`todre` 9") and "**+3" in best and worst.startswith("`evocut`") and "**−" in worst
    assert (ahead, behind) == ("1 of 4", "1 of 4")


def test_methods_by_budget_and_type(results: Path) -> None:
    found = rows(accuracy.block(results, "budgets"))
    assert list(found)[2:5] == ["full", "blind", "todre"] and "todre:exit=none" not in found
    assert "**" in found["todre"][0] and "**" not in found["grid"][0] and "+" not in found["random"][0]
    kinds = rows(accuracy.block(results, "types"))
    assert kinds["questions"] == ["200", "200"] and kinds["todre"][0].startswith("**9")
    assert list(kinds)[2] == "full" and "dart" in kinds


def test_options_stand_against_the_method_without_them(results: Path) -> None:
    found = rows(accuracy.block(results, "design"))
    budget, _, _, points, to_random = found["todre:keep=0.33,exit=none"]
    assert budget == "33 % of tokens" and points.startswith("**−2") and to_random.startswith("**+")
    assert found["todre:keep=1.0"][0] == "its own" and found["todre:keep=1.0"][3].endswith("to `full`")


def test_the_bounds_have_all_questions(results: Path) -> None:
    said = accuracy.block(results, "conditions")
    assert "first 400 questions" in said and said.count("% of 800") == 2 and "foveate eval demo-hd" in said


@pytest.mark.parametrize("path", accuracy.PAGES, ids=lambda path: path.stem)
def test_the_pages_are_fresh(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert accuracy.page(text) == text, "make docs"
    assert text.count(": begin") == 6 and text.count(": end") == 6


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    assert accuracy.block(tmp_path / "none.csv", "types") == "Not measured yet: results/none.csv.\n"
