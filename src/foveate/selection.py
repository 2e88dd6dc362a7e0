"""Running a method over many images: equal shapes together under `torch.vmap`, videos by frame, answers checked."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core import Evidence, Method, PromptMethod, Selection
from foveate.errors import ContractError

_STATIC = ("grid", "total", "depth", "modality", "crops", "thumbnail")
_TENSORS = tuple(f.name for f in dataclasses.fields(Evidence) if f.name not in _STATIC)
_ANSWERS = ("keep", "stay", "scores", "features", "merged_into")


def select_all(method: Method, evidences: Sequence[Evidence], site: int) -> list[Selection]:
    """Return the checked selection of each image; images of equal shape go through one `torch.vmap`.

    Raises:
        ContractError: If a selection is unsorted, repeats an index, is out of range or has a wrong count.
    """
    if isinstance(method, PromptMethod) and method.per == "frame" and any(e.modality == "video" for e in evidences):
        return _by_frame(method, evidences, site)
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, evidence in enumerate(evidences):
        shapes = tuple(None if (t := getattr(evidence, name)) is None else (t.shape, t.dtype) for name in _TENSORS)
        groups[(*(getattr(evidence, name) for name in _STATIC), shapes)].append(i)
    answers: dict[int, Selection] = {}
    for members in groups.values():
        group = [evidences[i] for i in members]
        selections = [method.select(group[0], site)] if len(group) == 1 else _vmapped(method, group, site)
        _check(method, group[0], selections, site)
        answers.update(zip(members, selections, strict=True))
    return [answers[i] for i in range(len(evidences))]


def _by_frame(method: PromptMethod, evidences: Sequence[Evidence], site: int) -> list[Selection]:
    """Judge each frame of each video as an image of its own, all in one go, and put the answers together."""
    whole = dataclasses.replace(method, per="video")
    rows = [_frames(evidence) for evidence in evidences]
    pieces = [
        evidence if len(frames) == 1 else _frame(evidence, keep, number)
        for evidence, frames in zip(evidences, rows, strict=True)
        for number, keep in enumerate(frames)
    ]
    answers = iter(select_all(whole, pieces, site))
    return [_joined([next(answers) for _ in frames], frames, e.n) for e, frames in zip(evidences, rows, strict=True)]


def _frames(evidence: Evidence) -> list[Tensor]:
    """Return the tokens of each frame that has any; all together for an image."""
    if evidence.modality != "video":
        return [torch.arange(evidence.n, device=evidence.features.device)]
    frame = evidence.coordinates[:, 0]
    return [rows for f in range(evidence.grid[0]) if len(rows := (frame == f).nonzero()[:, 0])]


def _frame(evidence: Evidence, rows: Tensor, number: int) -> Evidence:
    part = evidence.subset(Selection(keep=rows))
    place = part.coordinates * part.coordinates.new_tensor([0, 1, 1])
    seed = None if evidence.seed is None else evidence.seed + number  # or random would pick the same places in each
    return dataclasses.replace(part, grid=(1, *evidence.grid[1:]), coordinates=place, total=len(rows), seed=seed)


def _joined(answers: Sequence[Selection], frames: Sequence[Tensor], n: int) -> Selection:
    """Return one selection of ``n`` tokens from those of its frames; measures become their mean."""
    if len(answers) == 1:
        return answers[0]
    first, pairs = answers[0], list(zip(answers, frames, strict=True))
    keep = torch.cat([rows[answer.keep] for answer, rows in pairs])
    order = keep.argsort(stable=True)  # frames may be interleaved
    scores, merged = first.scores, first.merged_into
    if scores is not None:
        scores = scores.new_zeros(n).index_copy(0, torch.cat(list(frames)), torch.cat([_of(a.scores) for a in answers]))
    if merged is not None:
        merged = torch.full_like(torch.cat(list(frames)), -1)
        slot, start = order.argsort(), 0
        for answer, rows in pairs:
            into = _of(answer.merged_into)
            merged[rows] = torch.where(into < 0, into, slot[start + into.clamp(min=0)])
            start += len(answer.keep)
    return Selection(
        keep=keep[order],
        stay=None if first.stay is None else torch.cat([_of(a.stay) for a in answers])[order],
        scores=scores,
        features=None if first.features is None else torch.cat([_of(a.features) for a in answers])[order],
        merged_into=merged,
        measures={name: torch.stack([a.measures[name] for a in answers]).mean(0) for name in first.measures},
        repeats=first.repeats,
    )


def _of(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _vmapped(method: Method, group: Sequence[Evidence], site: int) -> list[Selection]:
    names = [name for name in _TENSORS if getattr(group[0], name) is not None]
    stacked = {name: torch.stack([getattr(evidence, name) for evidence in group]) for name in names}
    static: dict[str, Any] = {}

    def one(tensors: dict[str, Any]) -> dict[str, Tensor]:
        selection = method.select(dataclasses.replace(group[0], **tensors), site)
        static["repeats"] = selection.repeats
        present = {name: getattr(selection, name) for name in _ANSWERS if getattr(selection, name) is not None}
        return present | {f"measure {name}": value for name, value in selection.measures.items()}

    out = torch.vmap(one)(stacked)
    selections = []
    for i in range(len(group)):
        fields = {name: value[i] for name, value in out.items() if not name.startswith("measure ")}
        measures = {name.removeprefix("measure "): v[i] for name, v in out.items() if name.startswith("measure ")}
        selections.append(Selection(**fields, measures=measures, repeats=static["repeats"]))
    return selections


def _check(method: Method, evidence: Evidence, selections: Sequence[Selection], site: int) -> None:
    """Check the selections of one group, with a single transfer from the device."""
    n, k = evidence.n, len(selections[0].keep)
    expected = method.expected(n, evidence.total, site, evidence.depth)
    if expected is not None and k != expected:
        raise ContractError(
            f"`{method.name}` announced {expected} of {n} tokens at site {site} and kept {k}",
            "let expected() return what select() keeps, or None where it depends on the input",
        )
    if (selections[0].stay is not None) and not method.adaptive:
        raise ContractError(
            f"`{method.name}` answered with `stay` but is not declared adaptive",
            "set adaptive = True on the class, or answer with `keep` alone",
        )
    if k == 0:
        return
    keep = torch.stack([selection.keep for selection in selections])
    steps = keep.diff(dim=1)
    bad = (keep[:, 0] < 0) | (keep[:, -1] >= n) | (steps < (0 if selections[0].repeats else 1)).any(dim=1)
    if bool(bad.any()):
        raise ContractError(
            f"`{method.name}` must return sorted, unique indices in range({n}) at site {site}, "
            f"got {keep[bad.nonzero()[0, 0]].tolist()[:16]}...",
            "sort what topk gives: `scores.topk(k).indices.sort().values`",
        )
