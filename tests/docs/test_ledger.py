"""The ledger's commands can be typed, its arithmetic is right, and nothing in it is missing or leads nowhere."""

from __future__ import annotations

import doctest
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from docs import ledger
from foveate import from_spec, registry
from foveate.cli.bench import bench
from foveate.cli.evaluate import evaluate
from foveate.lab.contest import with_keep
from foveate.lab.lmms import read_arguments
from foveate.lab.shapes import SHAPES

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "ledger.md").read_text(encoding="utf-8")
DATA = ledger.published()
TABLES: list[dict[str, Any]] = DATA["table"]
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]

#: Benchmarks that lmms-eval has no task for.
ELSEWHERE = {"TGIF", "MSVD", "MSRVTT", "TGIF score", "MSVD score", "MSRVTT score"}


def loops() -> list[tuple[list[str], str, list[str]]]:
    """The specs, the model and the tasks of each loop over methods."""
    found = []
    for block in BLOCKS:
        for specs, body in re.findall(r"for method in (.*?); do\n(.*?)\ndone", block, re.DOTALL):
            (model,), (tasks,) = re.findall(r"pretrained=([\w./-]+),", body), re.findall(r"--tasks ([\w,]+)", body)
            found.append((specs.split(), model, tasks.split(",")))
    return found


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)}


def test_arithmetic() -> None:
    failed, attempted = doctest.testfile(str(DOCS / "ledger.md"), module_relative=False)
    assert attempted > 50
    assert failed == 0


def test_every_loop_can_be_typed() -> None:
    assert loops()
    for specs, model, _ in loops():
        assert specs
        for spec in specs:
            arguments = read_arguments(f"pretrained={model},method={spec}")
            assert arguments == {"pretrained": model, "method": spec}
            if spec != "none":
                from_spec(spec)


def test_every_other_command_can_be_typed() -> None:
    commands = [shlex.split(line) for block in BLOCKS for line in block.splitlines() if line.startswith("foveate ")]
    assert {words[1] for words in commands} == {"eval", "bench"}
    for _, name, *words in commands:
        app = typer.Typer()
        app.command()({"eval": evaluate, "bench": bench}[name])
        given = typer.main.get_command(app).make_context(f"foveate {name}", words).params
        keep = given["keep"][0] if name == "eval" else given["keep"]
        for method in given["method"] or ():
            with_keep(method, int(keep))
        assert given.get("shape") in {None, *SHAPES}


@pytest.mark.parametrize("table", TABLES, ids=[table["key"] for table in TABLES])
def test_a_papers_own_rows_have_values_and_a_command(table: dict[str, Any]) -> None:
    own = [row for row in table["rows"] if "spec" in row]
    assert own
    assert all(len(row["values"]) == len(table["benchmarks"]) == len(table["vanilla"]) for row in own)
    assert f"<!-- published {table['key']}: begin" in PAGE
    if ELSEWHERE.issuperset(table["benchmarks"]):
        return
    wanted = {"none", *(row["spec"] for row in own)}
    tasks = {DATA["tasks"][name][0] for name in table["benchmarks"]}
    assert any((set(specs), model, set(names)) == (wanted, table["model"], tasks) for specs, model, names in loops())


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_tasks_are_those_of_lmms_eval() -> None:
    (package,) = find_spec("lmms_eval").submodule_search_locations  # type: ignore[union-attr,misc]
    text = "\n".join(path.read_text(encoding="utf-8") for path in Path(package, "tasks").rglob("*.yaml"))
    known = set(re.findall(r"^(?:task|group): *[\"']?([\w-]+)", text, re.MULTILINE))
    assert {task for _, _, tasks in loops() for task in tasks} <= known


def test_every_method_has_an_entry() -> None:
    built_in = [name for name in registry.names() if registry.get(name).__module__.startswith("foveate.")]
    asked = {spec.partition(":")[0] for specs, _, _ in loops() for spec in specs}
    assert set(built_in) <= asked
    assert [name for name in built_in if f"`{name}" not in PAGE] == []


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if not link.startswith("http")]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        path = DOCS / name if name else DOCS / "ledger.md"
        assert path.is_file(), link
        assert not anchor or anchor in anchors(path), link


def test_an_average_that_is_not_its_rows_stands_out() -> None:
    row = {"tokens": "64", "method": "A", "spec": "a:keep=64", "average": 75.0, "values": [45.0, 90.0]}
    table = {"benchmarks": ["B", "C"], "vanilla": [90.0, 90.0], "rows": [row]}
    assert "| 75.0 | 75.00 | not run |" in ledger.published_table(table)
    row["average"] = 75.3
    assert "| 75.3 | **75.00** | not run |" in ledger.published_table(table)


def test_what_was_run_stands_beside_it() -> None:
    row = {"tokens": "64", "method": "A", "spec": "a:keep=64", "average": 75.0, "values": [45.0, 90.0]}
    table = {"benchmarks": ["B", "C"], "vanilla": [90.0, 90.0], "rows": [row | {"ours": [40.0, 80.0]}]}
    table["ours_vanilla"] = [80.0, 80.0]
    text = ledger.published_table(table)
    assert "| 75.0 | 75.00 | 75.0 |" in text
    assert "| 80.0 / 80.0 |" in text


def test_blocks_are_made_anew_and_the_rest_is_left() -> None:
    again = ledger.page(PAGE)
    assert ledger.page(again) == again
    assert re.sub(r"<!-- ([\w. -]+): begin.*?<!-- \1: end -->", "", again, flags=re.DOTALL) == re.sub(
        r"<!-- ([\w. -]+): begin.*?<!-- \1: end -->", "", PAGE, flags=re.DOTALL
    )
