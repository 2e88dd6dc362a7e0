"""Dropping equals masking: what the engine generates, against a reference that only masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate.core import Chain, Method
from foveate.engines.base import compress
from tests.engine.oracle import GREEDY, cache_lengths, differ, pair, prompts
from tests.engine.probes import Coin, SharedCoin
from tests.models import IMAGE, TOKENS, Tower, one_row, tiny_inputs

TOLERANCE = 1e-4

#: Without a cache the stock model takes a generated placeholder for a picture without features, and stops.
NO_CACHE: dict[str, Any] = {"use_cache": False, "suppress_tokens": [IMAGE]}

#: Method, and what its positions are.
CASES: dict[str, tuple[str | Method, str]] = {
    "evocut": ("evocut:keep=5", "packed"),
    "evocut original": ("evocut:keep=5,positions=original", "original"),
    "todre exits": ("todre:keep=6,exit=0.5,tau=1.0", "packed"),
    "todre stays": ("todre:keep=6,exit=0.5,tau=0.0", "packed"),
    "todre stage 1": ("todre:keep=6,exit=none,diversity=k_center,pivot_layer=feature", "packed"),
    "todre stage 2": ("todre:keep=1.0,exit=0.5,tau=1.0", "original"),
    "adav": ("adav:keep=6", "packed"),
    "adav compat": ("adav:keep=6,compat=true", "packed"),
    "v2drop": ("v2drop:stages=2@0.5/4@0.25", "original"),
    "v2drop to nothing": ("v2drop:stages=1@0.5/3@0.3/5@0", "original"),
    "v2drop by mean": ("v2drop:keep=8", "original"),
    "random": ("random:keep=5", "packed"),
    "grid": ("grid:keep=4", "packed"),
    "pool": ("pool:keep=4", "packed"),
    "divprune": ("divprune:keep=5", "packed"),
    "cdpruner": ("cdpruner:keep=5", "packed"),
    "vispruner": ("vispruner:keep=5,removed=2", "packed"),
    "holov": ("holov:keep=5,chunks=4", "packed"),
    "fastv": ("fastv:keep=7", "original"),
    "pyramiddrop": ("pyramiddrop", "original"),
    "sparsevlm": ("sparsevlm:stages=2@0.5/4@0.3,recycle=0.0", "original"),  # recycling: test_merging.py
    "dart": ("dart:keep=8,pivots=2", "original"),
    "vscan": ("vscan:keep=6,window=2", "packed"),
    "evocut + v2drop": ("evocut:keep=10 + v2drop:stages=2@0.5/4@0", "packed"),
    "evocut original + v2drop": ("evocut:keep=10,positions=original + v2drop:stages=2@0.5/4@0", "original"),
    "pool + evocut + todre": ("pool:keep=8,positions=packed + evocut:keep=5 + todre:keep=3,exit=0.5,tau=1.0", "packed"),
    "ragged": (Coin(positions="packed"), "packed"),
    "ragged original": (Coin(positions="original"), "original"),
    "ragged inside": (Coin(at="24", least=0), "original"),
    "ragged inside, together": (SharedCoin(at="135", share=0.6), "original"),
    "ragged everywhere": (Chain(Coin(share=0.8), Coin(at="13", seed=2), SharedCoin(at="34", seed=3)), "original"),
}
#: Methods that merge before the LLM otherwise than by plain means; their rows come from the frame, not from the oracle.
MERGED = (
    "visionzip:keep=6,contextual=0.4",
    "prumerge:keep=5,neighbours=3",
    "prumerge:keep=9,fence=0.5",
    "prumerge_plus:keep=9,fence=0.5,uniform=0.4",
)
BACKENDS: list[tuple[str, Tower]] = [(i, t) for i in ("sdpa", "eager") for t in ("clip", "siglip")]


@pytest.mark.parametrize(("impl", "tower"), BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_dropped_equals_masked(case: str, impl: str, tower: Tower) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(impl, tower), tiny_inputs()
    plain = model.generate(**inputs, **GREEDY, max_new_tokens=16)
    with compress(model, method) as handle:
        output = model.generate(**inputs, **GREEDY, max_new_tokens=16)
    report, prompt = handle.report, inputs["input_ids"].shape[1]

    reference = oracle.logits(inputs, output.sequences, report, positions)
    assert differ(output.logits, reference) <= TOLERANCE
    assert (torch.stack(output.logits, 1) - oracle.logits(inputs, output.sequences)[:, prompt - 1 : -1]).abs().amax(
        (1, 2)
    )[1:].min() > 100 * TOLERANCE, "the reference would not notice if nothing were dropped"

    lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    assert lengths == cache_lengths(report, inputs, 6, decoded=15)
    assert torch.equal(output.sequences[:, :prompt], inputs["input_ids"])
    assert torch.equal(output.sequences[0], plain.sequences[0])
    assert max((a[0] - b[0]).abs().max() for a, b in zip(output.logits, plain.logits, strict=True)) <= TOLERANCE
    assert [(image.row, image.index) for image in report.images] == [(1, 0), (2, 0), (2, 1)]
    assert all(image.alive == tuple(len(image.after(layer)) for layer in range(6)) for image in report.images)


@pytest.mark.parametrize(("impl", "tower"), [("sdpa", "clip"), ("eager", "siglip")])
@pytest.mark.parametrize("spec", MERGED)
def test_rows_merged_before_the_llm_are_read_in_their_places(spec: str, impl: str, tower: Tower) -> None:
    (model, oracle), inputs = pair(impl, tower), tiny_inputs()
    with compress(model, spec) as handle:
        output = model.generate(**inputs, **GREEDY, max_new_tokens=8)
    assert handle.frame is not None
    images, report = handle.frame.images, handle.report

    def merged(row: int) -> Any:
        mine = [seen.evidence.features.double() for seen in images if seen.row == row]

        def rewrite(layer: int, h: Any, maps: Any, text: Any, visual: Any) -> Any:
            return (
                h.index_copy(0, torch.tensor([entry for tokens in visual for entry in tokens]), torch.cat(mine))
                if not layer and mine
                else h
            )

        return rewrite

    assert differ(output.logits, oracle.logits(inputs, output.sequences, report, "packed", merged)) <= TOLERANCE
    steps, dropped = torch.stack(output.logits, 1), oracle.logits(inputs, output.sequences, report, "packed")
    assert (steps - dropped[:, -1 - steps.shape[1] : -1])[1:].abs().amax((1, 2)).min() > 100 * TOLERANCE
    if "fence" in spec:
        assert len({image.alive[0] for image in report.images}) > 1, "each picture has its own number of outliers"


def test_every_registered_method_is_proven() -> None:
    methods = [*(method for method, _ in CASES.values()), *MERGED]
    tried = {part.name for method in methods for part in foveate.from_spec(method).parts}
    known = {part.name for name in foveate.registry.names() for part in _build(name).parts}
    assert known <= tried


def _build(name: str) -> Method:
    try:
        return foveate.from_spec(f"{name}:keep=0.5")
    except foveate.BudgetError:
        return foveate.from_spec(name)


@pytest.mark.parametrize(("impl", "tower"), BACKENDS)
@pytest.mark.parametrize(
    "spec",
    [
        "evocut:keep=1.0",
        "evocut:keep=16,positions=original",
        "todre:keep=16,exit=0.5,tau=0.0",
        "todre:keep=1.0,exit=0.5,tau=0.0",
        "adav:keep=1.0",
        "adav:keep=1.0,compat=true",
        "v2drop:stages=2@1.0/4@1.0",
        "random:keep=1.0",
        "grid:keep=1.0",
        "pool:keep=1.0",
        "fastv:keep=1.0",
        "pyramiddrop:keep=1.0",
        "sparsevlm:keep=1.0",
        "dart:keep=1.0",
        "vscan:keep=1.0",
        "evocut:keep=1.0 + v2drop:stages=3@1.0",
    ],
)
def test_keeping_everything_changes_no_bit(spec: str, impl: str, tower: Tower) -> None:
    (model, _), inputs = pair(impl, tower), tiny_inputs()
    plain, read = model.generate(**inputs, **GREEDY, max_new_tokens=8), model(**inputs).logits
    with compress(model, spec):
        output, again = model.generate(**inputs, **GREEDY, max_new_tokens=8), model(**inputs).logits
    assert torch.equal(output.sequences, plain.sequences)
    assert torch.equal(torch.stack(output.logits), torch.stack(plain.logits))
    assert torch.equal(read, again)


@pytest.mark.parametrize("case", [name for name in CASES if "ragged" not in name])
def test_a_padded_batch_equals_its_rows_alone(case: str) -> None:
    (method, _), (model, _), inputs = CASES[case], pair(), tiny_inputs()
    prompt = inputs["input_ids"].shape[1]
    with compress(model, method) as handle:
        together = model.generate(**inputs, **GREEDY, max_new_tokens=8)
        report = handle.report
        for row in range(3):
            single = one_row(inputs, row)
            alone = model.generate(**single, **GREEDY, max_new_tokens=8)
            new = alone.sequences[0, single["input_ids"].shape[1] :]
            assert torch.equal(together.sequences[row, prompt:], new)
            pairs = zip(together.logits, alone.logits, strict=True)
            assert max((a[row] - b[0]).abs().max() for a, b in pairs) <= TOLERANCE
            if row:
                mine = [image.stages for image in report.images if image.row == row]
                kept = [[stage.kept for stage in stages] for stages in mine]
                assert kept == [[stage.kept for stage in image.stages] for image in handle.report.images]


def test_the_exit_fires_in_one_row_and_not_in_the_other() -> None:
    (model, oracle), inputs = pair(), tiny_inputs()
    with compress(model, "todre:keep=12,exit=0.5,tau=0.0") as handle:
        model.generate(**inputs, max_new_tokens=1)
    masses = [max(image.stages[-1].measures.values()) for image in handle.report.images]
    tau = (masses[0] + masses[1]) / 2
    assert masses[0] != masses[1] == masses[2]
    with compress(model, f"todre:keep=12,exit=0.5,tau={tau}") as handle:
        output = model.generate(**inputs, **GREEDY, max_new_tokens=16)
    left = [image.alive[-1] == 0 for image in handle.report.images]
    assert sorted({(image.row, gone) for image, gone in zip(handle.report.images, left, strict=True)}) in (
        [(1, True), (2, False)],
        [(1, False), (2, True)],
    )
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report, "packed")) <= TOLERANCE


@pytest.mark.parametrize(
    "options", [{}, NO_CACHE, {"cache_implementation": "static"}], ids=["dynamic", "none", "static"]
)
@pytest.mark.parametrize("case", ["evocut", "todre exits", "v2drop to nothing", "evocut + v2drop", "ragged everywhere"])
def test_beams_score_what_the_reference_scores(case: str, options: dict[str, Any]) -> None:
    (method, positions), (model, oracle), inputs = CASES[case], pair(), tiny_inputs()
    with compress(model, method) as handle:
        output = model.generate(
            **inputs, **GREEDY, **options, max_new_tokens=6, num_beams=3, num_return_sequences=2, output_scores=True
        )
    report, prompt = handle.report, inputs["input_ids"].shape[1]
    assert len(output.sequences) == 6
    sites = sorted(site for part in foveate.from_spec(method).parts for site in part.sites(6))
    stages = [[stage.site for stage in image.stages] for image in report.images]
    assert stages == [sites] * 3, "each stage is reported once, however many beams and steps there were"
    for i, sequence in enumerate(output.sequences):
        assert torch.equal(sequence[:prompt], inputs["input_ids"][i // 2])
        logits = oracle.read(inputs, output.sequences, i, report, positions, source=i // 2).logits[-7:-1]
        score = logits.log_softmax(-1).gather(1, sequence[prompt:, None]).mean()
        assert abs(score - output.sequences_scores[i]) <= TOLERANCE


@pytest.mark.parametrize("options", [NO_CACHE, {"cache_implementation": "static"}], ids=["none", "static"])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "case", ["evocut", "todre exits", "evocut original", "v2drop", "evocut original + v2drop", "ragged everywhere"]
)
def test_no_cache_and_a_static_cache(case: str, impl: str, options: dict[str, Any]) -> None:
    (method, positions), (model, oracle) = CASES[case], pair(impl)
    for inputs in (tiny_inputs(), tiny_inputs((2,))):  # a single row has no mask at all
        with compress(model, method) as handle:
            output = model.generate(**inputs, **GREEDY, **options, max_new_tokens=6)
        reference = oracle.logits(inputs, output.sequences, handle.report, positions)
        assert differ(output.logits, reference) <= TOLERANCE


@pytest.mark.parametrize(
    ("rows", "method"),
    [
        ([[IMAGE, 3, 4], [IMAGE, 5, 6]], Coin(at="1", share=0.2, least=0)),
        ([[IMAGE, 3, 4]], Coin(at="13", share=0.5)),
        ([[IMAGE, 3]], Coin(at="1", share=0.0, least=0)),
    ],
    ids=["ragged", "single", "one token left"],
)
def test_a_static_cache_without_padding(rows: list[list[int]], method: Method) -> None:
    """Nothing is padded, so there is no mask to cut: it has to be made, and as wide as the cache."""
    (model, oracle), inputs = pair(), prompts(rows)
    with compress(model, method) as handle:
        output = model.generate(**inputs, **GREEDY, max_new_tokens=5, cache_implementation="static")
    assert len({image.alive for image in handle.report.images}) == len(rows)
    assert differ(output.logits, oracle.logits(inputs, output.sequences, handle.report)) <= TOLERANCE


ODD_PROMPTS = {
    "the picture is first": [[IMAGE, 5, 6, 7]],
    "the picture is last": [[1, 5, 6, IMAGE]],
    "only a picture": [[IMAGE]],
    "pictures side by side": [[1, IMAGE, IMAGE, 5]],
    "only pictures": [[IMAGE, IMAGE], [1, 4, 5]],
    "one word each side": [[1, IMAGE, 5], [1, 9, 9, 9, IMAGE, 8, 7, IMAGE, 6]],
    "no row without": [[1, IMAGE, 5, 6], [1, 4, IMAGE, 7, 8, 9]],
}


@pytest.mark.parametrize("name", ODD_PROMPTS)
@pytest.mark.parametrize(
    ("spec", "positions"),
    [
        ("evocut:keep=5", "packed"),
        ("todre:keep=6,exit=0.5,tau=1.0", "packed"),
        ("adav:keep=6", "packed"),
        ("random:keep=1", "packed"),
        ("v2drop:stages=2@0.5/4@0.25", "original"),
        ("pool:keep=4 + v2drop:stages=3@0.5", "packed"),
    ],
)
@pytest.mark.parametrize("masked", [True, False])
def test_odd_prompts(name: str, spec: str, positions: str, masked: bool) -> None:
    (model, oracle), inputs = pair(), prompts(ODD_PROMPTS[name])
    given_ = inputs if masked else {k: v for k, v in inputs.items() if k != "attention_mask"}
    with compress(model, spec) as handle:
        output = model.generate(**given_, **GREEDY, max_new_tokens=4)
    reference = oracle.logits(inputs, output.sequences, handle.report, positions)
    prompt = inputs["input_ids"].shape[1]
    for row in range(len(reference)):  # where the last token left, the last one that stayed answers
        alive = [i for i in range(prompt) if not reference[row, i].isnan().any()]
        reference[row, prompt - 1] = reference[row, alive[-1]]
    assert differ(output.logits, reference) <= TOLERANCE


@pytest.mark.parametrize(
    "spec", ["evocut:keep=5", "todre:keep=5,exit=0.5,tau=1.0", "v2drop:stages=2@0.5", "pool:keep=4"]
)
def test_bfloat16_stays_near(spec: str) -> None:
    from tests.engine.oracle import Oracle, vivid
    from tests.models import tiny_llava

    model, inputs = vivid(tiny_llava(dtype=torch.bfloat16)), tiny_inputs()
    with compress(model, spec) as handle:
        output = model.generate(
            **{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}, **GREEDY, max_new_tokens=4
        )
    reference = Oracle(model).logits(inputs, output.sequences, handle.report, _positions(spec))
    steps = torch.stack(output.logits, 1)
    assert (steps - reference[:, -5:-1]).abs().max() <= 0.1
    assert steps.std() > 1


def _positions(spec: str) -> str:
    return "original" if spec.startswith("v2drop") else "packed"


def test_a_plain_forward_returns_the_survivors_logits() -> None:
    (model, oracle), inputs = pair(), one_row(tiny_inputs(), 2)
    for spec in ("evocut:keep=5", "evocut:keep=5,positions=original", "v2drop:stages=2@0.5/4@0.25"):
        with compress(model, spec) as handle, torch.no_grad():
            logits = model(**inputs).logits
            base = model.model(**inputs).last_hidden_state
        reference = oracle.logits(
            inputs, inputs["input_ids"], handle.report, "original" if "v2" in spec else handle.positions
        )
        alive = reference[0][~reference[0].isnan().any(-1)]
        assert logits.shape[1] == base.shape[1] == len(alive)
        assert (logits[0] - alive).abs().max() <= TOLERANCE
        assert torch.equal(model.lm_head(base), logits)


@st.composite
def _rows(draw: st.DrawFn) -> list[list[int]]:
    """Prompts of words and pictures in any order, at most two pictures each, ending in a word."""
    words = st.integers(3, 140)
    row = st.lists(st.one_of(st.just(IMAGE), words), max_size=7).filter(lambda row: row.count(IMAGE) <= 2)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    if not any(IMAGE in row for row in rows):
        rows[-1].append(IMAGE)
    return [[*row, draw(words)] for row in rows]


@st.composite
def _methods(draw: st.DrawFn) -> Method:
    shares = st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.1])
    parts: list[Method] = []
    if draw(st.booleans()):
        position: Any = draw(st.sampled_from(["original", "packed"]))
        parts.append(Coin(positions=position, share=draw(shares), seed=draw(st.integers(0, 9))))
    for _ in range(draw(st.integers(0 if parts else 1, 2))):
        kind = draw(st.sampled_from([Coin, SharedCoin]))
        sites = "".join(map(str, sorted(draw(st.sets(st.integers(1, 5), min_size=1, max_size=3)))))
        parts.append(kind(at=sites, share=draw(shares), seed=draw(st.integers(0, 9)), least=draw(st.integers(0, 1))))
    return parts[0] if len(parts) == 1 else Chain(*parts)


@settings(max_examples=60)
@given(
    rows=_rows(),
    method=_methods(),
    backend=st.sampled_from(BACKENDS),
    padding=st.sampled_from([0, 0, 3]),
    options=st.sampled_from([{}, {}, NO_CACHE, {"cache_implementation": "static"}]),
)
def test_any_prompts_any_drops(
    rows: list[list[int]], method: Method, backend: tuple[str, Tower], padding: int, options: dict[str, Any]
) -> None:
    (model, oracle), inputs = pair(*backend), prompts(rows)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (padding, 0))
    with compress(model, method) as handle:
        output = model.generate(**inputs, **GREEDY, **options, max_new_tokens=4)
    reference = oracle.logits(inputs, output.sequences, handle.report, handle.positions)
    assert differ(output.logits, reference) <= TOLERANCE
    assert all(image.tokens == TOKENS for image in handle.report.images)
