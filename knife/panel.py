"""The pictures knife draws, as the bytes of PNG files: sheets of samples, panels of translations, curves.

A *tile* is one small image, [H, W, 3] uint8; tiles of one size are laid out in rows as a *sheet*.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from knife.image import MARK

GAP = 2  # pixels between tiles, before zooming
LEFT, TOP = 72, 52  # room for the names of rows and columns
LONGEST = 512  # pixels; larger images are drawn smaller
DARK, PALE, RED = (24, 24, 24), (170, 170, 170), (255, 64, 64)
DASH = 3  # pixels
HEAT = (  # from black to pale yellow in equal steps of lightness (CIELAB L* 0, 12, 24, ... 96), from violet to yellow
    (0, 0, 0), (33, 27, 58), (86, 38, 89), (141, 52, 101), (183, 80, 103), (208, 121, 110), (219, 165, 135),
    (245, 203, 146), (255, 245, 188),
)  # fmt: skip
COLOUR = ("r", "g", "b")  # channels that are drawn as one coloured tile
CHART, MARGIN, TICKS = (
    (480, 320),
    48,
    5,
)  # width and height of a chart in pixels, room around its frame, parts of an axis
GRID = (224, 224, 224)
COLOURS = ((0, 0, 0), (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167))  # told apart by the colour-blind

Tile = np.ndarray[Any, Any]

# -------------------------------------------------------------------------------------------------------------- tiles


def grey(plane: Tensor, low: float, high: float) -> Tile:
    """Draw one channel [H, W] in grey: black at `low` and below, white at `high` and above."""
    level = ((plane - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round().byte().numpy()
    return np.repeat(level[:, :, None], 3, axis=2)


def heat(plane: Tensor, high: float) -> Tile:
    """Draw one channel [H, W] of values from 0 to `high` in colours that brighten evenly, from black to pale yellow."""
    place = (plane / max(high, 1e-12)).clamp(0, 1).numpy() * (len(HEAT) - 1)
    ramps = [np.interp(place, range(len(HEAT)), ramp) for ramp in zip(*HEAT, strict=True)]
    return np.stack(ramps, axis=2).round().astype(np.uint8)


def outlined(tile: Tile, mask: Tensor | None, colours: Sequence[tuple[int, int, int]] = (RED,)) -> Tile:
    """Return a tile with the border pixels of a mask [H, W] (bool) drawn: those with a neighbour outside the mask.

    colours: of the line; several take turns along it, as dashes.
    """
    if mask is None:
        return tile
    around = F.pad(mask, (1, 1, 1, 1))
    inner = mask & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    drawn = tile.copy()
    rows, columns = np.nonzero((mask & ~inner).numpy())
    drawn[rows, columns] = np.array(colours)[(rows + columns) // DASH % len(colours)]
    return drawn


def tiles(x: Tensor, low: float, high: float, colour: bool) -> list[Tile]:
    """Draw an image [C, H, W] as a grey tile a channel, or its three channels as one coloured tile."""
    planes = [grey(plane, low, high) for plane in x]
    return [np.stack([plane[:, :, 0] for plane in planes], axis=2)] if colour else planes


# ------------------------------------------------------------------------------------------------------------- sheets


def arrange(rows: Sequence[Sequence[Tile]], zoom: int = 1) -> Picture.Image:
    """Lay tiles of one size out in rows on a dark ground, each pixel drawn as `zoom` x `zoom`."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), DARK, np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = GAP + i * (height + GAP), GAP + j * (width + GAP)
            sheet[top : top + height, left : left + width] = tile
    picture = Picture.fromarray(sheet)
    return picture.resize((picture.width * zoom, picture.height * zoom), Picture.Resampling.NEAREST)


def captioned(
    rows: Sequence[Sequence[Tile]],
    zoom: int,
    title: str,
    row_names: Sequence[str],
    column_names: Sequence[str],
    notes: Sequence[Sequence[str]] = (),
) -> Picture.Image:
    """Lay tiles out with a title and the names of columns above, the names of rows at the left, and notes on tiles."""
    sheet, (height, width) = arrange(rows, zoom), rows[0][0].shape[:2]
    title = " ".join(title.encode("utf-8", "backslashreplace").decode().split())
    font = ImageFont.load_default(13)
    room = max(LEFT + sheet.width, 16 + round(font.getlength(title)))
    picture = Picture.new("RGB", (room, TOP + sheet.height), DARK)
    picture.paste(sheet, (LEFT, TOP))
    pen = ImageDraw.Draw(picture)
    pen.text((8, 8), title, fill="white", font=font)
    for j, name in enumerate(column_names):
        pen.text((LEFT + zoom * (GAP + j * (width + GAP)) + 4, 32), name, fill=PALE, font=font)
    for i, name in enumerate(row_names):
        pen.text((8, TOP + zoom * (GAP + i * (height + GAP)) + 4), name, fill=PALE, font=font)
    for i, line in enumerate(notes):
        for j, note in filter(itemgetter(1), enumerate(line)):
            place = LEFT + zoom * (GAP + j * (width + GAP)) + 4, TOP + zoom * (GAP + i * (height + GAP)) + 4
            pen.rectangle(pen.textbbox(place, note, font=font), fill=DARK)
            pen.text(place, note, fill="white", font=font)
    return picture


def png(picture: Picture.Image | Tile, synthetic: bool = True) -> bytes:
    """Return a picture, or one tile, as the bytes of a PNG file; `synthetic` marks it as showing made-up images."""
    picture = Picture.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    about = PngImagePlugin.PngInfo()
    if synthetic:
        about.add_text("Comment", MARK)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def grid(x: Tensor, value_range: tuple[float, float]) -> bytes:
    """Draw images [N, C, H, W] in `value_range`, a row each; three channels are taken for colours."""
    rows = [tiles(image, *value_range, colour=x.shape[1] == 3) for image in x]
    return png(arrange(rows, zoom=max(1, 128 // x.shape[-1])))


def translation(
    before: Tensor, after: Tensor, channels: Sequence[str], mask: Tensor | None = None, title: str = ""
) -> bytes:
    """Draw a translation: rows for input, output and change; a column for each channel, and the sum of the changes.

    Changes are absolute differences; those of the channels share one scale of colours, their sum has its own.

    Args:
        before: the input [C, H, W] in [0, 1].
        after: the output, likewise.
        channels: a name for each channel; r, g, b are drawn as one coloured tile.
        mask: what was asked for [H, W] (bool), outlined in input and output; None outlines nothing.
        title: what was asked for, and what came of it.
    """
    before, after = fitting(before), fitting(after)
    outline = None if mask is None else fitting(mask[None].float())[0] > 0.5
    change, colour = (after - before).abs(), tuple(channels) == COLOUR
    rows = [[outlined(tile, outline) for tile in tiles(x, 0, 1, colour)] for x in (before, after)]
    changes = [] if colour or len(change) == 1 else [heat(plane, float(change.max())) for plane in change]
    rows.append([*changes, heat(change.sum(0), float(change.sum(0).max()))])
    names = [*channels, "sum"] if changes else ["image" if colour else channels[0]]
    return png(captioned(rows, max(1, 160 // before.shape[2]), title, ("input", "output", "change"), names))


def fitting(x: Tensor) -> Tensor:
    """Return [C, H, W], made smaller if a side is too long to be drawn."""
    longest = max(x.shape[1:])
    if longest <= LONGEST:
        return x
    height, width = (max(1, side * LONGEST // longest) for side in x.shape[1:])
    return F.interpolate(x[None], size=(height, width), mode="bilinear", antialias=True)[0]


# -------------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, its points from left to right, and a place along x to mark, if there is one."""

    name: str
    points: Sequence[tuple[float, float]]
    mark: float | None = None


def curve(xs: Sequence[float], ys: Sequence[float], x_name: str, title: str) -> bytes:
    """Draw a line through points, its axes from the least to the largest value (y from 0 at most)."""
    return png(chart([Line("", [*zip(xs, ys, strict=True)])], x_name, title), synthetic=False)


def chart(lines: Sequence[Line], x_name: str, title: str, high: float = 1e-12) -> Picture.Image:
    """Draw lines in one frame, each in its colour, marked places dashed; y goes from 0 at most to `high` at least."""
    xs, ys = ([point[axis] for line in lines for point in line.points] for axis in (0, 1))
    left, right, low, high = min(xs), max(xs), min(0.0, *ys), max(high, *ys)
    picture = Picture.new("RGB", CHART, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    end, bottom = CHART[0] - MARGIN, CHART[1] - MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / max(right - left, 1e-12), (y - low) / (high - low)
        return MARGIN + across * (end - MARGIN), bottom - up * (bottom - MARGIN)

    pen.text((MARGIN, 16), title, fill="black", font=font)
    pen.text((end, bottom + 24), x_name, fill="black", font=font, anchor="ra")
    for y in ticks(low, high):
        pen.line((place(left, y), place(right, y)), fill=GRID)
        pen.text((MARGIN - 6, place(left, y)[1]), f"{y:.4g}", fill="black", font=font, anchor="rm")
    for x in ticks(left, right):
        pen.text((place(x, low)[0], bottom + 6), f"{x:.4g}", fill="black", font=font, anchor="ma")
    pen.rectangle((*place(left, high), *place(right, low)), outline="grey")
    for i, line in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        pen.line([place(*point) for point in line.points], fill=colour, width=2)
        pen.text((end - 6, MARGIN + 6 + 16 * i), line.name, fill=colour, font=font, anchor="ra")
        if line.mark is not None:
            x = place(line.mark, 0)[0] + i  # marks of one place stand side by side
            for y in range(MARGIN, bottom, 8):
                pen.line((x, y, x, y + 4), fill=colour)
    return picture


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two, evenly spread, some five of them."""
    rough = max((high - low) / TICKS, 1e-12)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(part * power for part in (1, 2, 2.5, 5, 10) if part * power >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def beside(pictures: Sequence[Picture.Image]) -> Picture.Image:
    """Put pictures of one height side by side."""
    row = Picture.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height), "white")
    for i, picture in enumerate(pictures):
        row.paste(picture, (sum(earlier.width for earlier in pictures[:i]), 0))
    return row
