"""Images and the files they came from: read, bring onto a model's grid, add a change, write back.

A model sees `image.normalised(size, value_range)`; what it changed comes back through `image.plus(delta, value_range)`,
which adds to the file's own intensities, so that whatever the model did not change stays bit for bit. Every file is
taken as untrusted: whatever is wrong with it ends in an `InputError` that names it.

Pixels lie as they are looked at. A NIfTI slice is turned by its affine: an axial one has anterior at the top and the
patient's right at the left (radiological); others follow the same rule, rows along the higher world axis (S, else A),
columns along the lower one, both from + to -. `write` undoes the turn exactly and keeps the header's geometry fields.

To add a picture format: its suffix in FORMATS, its modes in MODES, its options in `_save_options`; the test to write is
a row of `PICTURES` in tests/test_image.py.
"""

import gzip
import io
import logging
import math
import os
import re
import secrets
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin
import torch
from nibabel import orientations
from nibabel.nifti1 import Nifti1Header, data_type_codes
from nibabel.nifti2 import Nifti2Header
from torch import Tensor
from torch.nn import functional as F

from knife.errors import InputError

NIFTI = (".nii.gz", ".nii")
FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".webp": "WEBP",
}  # fmt: skip
SUFFIXES = (*NIFTI, *FORMATS)
MODES = {  # what each format can hold
    "PNG": ("L", "LA", "RGB", "RGBA", "I;16"), "TIFF": ("L", "LA", "RGB", "RGBA", "I;16", "F"),
    "JPEG": ("L", "RGB"), "BMP": ("L", "RGB"), "WEBP": ("RGB", "RGBA"),
}  # fmt: skip
CONVERSIONS = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "RGBX": "RGB"}
SEQUENCES = {  # canonical name and order: the words that name it in a file name
    "t1": ("t1", "t1n", "t1w"), "t1ce": ("t1ce", "t1c", "t1gd"), "t2": ("t2", "t2w"), "flair": ("flair", "t2f"),
}  # fmt: skip
MASK_WORDS = ("seg", "segm", "mask", "label", "labels")
GEOMETRY = (
    "dim_info", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
MAX_PIXELS = 64 * 2**20  # of a picture
MAX_VOXELS = 16 * 2**20  # of a NIfTI slice, over all channels
MAX_SURPLUS = 2**20  # bytes that a NIfTI stream may hold before and after its voxels
MAX_STORED_CHANNELS = 8  # [X, Y, C] with more than these is a volume
SAME_GRID = 1e-3  # world units by which two files of one slice may differ
PAD_ONLY = 9 / 8  # a NIfTI slice that fills a model's grid up to this factor is padded, not resized
MARK = "synthetic: knife"
_SILENT = logging.Logger("nifti", logging.CRITICAL + 1)
_WARNINGS = threading.Lock()  # their filters are one for all threads

Header = Any  # a Nifti1Header or Nifti2Header of nibabel, whose methods are untyped
Array = np.ndarray[Any, Any]


class MRSequence(NamedTuple):
    """What a file name tells: a canonical name, "t1", "t1ce", "t2", "flair" or "seg", and the word it was told by."""

    name: str
    token: str


class Orientation(NamedTuple):
    """How the stored plane [C, a, b] becomes the displayed one: swap the axes, then flip the dimensions in `flip`."""

    swap: bool
    flip: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Nifti:
    """Describe one NIfTI file so that other pixels can take the place of its own.

    header: geometry only (GEOMETRY), free of names and texts. shape: as stored; spatial: its part without channels.
    frame: [3, 3] world row step, column step and first pixel, as displayed. dtype: what output is stored as.
    """

    header: Header
    shape: tuple[int, ...]
    spatial: tuple[int, ...]
    orientation: Orientation
    frame: Array
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Picture:
    """Describe one picture file: pillow mode without alpha, alpha plane uint8 [H, W], resolution, colour profile."""

    mode: str
    alpha: Array | None
    options: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Source:
    """Where an image came from, and what its files can hold.

    limits: [C, 2] the values that a changed pixel may take. whole: [C, 1, 1] bool, channels stored as whole numbers.
    kind: one Picture, or one Nifti for each of `paths`. synthetic: the file says that knife made it.
    """

    paths: tuple[Path, ...]
    kind: Picture | tuple[Nifti, ...]
    limits: Tensor
    whole: Tensor
    synthetic: bool


@dataclass(frozen=True, eq=False)
class Image:
    """Hold one 2-D image in its file's own intensities, and where it came from.

    pixels: [C, H, W] float32, after a NIfTI file's slope and intercept, oriented as displayed (see the module).
    window: [C, 2] low and high intensity that map to the ends of a model's value range.
    channels: ("t1", "flair", ...) where file names tell, ("r", "g", "b"), ("grey",), else ("0", "1", ...).
    """

    pixels: Tensor
    window: Tensor
    channels: tuple[str, ...]
    source: Source

    def normalised(self, size: tuple[int, int] | None, value_range: tuple[float, float]) -> Tensor:
        """Return [C, h, w] float32 in `value_range`, clipped to the window, on the grid of `size` (None: its own)."""
        low, high = self.window.double()[:, :, None, None].unbind(1)
        share = ((self.pixels.double() - low) / (high - low)).clamp(0, 1)
        x = (value_range[0] + share * (value_range[1] - value_range[0])).float()
        return x if size is None else self.on_grid(x, size, pad=value_range[0])

    def on_grid(self, x: Tensor, size: tuple[int, int], pad: float = 0.0) -> Tensor:
        """Bring [C, H, W] on the image's grid to [C, h, w] = `size`: resize to fit inside, antialiased, centre, pad.

        A NIfTI slice that nearly fills the grid (PAD_ONLY) is padded only, as 240 x 240 to 256 x 256 in the paper.
        """
        top, left, height, width = self._placed(size)
        below, right = size[0] - top - height, size[1] - left - width
        return F.pad(_resized(x, (height, width)), (left, right, top, below), value=pad)

    def from_grid(self, x: Tensor) -> Tensor:
        """Bring [C, h, w] on a model's grid back to [C, H, W] on the image's: cut off the padding, resize."""
        top, left, height, width = self._placed((x.shape[-2], x.shape[-1]))
        rows, columns = self.pixels.shape[1:]
        return _resized(x[:, top : top + height, left : left + width], (rows, columns))

    def plus(self, delta: Tensor, value_range: tuple[float, float]) -> "Image":
        """Return the image changed by `delta` [C, h, w], in units of `value_range` on a model's grid.

        The change is scaled by the window and added to the raw pixels: fine detail and values beyond the window stay.
        Where delta is 0, and in the background, pixels stay bit for bit. Changed pixels are rounded if the file holds
        whole numbers, and clipped to what it can hold.
        """
        gain = (self.window[:, 1].double() - self.window[:, 0]) / (value_range[1] - value_range[0])
        change = self.from_grid(delta.detach().to("cpu", torch.float64)) * gain[:, None, None]
        change = change.masked_fill(self.background, 0)
        changed = self.pixels.double() + change
        low, high = self.source.limits[:, :, None, None].unbind(1)
        changed = torch.where(self.source.whole, changed.round(), changed).clamp(low, high)
        return replace(self, pixels=torch.where(change == 0, self.pixels, changed.float()))

    def like(self, pixels: Tensor) -> "Image":
        """Return an image of other pixels [C', H, W] in the same place; with another C', of unnamed channels.

        Raises ValueError if height or width differ.
        """
        if pixels.shape[1:] != self.pixels.shape[1:]:
            raise ValueError(f"pixels are {list(pixels.shape)}, the image is {list(self.pixels.shape)}")
        pixels = pixels.detach().to("cpu", torch.float32)
        if pixels.shape == self.pixels.shape:
            return replace(self, pixels=pixels)
        count = len(pixels)
        limits, whole = torch.tensor([[-torch.inf, torch.inf]]).expand(count, 2), torch.zeros(count, 1, 1).bool()
        source = replace(self.source, limits=limits, whole=whole)
        return Image(pixels, _window(pixels), tuple(map(str, range(count))), source)

    @property
    def background(self) -> Tensor:
        """Return [H, W] bool: pixels of a NIfTI slice that are exactly 0 in every channel, where 0 means "nothing".

        It means so if it is the low end of every window, or the value of one pixel in twenty; in a CT it is water.
        """
        zero = (self.pixels == 0).all(0)
        empty = not isinstance(self.source.kind, Picture) and (
            bool((self.window[:, 0] == 0).all()) or zero.float().mean().item() >= 0.05
        )
        return zero if empty else torch.zeros_like(zero)

    def _placed(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return top, left, height, width of the image on a model's grid of this size."""
        rows, columns = self.pixels.shape[1:]
        scale = min(size[0] / rows, size[1] / columns)
        if 1 <= scale <= PAD_ONLY and not isinstance(self.source.kind, Picture):
            scale = 1
        height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
        return (size[0] - height) // 2, (size[1] - width) // 2, height, width


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [C, H, W] to `size`, antialiased; the same size is the identity."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x[None], size=size, mode="bilinear", antialias=True)[0]


# ---------------------------------------------------------------------------------------------------------------- names


def is_image(path: Path | str) -> bool:
    """Tell whether a file's name is that of an image knife reads; hidden files are not."""
    return bool(_suffix(Path(path))) and not Path(path).name.startswith(".")


def output_name(image: Image) -> tuple[str, str]:
    """Return stem and suffix to name outputs by: ("x", ".nii.gz") for x.nii.gz.

    Several files have the suffix "" (a folder holds the output) and as stem their name without the sequence.
    """
    first = image.source.paths[0]
    stem = first.name.removesuffix(_suffix(first))
    told = sequence_of(first)
    if len(image.source.paths) == 1 or told is None:
        return stem, _suffix(first)
    bare = re.sub(rf"(^|[^A-Za-z0-9]){told.token}(?![A-Za-z0-9])", "", stem).strip(" ._-")
    return bare or first.absolute().parent.name or "image", ""


def sequence_of(path: Path | str) -> MRSequence | None:
    """Return the MR sequence, or "seg", that a file's name tells by a word of its own; None if there is none."""
    words = re.split(r"[^A-Za-z0-9]+", Path(path).name)
    known = {"seg": MASK_WORDS, **SEQUENCES}  # x_t1_seg is a mask
    told = ((name, word) for name, spelt in known.items() for word in reversed(words) if word.lower() in spelt)
    found = list(told)
    if not found or found[0][0] == "seg":
        return MRSequence(*found[0]) if found else None
    return MRSequence(*max(found, key=lambda f: words.index(f[1])))  # BIDS: space-T1w_FLAIR is a flair


def sequence_files(folder: Path | str) -> dict[str, Path]:
    """Return the NIfTI files of a folder by sequence, in canonical order; masks and other files are left out.

    Raises InputError if the folder cannot be listed or two files are of the same sequence.
    """
    folder = Path(folder)
    with _refusing(folder, "a folder"):
        files = sorted(f for f in folder.iterdir() if is_image(f) and _suffix(f).lower() in NIFTI)
    return _by_sequence([file for file in files if _mr_name(file)])


def _by_sequence(files: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        name = _mr_name(file)
        if name is None:
            raise InputError(f"{_shown(file)}: its name tells no sequence; files are joined by t1, t1ce, t2 or flair.")
        if name in found:
            both = f"{_shown(found[name])} and {_shown(file)}"
            raise InputError(f"{both}: two files of sequence {name}; give the files of one case only.")
        found[name] = file
    return {name: found[name] for name in SEQUENCES if name in found}


def _mr_name(path: Path) -> str | None:
    told = sequence_of(path)
    return told.name if told and told.name in SEQUENCES else None


def _suffix(path: Path) -> str:
    """Return the image suffix of a path as it is spelt, or "" if there is none."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[len(path.name) - len(suffix) :]


def _shown(path: Path) -> str:
    """Spell a path so that it fits on one line: control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


# ------------------------------------------------------------------------------------------------------------- reading


def read(path: Path | str | Sequence[Path | str]) -> Image:
    """Read one 2-D image from a file, from a folder of one case or from several files, one for each MR sequence.

    Raises InputError, and nothing else, if a file cannot be used: missing, no regular file, malformed, damaged, too
    large, a volume, without finite pixels, or the same value everywhere.
    """
    image = _assembled([Path(path)] if isinstance(path, Path | str) else [Path(p) for p in path])
    flat = image.pixels.flatten(1)
    if bool((flat == flat[:, :1]).all()):
        values = ", ".join(f"{v:g}" for v in flat[:, 0].tolist()[:4])
        raise InputError(f"{_shown(image.source.paths[0])}: every pixel is {values}; a constant image shows nothing.")
    return image


def read_mask(path: Path | str, image: Image) -> Tensor:
    """Read a mask as [1, H, W] float32, 1 where its label is above 0, in the image's orientation.

    A NIfTI mask must lie on the image's grid; a picture counts as drawn on the displayed image. An empty mask is one.
    Raises InputError if it cannot be read, or its shape or geometry differ.
    """
    mask = _decoded(Path(path))
    name, whose = _shown(Path(path)), _shown(image.source.paths[0])
    if mask.pixels.shape[1:] != image.pixels.shape[1:]:
        shapes = [" x ".join(map(str, p.shape[1:])) for p in (mask.pixels, image.pixels)]
        raise InputError(f"{name}: the mask is {shapes[0]}, but {whose} is {shapes[1]}; give one of the same shape.")
    if _suffix(Path(path)).lower() in (".jpg", ".jpeg"):
        raise InputError(f"{name}: JPEG blurs the edges of labels; save the mask as PNG or NIfTI.")
    if not isinstance(mask.source.kind, Picture):
        if isinstance(image.source.kind, Picture):
            raise InputError(f"{name}: a NIfTI mask, but {whose} has no geometry to lay it on; save the mask as PNG.")
        if len(mask.pixels) != 1:
            raise InputError(f"{name}: a mask of {len(mask.pixels)} channels; give one with a single label a pixel.")
        _check_same_grid(mask, image)
    return (mask.pixels > 0).any(0, keepdim=True).float()


def _assembled(paths: Sequence[Path]) -> Image:
    """Read the file, or join the files of one case as channels in canonical order."""
    if not paths:
        raise InputError("no image file given; name at least one.")
    if len(paths) == 1 and not _is_folder(paths[0]):
        return _decoded(paths[0])
    named = sequence_files(paths[0]) if len(paths) == 1 else _by_sequence(paths)
    if not named:
        raise InputError(f"{_shown(paths[0])}: a folder without NIfTI files named t1, t1ce, t2 or flair; give a file.")
    return _joined(tuple(named), [_decoded(file) for file in named.values()])


def _is_folder(path: Path) -> bool:
    with _refusing(path, "a path"):
        return path.is_dir()


def _joined(channels: tuple[str, ...], images: Sequence[Image]) -> Image:
    for image in images:
        if isinstance(image.source.kind, Picture) or len(image.pixels) != 1:
            raise InputError(f"{_shown(image.source.paths[0])}: only NIfTI files of one channel can be joined.")
        _check_same_grid(image, images[0])
    pixels, sources = torch.cat([image.pixels for image in images]), [image.source for image in images]
    files = tuple(file for source in sources for file in cast(tuple[Nifti, ...], source.kind))
    synthetic = any(source.synthetic for source in sources)
    tops = [float(source.limits[0, 1]) if source.whole.any() else torch.inf for source in sources]
    paths = tuple(path for source in sources for path in source.paths)
    return _image(paths, files, pixels, channels=channels, tops=tops, synthetic=synthetic)


def _check_same_grid(image: Image, other: Image) -> None:
    """Raise InputError, naming the pair, unless two images cover the same pixels of the world."""
    mine, its = cast(tuple[Nifti, ...], image.source.kind)[0], cast(tuple[Nifti, ...], other.source.kind)[0]
    pair = f"{_shown(image.source.paths[0])} and {_shown(other.source.paths[0])}"
    if image.pixels.shape[1:] != other.pixels.shape[1:]:
        shapes = [" x ".join(map(str, x.pixels.shape[1:])) for x in (image, other)]
        raise InputError(f"{pair}: {shapes[0]} and {shapes[1]} pixels; give files of the same slice.")
    gap = float(np.abs(mine.frame - its.frame).max())
    if gap > SAME_GRID:
        raise InputError(f"{pair}: their affines differ by {gap:.3g}; resample one onto the grid of the other.")


def _decoded(path: Path) -> Image:
    """Read one file; a constant one too, since a mask may be empty."""
    suffix = _suffix(path).lower()
    if not suffix:
        raise InputError(f"{_shown(path)}: no image format that knife reads; give one of {', '.join(SUFFIXES)}.")
    with _refusing(path, "a NIfTI file" if suffix in NIFTI else "a picture"), _regular(path) as file:
        return _decode_nifti(file, path) if suffix in NIFTI else _decode_picture(file, path)


@contextmanager
def _refusing(path: Path, what: str) -> Iterator[None]:
    """Turn whatever reading raises into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{_shown(path)}: no such file; check the name.") from None
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"{_shown(path)}: more than {MAX_PIXELS} pixels; give a smaller picture.") from error
    except PIL.UnidentifiedImageError as error:
        raise InputError(f"{_shown(path)}: not a PNG, JPEG, TIFF, BMP or WebP picture; save it as one.") from error
    except MemoryError as error:
        raise InputError(f"{_shown(path)}: needs more memory than there is; give a smaller file.") from error
    except Exception as error:  # nibabel, pillow, zlib and numpy raise more than a dozen classes on damaged files
        lines = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()
        reason = " ".join(lines)[:160].rstrip(" .")
        raise InputError(f"{_shown(path)}: cannot be read as {what} ({reason}); save or copy it anew.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pillow's warnings about odd metadata and large pictures from the terminal."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file; a FIFO, device or socket is refused without waiting on it."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(fd, "rb") as file:
        mode, size = os.fstat(fd).st_mode, os.fstat(fd).st_size
        if not stat.S_ISREG(mode):
            raise InputError(f"{_shown(path)}: no regular file; give an image file.")
        if not size:
            raise InputError(f"{_shown(path)}: the file is empty; copy it anew.")
        yield file


def _image(
    paths: tuple[Path, ...],
    kind: Picture | tuple[Nifti, ...],
    pixels: Tensor,
    *,
    channels: tuple[str, ...],
    tops: Sequence[float],
    synthetic: bool,
) -> Image:
    """Assemble an image; `tops` has the largest whole number that each channel's file holds, or inf for floats."""
    limits = torch.tensor([[0.0, top] for top in tops], dtype=torch.float64)
    whole = limits[:, 1].isfinite()
    normalised = not whole.any() and pixels.min().item() >= 0 and pixels.max().item() <= 1  # as published slices are
    if normalised:
        limits[:, 1] = 1
    known = normalised or (isinstance(kind, Picture) and bool(whole.all()))
    window = limits.float() if known else _window(pixels)
    limits[:, 0] = torch.minimum(pixels.amin((1, 2)), window[:, 0])  # no change goes below both image and window
    return Image(pixels, window, channels, Source(paths, kind, limits, whole[:, None, None], synthetic))


def _window(pixels: Tensor) -> Tensor:
    """Return [C, 2] intensities of [C, H, W] that span a model's range: 0 to the 99.5th percentile of what is above 0.

    The low end is the 0.5th percentile of what is not 0, if that is clearly negative (CT, standardised values); the few
    slightly negative voxels that resampling leaves in MR are not.
    """
    ends = []
    for channel in pixels.double().numpy():
        above, other = channel[channel > 0], channel[channel != 0]
        high = float(np.percentile(above, 99.5)) if above.size else 0.0
        low = float(np.percentile(other, 0.5)) if other.size else 0.0
        low = low if low < -0.05 * high else 0.0
        ends.append((low, high if high > low else low + 1))
    return torch.tensor(ends)


# --------------------------------------------------------------------------------------------------------------- NIfTI


def _decode_nifti(file: BinaryIO, path: Path) -> Image:
    """Read one slice; everything that the header can tell is checked before a voxel is read."""
    magic = file.read(2)
    file.seek(0)
    stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if magic == b"\x1f\x8b" else file
    head = stream.read(Nifti2Header.sizeof_hdr)
    header = _parsed_header(head, path)
    shape, dtype, offset = _checked_header(header, path)
    axes, count, spatial = _layout(shape, path)
    affine = _affine(header, path)
    data = _read_to_end(stream, head, offset + math.prod(shape) * dtype.itemsize, path)
    values = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape, order="F")
    plane = np.moveaxis(values.reshape(shape[axes[0]], shape[axes[1]], count), 2, 0)
    pixels, stored = _intensities(plane, header, path)
    orientation, frame = _oriented(affine, axes, plane.shape[1:])
    described = Nifti(_geometry(header), shape, spatial, orientation, frame, stored)
    name = _mr_name(path) if count == 1 else None
    return _image(
        (path,),
        (described,),
        _displayed(pixels, orientation),
        channels=(name,) if name else tuple(map(str, range(count))),
        tops=[min(2.0**24, cast(Any, np.iinfo)(stored).max) if stored.kind in "iu" else torch.inf] * count,
        synthetic=bytes(header["descrip"]).startswith(MARK.encode()),
    )


def _intensities(raw: Array, header: Header, path: Path) -> tuple[Array, np.dtype[Any]]:
    """Return the voxels as float32 after slope and intercept, and the type that output of their kind is stored as.

    That is their own if it is an integer type, there is no scaling, and float32 holds them exactly (below 2^24).
    """
    slope, inter = header.get_slope_inter()
    scaled = (slope, inter) not in ((None, None), (1.0, 0.0))
    with np.errstate(all="ignore"):
        pixels = np.asarray(raw * slope + inter if scaled else raw).astype(np.float32)
    bad = pixels.size - int(np.isfinite(pixels).sum())
    if bad:
        raise InputError(f"{_shown(path)}: {bad} voxels are NaN, infinite or beyond float32; fill them first.")
    exact = raw.dtype.kind in "iu" and not scaled and float(np.abs(pixels).max()) <= 2**24
    return pixels, raw.dtype.newbyteorder("=") if exact else np.dtype(np.float32)


def _parsed_header(head: bytes, path: Path) -> Header:
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    kind: Header = Nifti2Header if 540 in sizes else Nifti1Header
    if not sizes & {348, 540} or len(head) < kind.sizeof_hdr:
        raise InputError(f"{_shown(path)}: no NIfTI header where one should be; save it as .nii or .nii.gz.")
    header = kind(head[: kind.sizeof_hdr], check=False)
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise InputError(f"{_shown(path)}: not a single-file NIfTI; save header and voxels together as .nii.")
    return header


def _checked_header(header: Header, path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and offset of the voxels, or raise InputError for what knife cannot use."""
    rank = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : rank + 1])
    if not 2 <= rank <= 7 or min(shape) < 1:
        raise InputError(f"{_shown(path)}: its header declares the shape {list(shape)}; give a 2-D slice.")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind = data_type_codes.label[int(header["datatype"])]
        raise InputError(f"{_shown(path)}: its voxels are {kind}; save them as integers or float32.")
    if not np.isfinite(header["pixdim"][1 : min(rank, 3) + 1]).all():
        raise InputError(f"{_shown(path)}: its voxel size is not finite; correct pixdim in the header.")
    offset = int(header["vox_offset"])
    if not header.sizeof_hdr <= offset <= MAX_SURPLUS:
        raise InputError(f"{_shown(path)}: its header places the voxels at byte {offset}; save it anew.")
    return shape, dtype, offset


def _layout(shape: tuple[int, ...], path: Path) -> tuple[tuple[int, int], int, tuple[int, ...]]:
    """Return the two axes of the slice, the number of channels, and the part of the shape without them.

    Slices are [X, Y], [X, Y, 1], [1, Y, Z], [X, 1, Z], each also with channels as a further axis, and [X, Y, C <= 8].
    """
    full, rest = (*shape, 1)[:3], [n for n in shape[3:] if n > 1]
    flat = next((axis for axis in (2, 1, 0) if full[axis] == 1), None)
    bare = len(shape) == 3 and flat is None and shape[2] <= MAX_STORED_CHANNELS
    if len(rest) > 1 or (flat is None and not bare):
        size = " x ".join(map(str, shape))
        raise InputError(
            f"{_shown(path)}: a volume of {size} voxels, and knife translates slices; give one slice "
            f"[X, Y], [X, Y, 1] or [X, Y, 1, C]."
        )
    if math.prod(shape) > MAX_VOXELS:
        raise InputError(f"{_shown(path)}: its header declares more than {MAX_VOXELS} voxels; give a smaller slice.")
    if flat is None:
        return (0, 1), shape[2], shape[:2]
    one, two = (axis for axis in range(3) if axis != flat)
    return (one, two), math.prod(shape[3:]), shape[:3]


def _read_to_end(stream: BinaryIO, head: bytes, size: int, path: Path) -> bytes:
    """Read up to byte `size`, and a compressed stream to its end, since only there its checksum is compared."""
    data = head + stream.read(max(size - len(head), 0))
    if len(data) < size:
        raise InputError(f"{_shown(path)}: ends after {len(data)} of {size} bytes; copy it anew.")
    if isinstance(stream, gzip.GzipFile) and len(stream.read(MAX_SURPLUS + 1)) > MAX_SURPLUS:
        raise InputError(f"{_shown(path)}: holds far more than the {size} bytes that it declares; save it anew.")
    return data


def _affine(header: Header, path: Path) -> Array:
    """Return the affine [4, 4] that other programs use: sform, else qform, else voxel size alone."""
    fixed = header.copy()
    fixed.check_fix(logger=_SILENT, error_level=logging.ERROR)
    affine = np.asarray(fixed.get_best_affine(), dtype=np.float64)
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        volume = abs(np.linalg.det(affine[:3, :3] / lengths))  # 1 if orthogonal, 0 if two axes are one
        sane = np.isfinite(affine).all() and lengths.min() > 1e-6 and np.abs(affine).max() < 1e6 and volume > 1e-3
    if not sane:
        raise InputError(f"{_shown(path)}: its affine is singular, not finite or huge; correct the header.")
    return affine


def _oriented(affine: Array, axes: tuple[int, int], shape: Sequence[int]) -> tuple[Orientation, Array]:
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


def _displayed(plane: Array, orientation: Orientation) -> Tensor:
    turned = plane.swapaxes(1, 2) if orientation.swap else plane
    return torch.from_numpy(np.ascontiguousarray(np.flip(turned, orientation.flip)))


def _stored(pixels: Tensor, orientation: Orientation) -> Array:
    """Undo `_displayed`."""
    turned = np.flip(pixels.numpy(), orientation.flip)
    return turned.swapaxes(1, 2) if orientation.swap else turned


def _geometry(header: Header) -> Header:
    """Return a fresh header with the geometry of another, bit for bit, and none of its texts."""
    fresh = type(header)(endianness="<")
    for field in GEOMETRY:
        fresh[field] = header[field]
    return fresh


# ------------------------------------------------------------------------------------------------------------ pictures


def _decode_picture(file: BinaryIO, path: Path) -> Image:
    with _quiet():
        opened = _opened_picture(file, path)
        synthetic = _says_synthetic(opened)
        if opened.format == "TIFF":
            opened.load()  # reads metadata too, and warns about it
    opened.load()  # the work, outside the lock
    with _quiet():
        picture, info = PIL.ImageOps.exif_transpose(opened), opened.info
        mode = _plain_mode(picture, path)
        picture = picture if mode in (picture.mode, "I;16") else picture.convert(mode)
    profile = info.get("icc_profile") if opened.mode != "CMYK" else None
    array = np.atleast_3d(np.asarray(picture)).astype(np.float32)  # [H, W, C]
    alpha = array[..., -1].astype(np.uint8) if mode in ("LA", "RGBA") else None
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array if alpha is None else array[..., :-1], 2, 0)))
    if not bool(pixels.isfinite().all()):
        raise InputError(f"{_shown(path)}: it has pixels that are NaN or infinite; fill them first.")
    kept = {"icc_profile": profile, "dpi": _resolution(info.get("dpi"))}
    kind = Picture(mode.removesuffix("A"), alpha, {key: value for key, value in kept.items() if value})
    channels = ("grey",) if len(pixels) == 1 else ("r", "g", "b")
    tops = [{"F": torch.inf, "I;16": 65535.0}.get(kind.mode, 255.0)] * len(pixels)
    return _image((path,), kind, pixels, channels=channels, tops=tops, synthetic=synthetic)


def _opened_picture(file: BinaryIO, path: Path) -> PIL.Image.Image:
    """Open one picture of an allowed format, its size checked before and its checksums before decoding."""
    formats = sorted(set(FORMATS.values()))
    opened = PIL.Image.open(file, formats=formats)
    if opened.width * opened.height > MAX_PIXELS:
        raise InputError(f"{_shown(path)}: {opened.width} x {opened.height} pixels; give at most {MAX_PIXELS}.")
    if opened.format != "MPO" and getattr(opened, "is_animated", False):  # an MPO is a JPEG with a preview behind it
        raise InputError(f"{_shown(path)}: holds several pictures; save the one to translate as its own file.")
    if opened.format == "PNG":
        opened.verify()  # decoding alone leaves the checksums uncompared
        file.seek(0)
        opened = PIL.Image.open(file, formats=formats)
    if _is_deep_colour(opened, file):
        raise InputError(f"{_shown(path)}: 16 bits a colour would be lost; save it with 8, or each colour as grey.")
    return opened


def _is_deep_colour(opened: PIL.Image.Image, file: BinaryIO) -> bool:
    """Tell whether pillow would silently read 16-bit colours as 8-bit ones."""
    if opened.format == "TIFF":
        bits = cast(Any, opened).tag_v2.get(258, (8,))
        return opened.mode not in ("F", "I") and len(bits) > 1 and max(bits) > 8
    if opened.format == "PNG":
        here = file.tell()
        file.seek(24)  # IHDR: bit depth, colour type
        depth, colour = file.read(2)
        file.seek(here)
        return depth == 16 and colour in (2, 4, 6)
    return False


def _plain_mode(picture: PIL.Image.Image, path: Path) -> str:
    """Return the mode to convert to: L, LA, RGB, RGBA, I;16 or F."""
    mode = "I;16" if picture.mode.startswith("I;16") else CONVERSIONS.get(picture.mode, picture.mode)
    if mode in ("L", "RGB") and picture.has_transparency_data:
        mode += "A"
    if mode not in MODES["TIFF"]:
        raise InputError(f"{_shown(path)}: pixels of mode {mode}; save it as 8-bit grey or RGB, or 16-bit grey.")
    return mode


def _resolution(dpi: Any) -> tuple[float, float] | None:
    """Return the dots per inch if they are two sensible numbers."""
    try:
        x, y = (float(d) for d in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 1 <= x < 65535 and 1 <= y < 65535 else None


def _says_synthetic(opened: PIL.Image.Image) -> bool:
    texts = [opened.info.get("Comment"), opened.info.get("comment"), opened.getexif().get(270)]
    return any(MARK in (t.decode("latin-1") if isinstance(t, bytes) else str(t)) for t in texts)


# ------------------------------------------------------------------------------------------------------------- writing


def write(image: Image, path: Path | str, synthetic: bool = True) -> None:
    """Write an image in the format that the suffix of `path` names; only complete files ever appear.

    NIfTI keeps the geometry of the input, drops its texts, and is stored as the input's integer type if every value
    fits it, else as float32. An image read from several files is written under their names if `path` is a folder (a
    name without image suffix), else as one [X, Y, 1, C] file. Pictures keep alpha, resolution and colour profile and
    lose other metadata. `synthetic` puts a mark into the file (BMP has no place for one).

    Raises InputError if that would overwrite an input, the format cannot hold the image or pixels are not finite;
    OSError if the disk refuses.
    """
    path = Path(path)
    kind, paths = image.source.kind, image.source.paths
    if not bool(image.pixels.isfinite().all()):
        raise InputError(f"{_shown(path)}: the pixels to write are not all finite; nothing was written.")
    if not _suffix(path) and len(paths) > 1:
        if len(image.pixels) != len(paths):
            raise InputError(f"{_shown(path)}: {len(image.pixels)} channels do not fill {len(paths)} files; name one.")
        files = {path / own.name: [i] for i, own in enumerate(paths)}
    else:
        files = {path: list(range(len(image.pixels)))}
    encoded = {}
    for file, channels in files.items():
        _check_no_input(file, paths)
        if isinstance(kind, Picture):
            encoded[file] = _encode_picture(image, kind, file, synthetic)
        else:
            encoded[file] = _encode_nifti(image, kind, channels, file, synthetic)
    for file, data in encoded.items():
        write_safely(file, data)


def _check_no_input(path: Path, inputs: Sequence[Path]) -> None:
    if path.exists() and any(own.exists() and path.samefile(own) for own in inputs):
        raise InputError(f"{_shown(path)}: this is the input, and inputs are never overwritten; name another output.")


def _encode_nifti(image: Image, files: tuple[Nifti, ...], channels: list[int], path: Path, synthetic: bool) -> bytes:
    """Return the bytes of a NIfTI file: geometry of the input, slope 1, voxels in Fortran order."""
    suffix = _suffix(path).lower()
    if suffix not in NIFTI:
        raise InputError(f"{_shown(path)}: a NIfTI slice is written as NIfTI; name the output .nii or .nii.gz.")
    pixels = image.pixels[channels]
    own = files[channels[0] :][:1] if len(channels) == 1 and len(image.pixels) == len(files) else files
    file, dtype = own[0], _stored_type(pixels, {f.dtype for f in own})
    shape = file.shape
    if math.prod(shape) != pixels.numel():  # several files into one, or a map of fewer channels
        shape = file.spatial if len(pixels) == 1 else (*(*file.spatial, 1)[:3], len(pixels))
    header = file.header.copy()
    header.set_data_shape(shape)
    header["pixdim"] = file.header["pixdim"]  # the line before resets those beyond the shape
    header.set_data_dtype(dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = header.single_vox_offset
    if synthetic:
        header["descrip"], header["intent_name"] = MARK.encode(), b"synthetic"
    plane = np.moveaxis(_stored(pixels, file.orientation), 0, 2)
    voxels = plane.reshape(shape).astype(dtype.newbyteorder("<")).tobytes(order="F")
    data = bytes(header.binaryblock) + bytes(4) + voxels  # four zeros: no extensions
    return gzip.compress(data, 6, mtime=0) if suffix == ".nii.gz" else data


def _stored_type(pixels: Tensor, dtypes: set[np.dtype[Any]]) -> np.dtype[Any]:
    """Return the integer type that the files have in common if it holds every value, else float32."""
    dtype = next(iter(dtypes))
    if len(dtypes) > 1 or dtype.kind not in "iu" or not bool((pixels == pixels.round()).all()):
        return np.dtype(np.float32)
    bounds = cast(Any, np.iinfo)(dtype)
    fits = bounds.min <= pixels.min().item() and pixels.max().item() <= bounds.max
    return dtype if fits else np.dtype(np.float32)


def _encode_picture(image: Image, kind: Picture, path: Path, synthetic: bool) -> bytes:
    """Return the bytes of a picture, whole numbers rounded and clipped to what its mode holds."""
    target = FORMATS.get(_suffix(path).lower())
    if target is None:
        raise InputError(f"{_shown(path)}: a picture is written as one of {', '.join(FORMATS)}; name the output so.")
    count, same = len(image.pixels), len(image.pixels) == (3 if kind.mode == "RGB" else 1)
    if count not in (1, 3):
        raise InputError(f"{_shown(path)}: {count} channels, and a picture has 1 or 3; save them one by one.")
    mode = kind.mode if same else ("RGB" if count == 3 else "L")
    alpha = kind.alpha if same else None
    full = mode if alpha is None else mode + "A"
    if full not in MODES[target]:
        raise InputError(f"{_shown(path)}: {target} cannot hold pixels of mode {full}; name the output .png or .tif.")
    array = np.moveaxis(image.pixels.numpy(), 0, 2)
    if mode != "F":
        array = array.round().clip(0, 65535 if mode == "I;16" else 255).astype("uint16" if mode == "I;16" else "uint8")
    array = array if alpha is None else np.concatenate([array, alpha[..., None]], axis=2)
    picture = PIL.Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))
    out = io.BytesIO()
    picture.save(out, format=target, **_save_options(target, synthetic), **kind.options)
    return out.getvalue()


def _save_options(target: str, synthetic: bool) -> dict[str, Any]:
    """Return what pillow is told beside the pixels: no loss where the format allows it, and the mark."""
    exact: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True},
    }
    options = exact.get(target, {})
    if synthetic and target == "PNG":
        options["pnginfo"] = PIL.PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("Software", "knife")
        options["pnginfo"].add_text("Comment", MARK)
    elif synthetic and target == "TIFF":
        options |= {"description": MARK, "software": "knife"}
    elif synthetic and target == "JPEG":
        options["comment"] = MARK
    elif synthetic and target == "WEBP":
        options["exif"] = PIL.Image.Exif()
        options["exif"][270] = MARK
    return options


def write_safely(path: Path, data: bytes) -> None:
    """Put bytes at a path so that a crash or power loss leaves the old file, none, or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".knife-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new name itself survive a power loss
    finally:
        os.close(folder)
