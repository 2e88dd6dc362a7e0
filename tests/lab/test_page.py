"""The tables say what the answers are, and the page is one file on which nothing covers anything else."""

from __future__ import annotations

import csv
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from foveate.lab import page, plots, tables
from foveate.lab.answers import Answer
from foveate.lab.summary import Summary, summarise

METHODS = ("evocut", "todre", "todre:exit=none", "adav", "v2drop", "random", "grid", "pool", "downscale")
METHODS += ("divprune", "prumerge_plus", "sparsevlm")
BUDGETS = (192, 64, 0.05)
TYPES = ("presence", "smallest", "word")
HEADER = {
    "model": "tiny </script><b>llava</b>",
    "task": "demo",
    "n": 120,
    "versions": {"torch": "2.13"},
    "command": "foveate eval --n 120",
    "refused": {"fastv:keep=64": "too deep", "vscan:keep=64": "too deep"},
}


def made_up(methods: tuple[str, ...] = METHODS, budgets: tuple[Any, ...] = BUDGETS, n: int = 120) -> list[Answer]:
    """Answers of a made-up run: four questions a picture, methods better and worse, close together and far apart."""
    generator, answers = np.random.default_rng(0), []
    ease = np.repeat(generator.normal(0.5, 1.0, n // 4), 4)
    arms: list[tuple[str, str, Any, float]] = [("full", "full", None, 1.5), ("blind", "blind", None, -2.0)]
    for place, method in enumerate(methods):
        name, _, options = method.partition(":")
        for step, budget in enumerate(budgets):
            spec = f"{name}:keep={budget}" + (f",{options}" if options else "")
            arms.append((spec, method, budget, 0.1 * place - 0.5 * step))
    for arm, method, budget, skill in arms:
        alive = 576.0 if budget is None else budget * 576.0 if isinstance(budget, float) else float(budget)
        right = generator.logistic(size=n) < ease + skill
        for i in range(n):
            kind = TYPES[i % len(TYPES)]
            answers.append(Answer(arm, method, budget, str(i), f"{i // 4}.png", kind, "x", bool(right[i]), alive))
    return answers


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise(made_up())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the three files of the made-up run, by their ending."""
    out = tmp_path_factory.mktemp("lab") / "results"
    files = page.write(made_up(), HEADER, out)
    assert files == [out / "accuracy.csv", out / "accuracy.md", out / "accuracy.html"]
    return {file.suffix: file.read_text() for file in files}


def boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    """Return where each level piece of text of a figure lies; those that lean overlap in their boxes only."""
    FigureCanvasAgg(figure).draw()
    found = []
    for axes in figure.axes:
        labels = [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        for axis, place in ((axes.xaxis, 0), (axes.yaxis, 1)):
            low, high = sorted(axis.get_view_interval())
            labels += [label for label in axis.get_ticklabels() if low <= label.get_position()[place] <= high]
        found += [(one.get_text(), one.get_window_extent()) for one in labels if one.get_rotation() in (0.0, 90.0)]
    return [(text, box) for text, box in found if text]


def test_csv_has_a_row_for_each_arm(written: dict[str, str], summary: Summary) -> None:
    rows = {row["arm"]: row for row in csv.DictReader(written[".csv"].splitlines())}
    assert set(rows) == {row.arm for row in summary.rows} and len(rows) == 2 + len(METHODS) * len(BUDGETS)
    row, same = rows["todre:keep=64,exit=none"], summary.row("todre:keep=64,exit=none")
    assert same is not None and same.random is not None and same.random.low is not None
    assert (row["method"], row["budget"], row["n"], row["tokens_per_layer"]) == ("todre:exit=none", "64", "120", "64.0")
    assert float(row["accuracy"]) == pytest.approx(int(row["right"]) / 120, abs=5e-5)
    assert float(row["random_points"]) == pytest.approx(100 * same.random.difference, abs=5e-3)
    assert float(row["random_points_low"]) == pytest.approx(100 * same.random.low, abs=5e-3)
    assert int(row["random_gained"]) - int(row["random_lost"]) == round(1.2 * float(row["random_points"]))
    assert sum(int(row[f"type_{kind}_n"]) for kind in TYPES) == 120
    plain = summary.row("todre:keep=64")
    assert plain is not None and same.plain is not None and row["plain_n"] == "120"
    assert same.plain.difference == pytest.approx(same.score.accuracy - plain.score.accuracy)
    assert rows["todre:keep=64"]["plain_points"] == rows["full"]["plain_points"] == ""
    assert rows["full"]["full_points"] == rows["random:keep=64"]["random_q"] == ""
    assert (row["run_task"], row["run_versions_torch"], row["run_n"]) == ("demo", "2.13", "120")


def test_markdown_has_the_tables(written: dict[str, str]) -> None:
    text = written[".md"]
    for heading in (
        "Overall",
        "Differences: 64 tokens",
        "Best methods",
        "By type: 5 % of tokens",
        "Hard questions",
        "Options",
    ):
        assert f"\n## {heading}" in text
    assert "120 questions about 30 pictures" in text and "Regenerate: `foveate eval --n 120`" in text
    assert "fastv:keep=64, vscan:keep=64 could not run: too deep." in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


class Tags(HTMLParser):
    """Collects what a page refers to, and the names in it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.links += [given[name] for name in ("href", "xlink:href", "src", "srcset", "data") if name in given]
        self.names += [given["id"]] if "id" in given else []

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_one_file(written: dict[str, str]) -> None:
    """Nothing is fetched, names are unique, what the header says is not taken for markup."""
    tags = Tags()
    tags.feed(written[".html"])
    assert tags.links and all(link.startswith("#") and link[1:] in tags.names for link in tags.links)
    assert len(set(tags.names)) == len(tags.names)
    assert not re.search(r"https?:|@import|url\((?!#)", written[".html"])
    assert "<b>llava" not in written[".html"] and "tiny </script><b>llava</b>" in tags.text


def test_text_of_figures_is_text(written: dict[str, str]) -> None:
    figures = re.findall(r"<svg.*?</svg>", written[".html"], flags=re.DOTALL)
    assert len(figures) == 2 * len(BUDGETS) + 2
    assert all("<text" in figure and "<style" not in figure and "<image" not in figure for figure in figures)
    assert all(f">{method}</text>" in figures[0] for method in METHODS)


def test_colours_of_figures_are_those_of_the_page(written: dict[str, str]) -> None:
    """Every colour is a variable with a value for light and one for dark, but for the heat map's own."""
    figures = re.findall(r"<svg.*?</svg>", written[".html"], flags=re.DOTALL)
    for figure in figures[: len(BUDGETS) + 2]:
        assert not re.search(r"(?:fill|stroke): #", figure)
    for name in set(re.findall(r"var\(--(\w+)\)", written[".html"])):
        assert len(re.findall(rf"--{name}: #", written[".html"])) == 2


def test_names_may_hold_anything(tmp_path: Path) -> None:
    """Formulas and markup are text, and letters that no font here has are left to the browser."""
    names = dict(zip(TYPES, ("$a$ & <b>", "颜色", "a|b"), strict=True))
    answers = [replace(answer, type=names[answer.type]) for answer in made_up(("evocut", "random"), (64,), 12)]
    _, tables_file, page_file = page.write(answers, HEADER, tmp_path)
    assert ">$a$ &amp; &lt;b&gt;</text>" in page_file.read_text() and ">颜色</text>" in page_file.read_text()
    assert "a\\|b" in tables_file.read_text()


def test_writing_twice_writes_the_same(written: dict[str, str], tmp_path: Path) -> None:
    again = page.write(made_up(), HEADER, tmp_path)
    assert {file.suffix: file.read_text() for file in again} == written


@pytest.mark.parametrize("name", ["forest", "wide", "narrow", "heat"])
def test_nothing_covers_anything_else(summary: Summary, name: str) -> None:
    """No text touches another or leaves the figure."""
    size = {"wide": page.WIDE, "narrow": page.NARROW}.get(name)
    drawn = {"forest": plots.forest, "heat": plots.heat}
    figures = [plots.curves(summary, *size)] if size else [drawn[name](summary, budget) for budget in BUDGETS]
    for figure in figures:
        found, whole = boxes(figure), figure.bbox
        assert len(found) > 8
        for text, box in found:
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, text
        for (text, box), (other, its) in itertools.combinations(found, 2):
            apart = box.x1 <= its.x0 or its.x1 <= box.x0 or box.y1 <= its.y0 or its.y1 <= box.y0
            assert apart or min(box.y1, its.y1) - max(box.y0, its.y0) < 1.5, f"{text!r} covers {other!r}"


def test_spread_keeps_order_gap_and_limits() -> None:
    places = [5.0, 5.1, 5.05, 0.2, 9.9, 9.95]
    moved = plots.spread(places, 1.0, 0.0, 10.0)
    assert np.argsort(moved).tolist() == np.argsort(places).tolist()
    assert min(np.diff(sorted(moved))) == pytest.approx(1.0) and min(moved) >= 0.0 and max(moved) <= 10.0
    assert plots.spread([1.0, 3.0, 7.0], 1.0, 0.0, 10.0) == [1.0, 3.0, 7.0]


@pytest.mark.parametrize(
    "answers",
    [
        made_up(METHODS, (64,), 4),
        made_up(methods=("random",), budgets=(64,), n=8),
        made_up(methods=(), n=8),
        [one for one in made_up(("evocut", "random"), (64,), 40) if one.type == "word"],
        [one for one in made_up(("evocut", "grid"), (64,), 40) if one.arm not in ("full", "blind")],
        [one for one in made_up(("evocut", "random"), (64,), 80) if one.arm == "full" or int(one.item) < 40],
    ],
    ids=["one picture", "random alone", "no method", "one type", "no bounds", "unfinished"],
)
def test_small_and_unfinished_runs_are_written(answers: list[Answer], tmp_path: Path) -> None:
    text = page.write(answers, {}, tmp_path)[1].read_text()
    behind = len({answer.item for answer in answers}) * len({answer.arm for answer in answers}) > len(answers)
    assert ("Unfinished: fewer than 80 questions were answered by blind 40, evocut:keep=64 40" in text) == behind


def test_a_lead_that_may_be_chance_is_called_that(summary: Summary) -> None:
    said = tables.verdicts(summary)
    assert len(said) == len(BUDGETS)
    for budget, sentence in zip(summary.budgets, said, strict=True):
        assert ("may be chance" in sentence) != summary.won(budget)[None].lead.decided
