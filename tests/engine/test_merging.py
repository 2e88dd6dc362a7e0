"""Tokens merged inside the LLM: the hidden states that go on, against a reference that merges by hand, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import foveate
from foveate.core import Chain, Evidence, Method, Selection
from foveate.engines.base import compress
from tests.engine.oracle import GREEDY, differ, pair
from tests.engine.probes import Coin, peek, watch
from tests.engine.test_oracle import NO_CACHE, TOLERANCE
from tests.methods.helpers import clusters
from tests.models import TOKENS, Tower, one_row, tiny_inputs

#: Of 16 tokens 2 stay and 14 become 2, of these 4 one stays and 3 become 1.
SPEC, SITES = "sparsevlm:stages=2@2/4@1,recycle=1.0", {2: (2, 2), 4: (1, 1)}

Rewrite = Callable[[int, Tensor, list[Tensor], list[int], list[list[int]]], Tensor]


def recycling(inputs: dict[str, Tensor], report: Any) -> Callable[[int], Rewrite]:
    """Return what the oracle does to the states of each row: SparseVLM's rule once more, image by image, by loops."""
    prompt = inputs["attention_mask"].sum(1).tolist()

    def of_row(row: int) -> Rewrite:
        images = [image for image in report.images if image.row == row]
        embedded: list[Tensor] = []
        alive = [list(range(TOKENS)) for _ in images]

        def rewrite(layer: int, h: Tensor, maps: list[Tensor], words: list[int], visual: list[list[int]]) -> Tensor:
            if layer == 0:
                embedded.append(h)
            if layer not in SITES:
                return h
            (keep, groups), h = SITES[layer], h.clone()
            for image, tokens in enumerate(visual):
                entries = [tokens[i] for i in alive[image]]
                text = [word for word in words if tokens[-1] < word < prompt[row]]
                likeness = np.zeros(len(text))
                for entry in entries:
                    dots = np.exp((embedded[0][text] @ embedded[0][entry]).numpy())
                    likeness += dots / dots.sum() / len(entries)
                raters = [word for word, share in zip(text, likeness, strict=True) if share > 1 / len(text)]
                scores = [sum(float(maps[layer - 1][word, entry]) for word in raters) for entry in entries]
                order = sorted(range(len(entries)), key=lambda i: -scores[i])
                states = h[entries].numpy()
                again = order[keep:]
                peaks, nearest, margin = clusters(states[again], groups)
                assert margin > 1e-6, "another seed: this one is too close to call"
                for group, peak in enumerate(peaks):
                    members = [again[i] for i in range(len(again)) if nearest[i] == group]
                    h[entries[again[peak]]] = torch.from_numpy(states[members]).mean(0)
                chosen = sorted([*order[:keep], *(again[peak] for peak in peaks)])
                alive[image] = [alive[image][i] for i in chosen]
                assert tuple(alive[image]) == images[image].after(layer)
            return h

        return rewrite

    return of_row


@pytest.mark.parametrize(
    "options", [{}, NO_CACHE, {"cache_implementation": "static"}], ids=["dynamic", "none", "static"]
)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_recycled_tokens_are_read_as_the_mean_of_their_group(impl: str, tower: Tower, options: dict[str, Any]) -> None:
    (model, oracle), inputs = pair(impl, tower), tiny_inputs()
    with compress(model, SPEC) as handle:
        output = model.generate(**inputs, **GREEDY, **options, max_new_tokens=8)
    report = handle.report
    assert {image.alive for image in report.images} == {(16, 16, 4, 4, 2, 2)}
    reference = oracle.logits(inputs, output.sequences, report, rewrite=recycling(inputs, report))
    assert differ(output.logits, reference) <= TOLERANCE
    only_dropped = oracle.logits(inputs, output.sequences, report)
    steps = torch.stack(output.logits, 1)
    assert (steps - only_dropped[:, -1 - steps.shape[1] : -1])[1:].abs().amax((1, 2)).min() > 100 * TOLERANCE


def test_a_padded_batch_equals_its_rows_alone() -> None:
    (model, _), inputs = pair(), tiny_inputs()
    with compress(model, SPEC) as handle:
        together = model.generate(**inputs, **GREEDY, max_new_tokens=6)
        kept = [[stage.kept for stage in image.stages] for image in handle.report.images]
        for row in (1, 2):
            alone = model.generate(**one_row(inputs, row), **GREEDY, max_new_tokens=6)
            pairs = zip(together.logits, alone.logits, strict=True)
            assert max((a[row] - b[0]).abs().max() for a, b in pairs) <= TOLERANCE
            mine = [[stage.kept for stage in image.stages] for image in handle.report.images]
            assert mine == [stages for stages, image in zip(kept, (1, 2, 2), strict=True) if image == row]


def test_beams() -> None:
    (model, oracle), inputs = pair(), tiny_inputs()
    with compress(model, SPEC) as handle:
        output = model.generate(**inputs, **GREEDY, max_new_tokens=5, num_beams=3, output_scores=True)
    for row, sequence in enumerate(output.sequences):
        rewrite = recycling(inputs, handle.report)(row)
        logits = oracle.read(inputs, output.sequences, row, handle.report, rewrite=rewrite).logits[-6:-1]
        score = logits.log_softmax(-1).gather(1, sequence[-5:, None]).mean()
        assert abs(score - output.sequences_scores[row]) <= TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Shift(Method):
    """Moves the states of all tokens, and drops none, or those at even places."""

    name: ClassVar[str] = "shift"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    adaptive: ClassVar[bool] = True

    halve: bool = False

    def sites(self, n_layers: int) -> tuple[int, ...]:
        return (2, 3)

    def select(self, evidence: Evidence, site: int) -> Selection:
        place = torch.arange(evidence.n)
        stay = place % 2 > 0 if self.halve and site == 3 else place >= 0
        return Selection(keep=place, stay=stay, features=evidence.require("hidden").flip(0) * site, merged_into=place)


@dataclass(frozen=True, kw_only=True)
class SharedShift(Shift):
    """The same for all images of a prompt together."""

    name: ClassVar[str] = "shared_shift"
    scope: ClassVar[Literal["image", "prompt"]] = "prompt"


@pytest.mark.parametrize("halve", [False, True])
@pytest.mark.parametrize("kind", [Shift, SharedShift])
def test_new_states_without_a_drop_and_with_one(kind: type[Shift], halve: bool) -> None:
    (model, oracle), inputs = pair(), tiny_inputs()
    with compress(model, kind(halve=halve)) as handle:
        output = model.generate(**inputs, **GREEDY, max_new_tokens=4)

    def rewrite(layer: int, h: Tensor, maps: Any, words: list[int], visual: list[list[int]]) -> Tensor:
        units = [[entry for tokens in visual for entry in tokens]] if kind is SharedShift and visual else visual
        h = h.clone()
        for unit in units if layer in (2, 3) else ():
            h[unit] = h[unit].flip(0) * layer
        return h

    reference = oracle.logits(inputs, output.sequences, handle.report, rewrite=lambda row: rewrite)
    assert differ(output.logits, reference) <= TOLERANCE
    assert {image.alive[3] for image in handle.report.images} == {8 if halve else 16}
    for seen in handle.frame.images:  # type: ignore[union-attr]
        last = seen.stages[-1].selection
        assert last.features is not None and last.merged_into is not None
        assert len(last.features) == len(last.keep) == len(seen.stages[-1].kept)
        assert last.merged_into[last.keep].tolist() == list(range(len(last.keep)))


def test_the_next_method_at_the_same_site_sees_the_new_states(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, _), inputs, seen = pair(), tiny_inputs(), watch(monkeypatch)
    with compress(model, Chain(Shift(halve=True), peek(3, "hidden", "keys", "relevance"))):
        model.generate(**inputs, max_new_tokens=1)
    for before, after in zip(seen["shift", 3], seen["peek", 3], strict=True):
        assert before.hidden is not None
        assert torch.equal(after.require("hidden"), (before.hidden.flip(0) * 3)[1::2])
        assert torch.equal(after.features, before.features[1::2])
        assert len(after.require("keys")) == after.require("relevance").shape[1] == 8


def test_verify_merges_too() -> None:
    (model, _) = pair()
    done = foveate.verify(model, SPEC, tiny_inputs(), new_tokens=3)
    assert done.ok and done.effect > 100 * TOLERANCE


def test_verify_would_notice_a_merge_that_did_not_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.engines.decoder import DecoderPart

    original: Any = DecoderPart._select

    def without(self: Any, call: Any, method: Method, site: int, hidden: Tensor) -> Tensor:
        original(self, call, method, site, hidden)
        return hidden

    monkeypatch.setattr(DecoderPart, "_select", without)
    assert not foveate.verify(pair()[0], SPEC, tiny_inputs(), new_tokens=3).ok


def test_recycling_after_a_drop_that_left_rows_of_another_length() -> None:
    (model, _), inputs = pair(), tiny_inputs()
    chain = Chain(Coin(at="1", share=0.7, least=4), foveate.from_spec("sparsevlm:stages=2@0.3,recycle=1.0"))
    assert foveate.verify(model, chain, inputs, new_tokens=3).ok
