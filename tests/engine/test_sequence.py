"""Index surgery against naive loops over lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.engines.sequence import Layout, Plan, find, make_plan, take, take_mask
from foveate.errors import UnsupportedCall

PAD, WORD, IMAGE = 0, 1, 9

Row = list[tuple[str, int]]  # ("text", words) or ("image", tokens)


@st.composite
def _batch(draw: st.DrawFn) -> tuple[list[Row], int]:
    """Rows of pieces, each with at least one token, and columns of padding that no row needs."""
    piece = st.tuples(st.sampled_from(["text", "image"]), st.integers(1, 4))
    rows = draw(st.lists(st.lists(piece, min_size=1, max_size=5), min_size=1, max_size=4))
    return rows, draw(st.integers(0, 3))


def _ids(rows: list[Row], padding: int) -> tuple[Tensor, Tensor, list[int]]:
    flat = [[IMAGE if kind == "image" else WORD for kind, n in row for _ in range(n)] for row in rows]
    length = max(map(len, flat)) + padding
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in flat])
    sizes = [n for row in rows for kind, n in row if kind == "image"]
    return ids, (ids != PAD).long(), sizes


def _spread(rows: list[Row], length: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Naive: positions of the words of each row, and of each image of each row."""
    words, images = [], []
    for row in rows:
        at = length - sum(n for _, n in row)
        mine: list[int] = []
        pictures: list[list[int]] = []
        for kind, n in row:
            (mine.extend if kind == "text" else pictures.append)(list(range(at, at + n)))
            at += n
        words.append(mine)
        images.append(pictures)
    return words, images


def _layout(rows: list[Row], padding: int) -> tuple[Layout, Tensor, Tensor]:
    ids, mask, sizes = _ids(rows, padding)
    return find(mask, {"image": ids == IMAGE}, {"image": sizes}), ids, mask


def _columns(plan: Plan) -> list[list[int]]:
    """What is left of each row."""
    valid = torch.ones_like(plan.index, dtype=torch.bool) if plan.valid is None else plan.valid
    return [row[keep].tolist() for row, keep in zip(plan.index, valid, strict=True)]


def _subset(draw: st.DrawFn, n: int, least: int = 0) -> list[int]:
    return sorted(draw(st.sets(st.integers(0, n - 1), min_size=min(least, n))))


@given(batch=_batch())
def test_find(batch: tuple[list[Row], int]) -> None:
    rows, padding = batch
    layout, ids, _ = _layout(rows, padding)
    words, images = _spread(rows, ids.shape[1])
    assert layout.length == ids.shape[1] and layout.batch == len(rows)
    assert [t.tolist() for t in layout.text] == words
    flat = [(row, positions) for row, pictures in enumerate(images) for positions in pictures]
    assert [(span.row, span.positions.tolist()) for span in layout.spans] == flat
    assert [(span.number, span.source) for span in layout.spans] == [(i, i) for i in range(len(flat))]
    for span in layout.spans:
        after = [place for place in words[span.row] if place > span.positions[-1]]
        assert layout.text_after(span).tolist() == after


@given(batch=_batch(), times=st.integers(1, 3))
def test_expand(batch: tuple[list[Row], int], times: int) -> None:
    rows, padding = batch
    layout, *_ = _layout(rows, padding)
    wide = layout.expand(len(rows) * times)
    again, *_ = _layout([row for row in rows for _ in range(times)], padding)
    assert [t.tolist() for t in wide.text] == [t.tolist() for t in again.text]
    naive = [(s.row, s.positions.tolist()) for s in again.spans]
    assert [(s.row, s.positions.tolist()) for s in wide.spans] == naive
    for span in wide.spans:
        assert span.positions.tolist() == layout.spans[span.source].positions.tolist()
        assert layout.spans[span.source].row == span.row // times


@given(batch=_batch(), data=st.data(), repeats=st.booleans())
def test_shortened(batch: tuple[list[Row], int], data: st.DataObject, repeats: bool) -> None:
    rows, padding = batch
    layout, ids, _ = _layout(rows, padding)
    keeps = [
        _subset(data.draw, len(span.positions), 0 if layout.text[span.row].numel() else 1) for span in layout.spans
    ]
    if repeats:
        keeps = [sorted([*keep, *keep[:1]]) for keep in keeps]
    short, plan = layout.shortened([torch.tensor(keep, dtype=torch.long) for keep in keeps])
    words, images = _spread(rows, ids.shape[1])
    left, pieces, chosen = [], [], iter(keeps)
    for row in range(len(rows)):
        mine = [[pictures[i] for i in next(chosen)] for pictures in images[row]]
        left.append(sorted([*words[row], *(place for picture in mine for place in picture)]))
        pieces.append(mine)
    length = max(map(len, left))
    assert _columns(plan) == left
    assert plan.index.shape == (len(rows), length) and short.length == length
    assert (plan.valid is None) == all(len(row) == length for row in left)
    spans = iter(short.spans)
    for row in range(len(rows)):  # every token stands where the plan put it
        taken = dict(enumerate(left[row], start=length - len(left[row])))
        assert [taken[int(place)] for place in short.text[row]] == words[row]
        for piece in pieces[row]:
            span = next(spans)
            assert span.row == row
            assert [taken[int(place)] for place in span.positions] == piece
    places = [
        [*short.text[row].tolist(), *(p for s in short.spans if s.row == row for p in s.positions.tolist())]
        for row in range(len(rows))
    ]
    assert all(sorted(row) == list(range(length - len(row), length)) for row in places), "each column is named once"


@st.composite
def _nested(draw: st.DrawFn) -> tuple[int, list[list[int]], list[list[int]]]:
    """Length of a prompt, what an earlier plan left of each row, and what a later one left of that."""
    length = draw(st.integers(1, 9))
    earlier = [_subset(draw, length, 1) for _ in range(draw(st.integers(1, 4)))]
    later = [[row[i] for i in _subset(draw, len(row), 1)] for row in earlier]
    return length, earlier, later


@given(nested=_nested())
def test_within(nested: tuple[int, list[list[int]], list[list[int]]]) -> None:
    length, earlier, later = nested
    first, second = (make_plan([torch.tensor(row) for row in rows]) for rows in (earlier, later))
    sequence = torch.arange(length).expand(len(earlier), length) * 10 + torch.arange(len(earlier))[:, None]
    once = take(sequence, first.index, 1)
    twice = take(once, second.within(first, length), 1)
    for row, kept in enumerate(later):
        assert twice[row, twice.shape[1] - len(kept) :].tolist() == [10 * place + row for place in kept]


@given(data=st.data())
def test_make_plan(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 8))
    rows = [_subset(data.draw, length, 1) for _ in range(data.draw(st.integers(1, 4)))]
    plan = make_plan([torch.tensor(row) for row in rows])
    assert _columns(plan) == rows
    assert plan.index[:, -1].tolist() == [row[-1] for row in rows]
    if plan.valid is not None:
        assert (plan.index[~plan.valid] == 0).all()
        assert (plan.valid.long().diff(dim=1) >= 0).all(), "filler stands in front"


def test_a_row_that_loses_everything_is_refused() -> None:
    with pytest.raises(UnsupportedCall) as error:
        make_plan([torch.tensor([1, 2]), torch.tensor([], dtype=torch.long)])
    assert error.value.hint


@given(data=st.data(), extra=st.sampled_from([(), (3,)]), leading=st.sampled_from([(), (2,)]), shared=st.booleans())
def test_take(data: st.DataObject, extra: tuple[int, ...], leading: tuple[int, ...], shared: bool) -> None:
    batch, length, k = (data.draw(st.integers(1, 4)) for _ in range(3))
    tensor = torch.randn(*leading, 1 if shared else batch, length, *extra)
    index = torch.tensor([[data.draw(st.integers(0, length - 1)) for _ in range(k)] for _ in range(batch)])
    out = take(tensor, index, len(leading) + 1)
    assert out.shape == (*leading, batch, k, *extra)
    for row in range(batch):
        for j in range(k):
            source = (
                tensor[..., 0 if shared else row, int(index[row, j]), :]
                if extra
                else tensor[..., 0 if shared else row, int(index[row, j])]
            )
            got = out[..., row, j, :] if extra else out[..., row, j]
            assert torch.equal(got, source)


@given(data=st.data(), kind=st.sampled_from([torch.bool, torch.float32]), shared=st.booleans(), room=st.integers(0, 3))
def test_take_mask(data: st.DataObject, kind: Any, shared: bool, room: int) -> None:
    batch, length, heads = (data.draw(st.integers(1, 4)) for _ in range(3))
    rows = [_subset(data.draw, length, 1) for _ in range(batch)]
    plan = make_plan([torch.tensor(row) for row in rows])
    seen = torch.rand(1 if shared else batch, heads, length, length + room) < 0.5
    hidden = torch.finfo(torch.float32).min
    mask = seen if kind == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, hidden)
    out = take_mask(mask, plan)
    k = plan.index.shape[1]
    assert out.shape == (batch, heads, k, k + (length + room - k if room else 0))
    visible = out if kind == torch.bool else out == 0
    assert kind == torch.bool or bool(((out == 0) | (out == hidden)).all())
    for b, row in enumerate(rows):
        start = k - len(row)
        for i, query in enumerate(row):
            for column in range(out.shape[3]):
                key = row[column - start] if start <= column < k else None
                wanted = False if key is None else bool(seen[0 if shared else b, 0, query, key])
                assert bool(visible[b, 0, start + i, column]) == wanted
    assert torch.equal(take_mask(mask[:, :1], plan), out[:, :1])


@given(batch=_batch(), data=st.data())
def test_wrong_numbers_are_refused(batch: tuple[list[Row], int], data: st.DataObject) -> None:
    rows, padding = batch
    ids, mask, sizes = _ids(rows, padding)
    wrong = [*sizes, 1] if not sizes or data.draw(st.booleans()) else [*sizes[:-1], sizes[-1] + 1]
    with pytest.raises(UnsupportedCall) as error:
        find(mask, {"image": ids == IMAGE}, {"image": wrong})
    assert str(sum(sizes)) in str(error.value) and str(sum(wrong)) in str(error.value) and error.value.hint
    with pytest.raises(UnsupportedCall, match="right"):
        find(
            torch.nn.functional.pad(mask, (0, 1)),
            {"image": torch.nn.functional.pad(ids == IMAGE, (0, 1))},
            {"image": sizes},
        )
