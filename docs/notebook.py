"""Runs examples/tour.ipynb from top to bottom and writes what came out into it: `python docs/notebook.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
TOUR = ROOT / "examples" / "tour.ipynb"


def read() -> Any:
    """Return the notebook as it is stored."""
    return nbformat.read(TOUR, as_version=4)


def run() -> Any:
    """Return the notebook with the outputs of a new run; raises where a cell does."""
    notebook = read()
    code = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": code, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=300, startup_timeout=300, coalesce_streams=True)
    client.execute(env=environment, cwd=str(TOUR.parent))
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # bars of progress
    return notebook


def words(notebook: Any) -> list[str]:
    """Return what each cell with code printed or showed as text."""
    return [
        "".join(output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


if __name__ == "__main__":
    nbformat.write(run(), TOUR)
