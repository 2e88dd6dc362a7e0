from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import BudgetError, VScan
from foveate.methods.vscan import VScanCut, VScanMerge
from tests.methods.helpers import Array, array, gap, make_evidence, top, waves


def places(frames: int, rows: int, columns: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(size) for size in (frames, rows, columns)])


def scans(shallow: Array, deep: Array, where: Array, k: int, side: int) -> list[int]:
    """Half of the picks window by window, one from each in turn, half from the rest of the picture; by loops."""
    windows: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(range(len(where)), key=lambda i: -shallow[i]):
        frame, row, column = (int(x) for x in where[i])
        windows.setdefault((frame, row // side, column // side), []).append(i)
    local: list[int] = []
    while len(local) < k // 2:
        turn = sorted((tokens.pop(0) for tokens in windows.values() if tokens), key=lambda i: -shallow[i])
        local += turn[: k // 2 - len(local)]
    rest = sorted((i for i in range(len(where)) if i not in local), key=lambda i: -deep[i])
    return sorted(local + rest[: k - k // 2])


@given(
    seed=st.integers(0, 10**6),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    side=st.integers(1, 4),
    share=st.floats(0.05, 1.0),
)
def test_both_scans_and_the_merge(seed: int, grid: tuple[int, int, int], side: int, share: float) -> None:
    n = math.prod(grid)
    evidence = make_evidence(n, seed, grid=grid, coordinates=places(*grid))
    shallow, deep, x = (array(e) for e in (evidence.encoder_shallow, evidence.encoder_saliency, evidence.features))
    method = VScanMerge(keep=share, window=side)
    k = method.expected(n, n, 0, 32)
    assert k == min(n, math.floor(1.5 * max(1, math.floor(share * n + 0.5)) + 0.5))
    wanted = scans(shallow, deep, array(evidence.coordinates), k, side)
    norm = np.sqrt((x**2).sum(1))
    cosine = (x @ x[wanted].T) / norm[:, None] / norm[wanted]
    assume(min(gap(shallow), gap(deep)) > 1e-9 and (k == 1 or np.diff(np.sort(cosine, 1)[:, -2:]).min() > 1e-6))
    nearest = [wanted.index(i) if i in wanted else int(cosine[i].argmax()) for i in range(n)]

    answer = method.select(evidence, 0)
    assert answer.keep.tolist() == wanted
    if k == n:
        assert answer.features is None and answer.merged_into is None
        return
    assert answer.merged_into is not None and answer.merged_into.tolist() == nearest
    for slot in range(k):
        members = [i for i in range(n) if nearest[i] == slot]
        np.testing.assert_allclose(array(answer.features)[slot], x[members].mean(0), atol=1e-5)


def test_each_window_of_the_published_grid_gets_three() -> None:
    shallow = torch.rand(576, generator=torch.Generator().manual_seed(0))
    deep = torch.arange(576.0)  # the picture as a whole is all about its last rows
    where = places(1, 24, 24)
    evidence = make_evidence(
        576, grid=(1, 24, 24), coordinates=where, encoder_shallow=shallow, encoder_saliency=deep, total=576
    )
    answer = VScan(keep=64).select(evidence, 0)
    assert len(answer.keep) == 96
    early = [i for i in answer.keep.tolist() if i < 24 * 18]
    windows = [(int(where[i, 1]) // 6, int(where[i, 2]) // 6) for i in early]
    assert {windows.count(window) for window in windows} == {3} and len(set(windows)) == 12


def test_by_hand() -> None:
    # For a mean of 2 three tokens enter the LLM. Of the best of both windows, 1 and 2, token 2 is the better one; of
    # the rest 1 and 0 stand out in the whole. Token 3 is most like 2.
    evidence = make_evidence(
        4,
        grid=(1, 1, 4),
        coordinates=places(1, 1, 4),
        features=torch.tensor([[4.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.5, 4.0]]),
        encoder_shallow=torch.tensor([0.1, 0.2, 0.4, 0.3]),
        encoder_saliency=torch.tensor([0.3, 0.9, 0.9, 0.1]),
    )
    answer = VScan(keep=2, window=2).select(evidence, 0)
    assert answer.keep.tolist() == [0, 1, 2]
    assert answer.features is not None and answer.merged_into is not None
    assert answer.features.tolist() == [[4.0, 0.0], [-1.0, 0.0], [0.25, 3.0]]
    assert answer.merged_into.tolist() == [0, 1, 2, 2]


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), share=st.floats(0.4, 1.0))
def test_half_way_the_last_prompt_token_decides(seed: int, n: int, share: float) -> None:
    evidence = make_evidence(n, seed)
    wanted = array(evidence.relevance)[-1]
    assume(gap(wanted) > 1e-7)
    method = VScanCut(keep=share)
    answer = method.select(evidence, 16)
    assert answer.keep.tolist() == top(wanted, method.expected(n, n, 16, 32))


@pytest.mark.parametrize(("mean", "first", "second"), [(192, 288, 96), (128, 192, 64), (64, 96, 32), (32, 48, 16)])
def test_the_published_counts(mean: int, first: int, second: int) -> None:
    for method in (VScan(keep=mean), VScan(keep=mean / 576)):
        assert method.sites(32) == (0, 16)
        assert method.expected(576, 576, 0, 32) == first
        assert method.expected(first, first, 16, 32) == second


@given(n=st.integers(1, 3000), layers=st.integers(2, 80), inner=st.floats(0.01, 1.0), keep=st.integers(1, 3000))
def test_a_mean_in_tokens_is_met(n: int, layers: int, inner: float, keep: int) -> None:
    method = VScan(keep=keep, inner=inner)
    first = method.expected(n, n, 0, layers)
    cut = method.sites(layers)[-1]
    second = method.expected(first, first, cut, layers) if cut else first
    assert 0 <= second <= first <= n
    early = cut or layers
    assert abs((early * first + (layers - early) * second) / layers - min(keep, n)) <= 0.5 + (cut == 0)


@given(n=st.integers(1, 3000), layers=st.integers(2, 80), share=st.floats(0.01, 1.0))
def test_a_mean_as_a_fraction_is_met_to_within_a_token(n: int, layers: int, share: float) -> None:
    method = VScan(keep=share)
    first, (_, cut) = method.expected(n, n, 0, layers), method.sites(layers)
    second = method.expected(first, first, cut, layers)
    assert abs((cut * first + (layers - cut) * second) / layers - max(1, math.floor(share * n + 0.5))) <= 1.5


def test_each_stage_works_alone() -> None:
    assert [type(part) for part in VScan(keep=64).parts] == [VScanMerge, VScanCut]
    assert [type(part) for part in VScan(keep=64, inner=1.0).parts] == [VScanMerge]
    assert VScan(keep=64, inner=1.0).expected(576, 576, 0, 32) == 64
    assert [part.positions for part in VScan(keep=64, positions="original").parts] == ["original", "paper"]
    assert VScanMerge.paper_positions == "packed"


@pytest.mark.parametrize(("layers", "shallow"), [(24, 5), (27, 6), (32, 7), (12, 3), (4, 1), (1, 0)])
def test_the_early_layer_scales_with_the_encoder(layers: int, shallow: int) -> None:
    assert VScanMerge(keep=64).shallow_layer(layers) == shallow
    assert VScanMerge(keep=64, shallow=0).shallow_layer(layers) == 0
    with pytest.raises(BudgetError, match=f"an encoder of {layers} layers has no layer {layers}"):
        VScanMerge(keep=64, shallow=layers).shallow_layer(layers)


def test_golden() -> None:
    saliency = {"encoder_saliency": waves(24).softmax(0), "encoder_shallow": waves(24, step=0.3).softmax(0)}
    evidence = make_evidence(24, features=waves(24, 6), **saliency)
    answer = VScan(keep=6, window=2).select(evidence, 0)
    assert (answer.keep.tolist(), answer.merged_into.tolist()) == GOLDEN  # type: ignore[union-attr]


GOLDEN = (
    [0, 1, 2, 4, 12, 15, 18, 22, 23],
    [0, 1, 2, 3, 3, 0, 0, 7, 0, 2, 0, 2, 4, 4, 2, 5, 0, 0, 6, 0, 0, 6, 7, 8],
)


@pytest.mark.parametrize(
    "options", [{"inner": 0.0}, {"inner": 1.1}, {"window": 0}, {"shallow": -1}, {"keep": 0}, {"keep": 2.0}]
)
def test_bad_options_are_refused_with_a_hint(options: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        VScan(**({"keep": 4} | options))
