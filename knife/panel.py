"""The pictures knife draws, as the bytes of PNG files: sheets of samples, panels of translations, curves.

A *tile* is one small image, [H, W, 3] uint8; tiles of one size are laid out in rows as a *sheet*.
"""

import io
from collections.abc import Sequence
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
HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))  # dark to bright
COLOUR = ("r", "g", "b")  # channels that are drawn as one coloured tile

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


def outlined(tile: Tile, mask: Tensor | None) -> Tile:
    """Return a tile with the border pixels of a mask [H, W] (bool) in red: those with a neighbour outside the mask."""
    if mask is None:
        return tile
    around = F.pad(mask, (1, 1, 1, 1))
    inner = mask & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    drawn = tile.copy()
    drawn[(mask & ~inner).numpy()] = RED
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
    rows: Sequence[Sequence[Tile]], zoom: int, title: str, row_names: Sequence[str], column_names: Sequence[str]
) -> Picture.Image:
    """Lay tiles out with a title and the names of columns above, and the names of rows at the left."""
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


def curve(xs: Sequence[float], ys: Sequence[float], x_name: str, title: str) -> bytes:
    """Draw a line through points, its axes from the least to the largest value (y from 0 at most)."""
    width, height, margin = 480, 320, 48
    low, high = min(0.0, *ys), max(*ys, 1e-12)
    across = [(x - xs[0]) / max(xs[-1] - xs[0], 1e-12) for x in xs]
    up = [(y - low) / (high - low) for y in ys]
    right, bottom = width - margin, height - margin
    line = [(margin + a * (right - margin), bottom - u * (bottom - margin)) for a, u in zip(across, up, strict=True)]
    picture = Picture.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((margin, margin, right, bottom), outline="grey")
    pen.line(line, fill="black", width=2)
    pen.text((margin, 16), title, fill="black")
    pen.text((margin, bottom + 12), f"{x_name} {xs[0]:g} to {xs[-1]:g}", fill="black")
    pen.text((4, margin), f"{high:.3g}", fill="black")
    pen.text((4, bottom - 12), f"{low:.3g}", fill="black")
    return png(picture, synthetic=False)
