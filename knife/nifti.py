"""NIfTI slices: bytes to pixels as they are looked at and back, with the geometry of the header kept bit for bit.

A slice is turned by its affine: an axial one has anterior at the top and the patient's right at the left
(radiological); others follow the same rule, rows along the higher world axis (S, else A), columns along the lower one,
both from + to -. `encode` undoes the turn exactly and keeps the header's geometry fields.
"""

import gzip
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
from nibabel import orientations
from nibabel.nifti1 import Nifti1Header, data_type_codes
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from torch import Tensor

from knife.errors import InputError
from knife.files import MARK, shown
from knife.finite import finite

NIFTI = (".nii.gz", ".nii")
GEOMETRY = (
    "dim_info", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
MAX_VOXELS = 16 * 2**20  # of a slice, over all channels
MAX_SURPLUS = 2**20  # bytes that a stream may hold before and after its voxels
MAX_STORED_CHANNELS = 8  # [X, Y, C] with more than these is a volume
_SILENT = logging.Logger("nifti", logging.CRITICAL + 1)

Header = Any  # a Nifti1Header or Nifti2Header of nibabel, whose methods are untyped
Array = np.ndarray[Any, Any]


class Orientation(NamedTuple):
    """How the stored plane [C, a, b] becomes the displayed one: swap the axes, then flip the dimensions in `flip`."""

    swap: bool
    flip: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Nifti:
    """Describe one NIfTI file so that other pixels can take the place of its own.

    header: geometry only (GEOMETRY), free of names and texts. shape: as stored; spatial: its part without channels.
    frame: [3, 3] world row step, column step and first pixel, as displayed. dtype: what output is stored as.
    filled: how many of its voxels were no number and have been filled, see `knife.finite`.
    """

    header: Header
    shape: tuple[int, ...]
    spatial: tuple[int, ...]
    orientation: Orientation
    frame: Array
    dtype: np.dtype[Any]
    filled: int = 0

    @property
    def top(self) -> float:
        """Return the largest whole number that a pixel may take, or inf for floats."""
        return min(2.0**24, cast(Any, np.iinfo)(self.dtype).max) if self.dtype.kind in "iu" else math.inf


# ------------------------------------------------------------------------------------------------------------- reading


def decode(file: BinaryIO, path: Path, fill: float | None = None) -> tuple[Nifti, Tensor, bool]:
    """Read one slice: what it is, pixels [C, H, W] float32 as displayed, and whether it says that knife made it.

    fill: what stands for NaN and infinity; None: they are refused.

    Everything that the header can tell is checked before a voxel is read.
    """
    stream, head, header = begin(file, path)
    shape, dtype, offset = checked_header(header, path)
    axes, count, spatial = layout(shape, header, path)
    affine = affine_of(header, path)
    data = read_to_end(stream, head, offset + math.prod(shape) * dtype.itemsize, path)
    values = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape, order="F")
    plane = np.moveaxis(values.reshape(shape[axes[0]], shape[axes[1]], count), 2, 0)
    pixels, kept, filled = intensities(plane, header, path, fill)
    orientation, frame = oriented(affine, axes, plane.shape[1:])
    nifti = Nifti(geometry(header), shape, spatial, orientation, frame, kept, filled)
    return nifti, displayed(pixels, orientation), bytes(header["descrip"]).startswith(MARK.encode())


def begin(file: BinaryIO, path: Path) -> tuple[BinaryIO, bytes, Header]:
    """Return the stream of a file, which may be compressed, the bytes already read from it, and the header in them."""
    magic = file.read(2)
    file.seek(0)
    stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if magic == b"\x1f\x8b" else file
    head = stream.read(Nifti2Header.sizeof_hdr)
    return stream, head, parsed_header(head, path)


def intensities(raw: Array, header: Header, path: Path, fill: float | None = None) -> tuple[Array, np.dtype[Any], int]:
    """Return the voxels as float32 after slope and intercept, their type in output, and how many have been filled.

    The type is their own if it is an integer type, there is no scaling, and float32 holds them exactly (below 2^24).
    """
    slope, inter = header.get_slope_inter()
    scaled = (slope, inter) not in ((None, None), (1.0, 0.0))
    with np.errstate(all="ignore"):
        pixels = np.asarray(raw * slope + inter if scaled else raw).astype(np.float32)
    pixels, filled = finite(pixels, path, fill, "voxels")
    exact = raw.dtype.kind in "iu" and not scaled and float(np.abs(pixels).max()) < 2**24
    return pixels, raw.dtype.newbyteorder("=") if exact else np.dtype(np.float32), filled


def parsed_header(head: bytes, path: Path) -> Header:
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    kind: Header = Nifti2Header if 540 in sizes else Nifti1Header
    if not sizes & {348, 540} or len(head) < kind.sizeof_hdr:
        raise InputError(f"{shown(path)}: no NIfTI header where one should be; save it as .nii or .nii.gz.")
    header = kind(head[: kind.sizeof_hdr], check=False)
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise InputError(f"{shown(path)}: not a single-file NIfTI; save header and voxels together as .nii.")
    return header


def checked_header(header: Header, path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and offset of the voxels, or raise InputError for what knife cannot use."""
    rank = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : rank + 1])
    if not 2 <= rank <= 7 or min(shape) < 1:
        raise InputError(f"{shown(path)}: its header declares the shape {list(shape)}; give a 2-D slice.")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind = data_type_codes.label[int(header["datatype"])]
        raise InputError(f"{shown(path)}: its voxels are {kind}; save them as integers or float32.")
    if not np.isfinite(header["pixdim"][1 : min(rank, 3) + 1]).all():
        raise InputError(f"{shown(path)}: its voxel size is not finite; correct pixdim in the header.")
    offset = int(header["vox_offset"])
    if not header.sizeof_hdr <= offset <= MAX_SURPLUS:
        raise InputError(f"{shown(path)}: its header places the voxels at byte {offset}; save it anew.")
    return shape, dtype, offset


def layout(shape: tuple[int, ...], header: Header, path: Path) -> tuple[tuple[int, int], int, tuple[int, ...]]:
    """Return the two axes of the slice, the number of channels, and the part of the shape without them.

    Slices are [X, Y], [X, Y, 1], [1, Y, Z], [X, 1, Z], each also with channels as a further axis, and [X, Y, C <= 8].
    """
    full, rest = (*shape, 1)[:3], [n for n in shape[3:] if n > 1]
    flat = next((axis for axis in (2, 1, 0) if full[axis] == 1), None)
    if len(rest) > 1 or is_volume(shape, header):
        size = " x ".join(map(str, shape))
        raise InputError(
            f"{shown(path)}: a volume of {size} voxels, and knife translates slices; give one slice "
            f"[X, Y], [X, Y, 1] or [X, Y, 1, C]."
        )
    if math.prod(shape) > MAX_VOXELS:
        raise InputError(f"{shown(path)}: its header declares more than {MAX_VOXELS} voxels; give a smaller slice.")
    if flat is None:
        return (0, 1), shape[2], shape[:2]
    one, two = (axis for axis in range(3) if axis != flat)
    return (one, two), math.prod(shape[3:]), shape[:3]


def read_to_end(stream: BinaryIO, head: bytes, size: int, path: Path) -> bytes:
    """Read up to byte `size`, and a compressed stream to its end, since only there its checksum is compared."""
    data = head + stream.read(max(size - len(head), 0))
    if len(data) < size:
        raise InputError(f"{shown(path)}: ends after {len(data)} of {size} bytes; copy it anew.")
    if isinstance(stream, gzip.GzipFile) and len(stream.read(MAX_SURPLUS + 1)) > MAX_SURPLUS:
        raise InputError(f"{shown(path)}: holds far more than the {size} bytes that it declares; save it anew.")
    return data


def affine_of(header: Header, path: Path) -> Array:
    """Return the affine [4, 4] that other programs use: sform, else qform, else voxel size alone."""
    affine = np.asarray(mended(header).get_best_affine(), dtype=np.float64)
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        volume = abs(np.linalg.det(affine[:3, :3] / lengths))  # 1 if orthogonal, 0 if two axes are one
        sane = np.isfinite(affine).all() and lengths.min() > 1e-6 and np.abs(affine).max() < 1e6 and volume > 1e-3
    if not sane:
        raise InputError(f"{shown(path)}: its affine is singular, not finite or huge; correct the header.")
    return affine


def mended(header: Header) -> Header:
    """Return a copy of a header in which what others write loosely is set right: pixdim[0] of 0, sizes below 0."""
    fixed = header.copy()
    fixed.check_fix(logger=_SILENT, error_level=logging.ERROR)
    return fixed


def qform_of(header: Header) -> Array | None:
    """Return the affine [4, 4] of a header's quaternion, or None if it has none, or one that turns nothing."""
    try:
        return np.asarray(mended(header).get_qform(), dtype=np.float64) if int(header["qform_code"]) > 0 else None
    except (ValueError, HeaderDataError):  # longer than 1: no program can use it, and the sform stands for it
        return None


def oriented(affine: Array, axes: tuple[int, int], shape: Sequence[int]) -> tuple[Orientation, Array]:
    """Return how to turn a stored plane of `shape` for display, and its frame [3, 3] in the world."""
    nearest = cast(Any, orientations).io_orientation(affine)  # of each voxel axis: world axis, direction
    swap = bool(nearest[axes[0], 0] < nearest[axes[1], 0])
    rows, columns = axes[::-1] if swap else axes
    flips = nearest[rows, 1] > 0, nearest[columns, 1] > 0
    frame, first = np.stack([affine[:3, rows], affine[:3, columns]]), affine[:3, 3].copy()
    for i, axis in enumerate((rows, columns)):
        if flips[i]:
            first += affine[:3, axis] * (shape[axes.index(axis)] - 1)
            frame[i] *= -1
    return Orientation(swap, tuple(i + 1 for i in (0, 1) if flips[i])), np.vstack([frame, first])


def is_volume(shape: Sequence[int], header: Header) -> bool:
    """Tell whether voxels of this shape are a volume: three long axes.

    [X, Y, C <= 8] is a slice with channels, unless dim_info says that the scanner put its slices along the third axis;
    the size of a voxel tells nothing, since programs write one for channels too.
    """
    bare = len(shape) == 3 and shape[2] <= MAX_STORED_CHANNELS and header.get_dim_info()[2] != 2
    return len(shape) >= 3 and min(shape[:3]) > 1 and not bare


def axial_axis(affine: Array) -> int:
    """Return the voxel axis that is nearest to the world's inferior-superior axis."""
    world = cast(Any, orientations).io_orientation(affine)[:, 0]
    return int(np.flatnonzero(world == 2)[0])


def displayed(plane: Array, orientation: Orientation) -> Tensor:
    turned = plane.swapaxes(1, 2) if orientation.swap else plane
    return torch.from_numpy(np.ascontiguousarray(np.flip(turned, orientation.flip)))


def stored_plane(pixels: Tensor, orientation: Orientation) -> Array:
    """Undo `displayed`."""
    turned = np.flip(pixels.numpy(), orientation.flip)
    return turned.swapaxes(1, 2) if orientation.swap else turned


def geometry(header: Header) -> Header:
    """Return a fresh header with the geometry of another, bit for bit, and none of its texts."""
    fresh = type(header)(endianness="<")
    for field in GEOMETRY:
        fresh[field] = header[field]
    return fresh


def new_header(affine: Array, voxels: Array) -> Header:
    """Return the header of voxels [X, Y, Z] that lie in scanner coordinates, in millimetres."""
    kind: Any = Nifti1Header  # whose methods are untyped
    header = kind()
    header.set_data_shape(voxels.shape[:3])
    header.set_data_dtype(voxels.dtype)
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm")
    return header


# ------------------------------------------------------------------------------------------------------------- writing


def encode(pixels: Tensor, files: Sequence[Nifti], *, dtype: str = "same", synthetic: bool, zipped: bool) -> bytes:
    """Return the bytes of a file of pixels [C, H, W]: geometry of the first of `files`, slope 1, no texts.

    dtype: "same" for the integer type that the files have in common if it holds every value, else float32; "float32".
    """
    file = files[0]
    kept = stored_type(pixels, {f.dtype for f in files}) if dtype == "same" else np.dtype(np.float32)
    shape = file.shape
    if math.prod(shape) != pixels.numel():  # several files into one, or a map of fewer channels
        shape = file.spatial if len(pixels) == 1 else (*(*file.spatial, 1)[:3], len(pixels))
    plane = np.moveaxis(stored_plane(pixels, file.orientation), 0, 2)
    return finished(file.header, plane.reshape(shape), kept, synthetic=synthetic, zipped=zipped)


def finished(geometry: Header, voxels: Array, dtype: np.dtype[Any], *, synthetic: bool, zipped: bool) -> bytes:
    """Return the bytes of a file of voxels, stored as `dtype`, with the geometry of a header."""
    header = geometry.copy()
    header.set_data_shape(voxels.shape)
    header["pixdim"] = geometry["pixdim"]  # the line before resets those beyond the shape
    header.set_data_dtype(dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = header.single_vox_offset
    if synthetic:
        header["descrip"], header["intent_name"] = MARK.encode(), b"synthetic"
    stored = voxels.astype(dtype.newbyteorder("<")).tobytes(order="F")
    data = bytes(header.binaryblock) + bytes(4) + stored  # four zeros: no extensions
    return gzip.compress(data, 6, mtime=0) if zipped else data


def stored_type(pixels: Tensor, dtypes: set[np.dtype[Any]]) -> np.dtype[Any]:
    """Return the integer type that the files have in common if it holds every value, else float32."""
    dtype = next(iter(dtypes))
    if len(dtypes) > 1 or dtype.kind not in "iu" or not bool((pixels == pixels.round()).all()):
        return np.dtype(np.float32)
    bounds = cast(Any, np.iinfo)(dtype)
    fits = bounds.min <= pixels.min().item() and pixels.max().item() <= bounds.max
    return dtype if fits else np.dtype(np.float32)
