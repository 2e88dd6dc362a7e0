"""Compiled generation, in a process of its own: the shape checks that the tests run under cannot be compiled.

python -m tests.engine.compiled [BACKEND]    # one line of JSON: by name the logit differences and graph counts

Without a backend graphs are counted and run as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.configuration_utils import CompileConfig

from foveate.engines.base import Handle, compress
from tests.engine.oracle import GREEDY, Oracle, differ, vivid
from tests.models import one_row, tiny_inputs, tiny_llava

STATIC: dict[str, Any] = {**GREEDY, "cache_implementation": "static", "max_new_tokens": 5}
SPECS = {
    "before": ("evocut:keep=5", "packed"),
    "inside": ("evocut:keep=8,positions=original + v2drop:stages=1@0.5/2@0", "original"),
}


class Graphs:
    """A compiler that counts the graphs."""

    def __init__(self, backend: str | None) -> None:
        self.count, self._backend = 0, backend

    def __deepcopy__(self, memo: Any) -> Graphs:
        return self

    def __call__(self, graph: Any, example: Any) -> Any:
        self.count += 1
        return graph.forward if self._backend is None else torch._dynamo.lookup_backend(self._backend)(graph, example)


Check = Callable[[Handle, Any, Oracle, Graphs, str], list[tuple[float, int]]]


def _read(handle: Handle, oracle: Oracle, inputs: Any, positions: str, **options: Any) -> float:
    output = handle.model.generate(**inputs, **STATIC, **options)
    return differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions))


def decode_steps(handle: Handle, model: Any, oracle: Oracle, graphs: Graphs, positions: str) -> list[Any]:
    """`generate` compiles its decode steps: two calls of equal length, and one of another batch."""
    config = CompileConfig(fullgraph=True, backend=graphs, mode=None)
    config._compile_all_devices = True
    calls = [tiny_inputs(seed=1), tiny_inputs(seed=2), one_row(tiny_inputs(), 2)]
    return [(_read(handle, oracle, inputs, positions, compile_config=config), graphs.count) for inputs in calls]


def whole_graph(handle: Handle, model: Any, oracle: Oracle, graphs: Graphs, positions: str) -> list[Any]:
    """The owner of the model compiles its forward, without a break."""
    model.forward = torch.compile(model.forward, backend=graphs, fullgraph=True)
    return [(_read(handle, oracle, tiny_inputs(), positions), graphs.count)]


def broken_graph(handle: Handle, model: Any, oracle: Oracle, graphs: Graphs, positions: str) -> list[Any]:
    """The owner of the model compiles its forward, breaks allowed."""
    model.forward = torch.compile(model.forward, backend=graphs)
    return [(_read(handle, oracle, tiny_inputs(), positions), graphs.count)]


CHECKS = {
    f"{check.__name__} {where}": (check, where)
    for check, places in ((decode_steps, SPECS), (whole_graph, ["before"]), (broken_graph, SPECS))
    for where in places
}


def main(backend: str | None = None) -> None:
    """Print what was measured."""
    torch.set_num_threads(1)
    model = vivid(tiny_llava(layers=3))
    oracle, measured = Oracle(model), {}
    for name, (check, where) in CHECKS.items():
        torch.compiler.reset()
        spec, positions = SPECS[where]
        with compress(model, spec) as handle:
            measured[name] = check(handle, model, oracle, Graphs(backend), positions)
        for attribute in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
            model.__dict__.pop(attribute, None)
    print(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
