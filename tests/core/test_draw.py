from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from foveate import draw
from foveate.report import ImageReport, Report, StageReport

RED = (200, 30, 30)


def red(width: int = 480, height: int = 360) -> Image.Image:
    return Image.new("RGB", (width, height), RED)


def centre(picture: Image.Image, grid: tuple[int, int], row: int, column: int) -> tuple[int, ...]:
    x = round((column + 0.5) * picture.width / grid[1])
    y = round((row + 0.5) * picture.height / grid[0])
    pixel = picture.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return pixel


def is_grey(pixel: tuple[int, ...]) -> bool:
    return max(pixel) - min(pixel) < 20


def test_kept_cells_are_untouched_and_the_others_grey_on_a_grid_that_is_not_square() -> None:
    picture = draw.kept(red(), (1, 3, 4), [0, 6, 11])
    assert picture.size == (480, 360)
    for token in range(12):
        pixel = centre(picture, (3, 4), *divmod(token, 4))
        assert (pixel == RED) == (token in {0, 6, 11})
        assert is_grey(pixel) == (token not in {0, 6, 11})


def test_the_outline_runs_around_neighbours_and_not_between_them() -> None:
    picture = draw.kept(red(), (1, 3, 4), [5, 6])
    between, border = picture.getpixel((240, 180)), picture.getpixel((121, 180))
    assert between == RED
    assert border not in (RED, None)


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_exactly_the_kept_cells_shine(rows: int, columns: int, data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.integers(0, rows * columns - 1)))
    picture = draw.kept(red(333, 401), (1, rows, columns), kept)
    shining = {t for t in range(rows * columns) if centre(picture, (rows, columns), *divmod(t, columns)) == RED}
    assert shining == kept


def test_merged_cells_share_an_outline_and_stay_bright() -> None:
    picture = draw.kept(red(400, 400), (1, 2, 2), [0, 2], merged_into=[0, 0, 1, -1])
    assert [centre(picture, (2, 2), *divmod(token, 2)) == RED for token in range(4)] == [True, True, True, False]
    assert picture.getpixel((199, 100)) == picture.getpixel((200, 100)) == RED
    assert picture.getpixel((100, 199)) != RED


def test_small_pictures_are_enlarged_and_large_ones_left_alone() -> None:
    assert min(draw.kept(red(20, 10), (1, 2, 2), []).size) == 336
    assert draw.kept(red(336, 336), (1, 48, 48), []).size == (672, 672)
    assert draw.kept(red(1500, 900), (1, 2, 2), []).size == (1500, 900)


def test_frames_stand_side_by_side() -> None:
    picture = draw.kept(red(400, 400), (2, 2, 2), [0, 7])
    assert picture.size == (808, 400)
    assert picture.getpixel((100, 100)) == RED
    assert picture.getpixel((708, 300)) == RED
    assert picture.getpixel((100, 300)) != RED


def test_a_cropped_picture_has_its_grid_on_the_central_square() -> None:
    picture = draw.kept(red(800, 400), (1, 2, 2), [0], crop=True)
    assert picture.getpixel((300, 100)) == RED
    for outside in ((100, 100), (700, 100)):
        pixel = picture.getpixel(outside)
        assert isinstance(pixel, tuple)
        assert is_grey(pixel)


def test_scores_colour_the_boxes_from_blue_to_yellow() -> None:
    picture = draw.kept(red(400, 400), (1, 2, 2), [0, 3], scores=[0.0, math.nan, -math.inf, 1.0])
    assert picture.getpixel((1, 1)) == draw.RAMP[0]
    assert picture.getpixel((399, 399)) == draw.RAMP[-1]


def test_heat_has_a_colour_bar_and_leaves_cells_without_score_dark() -> None:
    picture = draw.heat(red(400, 400), (1, 2, 2), [0.0, math.nan, 0.5, 1.0])
    assert picture.width > 400
    low, none, high = (picture.getpixel(place) for place in ((100, 100), (300, 100), (300, 300)))
    assert isinstance(low, tuple)
    assert isinstance(none, tuple)
    assert isinstance(high, tuple)
    assert is_grey(none)
    assert sum(high) > sum(low)


def test_heat_of_equal_scores_works() -> None:
    assert draw.heat(red(), (1, 2, 2), [3.0] * 4).height == 360


def inner() -> ImageReport:
    stages = (
        StageReport(site=1, method="v2drop", kept=(0, 1)),
        StageReport(site=2, method="v2drop", kept=(1,)),
        StageReport(site=3, method="v2drop", kept=()),
    )
    return ImageReport(row=0, index=0, modality="image", grid=(1, 2, 2), tokens=4, stages=stages, alive=(4, 2, 1, 0))


def test_tokens_are_brighter_the_longer_they_live() -> None:
    picture = draw.tokens(red(400, 400), inner())
    reds = [centre(picture, (2, 2), *divmod(token, 2))[0] for token in range(4)]
    assert reds[1] == RED[0]
    assert reds[1] > reds[0] > reds[2] == reds[3]


def test_the_report_draws_itself_also_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    red(400, 400).save(path)
    report = Report(method="v2drop:keep=2", model="Llava", layers=4, images=(inner(),))
    assert report.draw(path).tobytes() == draw.tokens(red(400, 400), inner()).tobytes()
    assert report.draw(str(path), index=-1).size == (400, 400)


def test_alive_draws_a_bar_per_layer() -> None:
    report = Report(method="v2drop:keep=2", model="Llava", layers=4, images=(inner(),))
    picture = draw.alive(report)
    assert picture.size == (560, 240)
    heights = [
        sum(picture.getpixel((52 + round((layer + 0.5) * 494 / 4), y)) == draw.RAMP[3] for y in range(240))
        for layer in range(4)
    ]
    assert heights[0] > heights[1] > heights[2] > heights[3]
    with pytest.raises(ValueError, match="nothing has run yet"):
        draw.alive(Report(method="x", model="y", layers=4))


def test_a_sheet_has_room_for_every_panel_and_wraps_long_titles() -> None:
    short = draw.sheet([("a", red())] * 4, 2, width=200)
    long = draw.sheet([("a", red()), ("word " * 40 + "\nsecond line", red())], 2, heading="heading", width=200)
    assert short.size[0] == long.size[0] == 2 * 200 + 3 * 18
    assert short.height > 2 * 150
    assert long.height > short.height - 150


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: draw.kept(red(), (1, 2, 2), [4]), r"outside range\(4\)"),
        (lambda: draw.kept(red(), (1, 2, 2), [-1]), r"outside range\(4\)"),
        (lambda: draw.kept(red(), (1, 0, 2), []), "each at least 1"),
        (lambda: draw.kept(red(), (1, 2, 2), [0], scores=[1.0]), "scores must have one value per token of the grid: 4"),
        (lambda: draw.kept(red(), (1, 2, 2), [0], life=[1.0]), "life must have one value per token of the grid: 4"),
        (lambda: draw.heat(red(), (1, 2, 2), [1.0]), "scores must have one value per token of the grid: 4, got 1"),
    ],
)
def test_what_does_not_fit_the_grid_is_refused(call: object, complaint: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=complaint):
        call()
