"""Masks as targets: a file on the image's grid, a NIfTI file elsewhere in its world, or a shape given by numbers."""

import math
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from knife import nifti
from knife.errors import ApartError, InputError, TargetError
from knife.files import refusing, regular, shown
from knife.image import Image, read_mask, suffix_of
from knife.nifti import NIFTI, Array, Nifti
from knife.picture import Picture

SHAPES = {  # name: form, example
    "ellipse": ("ellipse:cx,cy,rx,ry", "ellipse:120,100,20,15"),
    "rectangle": ("rectangle:x,y,w,h", "rectangle:50%,40%,20%,10%"),
}
MAX_VOXELS = 2**28  # of a mask, which may be a volume
EDGE = 2  # pixels that a soft edge is wide
PARALLEL = 0.01  # sine of the angle by which two planes may differ


def read_target_mask(text: str, image: Image, option: str = "--target") -> Tensor:
    """Read a wanted mask as [1, H, W] float32, 1 where its label is above 0, on the image's grid as displayed.

    option: the word of the command line that gave the text, for messages.
    text: a mask file, or a shape of SHAPES in pixels of the displayed image: x from the left, y from the top, pixel
    centres at whole numbers; numbers with a % sign are shares of width or height. Between two NIfTI files the world
    coordinates tell where the mask lies, whatever its resolution, orientation or number of slices: each pixel takes the
    label of the nearest voxel, and what the mask does not cover is 0. A picture must have the image's shape.

    Raises TargetError if the text is neither a file nor a shape; InputError if the file cannot be used.
    """
    name, colon, numbers = text.partition(":")
    if colon and name in SHAPES:
        return drawn(name, numbers, image, option)
    if not suffix_of(Path(text)):
        forms = ", ".join(form for form, _ in SHAPES.values())
        raise TargetError(
            f"{option} {shown(text)}: neither a mask file nor a shape; give a NIfTI or PNG file, {forms}."
        )
    if isinstance(image.source.kind, Picture) or suffix_of(Path(text)).lower() not in NIFTI:
        return read_mask(text, image)
    return sampled(Path(text), image)


# -------------------------------------------------------------------------------------------------------------- shapes


def drawn(name: str, numbers: str, image: Image, option: str) -> Tensor:
    """Return the mask [1, H, W] of a shape that four numbers describe.

    Raises TargetError if they do not, or no pixel of the image lies in the shape.
    """
    rows, columns = image.pixels.shape[1:]
    form, example = SHAPES[name]
    try:
        wholes = columns, rows, columns, rows
        a, b, c, d = (number(part, whole) for part, whole in zip(numbers.split(","), wholes, strict=True))
        if c <= 0 or d <= 0:
            raise ValueError(numbers)
    except ValueError:
        how = "in pixels of the displayed image, x to the right and y down, or in % of its width and height"
        given = shown(f"{name}:{numbers}")
        raise TargetError(f"{option} {given}: give {form} {how}, with sizes above 0, such as {example}.") from None
    y, x = torch.arange(rows).double()[:, None], torch.arange(columns).double()
    if name == "ellipse":
        inside = ((x - a) / c) ** 2 + ((y - b) / d) ** 2 <= 1
    else:
        inside = (a <= x) & (x < a + c) & (b <= y) & (y < b + d)
    if not inside.any():
        whose = f"{shown(image.source.paths[0])}, {columns} wide and {rows} high"
        raise TargetError(f"{option} {name}:{numbers}: covers no pixel of {whose}; give {form} within it.")
    return inside[None].float()


def soft_edged(mask: Tensor) -> Tensor:
    """Return a mask [1, h, w] that rises from 0 at its border to 1 within; a few pixels alone keep their hard edge."""
    around = F.avg_pool2d(mask, 2 * EDGE + 1, 1, EDGE, count_include_pad=False)
    soft = (2 * around - 1).clamp(min=0) * mask
    return soft / soft.max() if soft.max() > 0.5 else mask


def number(text: str, whole: int) -> float:
    """Return a number, or with a % sign that share of `whole`; raises ValueError if it is none."""
    share = text.strip().endswith("%")
    value = float(text.strip().removesuffix("%")) * (whole / 100 if share else 1)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


# ----------------------------------------------------------------------------------------------------------- the world


def sampled(path: Path, image: Image) -> Tensor:
    """Return a NIfTI mask on the grid of a NIfTI image [1, H, W], by the nearest voxel in the world.

    Raises InputError, naming both, if the mask is a slice of another plane, or they have no place in common.
    """
    labels, affine = labels_of(path)
    frame, pair = (
        cast(tuple[Nifti, ...], image.source.kind)[0].frame,
        f"{shown(path)} and {shown(image.source.paths[0])}",
    )
    if 1 in labels.shape:
        flat = max(axis for axis in range(3) if labels.shape[axis] == 1)
        one, two = (affine[:3, axis] for axis in range(3) if axis != flat)
        sine = float(np.linalg.norm(np.cross(normal(one, two), normal(frame[0], frame[1]))))
        if sine > PARALLEL:
            angle = math.degrees(math.asin(min(sine, 1)))
            raise InputError(f"{pair}: their planes are {angle:.0f} degrees apart; give a mask of the image's plane.")
    rows, columns = image.pixels.shape[1:]
    world = frame[2] + np.arange(rows)[:, None, None] * frame[0] + np.arange(columns)[:, None] * frame[1]  # [H, W, 3]
    inverse = np.linalg.inv(affine)
    nearest = np.floor(world @ inverse[:3, :3].T + inverse[:3, 3] + 0.5).clip(-1, max(labels.shape)).astype(np.int64)
    inside = ((nearest >= 0) & (nearest < labels.shape)).all(-1)
    if not inside.any():
        raise ApartError(f"{pair}: no place of the world lies in both; give a mask of the same slice.")
    mask = np.zeros((1, rows, columns), np.float32)
    mask[0, inside] = labels[tuple(nearest[inside].T)] > 0
    return torch.from_numpy(mask)


def normal(one: Array, two: Array) -> Array:
    """Return the unit vector [3] that stands on two others."""
    stands = np.cross(one, two)
    return cast(Array, stands / np.linalg.norm(stands))


def labels_of(path: Path) -> tuple[Array, Array]:
    """Read a mask file, a slice or a volume: labels [X, Y, Z] and the affine [4, 4]; the last ones are kept."""
    with refusing(path, "a mask"):
        status = path.stat()
    return _labels_of(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _labels_of(path: Path, mtime: int, size: int) -> tuple[Array, Array]:
    with refusing(path, "a NIfTI file"), regular(path) as file:
        stream, head, header = nifti.begin(file, path)
        shape, dtype, offset = nifti.checked_header(header, path)
        several = len(shape) == 3 and min(shape) > 1 and not nifti.is_volume(shape, header)
        count = shape[2] if several else math.prod(shape[3:])
        if count > 1:
            raise InputError(f"{shown(path)}: a mask of {count} channels; give one with a single label a pixel.")
        if math.prod(shape) > MAX_VOXELS:
            raise InputError(f"{shown(path)}: its header declares more than {MAX_VOXELS} voxels; crop it first.")
        affine = nifti.affine_of(header, path)
        data = nifti.read_to_end(stream, head, offset + math.prod(shape) * dtype.itemsize, path)
        labels, *_ = nifti.intensities(np.frombuffer(data, dtype, math.prod(shape), offset), header, path)
        return labels.reshape((*shape, 1)[:3], order="F"), affine
