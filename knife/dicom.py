"""DICOM series as volumes: one file a slice, put in order by where each lies in the patient. Results are NIfTI.

Of a file only pixels and geometry are used; names, dates and all else of the patient stay where they are. Needs pydicom
(the extra `dicom`).
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from knife.errors import InputError
from knife.files import refusing, regular, shown
from knife.image import by_sequence, is_image, mr_name
from knife.nifti import Array, new_header
from knife.volume import MAX_VOXELS, Volume, joined, stacked

PREAMBLE = bytes(128)  # which may hold anything
MAGIC = b"DICM"  # behind it
META_GROUP = 2  # of tags: they say how all others are stored
MAX_PIXELS = 2**24  # of a slice
INDEX = "DICOMDIR"  # a DICOM file that lists others
GREY = ("MONOCHROME2", "MONOCHROME1")  # more is brighter; more is darker
TAGS = ("SeriesInstanceUID", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")
UNEVEN = 0.02  # share of the usual gap between slices by which one may differ
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM counts towards left and posterior, NIfTI towards right and anterior


def is_dicom(file: Path) -> bool:
    """Tell whether a file is DICOM, by its first bytes."""
    try:
        with regular(file) as stream:
            return stream.read(len(PREAMBLE) + len(MAGIC)).endswith(MAGIC)
    except (InputError, OSError):
        return False


def series_files(folder: Path) -> list[Path]:
    """Return the DICOM files of a folder, sorted by name; it is a series if it has more of them than of pictures."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith(".") and not file.is_dir())
    others = [file for file in files if not is_image(file) and file.name.upper() != INDEX]
    found = [file for file in others if is_dicom(file)]
    return found if len(found) > sum(map(is_image, files)) else []


def open_series(folder: Path, fill: float | None = None) -> Volume:
    """Read one series as a volume of one channel, whose file is the folder.

    fill: what stands for intensities that are NaN or infinite; None: they are refused.

    Raises:
        InputError: if pydicom is not installed, a file cannot be read, or the slices make no volume.
    """
    with refusing(folder, "a DICOM series"):
        files = series_files(folder)
        slices = [read_slice(file, MAX_VOXELS // max(len(files), 1)) for file in files]
        check_one_series(slices, folder)
        return ordered(slices, folder, fill)


def case_of(folder: Path) -> tuple[Path, ...]:
    """Return the series of one head: the folder itself, or its folders named by MR sequences, in canonical order.

    Raises:
        InputError: if two are of the same sequence.
    """
    folder = folder.resolve()  # results are named by the folder, and "." is no name
    if series_files(folder):
        return (folder,)
    inside = [place for place in sorted(folder.iterdir()) if place.is_dir() and mr_name(place) and series_files(place)]
    return tuple(by_sequence(inside).values())


def open_case(folders: Sequence[Path], fill: float | None = None) -> Volume:
    """Read one series, or series of one head in folders named by MR sequences, as the channels of one volume.

    fill: as of `open_series`.

    Raises:
        InputError: if one cannot be read, or their grids differ.
    """
    if len(folders) == 1:
        return open_series(folders[0], fill)
    return joined(tuple(str(mr_name(folder)) for folder in folders), [open_series(folder, fill) for folder in folders])


def read_slice(file: Path, most: int = MAX_PIXELS) -> Any:
    """Read one file, of `most` pixels or fewer.

    Raises:
        InputError: if it is no image that lies somewhere, or has several frames, or might unfold to any size.
    """
    try:
        import pydicom
    except ImportError as error:
        raise InputError(
            f"{shown(file)}: DICOM is read by pydicom; pip install 'knife-diffusion[dicom]', or convert it to NIfTI."
        ) from error
    logging.getLogger("pydicom").setLevel(logging.ERROR)  # it says each oddity twice, values of the patient in it
    with refusing(file, "a DICOM image"), warnings.catch_warnings(), regular(file) as stream:
        warnings.simplefilter("ignore")
        refuse_deflated(stream, file)
        read = pydicom.dcmread(stream)
        lacking = [tag for tag in (*TAGS, "PixelData") if tag not in read]
        if lacking or int(read.get("NumberOfFrames", 1)) != 1 or read.get("PhotometricInterpretation") not in GREY:
            reason = f"lacks {', '.join(lacking)}" if lacking else "holds several frames or colours"
            raise InputError(
                f"{shown(file)}: {reason}; give a series of one grey slice a file, or convert it to NIfTI."
            )
        if not 0 < int(read.Rows) * int(read.Columns) <= min(most, MAX_PIXELS):
            found = f"{read.Rows} x {read.Columns} pixels"
            raise InputError(f"{shown(file)}: {found}, in a series of so many slices; give smaller or fewer slices.")
        read.voxels = read.pixel_array
        return read


def refuse_deflated(stream: BinaryIO, file: Path) -> None:
    """Refuse a file of which all is compressed, tags too: pydicom unfolds it whole, whatever that comes to."""
    from pydicom.filereader import read_dataset
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    stream.seek(len(PREAMBLE) + len(MAGIC))
    meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != META_GROUP)
    stream.seek(0)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise InputError(f"{shown(file)}: a deflated DICOM file; save it uncompressed, or convert it to NIfTI.")


def check_one_series(slices: Sequence[Any], folder: Path) -> None:
    """Refuse what is more than one series, or too little for a volume."""
    series = {one.SeriesInstanceUID for one in slices}
    if len(series) > 1:
        raise InputError(
            f"{shown(folder)}: {len(series)} DICOM series in one folder; put each into a folder of its own."
        )
    if len(slices) < 2:
        raise InputError(f"{shown(folder)}: {len(slices)} DICOM files make no volume; give a whole series.")
    if len({one.PhotometricInterpretation for one in slices}) > 1:
        raise InputError(f"{shown(folder)}: its slices differ in PhotometricInterpretation; give one series.")
    for name in ("ImageOrientationPatient", "PixelSpacing"):
        values = np.array([one[name].value for one in slices], dtype=float)
        if np.abs(values - values[0]).max() > 1e-4:
            raise InputError(f"{shown(folder)}: its slices differ in {name}; give one series of parallel slices.")


def ordered(slices: Sequence[Any], folder: Path, fill: float | None = None) -> Volume:
    """Put slices in order along their common normal, and make a volume of them."""
    first = slices[0]
    along_columns, along_rows = np.array(first.ImageOrientationPatient, dtype=float).reshape(2, 3)
    normal = np.cross(along_columns, along_rows)
    places = np.array([one.ImagePositionPatient for one in slices], dtype=float)
    order = np.argsort(places @ normal)
    gaps = np.diff((places @ normal)[order])
    if gaps.min() <= 0 or np.ptp(gaps) > UNEVEN * np.median(gaps):
        found = f"{gaps.min():.3g} to {gaps.max():.3g} mm apart"
        raise InputError(f"{shown(folder)}: its slices lie {found}; one is missing or there twice.")
    row_spacing, column_spacing = (float(value) for value in first.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_columns * column_spacing, along_rows * row_spacing
    affine[:3, 2] = (places[order[-1]] - places[order[0]]) / (len(slices) - 1)
    affine[:3, 3] = places[order[0]]
    values, padding = (np.stack([of(slices[i]) for i in order], axis=2) for of in (intensities, padded))
    values = as_looked_at(values, padding, first.PhotometricInterpretation)[..., None]  # [column, row, slice, 1]
    return stacked(values, new_header(TO_RAS @ affine, values), TO_RAS @ affine, values.shape[:3], folder, fill)


def intensities(one: Any) -> Array:
    """Return a slice's intensities [column, row], rescaled."""
    slope, intercept = float(one.get("RescaleSlope", 1)), float(one.get("RescaleIntercept", 0))
    return narrowed(one.voxels.T * slope + intercept)


def narrowed(values: Array) -> Array:
    """Return values as int16 where they are whole numbers that fit, else as float32."""
    bounds = np.iinfo(np.int16)
    fits = (values == values.round()).all() and bounds.min <= values.min() and values.max() <= bounds.max
    return values.astype(np.int16 if fits else np.float32)


def padded(one: Any) -> Array:
    """Return where a slice holds no intensities but what fills the frame around them, [column, row] bool."""
    value = one.get("PixelPaddingValue")
    if value is None:
        return np.zeros(one.voxels.T.shape, bool)
    ends = np.array([value, one.get("PixelPaddingRangeLimit", value)])
    low, high = np.sort(ends.astype(one.voxels.dtype))  # below 0 some write it as if it had no sign: it wraps round
    return cast(Array, (low <= one.voxels.T) & (high >= one.voxels.T))


def as_looked_at(values: Array, padding: Array, photometric: str) -> Array:
    """Return a series' intensities so that more is brighter, and padding as what shows nothing.

    Of MONOCHROME1 the difference from the highest is taken. Padding is 0, or the lowest if that lies below 0, as in CT.
    """
    inverted = photometric == GREY[1]
    if not inverted and not padding.any():
        return values
    seen = values[~padding].astype(np.float32)
    if not seen.size:
        return np.zeros_like(values)
    if inverted:
        values, seen = seen.max() - values, seen.max() - seen
    return narrowed(np.where(padding, min(seen.min(), 0), values))
