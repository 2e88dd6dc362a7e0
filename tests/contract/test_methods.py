"""What every method promises, whatever its paper: the invariants that the engines rely on."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import foveate
from foveate import Evidence, Method, MissingEvidence, PromptMethod, Selection, registry
from foveate.core import DECLARABLE, Chain
from foveate.selection import select_all
from tests.methods.helpers import converted, make_evidence, permuted, tensors

DEPTH = 32
SPECS = [
    "adav:keep=7",
    "adav:keep=0.25,temperature=10.0,fixed=0.5",
    "cdpruner:keep=7",
    "cdpruner:keep=0.5",
    "dart",
    "dart:keep=0.5,pivots=2,layer=5",
    "dart:stages=3@2/9@0.5",
    "divprune:keep=7",
    "evocut:keep=7",
    "evocut:keep=0.3,share=global,directions=3",
    "fastv",
    "fastv:keep=7,layer=3",
    "fastv:stages=2@0.5/5@0",
    "grid:keep=6",
    "holov:keep=7",
    "holov:keep=0.5,chunks=5,alpha=2.0",
    "pool:keep=7",
    "prumerge:keep=7",
    "prumerge:keep=1.0,fence=1.5,neighbours=3",
    "prumerge_plus:keep=7",
    "prumerge_plus:keep=0.5,fence=0.0,uniform=0.3",
    "pyramiddrop",
    "pyramiddrop:keep=0.2,start=0.125",
    "pyramiddrop:stages=4@9/8@0.25",
    "random:keep=7,seed=3",
    "sparsevlm",
    "sparsevlm:keep=7,recycle=1.0",
    "sparsevlm:stages=2@0.3/9@0.1,recycle=0.6",
    "todre:keep=7",
    "todre:keep=7,exit=none,diversity=k_center,pivot_layer=feature",
    "todre:keep=1.0,tau=0.5",
    "v2drop",
    "v2drop:keep=0.25",
    "v2drop:stages=2@0.5/5@7,metric=cosine",
    "vscan:keep=0.5",
    "vscan:keep=13,inner=1.0,window=2",
    "vscan:keep=0.25,inner=0.5,window=3,shallow=0",
    "vispruner:keep=7",
    "vispruner:keep=0.3,important=0.0,removed=3",
    "visionzip:keep=7",
    "visionzip:keep=0.5,contextual=0.5",
    "evocut:keep=12 + v2drop:keep=6",
]
FULL = [
    f"{name}:keep={keep}{more}"
    for name, more in (
        ("adav", ""),
        ("adav", ",compat=true"),
        ("cdpruner", ""),
        ("dart", ""),
        ("divprune", ""),
        ("evocut", ""),
        ("fastv", ""),
        ("grid", ""),
        ("holov", ""),
        ("pool", ""),
        ("prumerge", ""),
        ("prumerge_plus", ""),
        ("pyramiddrop", ""),
        ("random", ""),
        ("sparsevlm", ""),
        ("todre", ",exit=none"),
        ("v2drop", ""),
        ("vispruner", ""),
        ("vscan", ""),
        ("visionzip", ""),
    )
    for keep in ("1.0", "999")
]

every_spec = pytest.mark.parametrize("spec", SPECS)


def places(spec: str) -> Iterator[tuple[Method, int]]:
    """Yield each part of a method with each of its sites."""
    for part in registry.from_spec(spec).parts:
        for site in part.sites(DEPTH):
            yield part, site


def only_declared(method: Method, evidence: Evidence) -> Evidence:
    """Return the evidence as an engine makes it: what the method did not declare is missing."""
    missing: dict[str, Any] = dict.fromkeys(DECLARABLE - {"coordinates"} - method.needs)
    return dataclasses.replace(evidence, **missing)


def check(answer: Selection, n: int, count: int | None) -> None:
    keep = answer.keep.tolist()
    assert keep == sorted(set(keep)) and all(0 <= i < n for i in keep)
    assert count is None or len(keep) == count
    for scores in filter(lambda t: t is not None, (answer.scores, answer.features)):
        assert not bool(scores.isnan().any())  # type: ignore[union-attr]
    assert answer.scores is None or (answer.scores.dtype == torch.float32 and answer.scores.shape == (n,))
    assert answer.features is None or answer.features.shape[0] == len(keep)
    if answer.merged_into is not None:
        own = answer.merged_into[answer.keep] == torch.arange(len(keep))
        assert bool((own if answer.stay is None else own | ~answer.stay).all())


def test_every_registered_method_is_under_contract() -> None:
    assert set(registry.names()) == {part.split(":")[0].strip() for spec in SPECS for part in spec.split("+")}


@every_spec
@pytest.mark.parametrize("n", [24, 7, 1])
def test_counts_are_obeyed_and_indices_sorted_unique_and_in_range(spec: str, n: int) -> None:
    for part, site in places(spec):
        answer = part.select(only_declared(part, make_evidence(n)), site)
        check(answer, n, part.expected(n, n, site, DEPTH))
        assert (part.expected(n, n, site, DEPTH) is None) == (answer.stay is not None)
        assert answer.stay is None or part.adaptive


@every_spec
def test_a_whole_spec_selects_at_each_of_its_sites(spec: str) -> None:
    method, evidence = registry.from_spec(spec), make_evidence(24)
    for site in method.sites(DEPTH):
        answers = select_all(method, [evidence, make_evidence(24, seed=1)], site)
        check(answers[0], 24, method.expected(24, 24, site, DEPTH))


@pytest.mark.parametrize("spec", FULL)
@pytest.mark.parametrize("n", [24, 5, 1])
def test_all_are_kept_at_full_budget(spec: str, n: int) -> None:
    evidence = make_evidence(n)
    for part, site in places(spec):
        answer = part.select(evidence, site)
        assert answer.keep.tolist() == list(range(n))
        assert answer.features is None or torch.equal(answer.features, evidence.features)


@every_spec
def test_the_answer_is_deterministic_and_leaves_inputs_and_generators_alone(spec: str) -> None:
    for part, site in places(spec):
        evidence = make_evidence(24)
        before = {name: value.clone() for name, value in tensors(evidence).items()}
        state = torch.get_rng_state()
        first = part.select(evidence, site)
        assert torch.equal(state, torch.get_rng_state())
        torch.rand(5)
        second = part.select(evidence, site)
        for name in ("keep", "stay", "scores", "features", "merged_into"):
            one, two = getattr(first, name), getattr(second, name)
            assert (one is None and two is None) or torch.equal(one, two)
        assert all(torch.equal(before[name], value) for name, value in tensors(evidence).items())


@every_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accepted_and_scores_are_float32(spec: str, dtype: torch.dtype) -> None:
    for part, site in places(spec):
        answer = part.select(converted(make_evidence(24), dtype), site)
        check(answer, 24, part.expected(24, 24, site, DEPTH))
        assert answer.features is None or answer.features.dtype == dtype


@every_spec
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_zero_and_identical_rows_make_no_nan(spec: str, value: float) -> None:
    base = make_evidence(24)
    poor: dict[str, Any] = {
        name: torch.full_like(t, value) for name, t in tensors(base).items() if t.is_floating_point()
    }
    for part, site in places(spec):
        answer = part.select(dataclasses.replace(base, **poor), site)
        check(answer, 24, part.expected(24, 24, site, DEPTH))


@every_spec
def test_tokens_in_another_order_are_the_same_tokens(spec: str) -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    for part, site in places(spec):
        if "coordinates" in part.needs and "seed" not in part.needs:
            continue  # it reads the raster order
        evidence = make_evidence(24)
        kept = part.select(evidence, site).keep.tolist()
        moved = part.select(permuted(evidence, order), site).keep
        assert sorted(order[moved].tolist()) == kept


@every_spec
def test_stacked_images_get_the_answers_they_get_alone(spec: str) -> None:
    for part, site in places(spec):
        images = [make_evidence(n, seed=seed) for seed, n in enumerate((24, 24, 10, 24, 10, 3))]
        images = [only_declared(part, image) for image in images]
        for image, together in zip(images, select_all(part, images, site), strict=True):
            alone = part.select(image, site)
            assert together.keep.tolist() == alone.keep.tolist()
            for name in ("stay", "scores", "features", "merged_into"):
                one, two = getattr(together, name), getattr(alone, name)
                assert (one is None) == (two is None)
                if one is not None:
                    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
            assert {k: round(float(v), 5) for k, v in together.measures.items()} == {
                k: round(float(v), 5) for k, v in alone.measures.items()
            }


@every_spec
def test_nothing_is_read_back_from_the_device(spec: str) -> None:
    # Tensors on `meta` have no values: a host sync or control flow that depends on data would raise.
    for part, site in places(spec):
        evidence = make_evidence(24)
        away: dict[str, Any] = {name: value.to("meta") for name, value in tensors(evidence).items()}
        answer = part.select(dataclasses.replace(evidence, **away), site)
        assert part.expected(24, 24, site, DEPTH) in (None, answer.keep.shape[0])
        if "encoder_fold" in part.needs:
            states = torch.empty(24, 6, device="meta")
            assert part.fold(part.fold(None, states, states), states, states).shape == (24,)


@every_spec
def test_specs_round_trip(spec: str) -> None:
    method = registry.from_spec(spec)
    again = registry.from_spec(registry.to_spec(method))
    assert again == method and hash(again) == hash(method)
    assert registry.to_spec(again) == registry.to_spec(method)


@every_spec
def test_declared_evidence_is_real_and_read(spec: str) -> None:
    for part, site in places(spec):
        assert part.needs <= DECLARABLE
        for name in sorted(part.needs - {"coordinates"}):
            without: dict[str, Any] = {name: None}
            with pytest.raises(MissingEvidence, match=f"`{name}` was not captured"):
                part.select(dataclasses.replace(make_evidence(24), **without), site)


@dataclass(frozen=True, kw_only=True)
class Peeking(PromptMethod):
    """Reads the text without saying so."""

    name: ClassVar[str] = "peeking"

    def select(self, evidence: Evidence, site: int) -> Selection:
        scores = evidence.features @ evidence.require("text").mean(0)
        return Selection(keep=scores.topk(self.count(evidence.n)).indices.sort().values)


def test_a_method_that_reads_what_it_did_not_declare_is_told_so() -> None:
    evidence = only_declared(Peeking(keep=3), make_evidence(24))
    with pytest.raises(MissingEvidence, match="add 'text' to the method's `needs`"):
        select_all(Peeking(keep=3), [evidence], 0)


@pytest.mark.parametrize("name", registry.names())
def test_docstrings_have_every_section_in_order(name: str) -> None:
    text = registry.get(name).__doc__ or ""
    sections = (
        "Paper:", "Idea:", "Sites:", "Keeps:", "Differs from the paper:", "Args:", "Raises:", "Example:"
    )  # fmt: skip
    found = [text.find(f"\n    {section}") for section in sections]
    assert -1 not in found and found == sorted(found)
    for field in dataclasses.fields(registry.get(name)):
        assert field.name == "positions" or f"\n        {field.name}: " in text


@pytest.mark.parametrize("name", registry.names())
def test_budgets_out_of_range_are_refused(name: str) -> None:
    for keep in ("0", "-1", "64.0", "0.0", "1.5", "nan"):
        with pytest.raises(foveate.BudgetError, match="hint: "):
            registry.from_spec(f"{name}:keep={keep}")


def test_unknown_choices_are_refused_in_the_users_words() -> None:
    # In a process of its own: under test, beartype would refuse them before the methods do.
    specs = [
        "evocut:keep=4,per=image",
        "todre:keep=4,diversity=max",
        "todre:keep=4,pivot_layer=first",
        "v2drop:metric=l3",
    ]
    script = (
        "import foveate\n"
        f"for spec in {specs!r}:\n"
        "    try:\n"
        "        foveate.from_spec(spec)\n"
        "    except foveate.BudgetError as error:\n"
        "        assert error.hint, spec\n"
        "    else:\n"
        "        raise AssertionError(spec)\n"
    )
    path = {"PYTHONPATH": str(Path(foveate.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **path}
    )
    assert done.returncode == 0, done.stderr


def test_the_second_method_of_a_chain_sees_what_the_first_kept() -> None:
    evidence = make_evidence(24)
    chain = Chain(foveate.EvoCut(keep=12), foveate.Grid(keep=4))
    first = foveate.EvoCut(keep=12).select(evidence, 0).keep.tolist()
    assert chain.select(evidence, 0).keep.tolist() == [first[i] for i in (1, 4, 7, 10)]
    assert chain.expected(24, 24, 0, DEPTH) == 4


@pytest.mark.parametrize(
    "spec", ["grid:keep=9 + evocut:keep=4", "pool:keep=9 + todre:keep=4,exit=none", "evocut:keep=9 + adav:keep=4"]
)
def test_a_chain_at_one_site_stacks_like_a_method(spec: str) -> None:
    chain, images = registry.from_spec(spec), [make_evidence(24, seed=seed) for seed in range(3)]
    for image, together in zip(images, select_all(chain, images, 0), strict=True):
        alone = chain.select(image, 0)
        assert together.keep.tolist() == alone.keep.tolist() and len(alone.keep) == 4
        for name in ("scores", "features", "merged_into"):
            one, two = getattr(together, name), getattr(alone, name)
            assert (one is None and two is None) or torch.allclose(one, two, atol=1e-5)


def test_a_larger_budget_keeps_what_a_smaller_one_kept() -> None:
    evidence = make_evidence(24)
    for name in ("cdpruner", "divprune", "evocut", "random", "todre"):
        kept: set[int] = set()
        for k in range(1, 25):
            more = registry.from_spec(f"{name}:keep={k}").select(evidence, 0).keep
            assert kept <= set(more.tolist()) and len(more) == k
            kept = set(more.tolist())
