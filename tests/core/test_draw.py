from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from foveate import draw
from foveate.draw.scene import FIRST, LINES, SECOND, Group, Scene, Text
from foveate.report import ImageReport, Report, StageReport

RED = (200, 30, 30)
SVG = "{http://www.w3.org/2000/svg}"


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


def tiled(kept: tuple[int, ...] = (0, 9, 35)) -> ImageReport:
    """Six tiles of 2 x 2 tokens and the whole after them."""
    stage = StageReport(site=0, method="evocut", kept=kept, scores=tuple(map(float, range(28))))
    return ImageReport(row=0, index=0, modality="image", grid=(7, 2, 2), tokens=28, stages=(stage,), alive=(3, 3))


def film(frames: int = 6) -> ImageReport:
    stage = StageReport(site=0, method="evocut", kept=tuple(range(0, 4 * frames, 5)))
    return ImageReport(
        row=0, index=0, modality="video", grid=(frames, 2, 2), tokens=4 * frames, stages=(stage,), alive=(5,)
    )


def test_tiles_are_put_together_and_the_whole_stands_beside_them() -> None:
    """Token 9 is the second of tile 2, which lies at the right of three: column 5 of row 0."""
    picture = draw.tokens(red(600, 400), tiled((0, 9, 27)))
    whole, tiles = picture.crop((0, 0, 600, 400)), picture.crop((608, 0, 1208, 400))
    assert picture.width == 1208
    assert [t for t in range(4) if centre(whole, (2, 2), *divmod(t, 2)) == RED] == [3]
    assert [t for t in range(24) if centre(tiles, (4, 6), *divmod(t, 6)) == RED] == [0, 5]


def test_a_video_is_a_contact_sheet_with_every_frame_under_its_own_cells() -> None:
    colours = [(200, 20 * number, 30) for number in range(12)]  # two frames make one row of tokens
    frames = [Image.new("RGB", (400, 400), colour) for colour in colours]
    sheet = draw.tokens(frames, film())
    assert sheet.width == 4 * 220 + 5 * 18
    lit = [number for number, colour in enumerate(colours) if has(sheet, colour)]
    assert lit == [2 * frame for frame in range(6) if any(token // 4 == frame for token in range(0, 24, 5))]


def test_pictures_and_videos_of_a_prompt_stand_side_by_side_with_their_counts() -> None:
    report = Report(method="evocut:keep=3", model="LLaVA", layers=0, images=(tiled((0, 9, 27)), film(2)))
    media = [red(), [red(60, 40)] * 2]
    assert texts(draw.prompt.scene(media, report))[:2] == ["image 1: 3 of 28 tokens", "video 2: 2 of 8 tokens"]
    assert has(draw.prompt(media, report), RED)
    alone = Report(method="evocut:keep=3", model="LLaVA", layers=0, images=(tiled(),))
    assert draw.prompt([red()], alone).tobytes() == draw.tokens(red(), tiled()).tobytes()


def test_tiles_that_count_as_pictures_are_drawn_on_plain_ground() -> None:
    report = Report(method="evocut:keep=3", model="Idefics3", layers=0, images=(inner(), inner()))
    drawn = draw.prompt([red()], report)
    assert drawn.width > drawn.height
    assert not has(drawn, RED)


def has(picture: Image.Image, colour: tuple[int, int, int]) -> bool:
    return any(pixel == colour for _, pixel in picture.getcolors(10**6) or ())


def test_stages_show_what_is_alive_after_each() -> None:
    strip = draw.stages(red(400, 400), inner(), width=100)
    assert strip.width == 4 * 100 + 5 * 18  # all tokens, then three stages
    top = strip.height - 18 - 100
    shares = []
    for panel in range(4):
        part = strip.crop((18 + panel * 118, top, 118 + panel * 118, top + 100))
        shares.append([not is_grey(centre(part, (2, 2), *divmod(token, 2))) for token in range(4)])
    assert shares == [[True] * 4, [True, True, False, False], [False, True, False, False], [False] * 4]


def test_two_methods_side_by_side_mark_what_only_one_kept() -> None:
    def kept(*tokens: int) -> ImageReport:
        stage = StageReport(site=0, method="m", kept=tokens)
        return ImageReport(
            row=0, index=0, modality="image", grid=(1, 2, 2), tokens=4, stages=(stage,), alive=(len(tokens),)
        )

    scene = draw.compare.scene(red(400, 400), kept(0, 1), kept(1, 2), ("a", "b"))
    words = texts(scene)
    assert {"a", "b", "1 only a", "1 only b", "1 both, without a line"} <= set(words)
    picture = draw.compare(red(400, 400), kept(0, 1), kept(1, 2), ("a", "b"), width=400)
    last = picture.crop((18 + 2 * 418, 0, picture.width, picture.height))
    assert has(last, FIRST)
    assert has(last, SECOND)
    with pytest.raises(ValueError, match="two pictures: 4 tokens on"):
        draw.compare(red(), kept(0), tiled())


def texts(scene: Scene) -> list[str]:
    found = []
    for item in scene.items:
        if isinstance(item, Text):
            found.append(item.text)
        elif isinstance(item, Group):
            found += texts(item.scene)
    return found


def test_scores_of_a_report_are_mapped_by_panel() -> None:
    picture = draw.scores(red(600, 400), tiled())
    low, high = picture.getpixel((608 + 20, 20)), picture.getpixel((450, 300))  # token 0; the last of the whole
    assert isinstance(low, tuple)
    assert isinstance(high, tuple)
    assert sum(high) > sum(low)
    with pytest.raises(ValueError, match="gave no scores"):
        draw.scores(red(), inner())


def test_alive_of_several_reports_has_a_line_and_a_name_for_each() -> None:
    one = Report(method="v2drop:keep=2", model="Llava", layers=4, images=(inner(),))
    other = Report(method="other", model="Llava", layers=4, images=(inner(),))
    picture = draw.alive(one, other)
    assert has(picture, LINES[0])
    assert has(picture, LINES[1])
    assert {"v2drop:keep=2", "other"} <= set(texts(draw.alive.scene(one, other)))
    with pytest.raises(ValueError, match="cannot be told apart"):
        draw.alive(*[one] * 7)


def test_svg_has_the_same_cells_as_the_pixels() -> None:
    """Whoever reads the paths of the mask finds the kept cells; pictures are stored once, text is text."""
    svg = draw.tokens.svg(red(600, 400), tiled((0, 9, 27)))
    root = ElementTree.fromstring(svg)
    paths = [path.get("d", "") for path in root.iter(f"{SVG}path") if path.get("fill") == "#fff"]
    assert paths == ["M300 200H600V400H300z", "M0 0H100V100H0zM500 0H600V100H500z"]
    assert len(list(root.iter(f"{SVG}image"))) == 1
    assert {use.get("href") for use in root.iter(f"{SVG}use")} == {f"#{next(root.iter(f'{SVG}image')).get('id')}"}
    sheet = ElementTree.fromstring(draw.stages.svg(red(400, 400), inner()))
    assert "before layer 2" in [text.text for text in sheet.iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: draw.tokens([], film()), "no picture to draw on"),
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
