"""The example with Ray answers as one process does, whoever is killed. Needs Ray: ``make test-ray``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from foveate.demo.world import held_out, scene
from foveate.lab.reader import Prompt, Reader

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: make test-ray")

EXAMPLE = Path(__file__).parents[2] / "examples" / "map_folder.py"
QUESTION = "what word is written?"
PICTURES = 18

Line = dict[str, str]
Start = Callable[[Path, Path], "subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in dict.fromkeys(seed for seed, _ in held_out(4 * PICTURES)):
        scene(seed).image.save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, str]:
    """What one process answers, picture by picture."""
    it = Reader("demo", "evocut:keep=64", device="cpu")
    asks = {file.name: Prompt.about([str(file)], QUESTION) for file in folder.iterdir()}
    given = {name: it.answer([prompt], max_new_tokens=16)[0].text for name, prompt in asks.items()}
    assert len(given) == PICTURES and len(set(given.values())) > 5
    return given


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the example, and ends with the test what has not ended by then."""
    import psutil

    drivers = []

    def run(source: Path, out: Path) -> subprocess.Popen[bytes]:
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(EXAMPLE), str(source), str(out), QUESTION]
        with (tmp_path / "log").open("ab") as log:
            driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        drivers.append(driver)
        return driver

    yield run
    for driver in drivers:
        if driver.poll() is None:
            family = [*psutil.Process(driver.pid).children(recursive=True), driver]
            for process in family:
                process.kill()


def finish(driver: subprocess.Popen[bytes]) -> None:
    assert driver.wait(timeout=300) == 0


def lines(out: Path) -> list[Line]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def answers(out: Path) -> dict[str, str]:
    """Return the answers, after checking that nothing stands there twice."""
    found = {line["picture"]: line["answer"] for line in lines(out)}
    assert len(found) == len(lines(out))
    return found


def at_work(driver: subprocess.Popen[bytes], out: Path) -> list[Any]:
    """Wait until some answers are there and others are not; return Ray's processes, those that answer first."""
    import psutil

    until = time.monotonic() + 300
    while not out.exists() or b"\n" not in out.read_bytes():
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    children = psutil.Process(driver.pid).children(recursive=True)
    assert len(lines(out)) < PICTURES
    return sorted(children, key=lambda child: "MapWorker" not in child.name())


def test_a_killed_worker_changes_nothing(start: Start, folder: Path, alone: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    driver = start(folder, out)
    worker = at_work(driver, out)[0]
    assert "MapWorker" in worker.name()
    worker.kill()
    finish(driver)
    assert answers(out) == alone


def test_a_killed_run_goes_on(start: Start, folder: Path, alone: dict[str, str], tmp_path: Path) -> None:
    """From a parquet file; the kill tears the last line."""
    from pyarrow import Table, parquet

    names, source, out = sorted(alone), tmp_path / "pictures.parquet", tmp_path / "out.jsonl"
    rows = [{"image": {"bytes": (folder / name).read_bytes(), "path": name}} for name in names]
    parquet.write_table(Table.from_pylist(rows), source, row_group_size=5)
    driver = start(source, out)
    left_behind = at_work(driver, out)
    driver.kill()
    driver.wait()
    before = out.read_bytes()
    assert 0 < before.count(b"\n") < PICTURES
    with out.open("ab") as torn:
        torn.write(b'{"picture": "1')
    for process in left_behind:
        if process.is_running():
            process.kill()
    finish(start(source, out))
    assert out.read_bytes().startswith(before)
    assert {names[int(row)]: answer for row, answer in answers(out).items()} == alone
    done = out.read_bytes()
    finish(start(source, out))
    assert out.read_bytes() == done
