"""Pictures: the right size, and every colour where it belongs."""

import io

import numpy as np
import PIL.Image
import pytest
import torch

from knife import panel
from knife.image import MARK
from knife.panel import GAP, LEFT, RED, TOP


def opened(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data))


def square(size: int = 8, low: int = 2, high: int = 6) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[low:high, low:high] = True
    return mask


def is_red(tile: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((tile == RED).all(2))


def test_grey_runs_from_black_to_white_and_is_clipped():
    tile = panel.grey(torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]]), -1, 1)
    assert tile.shape == (1, 5, 3)
    assert tile[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert (tile == tile[:, :, :1]).all()


def test_a_plane_without_contrast_is_drawn():
    assert not panel.grey(torch.zeros(4, 4), 0, 0).any()
    assert (panel.heat(torch.zeros(4, 4), 0.0) == panel.HEAT[0]).all()


def test_heat_brightens_evenly_between_the_ends_of_its_scale():
    tile = panel.heat(torch.linspace(0, 2, 41)[None], 2.0)
    assert tuple(tile[0, 0]) == panel.HEAT[0]
    assert tuple(tile[0, -1]) == panel.HEAT[-1]
    assert tuple(panel.heat(torch.tensor([[9.0]]), 2.0)[0, 0]) == panel.HEAT[-1]


def lightness(colours: np.ndarray) -> np.ndarray:
    """Return CIELAB L* of sRGB colours [..., 3] from 0 to 255."""
    level = colours / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, y * (29 / 3) ** 3)


def test_the_lightness_of_heat_is_linear_in_the_value():
    found = lightness(panel.heat(torch.linspace(0, 1, 201)[None], 1.0)[0].astype(float))
    assert (found[0], found[-1]) == (0, pytest.approx(96, abs=0.5))
    assert (np.diff(found[::2]) > 0).all()
    assert np.abs(found - 96 * np.linspace(0, 1, 201)).max() < 2  # one L* is about what an eye can tell
    assert lightness(np.array(panel.HEAT, float)) == pytest.approx(np.linspace(0, 96, 9), abs=0.3)


def test_an_outline_is_the_border_of_the_mask_and_leaves_the_tile_alone():
    tile = panel.grey(torch.zeros(8, 8), 0, 1)
    drawn = panel.outlined(tile, square())
    assert torch.equal(is_red(drawn), square() & ~square(low=3, high=5))
    assert not tile.any()
    assert panel.outlined(tile, None) is tile


def test_an_outline_of_several_colours_is_dashed():
    drawn = panel.outlined(panel.grey(torch.full((20, 20), 0.5), 0, 1), square(20, 2, 18), [(0, 0, 0), RED])
    border = square(20, 2, 18) & ~square(20, 3, 17)
    black = torch.from_numpy((drawn == 0).all(2))
    assert torch.equal(is_red(drawn) | black, border)
    assert 0.4 < float(black.sum() / border.sum()) < 0.6
    assert black[2, 4:16].tolist() == 2 * [*[True] * 3, *[False] * 3]


def test_a_mask_that_reaches_the_edge_is_outlined_there():
    full = torch.ones(4, 4, dtype=torch.bool)
    drawn = panel.outlined(panel.grey(torch.zeros(4, 4), 0, 1), full)
    assert torch.equal(is_red(drawn), ~square(4, 1, 3))


def test_an_empty_mask_draws_nothing():
    assert not panel.outlined(panel.grey(torch.zeros(4, 4), 0, 1), torch.zeros(4, 4).bool()).any()


def test_tiles_lie_in_rows_at_their_places():
    light, dark = (np.full((3, 5, 3), level, np.uint8) for level in (200, 100))
    sheet = np.asarray(panel.arrange([[light, dark], [dark]]))
    assert sheet.shape == (2 * 3 + 3 * GAP, 2 * 5 + 3 * GAP, 3)
    assert (sheet[GAP : GAP + 3, GAP : GAP + 5] == 200).all()
    assert (sheet[GAP : GAP + 3, 2 * GAP + 5 : 2 * GAP + 10] == 100).all()
    assert (sheet[2 * GAP + 3 : 2 * GAP + 6, GAP : GAP + 5] == 100).all()
    assert (sheet[2 * GAP + 3 :, 2 * GAP + 5 :] == panel.DARK).all()


def test_zooming_repeats_pixels():
    tile = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    once, thrice = (np.asarray(panel.arrange([[tile]], zoom)) for zoom in (1, 3))
    assert (thrice == once.repeat(3, 0).repeat(3, 1)).all()


def test_a_title_has_room_and_may_hold_any_character():
    tile = panel.grey(torch.zeros(8, 8), 0, 1)
    short = panel.captioned([[tile]], 1, "short", ("a",), ("b",))
    title = "a long \udc80 title \n in \x1b[31m red " * 5
    long = panel.captioned([[tile]], 1, title, ("a",), ("b",))
    assert long.width > short.width
    assert short.height == long.height == TOP + 8 + 2 * GAP


def test_notes_are_written_on_their_tiles():
    rows = [[panel.grey(torch.full((8, 8), 0.5), 0, 1)] * 2] * 2
    plain, noted = (
        np.asarray(panel.captioned(rows, 10, "", "ab", "ab", notes)).astype(int)
        for notes in ((), [["", ""], ["", "9"]])
    )
    changed = np.argwhere((plain != noted).any(2))
    assert len(changed)
    assert (changed >= (TOP + 10 * (2 * GAP + 8), LEFT + 10 * (2 * GAP + 8))).all()


@pytest.mark.parametrize(("channels", "columns"), [(1, 1), (2, 2), (3, 1), (4, 4)])
def test_a_grid_has_a_row_for_each_image(channels, columns):
    picture = opened(panel.grid(torch.zeros(2, channels, 64, 64), (-1, 1)))
    assert picture.size == (2 * (columns * 64 + (columns + 1) * GAP), 2 * (2 * 64 + 3 * GAP))
    assert picture.mode == "RGB"
    assert MARK in picture.text["Comment"]


@pytest.mark.parametrize(
    ("channels", "columns"),
    [(("t1", "t1ce", "t2", "flair"), 5), (("t1", "t2", "flair"), 4), (("grey",), 1), (("r", "g", "b"), 1)],
)
def test_a_translation_shows_every_channel_and_the_sum(channels, columns):
    before, after = torch.rand(2, len(channels), 40, 80)
    picture = opened(panel.translation(before, after, channels))
    assert picture.height == TOP + 2 * (3 * 40 + 4 * GAP)
    assert picture.width == LEFT + 2 * (columns * 80 + (columns + 1) * GAP)
    assert MARK in picture.text["Comment"]


def tile_of(picture: PIL.Image.Image, row: int, column: int, side: int, zoom: int) -> np.ndarray:
    """Cut a tile out of a captioned sheet, its zoom undone."""
    top, left = (start + zoom * (GAP + i * (side + GAP)) for start, i in ((TOP, row), (LEFT, column)))
    return np.asarray(picture)[top : top + zoom * side : zoom, left : left + zoom * side : zoom]


def test_a_translation_shows_input_output_mask_and_change_where_they_are():
    before, after = torch.full((2, 2, 8, 8), 0.2)
    after[0, 4, 4], after[1, 4, 4], after[1, 1, 1] = 0.6, 1.0, 0.4
    zoom, mask = 20, square()
    picture = opened(panel.translation(before, after, ("a", "b"), mask, "title"))
    for row in (0, 1):
        for column in (0, 1):
            assert torch.equal(is_red(tile_of(picture, row, column, 8, zoom)), mask & ~square(low=3, high=5))
    assert tile_of(picture, 1, 0, 8, zoom)[4, 4].tolist() == [153] * 3
    change_a, change_b, total = (tile_of(picture, 2, column, 8, zoom) for column in range(3))
    assert (change_a == panel.heat((after - before)[0], 0.8)).all()  # the channels share one scale
    assert (change_b == panel.heat((after - before)[1], 0.8)).all()
    assert (total == panel.heat((after - before).sum(0), 1.2)).all()
    assert (tile_of(picture, 0, 2, 8, zoom) == panel.DARK).all()


def test_a_huge_image_is_drawn_smaller():
    picture = opened(panel.translation(torch.zeros(1, 900, 1800), torch.zeros(1, 900, 1800), ("grey",)))
    assert picture.size == (LEFT + panel.LONGEST + 2 * GAP, TOP + 3 * panel.LONGEST // 2 + 4 * GAP)


def test_a_curve_spans_its_frame():
    picture = opened(panel.curve([0, 1, 2], [1.0, 3.0, 2.0], "level", "loss"))
    assert picture.size == (480, 320)
    assert "Comment" not in picture.text  # no made-up image
    dark = np.argwhere(np.asarray(picture).max(2)[60:260, 60:420] < 60)
    assert dark[:, 1].min() < 5
    assert dark[:, 1].max() > 350
    rising = dark[dark[:, 1] < 100]
    assert rising[rising[:, 1].argmin(), 0] > rising[rising[:, 1].argmax(), 0]


@pytest.mark.parametrize("ys", [[0.0, 0.0], [-1.0, 1.0], [5.0, 5.0]])
def test_curves_of_any_level_are_drawn(ys):
    assert opened(panel.curve([1, 2], ys, "x", "title")).size == (480, 320)


def test_a_tile_alone_is_a_picture_of_its_size():
    assert opened(panel.png(panel.grey(torch.zeros(5, 7), 0, 1))).size == (7, 5)


def drawn_in(picture: PIL.Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Return where a colour is drawn within the frame of a chart, [M, 2] rows and columns."""
    inside = np.asarray(picture)[panel.MARGIN + 40 : -panel.MARGIN, panel.MARGIN : -panel.MARGIN]
    return np.argwhere((inside == colour).all(2))


def test_lines_of_a_chart_share_a_frame_and_mark_their_places():
    low, high = (panel.Line(name, [(0, y), (1000, y)], mark) for name, y, mark in (("a", 0.2, None), ("b", 0.6, 250)))
    picture = panel.chart([low, high], "level", "title", high=1)
    width, height = (side - 2 * panel.MARGIN for side in panel.CHART)
    first, second = (drawn_in(picture, colour) for colour in panel.COLOURS[:2])
    assert np.ptp(first[:, 1]) > 0.98 * width
    assert first[:, 0].mean() + 40 == pytest.approx(0.8 * height, abs=3)
    rows, counts = np.unique(second[:, 0], return_counts=True)
    assert rows[counts.argmax()] + 40 == pytest.approx(0.4 * height, abs=3)
    columns, counts = np.unique(second[:, 1], return_counts=True)
    assert columns[counts.argmax()] == pytest.approx(0.25 * width, abs=3)  # the dashes


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1000, [0, 200, 400, 600, 800, 1000]),
        (10, 100, [20, 40, 60, 80, 100]),
        (0, 0.00622, [0, 0.002, 0.004, 0.006]),
        (-0.1, 1, [0, 0.25, 0.5, 0.75, 1]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_numbers(low, high, wanted):
    assert panel.ticks(low, high) == pytest.approx(wanted)


def test_pictures_stand_beside_one_another():
    row = panel.beside([PIL.Image.new("RGB", (width, 5), colour) for width, colour in ((3, "red"), (4, "blue"))])
    assert row.size == (7, 5)
    assert [row.getpixel((x, 2)) for x in (2, 3)] == [(255, 0, 0), (0, 0, 255)]
