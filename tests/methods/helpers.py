"""Random evidence for tests of methods: one image, every kind of evidence, nothing of a model."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foveate import Evidence

Array = NDArray[np.float64]


def make_evidence(n: int = 24, seed: int = 0, width: int = 8, words: int = 5, **changes: Any) -> Evidence:
    """Return evidence of one image of n tokens in a grid as square as n allows, with every field set."""
    generator = torch.Generator().manual_seed(seed)
    width = next((changes[name].shape[1] for name in ("features", "hidden", "text") if name in changes), width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = max(r for r in range(1, int(n**0.5) + 1) if n % r == 0)
    columns = n // rows
    place = torch.arange(n)
    values: dict[str, Any] = {
        "grid": (1, rows, columns),
        "coordinates": torch.stack([torch.zeros_like(place), place // columns, place % columns], dim=1),
        "features": normal(n, width),
        "total": n,
        "depth": 32,
        "encoder_fold": normal(n).abs(),
        "encoder_keys": normal(n, 4),
        "encoder_saliency": normal(n).softmax(0),
        "text": normal(words, width),
        "hidden": normal(n, width),
        "previous": normal(n, width),
        "relevance": normal(words, n).softmax(1) * 0.1,
        "text_mass": normal(n).abs() * 0.01,
        "seed": torch.tensor(seed + 7),
        "encoder_shallow": normal(n).softmax(0),
        "keys": normal(n, 6),
        "text_keys": normal(words, 6),
        "text_hidden": normal(words, width),
    }
    return Evidence(**(values | changes))


def tensors(evidence: Evidence) -> dict[str, Tensor]:
    """Return the tensors of the evidence by name."""
    fields = {f.name: getattr(evidence, f.name) for f in dataclasses.fields(evidence)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def converted(evidence: Evidence, dtype: torch.dtype) -> Evidence:
    """Return the evidence with its floating-point tensors in another dtype."""
    changed: dict[str, Any] = {k: v.to(dtype) for k, v in tensors(evidence).items() if v.is_floating_point()}
    return dataclasses.replace(evidence, **changed)


def permuted(evidence: Evidence, order: Tensor) -> Evidence:
    """Return the evidence with its tokens in another order."""
    encoder = ("encoder_fold", "encoder_keys", "encoder_saliency", "encoder_shallow")
    per_token = ("coordinates", "features", *encoder, "hidden", "previous", "text_mass", "keys")
    changed: dict[str, Any] = {name: getattr(evidence, name)[order] for name in per_token}
    assert evidence.relevance is not None
    return dataclasses.replace(evidence, relevance=evidence.relevance[:, order], **changed)


def waves(*shape: int, step: float = 0.7) -> Tensor:
    """Return sin(step i^1.5) in the given shape: numbers for golden tensors that need no generator."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.sin(step * np.arange(1, count + 1) ** 1.5).astype(np.float32)).reshape(shape)


def array(tensor: Tensor | None) -> Array:
    """Return a tensor as float64 numpy."""
    assert tensor is not None
    return tensor.double().numpy()


def top(scores: Array, k: int) -> list[int]:
    """Return the sorted indices of the k largest scores, by loops."""
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    return sorted(best)


def gap(scores: Array) -> float:
    """Return the smallest difference between two scores."""
    values = sorted(float(s) for s in scores)
    return min((b - a for a, b in pairwise(values)), default=1.0)


def clusters(rows: Array, k: int, neighbours: int = 5) -> tuple[list[int], list[int], float]:
    """Return density peaks by loops: the k peaks, the peak nearest each row, and the narrowest decision on the way."""
    n, width = rows.shape
    square = [[sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / width for y in rows] for x in rows]
    near = [sorted(square[i][j] for j in range(n) if j != i)[:neighbours] for i in range(n)]
    density = [math.exp(-sum(d) / len(d)) if d else 1.0 for d in near]
    weight = []
    for i in range(n):
        above = [math.sqrt(square[i][j]) for j in range(n) if density[j] > density[i]]
        weight.append(density[i] * (min(above) if above else math.sqrt(max(square[i]))))
    peaks = sorted(range(n), key=lambda i: -weight[i])[:k]
    nearest = []
    margin = min(gap(np.array(density)), gap(np.array(weight)))
    for i in range(n):
        ordered = sorted(range(k), key=lambda p: square[i][peaks[p]])
        nearest.append(peaks.index(i) if i in peaks else ordered[0])
        if k > 1 and i not in peaks:
            margin = min(margin, square[i][peaks[ordered[1]]] - square[i][peaks[ordered[0]]])
    return peaks, nearest, margin
