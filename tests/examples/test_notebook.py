"""The notebook runs from top to bottom without a network, and what it holds is what comes out."""

from __future__ import annotations

import pytest

pytest.importorskip("ipykernel")
notebook = pytest.importorskip("docs.notebook")


def test_tour() -> None:
    stored = notebook.read()
    outputs = [output for cell in stored.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert notebook.TOUR.stat().st_size < 200_000
    assert notebook.words(notebook.run()) == notebook.words(stored), "make notebook"
