"""The pictures knife draws: sheets of images, difference maps, panels, curves."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from torch import Tensor

GAP = 2


def grey(plane: Tensor, low: float, high: float) -> np.ndarray:
    """Return one channel [H, W] as 8-bit RGB [H, W, 3]."""
    level = ((plane - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round().byte().numpy()
    return np.repeat(level[:, :, None], 3, axis=2)


def tiles(x: Tensor, value_range: tuple[float, float]) -> list[np.ndarray]:
    """Return an image [C, H, W] as tiles [H, W, 3]: one coloured tile for three channels named so, else a grey one a channel."""
    low, high = value_range
    if x.shape[0] == 3:
        return [np.stack([grey(plane, low, high)[:, :, 0] for plane in x], axis=2)]
    return [grey(plane, low, high) for plane in x]


def arrange(rows: Sequence[Sequence[np.ndarray]], zoom: int = 1) -> Picture.Image:
    """Lay tiles of one size out in rows on a dark ground."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 24, np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = GAP + i * (height + GAP), GAP + j * (width + GAP)
            sheet[top : top + height, left : left + width] = tile
    picture = Picture.fromarray(sheet)
    return picture.resize((picture.width * zoom, picture.height * zoom), Picture.Resampling.NEAREST)


def png(picture: Picture.Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def grid(x: Tensor, value_range: tuple[float, float]) -> bytes:
    """Draw images [N, C, H, W], a row each, as PNG."""
    return png(arrange([tiles(image, value_range) for image in x], zoom=max(1, 128 // x.shape[-1])))


HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))  # dark to bright


def heat(plane: Tensor, high: float) -> np.ndarray:
    """Return one channel [H, W] of values 0..high as colours [H, W, 3] of evenly rising brightness."""
    place = (plane / max(high, 1e-12)).clamp(0, 1).numpy() * (len(HEAT) - 1)
    return np.stack([np.interp(place, range(len(HEAT)), ramp) for ramp in zip(*HEAT, strict=True)], 2).astype(np.uint8)


def outlined(tile: np.ndarray, mask: Tensor | None) -> np.ndarray:
    """Return a tile with the outline of a mask [H, W] in red."""
    if mask is None:
        return tile
    inner = mask.clone()
    for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
        inner &= mask.roll(shift, axis)
    drawn = tile.copy()
    drawn[(mask & ~inner).numpy()] = (255, 64, 64)
    return drawn


def translation(
    before: Tensor, after: Tensor, channels: Sequence[str], mask: Tensor | None, title: str, words: str
) -> bytes:
    """Draw a translation as PNG: a row each for input, output and difference, a column a channel, then the sum.

    Args:
        before: the input [C, H, W] in [0, 1].
        after: the output, likewise.
        channels: a name for each channel.
        mask: the wanted mask [H, W], outlined in the first column, or None.
        title: what was asked for.
        words: what came of it.
    """
    difference = (after - before).abs()
    total = difference.sum(0)
    rows = [[outlined(tile, mask) for tile in tiles(image, (0, 1))] for image in (before, after)]
    coloured = len(rows[0]) < len(channels)
    maps = [] if len(rows[0]) == 1 else [heat(plane, float(difference.max())) for plane in difference]
    maps.append(heat(total, float(total.max())))
    names = ["image"] if coloured else [*channels, "sum"][: len(maps)]
    zoom = max(1, 160 // before.shape[-1])
    return png(captioned(arrange([*rows, maps], zoom), rows[0][0].shape, names, ("input", "output", "change"), zoom, f"{title}    {words}"))


def captioned(
    sheet: Picture.Image, tile: tuple[int, ...], columns: Sequence[str], rows: Sequence[str], zoom: int, title: str
) -> Picture.Image:
    """Return a sheet of tiles with its title above, its columns named, and its rows named at the left."""
    left, top = 72, 52
    font = ImageFont.load_default(13)
    picture = Picture.new("RGB", (left + max(sheet.width, 360), top + sheet.height), (24, 24, 24))
    picture.paste(sheet, (left, top))
    pen = ImageDraw.Draw(picture)
    pen.text((8, 8), title, fill="white", font=font)
    for j, name in enumerate(columns):
        pen.text((left + zoom * (GAP + j * (tile[1] + GAP)) + 4, 32), name, fill=(170, 170, 170), font=font)
    for i, name in enumerate(rows):
        pen.text((8, top + zoom * (GAP + i * (tile[0] + GAP)) + 4), name, fill=(170, 170, 170), font=font)
    return picture


def curve(xs: Sequence[float], ys: Sequence[float], x_name: str, title: str) -> bytes:
    """Draw a line through points as PNG, with its extremes named."""
    width, height, margin = 480, 320, 48
    picture = Picture.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    low, high = min(0.0, *ys), max(*ys, 1e-12)
    places = [
        (
            margin + (x - xs[0]) / max(xs[-1] - xs[0], 1e-12) * (width - 2 * margin),
            height - margin - (y - low) / (high - low) * (height - 2 * margin),
        )
        for x, y in zip(xs, ys, strict=True)
    ]
    pen.rectangle((margin, margin, width - margin, height - margin), outline="grey")
    pen.line(places, fill="black", width=2)
    pen.text((margin, 16), title, fill="black")
    pen.text((margin, height - 36), f"{x_name} {xs[0]:g} to {xs[-1]:g}", fill="black")
    pen.text((4, margin), f"{high:.3g}", fill="black")
    pen.text((4, height - margin - 12), f"{low:.3g}", fill="black")
    return png(picture)
