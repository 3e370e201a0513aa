"""What the words for inputs stand for: files, folders, cases of several files, volumes and DICOM series."""

import os
from collections.abc import Sequence
from pathlib import Path

from knife import dicom
from knife.errors import InputError
from knife.image import NIFTI, SEQUENCES, Image, is_image, read, sequence_of
from knife.layouts import cases_of, sequences
from knife.stacks import Span, Stack, open_stack
from knife.volume import axial_count, open_volume

Place = str | Path


def expand(images: Place | Sequence[Place]) -> tuple[list[tuple[Path, ...]], list[Path]]:
    """Return the files of each image that files and folders stand for, and the masks that were left out.

    3-D files of one case, a sequence each, stand for one volume. A folder stands for the images in it, but masks (by
    their names), and for those of its subfolders that hold one file for each MR sequence; a folder of DICOM files, or
    of such folders named by MR sequences, for one volume.

    Raises:
        InputError: if there are none, a folder cannot be listed, or a case in it is incomplete.
    """
    places = [Path(place) for place in ([images] if isinstance(images, str | Path) else images)]
    found: list[tuple[Path, ...]] = []
    left_out: list[Path] = []
    joined = volumes_among(places)
    for place in places:
        if not os.path.isdir(place):
            if place not in joined or joined[place] not in found:
                found.append(joined.get(place, (place,)))
            continue
        inside = listed(place)
        if series := dicom.case_of(place):
            found.append(series)
            continue
        here, masks = grouped(place, inside)
        folders = [path for path in inside if path.is_dir()]
        cases = [case for folder in folders for case in grouped(place, listed(folder))[0] if len(case) > 1]
        if not here + cases:
            raise InputError(f"{place}: no images in this folder; give one of NIfTI, PNG, JPEG, TIFF or DICOM files.")
        found += here + cases
        left_out += masks
    if not found:
        raise InputError("no image given; name at least one file or folder.")
    return found, left_out


def volumes_among(places: Sequence[Path]) -> dict[Path, tuple[Path, ...]]:
    """Return the 3-D files that belong together, a sequence each of otherwise one name: file -> all of its case."""
    files = [place for place in places if not os.path.isdir(place) and sequence_of(place) and is_volume_file(place)]
    cases, _ = cases_of(Path(), files)
    together = [tuple(case[name] for name in SEQUENCES if name in case) for case in cases.values()]
    return {file: case for case in together if len(case) > 1 for file in case}


def is_volume_file(file: Path) -> bool:
    """Tell whether a file is a NIfTI volume; what cannot be read is refused when it is read."""
    try:
        return file.name.lower().endswith(NIFTI) and axial_count(file) is not None
    except InputError:
        return False


def opened(files: Sequence[Path], slices: Span | None, fill: float | None = None) -> Image | Stack:
    """Read an image, or a volume, of which some slices will be translated; `fill` stands for what is not finite.

    Raises:
        InputError: if it cannot be read, or `slices` are asked of an image that is none of a volume.
    """
    if files[0].is_dir():
        return open_stack(dicom.open_case(files, fill), slices)
    if is_volume_file(files[0]):
        return open_stack(open_volume(files, fill), slices)
    if slices is not None:
        raise InputError(f"--slices: {files[0]} is a single slice and no volume; leave the option out.")
    return read(files, fill)


def listed(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name.

    Raises:
        InputError: if it cannot be listed.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); allow it, or name the images.") from error


def grouped(root: Path, paths: Sequence[Path]) -> tuple[list[tuple[Path, ...]], list[Path]]:
    """Return the image files among some paths, those of one case and slice together, and the masks among them.

    Raises:
        InputError: if a case lacks a sequence that the others have.
    """
    files = [path for path in paths if is_image(path) and not path.is_dir()]
    found = sequences(root, files)
    if isinstance(found, str):
        told = {path: sequence_of(path) for path in files}
        masks = [path for path, sequence in told.items() if sequence is not None and sequence.name == "seg"]
        return [(path,) for path in files if path not in masks], masks
    if found.skipped:
        raise InputError(f"{next(iter(found.skipped.values()))}; complete the case, or move that file away.")
    return [entry.files for entry in found.entries], []
