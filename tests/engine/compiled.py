"""Compiled generation, in a process of its own: the shape checks that the tests run under cannot be compiled.

python -m tests.engine.compiled BACKEND [CHECK ...]    # one line of JSON: by check the differences and graph counts

The backend ``none`` runs each graph as it is.
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
from tests.families.matrix import model_of
from tests.models import one_row, tiny_inputs, tiny_llava
from tests.zoo.inputs import batch
from tests.zoo.models import placeholders

STATIC: dict[str, Any] = {**GREEDY, "cache_implementation": "static", "max_new_tokens": 5}
SPECS = {
    "before": ("evocut:keep=5", "packed"),
    "inside": ("evocut:keep=8,positions=original + v2drop:stages=1@0.5/2@0", "original"),
}


class Graphs:
    """A compiler that counts the graphs."""

    def __init__(self, backend: str) -> None:
        self.count, self._backend = 0, backend

    def __deepcopy__(self, memo: Any) -> Graphs:
        return self

    def __call__(self, graph: Any, example: Any) -> Any:
        self.count += 1
        if self._backend == "none":
            return graph.forward
        return torch._dynamo.lookup_backend(self._backend)(graph, example)


def _config(graphs: Graphs) -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend=graphs, mode=None)
    config._compile_all_devices = True
    return config


Check = Callable[[Handle, Any, Oracle, Graphs, str], list[tuple[float, int]]]


def _read(handle: Handle, oracle: Oracle, inputs: Any, positions: str, **options: Any) -> float:
    output = handle.model.generate(**inputs, **STATIC, **options)
    return differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, positions))


def decode_steps(handle: Handle, model: Any, oracle: Oracle, graphs: Graphs, positions: str) -> list[Any]:
    """`generate` compiles its decode steps: two calls of equal length, and one of another batch."""
    calls = [tiny_inputs(seed=1), tiny_inputs(seed=2), one_row(tiny_inputs(), 2)]
    return [
        (_read(handle, oracle, inputs, positions, compile_config=_config(graphs)), graphs.count) for inputs in calls
    ]


def whole_graph(handle: Handle, model: Any, oracle: Oracle, graphs: Graphs, positions: str) -> list[Any]:
    """The owner of the model compiles its forward, without a break."""
    model.forward = torch.compile(model.forward, backend=graphs, fullgraph=True)
    return [(_read(handle, oracle, tiny_inputs(), positions), graphs.count)]


def broken_graph(handle: Handle, model: Any, oracle: Oracle, graphs: Graphs, positions: str) -> list[Any]:
    """The owner of the model compiles its forward, breaks allowed."""
    model.forward = torch.compile(model.forward, backend=graphs)
    return [(_read(handle, oracle, tiny_inputs(), positions), graphs.count)]


def family(name: str, spec: str, graphs: Graphs) -> list[tuple[float, int]]:
    """Another family, two calls of equal length: compiled decode steps against the same steps as they are."""
    model, found = model_of(name, "sdpa"), []
    options = {**STATIC, "suppress_tokens": placeholders(model)}
    for seed in (1, 2):
        inputs = batch(name, (0, 1, 2), seed=seed)
        with compress(model, spec):
            plain = model.generate(**inputs, **options)
            output = model.generate(**inputs, **options, compile_config=_config(graphs))
        difference = (torch.stack(plain.logits) - torch.stack(output.logits)).abs().max()
        found.append((float(difference), graphs.count))
    return found


CHECKS = {
    f"{check.__name__} {where}": (check, where)
    for check, places in ((decode_steps, SPECS), (whole_graph, ["before"]), (broken_graph, ["inside"]))
    for where in places
}


FAMILIES = {"gemma3": "v2drop:stages=3@0.5/4@0.3", "qwen2_5_vl": "evocut:keep=0.6 + v2drop:stages=3@0.5/4@0"}


def main(backend: str, *names: str) -> None:
    """Print what was measured."""
    torch.set_num_threads(1)
    model = vivid(tiny_llava(layers=3))
    oracle, measured = Oracle(model), {}
    for name in names or (*CHECKS, *FAMILIES):
        torch.compiler.reset()
        if name in FAMILIES:
            measured[name] = family(name, FAMILIES[name], Graphs(backend))
            continue
        check, where = CHECKS[name]
        spec, positions = SPECS[where]
        with compress(model, spec) as handle:
            measured[name] = check(handle, model, oracle, Graphs(backend), positions)
        for attribute in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
            model.__dict__.pop(attribute, None)
    print(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
