from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate import budget
from foveate.budget import alive_per_layer, check_keep, resolve_keep, solve_schedule, stage_keep
from foveate.errors import BudgetError


@pytest.mark.parametrize(
    ("keep", "n", "expected"),
    [
        (64, 576, 64),
        (576, 576, 576),
        (600, 576, 576),
        (1, 1, 1),
        (0.5, 5, 3),
        (0.1, 4, 1),
        (1.0, 7, 7),
        (0.111, 576, 64),
    ],
)
def test_keep_by_hand(keep: float | int, n: int, expected: int) -> None:
    assert resolve_keep(keep, n) == expected


@pytest.mark.parametrize(
    ("keep", "complaint", "hint"),
    [
        (0, "at least 1 token, got 0", "keep=64 keeps 64 tokens"),
        (-1, "at least 1 token, got -1", "keep=0.25 keeps a quarter"),
        (64.0, r"fraction in \(0, 1\], got 64.0", "a number of tokens is an int: keep=64"),
        (1.5, r"fraction in \(0, 1\], got 1.5", "keep=64 keeps 64 tokens"),
        (0.0, r"fraction in \(0, 1\], got 0.0", "keep=1.0 keeps all"),
        (-0.5, "got -0.5", "keep=1.0 keeps all"),
        (float("nan"), "got nan", "keep=1.0 keeps all"),
        (float("inf"), "got inf", "keep=1.0 keeps all"),
        (True, "an int or a float, got True", "keep=64"),
        ("64", "an int or a float, got '64'", "keep=64"),
        (None, "an int or a float, got None", "keep=64"),
    ],
)
def test_a_wrong_keep_is_refused_with_what_to_type(keep: object, complaint: str, hint: str) -> None:
    with pytest.raises(BudgetError, match=complaint) as caught:
        check_keep(keep)
    assert caught.value.hint is not None
    assert hint in caught.value.hint
    assert isinstance(caught.value, ValueError)


def test_stages_may_keep_none() -> None:
    check_keep(0, allow_zero=True)
    check_keep(0.0, allow_zero=True)
    with pytest.raises(BudgetError):
        check_keep(-1, allow_zero=True)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_whole_keeps_are_counts(keep: int, n: int) -> None:
    assert resolve_keep(keep, n) == min(keep, n)


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_fractional_keeps_round_to_the_nearest_count(keep: float, n: int) -> None:
    k = resolve_keep(keep, n)
    assert 1 <= k <= n
    assert abs(k - keep * n) <= 0.5 or k == 1


@given(st.floats(0, 1), st.integers(0, 5000))
def test_a_stage_never_keeps_more_than_its_share(keep: float, alive: int) -> None:
    assert 0 <= stage_keep(keep, alive) <= keep * alive + 1e-8


def test_tokens_per_layer_of_the_published_schedule() -> None:
    alive = alive_per_layer(576, ((3, 0.5), (17, 0.3), (22, 0)), 32)
    assert alive == (576,) * 3 + (288,) * 14 + (86,) * 5 + (0,) * 10
    assert sum(alive) / 32 == pytest.approx(193.4, abs=0.1)


@given(st.integers(1, 3000), st.data())
def test_a_solved_schedule_meets_its_mean(n: int, data: st.DataObject) -> None:
    layers = data.draw(st.integers(4, 64))
    sites = sorted(data.draw(st.sets(st.integers(1, layers), min_size=3, max_size=3)))
    keep = data.draw(st.integers(1, n))
    assume(keep * layers >= sites[0] * n)
    stages = solve_schedule(n, keep, layers, (sites[0], sites[1], sites[2]))
    alive = alive_per_layer(n, stages, layers)
    assert [site for site, _ in stages] == sites
    assert list(alive) == sorted(alive, reverse=True)
    assert abs(sum(alive) / layers - keep) <= 0.5 or sites[2] == layers


@pytest.mark.parametrize("sites", [(0, 1, 2), (3, 3, 4), (5, 4, 6), (3, 17, 33)])
def test_sites_have_to_rise_within_the_model(sites: tuple[int, int, int]) -> None:
    with pytest.raises(BudgetError, match="three rising layers"):
        solve_schedule(576, 128, 32, sites)


def test_a_mean_out_of_reach_names_the_least() -> None:
    with pytest.raises(BudgetError, match=r"a mean of 10 of 576 tokens per layer is out of reach") as caught:
        solve_schedule(576, 10, 32, (3, 17, 22))
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("keep at least 54,")
    assert budget.alive_per_layer(576, solve_schedule(576, 54, 32, (3, 17, 22)), 32)[3] == 0


@given(
    n=st.integers(1, 3000),
    layers=st.integers(2, 80),
    share=st.floats(0.0, 1.0),
    data=st.data(),
)
def test_a_decaying_schedule_meets_its_mean_to_within_half_a_token(
    n: int, layers: int, share: float, data: st.DataObject
) -> None:
    sites = sorted(data.draw(st.sets(st.integers(1, layers - 1), min_size=1, max_size=4)))
    keep = max(1, round(share * n))
    assume(keep * layers >= sites[0] * n)
    stages = budget.solve_decay(n, keep, layers, sites)
    counts = alive_per_layer(n, stages, layers)
    assert [site for site, _ in stages] == sites
    assert list(counts) == sorted(counts, reverse=True)
    assert abs(sum(counts) / layers - keep) <= 0.5


def test_a_decaying_schedule_keeps_the_same_share_at_each_stage() -> None:
    assert budget.solve_decay(576, 270, 32, (8, 16, 24)) == ((8, 288), (16, 144), (24, 72))
    assert budget.solve_decay(576, 576, 32, (2, 6, 15)) == ((2, 576), (6, 576), (15, 576))
    assert budget.solve_decay(576, 36, 32, (2,)) == ((2, 0),)
    assert budget.solve_decay(576, 64, 32, (2,)) == ((2, 30),)
    with pytest.raises(BudgetError, match=r"out of reach: 2 of 32 layers .* makes 36\nhint: keep at least 36"):
        budget.solve_decay(576, 35, 32, (2,))


def test_a_decaying_schedule_counts_what_goes_on_besides() -> None:
    def one_more(alive: int, k: int) -> int:
        return min(alive, k + 1)

    stages = budget.solve_decay(100, 50, 10, (2, 5), one_more)
    first, second = (k + 1 for _, k in stages)
    assert abs((2 * 100 + 3 * first + 5 * second) / 10 - 50) <= 0.5


@pytest.mark.parametrize(
    ("depths", "layers", "places"),
    [
        ((2 / 32, 6 / 32, 15 / 32), 32, (2, 6, 15)),
        ((2 / 32, 6 / 32, 15 / 32), 40, (3, 8, 19)),
        ((0.25, 0.5, 0.75), 4, (1, 2, 3)),
        ((0.01, 0.02, 0.03), 32, (1, 2, 3)),
    ],
)
def test_depths_become_rising_layers(depths: tuple[float, ...], layers: int, places: tuple[int, ...]) -> None:
    assert budget.at_depths(depths, layers) == places


@pytest.mark.parametrize(
    "stages", [(), ((0, 0.5),), ((3, 0.5), (3, 0.2)), ((5, 0.5), (3, 0.5)), ((3, 1.5),), ((3, -1),)]
)
def test_stages_that_cannot_be_are_refused(stages: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(BudgetError, match="hint: "):
        budget.check_stages(stages)
