"""Pure index surgery: where things are in a batch of prompts, plans of what stays, gathers. No model in sight.

Positions are always indices into the padded prompt as the language model gets it. A `Layout` lives on the host, so that
sizes are known without waiting for the device; a `Plan` goes where the tensors are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.errors import UnsupportedCall


@dataclass(frozen=True)
class Span:
    """The tokens of one image (or video) in a batch of prompts.

    Args:
        row: Row of the batch.
        modality: ``image`` or ``video``.
        number: Which of the call's images (or videos) it is.
        source: Which of the call's images and videos together it is.
        positions: Where the visual tokens stand in the prompt, rising; text may stand between them.
        fixed: Where its other placeholders stand (row breaks), which always stay.
    """

    row: int
    modality: str
    number: int
    source: int
    positions: Int[Tensor, " n"]
    fixed: Int[Tensor, " f"] = field(default_factory=lambda: torch.arange(0))


@dataclass(frozen=True)
class Layout:
    """Where text and visual tokens stand in a left-padded batch of prompts.

    Args:
        length: Padded length of the prompts.
        text: For each row the positions of its real tokens that are not visual.
        spans: The images, row by row, in the order of the prompt.
    """

    length: int
    text: tuple[Int[Tensor, " _"], ...]
    spans: tuple[Span, ...]

    @property
    def batch(self) -> int:
        return len(self.text)

    @property
    def staying(self) -> list[Int[Tensor, " _"]]:
        """For each row the positions of what never leaves: its text and the fixed placeholders of its images."""
        fixed = [[span.fixed for span in self.spans if span.row == row] for row in range(self.batch)]
        return [torch.cat([text, *rest]).sort().values for text, rest in zip(self.text, fixed, strict=True)]

    def text_after(self, span: Span) -> Int[Tensor, " t"]:
        """Return the positions of the text that follows an image."""
        text = self.text[span.row]
        return text[text > torch.cat([span.positions, span.fixed]).max()]

    def expand(self, batch: int) -> Layout:
        """Return the layout of a batch in which every row is repeated in place, as beams do."""
        times, rest = divmod(batch, self.batch)
        assert rest == 0
        if times == 1:
            return self
        text = tuple(t for t in self.text for _ in range(times))
        by_row = [[s for s in self.spans if s.row == row] for row in range(self.batch)]
        spans = [
            replace(span, row=row * times + copy)
            for row in range(self.batch)
            for copy in range(times)
            for span in by_row[row]
        ]
        return Layout(self.length, text, tuple(spans))

    def shortened(self, keeps: Sequence[Int[Tensor, " _"]]) -> tuple[Layout, Plan]:
        """Return the layout in which span i holds only its tokens ``keeps[i]``, and the plan that leads there."""
        kept = [span.positions[keep.cpu()] for span, keep in zip(self.spans, keeps, strict=True)]
        plan = make_plan(merge_rows(self.staying, self.spans, kept))
        length = plan.index.shape[1]
        text, spans = list(self.text), list(self.spans)
        for row in range(self.batch):
            mine = [i for i, span in enumerate(self.spans) if span.row == row]
            pieces = [text[row], *(kept[i] for i in mine), *(spans[i].fixed for i in mine)]
            rank = torch.cat(pieces).argsort(stable=True).argsort() + length - sum(map(len, pieces))
            text[row], *rest = rank.split([len(piece) for piece in pieces])
            for i, positions, fixed in zip(mine, rest[: len(mine)], rest[len(mine) :], strict=True):
                spans[i] = replace(spans[i], positions=positions, fixed=fixed)
        return Layout(length, tuple(text), tuple(spans)), plan


@dataclass(frozen=True)
class Plan:
    """Which positions stay: right-aligned rows of indices, shorter rows begin with filler.

    Args:
        index: Positions in the prompt the plan was made from, rising in each row; filler is 0.
        valid: False on filler; None when there is none.
    """

    index: Int[Tensor, "b s"]
    valid: Bool[Tensor, "b s"] | None

    def to(self, device: torch.device) -> Plan:
        return Plan(self.index.to(device), None if self.valid is None else self.valid.to(device))

    def expand(self, times: int) -> Plan:
        """Return the plan of a batch in which every row is repeated in place."""
        valid = None if self.valid is None else self.valid.repeat_interleave(times, 0)
        return Plan(self.index.repeat_interleave(times, 0), valid)

    def within(self, earlier: Plan, length: int) -> Int[Tensor, "b s"]:
        """Return this plan's indices as columns of what an earlier, longer plan of the same prompt left."""
        columns = torch.arange(earlier.index.shape[1], device=earlier.index.device).expand_as(earlier.index)
        target = earlier.index if earlier.valid is None else earlier.index.masked_fill(~earlier.valid, length)
        inverse = columns.new_zeros(columns.shape[0], length + 1).scatter_(1, target, columns)
        return inverse.gather(1, self.index)


def find(
    mask: Int[Tensor, "b s"],
    placeholders: Mapping[str, Bool[Tensor, "b s"]],
    sizes: Mapping[str, Sequence[int]],
    visual: Mapping[str, Sequence[Int[Tensor, " _"] | None]] | None = None,
) -> Layout:
    """Find each image's tokens in a batch of prompts.

    Args:
        mask: 1 on real tokens, 0 on padding.
        placeholders: Which tokens are placeholders, by modality.
        sizes: Number of placeholders of each image, in the order of the prompts, by modality.
        visual: Which of them are visual tokens, None = all; left out: all of all images.

    Raises:
        UnsupportedCall: If rows are padded on the right, or placeholders and features differ in number.
    """
    real = mask.bool().cpu()
    if bool((~real[:, -1] & real.any(1)).any()):
        raise UnsupportedCall(
            "the prompts are padded on the right, and a decoder continues after the last column",
            'set `processor.tokenizer.padding_side = "left"`',
        )
    taken = torch.zeros_like(real)
    spans: list[Span] = []
    for modality, counts in sizes.items():
        here = placeholders[modality].cpu() & real
        taken |= here
        rows, columns = here.nonzero(as_tuple=True)
        if len(rows) != sum(counts):
            raise UnsupportedCall(
                f"the prompts hold {len(rows)} {modality} tokens and the {modality}s make {sum(counts)} "
                f"({len(counts)} {modality}s of {sorted(set(counts))} tokens)",
                "let the processor expand the placeholders: one image in the text for each image passed, in order",
            )
        which = [None] * len(counts) if visual is None else visual[modality]
        each = zip(rows.split(list(counts)), columns.split(list(counts)), which, strict=True)
        for number, (row, column, chosen) in enumerate(each):
            if bool((row != row[0]).any()):
                raise UnsupportedCall(
                    f"the tokens of one {modality} are spread over two prompts of the batch",
                    "let the processor expand the placeholders: one image in the text for each image passed, in order",
                )
            if chosen is None:
                spans.append(Span(int(row[0]), modality, number, 0, column))
            else:
                other = torch.ones(len(column), dtype=torch.bool)
                other[chosen] = False
                spans.append(Span(int(row[0]), modality, number, 0, column[chosen], column[other]))
    spans.sort(key=lambda span: (span.row, int(span.positions[0])))
    spans = [replace(span, source=i) for i, span in enumerate(spans)]
    text = tuple((real[row] & ~taken[row]).nonzero()[:, 0] for row in range(len(real)))
    return Layout(real.shape[1], text, tuple(spans))


def merge_rows(
    text: Sequence[Tensor], spans: Sequence[Span], kept: Sequence[Int[Tensor, " _"]]
) -> list[Int[Tensor, " _"]]:
    """Return for each row the sorted positions of its text and of the kept tokens of its images."""
    pieces = [[t] for t in text]
    for span, positions in zip(spans, kept, strict=True):
        pieces[span.row].append(positions)
    return [torch.cat([piece.to(row[-1].device) for piece in row]).sort().values for row in pieces]


def make_plan(rows: Sequence[Int[Tensor, " _"]]) -> Plan:
    """Right-align rows of positions; the last column is always the last real token."""
    length = max(len(row) for row in rows)
    if not all(len(row) for row in rows):
        raise UnsupportedCall("a prompt without text would lose all its tokens", "put text into the prompt")
    if all(len(row) == length for row in rows):
        return Plan(torch.stack(list(rows)), None)
    index = rows[0].new_zeros(len(rows), length)
    valid = torch.zeros(len(rows), length, dtype=torch.bool, device=index.device)
    for i, row in enumerate(rows):
        index[i, length - len(row) :] = row
        valid[i, length - len(row) :] = True
    return Plan(index, valid)


def take(tensor: Tensor, index: Int[Tensor, "b s"], dim: int) -> Tensor:
    """Gather ``index`` along ``dim``; the batch is the dimension before it, and may be 1 (broadcast)."""
    index = index.to(tensor.device)
    batch = dim - 1
    if tensor.shape[batch] == 1 and index.shape[0] > 1:
        tensor = tensor.expand(*tensor.shape[:batch], index.shape[0], *tensor.shape[dim:])
    view = [1] * tensor.dim()
    view[batch], view[dim] = index.shape
    shape = list(tensor.shape)
    shape[dim] = index.shape[1]
    return tensor.gather(dim, index.view(view).expand(shape))


def take_mask(mask: Tensor, plan: Plan) -> Tensor:
    """Gather rows and columns of a 4-D attention mask and hide the filler.

    Columns beyond the prompt (a static cache) come back as hidden columns.
    """
    batch, length = plan.index.shape
    columns, rows = mask.shape[3], mask.shape[2]
    index = plan.index.to(mask.device)
    mask = mask.expand(batch, *mask.shape[1:])
    mask = mask.gather(2, index[:, None, :, None].expand(batch, mask.shape[1], length, columns))
    mask = mask.gather(3, index[:, None, None, :].expand(batch, mask.shape[1], length, length))
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    if columns > rows:
        mask = torch.cat([mask, mask.new_full((batch, mask.shape[1], length, columns - length), hidden)], -1)
    if plan.valid is not None:
        filler = torch.nn.functional.pad(~plan.valid.to(mask.device), (0, mask.shape[-1] - length))
        mask = mask.masked_fill(filler[:, None, None, :], hidden)
    return mask
