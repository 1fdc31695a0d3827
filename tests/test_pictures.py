"""Pictures have the right colours in the right places, at any size, and refuse what they cannot draw."""

import numpy as np
import pytest

from segdeformer.errors import UserError
from segdeformer.report import lettering, pictures
from segdeformer.report.lettering import INK
from segdeformer.report.pictures import (
    IGNORED_COLOR,
    OUTLINE,
    WHITE,
    Color,
    Comparison,
    class_shares,
    colorize,
    comparison_sheet,
    confidence_map,
    overlay,
    with_color_bar,
    with_legend,
)

NAMES = ["water", "forest", "snow and ice", "barren"]
COLORS: list[Color] = [(38, 84, 150), (8, 60, 40), (248, 250, 255), (240, 192, 140)]
GREY: Color = (119, 119, 119)


def labels_of(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.uint8)


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def has_color(picture_HW3: np.ndarray, color: Color) -> bool:
    return bool((picture_HW3 == color).all(axis=-1).any())


def find(picture_HW3: np.ndarray, part_HW3: np.ndarray) -> tuple[int, int]:
    """Where the part lies, exactly; its first pixel must be the only one of its colour, or nearly."""
    h, w = part_HW3.shape[:2]
    for y, x in np.argwhere((picture_HW3 == part_HW3[0, 0]).all(axis=-1)):
        if np.array_equal(picture_HW3[y : y + h, x : x + w], part_HW3):
            return int(y), int(x)
    raise AssertionError("the picture does not contain the part")


def clear_of_edges(picture_HW3: np.ndarray) -> bool:
    """Whether nothing is drawn at the rim: clipped text would be."""
    rims = (picture_HW3[0], picture_HW3[-1], picture_HW3[:, 0], picture_HW3[:, -1])
    return all((rim == 255).all() for rim in rims)


# Colours.


def test_every_class_gets_its_exact_colour_and_ignored_pixels_the_neutral_one() -> None:
    picture = colorize(labels_of([0, 3], [255, 2]), COLORS)
    assert picture.dtype == np.uint8
    assert picture.tolist() == [
        [list(COLORS[0]), list(COLORS[3])],
        [list(IGNORED_COLOR), list(COLORS[2])],
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_colours_do_not_depend_on_the_integer_type(dtype: type) -> None:
    labels = labels_of([0, 1, 255], [3, 2, 1])
    assert np.array_equal(colorize(labels.astype(dtype), COLORS), colorize(labels, COLORS))


def test_ids_without_a_colour_are_refused_and_named() -> None:
    with pytest.raises(UserError) as caught:
        colorize(labels_of([0, 4], [254, 255]), COLORS)
    assert str(caught.value) == (
        "labels have ids 4, 254; there are 4 classes, ids 0 to 3, and 255 is ignored"
    )


def test_negative_ids_do_not_wrap_round_to_the_last_class() -> None:
    with pytest.raises(UserError, match=r"^labels have ids -1; there are 4 classes"):
        colorize(np.array([[0, -1]], np.int16), COLORS)


@pytest.mark.parametrize("labels", [np.zeros((2, 2)), np.zeros((2, 2, 3), np.uint8)])
def test_labels_that_are_no_id_map_are_refused(labels: np.ndarray) -> None:
    with pytest.raises(UserError, match="expected one integer per pixel"):
        colorize(labels, COLORS)


@pytest.mark.parametrize("opacity", [0.0, 0.25, 0.6, 1.0])
def test_overlay_is_the_weighted_mean_of_image_and_colour(opacity: float) -> None:
    image = noise(37, 23)
    labels = np.random.default_rng(1).integers(0, 4, (37, 23)).astype(np.uint8)
    expected = (1 - opacity) * image + opacity * np.array(COLORS, float)[labels]
    assert np.abs(overlay(image, labels, COLORS, opacity=opacity) - expected).max() <= 1


def test_overlay_shows_the_plain_image_where_pixels_are_ignored() -> None:
    image = noise(9, 7)
    labels = np.full((9, 7), 255, np.uint8)
    labels[4] = 1
    picture = overlay(image, labels, COLORS)
    ignored = labels == 255
    assert np.array_equal(picture[ignored], image[ignored])
    assert not np.array_equal(picture[4], image[4])


def test_overlay_leaves_its_inputs_alone() -> None:
    image, labels = noise(8, 8), np.zeros((8, 8), np.uint8)
    before = image.copy()
    overlay(image, labels, COLORS)
    assert np.array_equal(image, before)
    assert not labels.any()


def test_overlay_refuses_labels_of_another_size() -> None:
    with pytest.raises(
        UserError, match=r"^image is 8 x 9 x 3, labels are 9 x 8; expected H x W x 3 and H x W$"
    ):
        overlay(noise(8, 9), np.zeros((9, 8), np.uint8), COLORS)


@pytest.mark.parametrize("opacity", [-0.1, 1.5, float("nan")])
def test_overlay_refuses_an_opacity_that_is_no_share(opacity: float) -> None:
    with pytest.raises(UserError, match="must be between 0 and 1"):
        overlay(noise(4, 4), np.zeros((4, 4), np.uint8), COLORS, opacity=opacity)


def test_shares_count_only_pixels_that_are_not_ignored() -> None:
    shares = class_shares(labels_of([0, 0, 0], [1, 255, 255]), 4)
    assert shares.tolist() == [0.75, 0.25, 0.0, 0.0]


def test_shares_of_a_picture_that_is_all_ignored_are_zero() -> None:
    assert class_shares(np.full((3, 3), 255, np.uint8), 4).tolist() == [0.0] * 4


# Legends.


@pytest.mark.parametrize("size", [(256, 256), (300, 700), (700, 300), (1201, 1603)])
def test_legend_leaves_the_picture_itself_untouched(size: tuple[int, int]) -> None:
    picture = noise(*size)
    y, x = find(with_legend(picture, NAMES, COLORS, [0, 1]), picture)
    assert y == x > 0


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (5, 64), (33, 20), (512, 512), (300, 4000), (4000, 300)])
def test_legend_has_the_swatches_of_the_shown_classes_only(size: tuple[int, int]) -> None:
    legend = with_legend(np.full((*size, 3), 119, np.uint8), NAMES, COLORS, [0, 3], [0.5, 0.0, 0.0, 0.5])
    assert [has_color(legend, color) for color in COLORS] == [True, False, False, True]
    assert clear_of_edges(legend)


def test_legend_is_sorted_by_share() -> None:
    legend = with_legend(
        np.full((256, 256, 3), 119, np.uint8), NAMES, COLORS, [0, 1, 3], [0.1, 0.2, 0.0, 0.7]
    )

    def first_place(color: Color) -> tuple[int, int]:
        y, x = np.argwhere((legend == color).all(axis=-1))[0]
        return int(x), int(y)

    assert first_place(COLORS[3]) < first_place(COLORS[1]) < first_place(COLORS[0])


def test_tiny_pictures_are_enlarged_by_a_whole_factor_without_new_colours() -> None:
    picture = noise(32, 20)
    drawn, enlarged = with_legend(picture, NAMES, COLORS, [0]), picture.repeat(8, axis=0).repeat(8, axis=1)
    top, left = find(drawn, enlarged)
    np.testing.assert_array_equal(drawn[top : top + 256, left : left + 160], enlarged)


def test_legend_grows_with_the_picture() -> None:
    def swatch_px(side: int) -> int:
        legend = with_legend(np.full((side, side, 3), 119, np.uint8), NAMES, COLORS, [1])
        return int((legend == COLORS[1]).all(axis=-1).any(axis=0).sum())

    assert swatch_px(256) >= 11
    assert swatch_px(4000) == pytest.approx(4000 / 64, rel=0.15)


def test_legend_of_150_classes_stays_near_the_shape_of_a_screen() -> None:
    names = [f"class number {i}" for i in range(150)]
    colors: list[Color] = [(i, 255 - i, 100) for i in range(150)]
    legend = with_legend(np.full((512, 512, 3), 119, np.uint8), names, colors, range(150), [1 / 150] * 150)
    height, width = legend.shape[:2]
    assert 1 < width / height < 2.5
    assert width < 1800
    assert all(has_color(legend, color) for color in colors)


def test_long_and_foreign_names_are_not_clipped() -> None:
    names = ["w" * 500, "Gewässer, 水", "", "barren"]
    legend = with_legend(np.full((256, 256, 3), 119, np.uint8), names, COLORS, [0, 1, 2, 3], [0.25] * 4)
    assert clear_of_edges(legend)
    assert legend.shape[1] < 1000


def test_white_swatches_have_an_outline() -> None:
    legend = with_legend(np.full((256, 256, 3), 119, np.uint8), ["white"], [WHITE], [0])
    assert (legend == OUTLINE).all(axis=-1).sum() > 4 * 256


def test_picture_without_classes_is_only_framed() -> None:
    picture = noise(256, 300)
    framed = with_legend(picture, NAMES, COLORS, [])
    y, x = find(framed, picture)
    assert framed.shape == (256 + 2 * y, 300 + 2 * x, 3)


@pytest.mark.parametrize("wrong", [4, -1, 255])
def test_legend_refuses_ids_that_have_no_name(wrong: int) -> None:
    with pytest.raises(UserError, match=rf"^ids {wrong} have no name and colour; there are 4 classes$"):
        with_legend(noise(8, 8), NAMES, COLORS, [0, wrong])


def test_small_share_is_not_told_as_zero() -> None:
    assert [pictures._percent(s) for s in (0.0, 0.0001, 0.0005, 0.1234, 1.0)] == [
        "0.0%", "<0.1%", "0.1%", "12.3%", "100.0%",
    ]  # fmt: skip


# Text.


def test_text_is_drawn_in_its_colour_and_measured_as_drawn() -> None:
    canvas = np.full((40, 200, 3), 255, np.uint8)
    lettering.write(canvas, "Hill", 7, 30, 20)
    used = np.flatnonzero((canvas != 255).any(axis=(0, 2)))
    assert 7 <= used[0] <= 10
    assert used[-1] - 7 < lettering.text_width("Hill", 20) <= used[-1] - 7 + 2
    assert has_color(canvas, INK)
    rows = np.flatnonzero((canvas != 255).any(axis=(1, 2)))
    assert rows[0] >= 10
    assert rows[-1] <= 31


def test_shortened_text_fits_and_keeps_its_beginning() -> None:
    room = lettering.text_width("snow and ice", 16)
    assert lettering.shortened("snow and ice", 16, room) == "snow and ice"
    short = lettering.shortened("snow and ice on mountains", 16, room)
    assert short.endswith("…")
    assert "snow and ice on mountains".startswith(short[:-1])
    assert lettering.text_width(short, 16) <= room


def test_strokes_write_accents_and_dots_in_ascii() -> None:
    assert lettering._in_ascii("Gewässer … 30°N 水") == "Gewasser ... 30 N ?"


# Confidence.


def test_confidence_colours_grow_lighter_with_confidence() -> None:
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None]
    red, green, blue = np.moveaxis(confidence_map(ramp)[0].astype(float), -1, 0)
    lightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (np.diff(lightness) > 0).all()
    assert confidence_map(ramp)[0, 0].tolist() == [68, 1, 84]  # viridis: violet
    assert confidence_map(ramp)[0, -1].tolist() == [253, 231, 37]  # and yellow


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_confidence_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="they must lie between 0 and 1"):
        confidence_map(np.array([[0.5, value]], np.float32))


def test_confidence_a_rounding_above_one_is_one() -> None:
    above = np.nextafter(np.float32(1), np.float32(2))
    assert confidence_map(np.array([[above]], np.float32))[0, 0].tolist() == [253, 231, 37]


@pytest.mark.parametrize("size", [(360, 480), (32, 20), (256, 8), (8, 256)])
def test_colour_bar_spans_the_scale_below_the_picture(size: tuple[int, int]) -> None:
    picture = with_color_bar(np.full((*size, 3), 119, np.uint8))
    below = picture[np.argwhere((picture == GREY).all(axis=-1))[-1, 0] + 2 :]
    assert has_color(below, (68, 1, 84))
    assert has_color(below, (253, 231, 37))
    assert clear_of_edges(picture)


# Sheets.


def example(title: str, height: int, width: int, *, seed: int, score: float | None = 0.5) -> Comparison:
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 2, (height, width)).astype(np.uint8)
    prediction = draw.integers(0, 2, (height, width)).astype(np.uint8)
    return Comparison(title, noise(height, width, seed=seed), truth, prediction, score)


def test_sheet_shows_image_truth_and_prediction_side_by_side_in_exact_colours() -> None:
    row = example("a", 64, 64, seed=0)
    sheet = comparison_sheet([row], NAMES, COLORS, headline="One", tile_px=256)
    tiles = [row.image_HW3, colorize(row.truth_HW, COLORS), colorize(row.prediction_HW, COLORS)]
    places = [find(sheet, tile.repeat(4, axis=0).repeat(4, axis=1)) for tile in tiles]
    tops, lefts = zip(*places, strict=True)
    assert len(set(tops)) == 1
    assert lefts[1] - lefts[0] == lefts[2] - lefts[1] > 256


def test_sheet_legend_has_the_classes_that_occur_and_the_ignored_ones() -> None:
    row = example("a", 64, 64, seed=0)
    row.truth_HW[0] = 255
    row.prediction_HW[5] = 3
    sheet = comparison_sheet([row], NAMES, COLORS, headline="One", tile_px=256)
    tiles_end = np.argwhere((sheet == COLORS[3]).all(axis=-1))[0, 0] + 256
    legend = sheet[tiles_end:]
    shown = [has_color(legend, color) for color in (*COLORS, IGNORED_COLOR)]
    assert shown == [True, True, False, True, True]


def test_large_maps_are_reduced_without_mixing_colours() -> None:
    row = example("a", 700, 900, seed=0)
    sheet = comparison_sheet([row], NAMES, COLORS, headline="", tile_px=256)
    assert sheet.shape[1] < 1000
    lefts = np.argwhere((sheet == OUTLINE).all(axis=-1))
    top, left = lefts.min(axis=0)
    height, width = round(700 * 256 / 900), 256
    pitch = width + 2 + 8
    truth = sheet[top + 1 : top + 1 + height, left + 1 + pitch : left + 1 + pitch + width]
    assert {tuple(c) for c in np.unique(truth.reshape(-1, 3), axis=0).tolist()} == {COLORS[0], COLORS[1]}


@pytest.mark.parametrize("count", [1, 2, 3, 6, 13])
def test_any_number_of_examples_makes_a_sheet_near_the_shape_of_a_screen(count: int) -> None:
    rows = [example(f"tile {i}", 180, 180, seed=i) for i in range(count)]
    sheet = comparison_sheet(rows, NAMES, COLORS, headline="Some examples")
    height, width = sheet.shape[:2]
    assert 0.6 < width / height < 2.5
    assert clear_of_edges(sheet)
    for row in rows:
        find(sheet, row.image_HW3)


def test_sheet_takes_long_titles_mixed_sizes_and_missing_scores() -> None:
    rows = [
        example("a title " * 40, 40, 256, seed=0),
        example("", 256, 8, seed=1, score=None),
        example("large", 1024, 2048, seed=2),
        example("水" * 90, 1, 1, seed=3, score=1.0),
    ]
    sheet = comparison_sheet(rows, ["w" * 99, *NAMES[1:]], COLORS, headline="A headline of many words " * 20)
    assert clear_of_edges(sheet)
    find(sheet, rows[0].image_HW3)
    find(sheet, rows[1].image_HW3)


def test_headline_takes_room_only_when_there_is_one() -> None:
    row = example("a", 64, 64, seed=0)
    plain = comparison_sheet([row], NAMES, COLORS, headline="")
    headed = comparison_sheet([row], NAMES, COLORS, headline="Validation")
    assert headed.shape[1] == plain.shape[1]
    assert headed.shape[0] > plain.shape[0]


def test_sheet_refuses_labels_of_another_size_and_names_the_example() -> None:
    row = example("tile 7", 8, 8, seed=0)._replace(prediction_HW=np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match=r"^tile 7: image is 8 x 8 x 3, labels are 4 x 4; expected"):
        comparison_sheet([row], NAMES, COLORS, headline="")


def test_sheet_takes_plain_tuples_too() -> None:
    row = example("a", 64, 64, seed=0)
    named = comparison_sheet([row], NAMES, COLORS, "One")
    plain = (row.title, row.image_HW3, row.truth_HW, row.prediction_HW, row.score)
    assert np.array_equal(comparison_sheet([plain], NAMES, COLORS, "One"), named)


def test_sheet_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="needs at least one example"):
        comparison_sheet([], NAMES, COLORS, headline="Nothing")
