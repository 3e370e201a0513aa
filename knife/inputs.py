"""What the words for inputs stand for: files, folders, cases of several files, volumes and DICOM series.

And which of them are this program's, where several programs share them: a shard.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from knife import dicom
from knife.errors import InputError, SettingsError
from knife.image import NIFTI, SEQUENCES, Image, is_image, read, sequence_of
from knife.layouts import cases_of, sequences
from knife.stacks import Span, Stack, open_stack
from knife.volume import axial_count, open_volume

Place = str | Path
UNREAD = (".heic", ".heif", ".avif", ".gif", ".dng", ".cr2", ".nef", ".nrrd", ".mha", ".mhd", ".mgz", ".img", ".npy")


class Shard(NamedTuple):
    """One of several parts of the inputs."""

    number: int  # from 1 on
    of: int
    origin: str = "--shard"

    def __str__(self) -> str:
        """Return it as --shard spells it."""
        return f"{self.number}/{self.of}"


ALL = Shard(1, 1)


def shard_of(text: str | None, inputs: int, environ: Mapping[str, str]) -> Shard:
    """Return which part of the inputs a text, 2/8, stands for; None stands for all, auto for what the environment says.

    A job array of SLURM says it, torchrun, or srun. A single input cannot be divided: then the environment does not
    count, so that an array of which each task names a file of its own does what it always did.

    Raises:
        SettingsError: if the text is no such part, or the environment tells none that there is.
    """
    if text is None:
        return ALL
    if text != "auto":
        told = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if told is None or not 1 <= int(told[1]) <= int(told[2]):
            raise SettingsError(f"--shard {text}: give which of how many parts, from 1 on, such as 2/8.")
        return Shard(int(told[1]), int(told[2]))
    part = shard_around(environ) if inputs > 1 else ALL
    if not 1 <= part.number <= part.of:
        raise SettingsError(
            f"--shard: the {part.origin} calls this {part}, and there is no such part; give it, as 2/8."
        )
    return part


def shard_around(environ: Mapping[str, str]) -> Shard:
    """Return which of several tasks or processes this is, as those who start them tell in the environment."""
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
    task, first, step, tasks = (whole(environ.get(name)) for name in names)
    rank, world = (whole(environ.get(name)) for name in ("RANK", "WORLD_SIZE"))
    step_rank, step_world = (whole(environ.get(name)) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    if task is not None and tasks:
        return Shard((task - (first or 0)) // (step or 1) + 1, tasks, "SLURM job array")
    if rank is not None and world:
        return Shard(rank + 1, world, "torchrun")
    if step_rank is not None and (step_world or 0) > 1:
        return Shard(step_rank + 1, step_world or 0, "SLURM step")
    return ALL


def whole(text: str | None) -> int | None:
    """Return the whole number that a variable of the environment holds, if it holds one."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,9}", text) else None


def expand(images: Place | Sequence[Place]) -> tuple[list[tuple[Path, ...]], list[Path]]:
    """Return the files of each image that files and folders stand for, and the masks that were left out.

    3-D files of one case, a sequence each, stand for one volume. A folder stands for the images in it, but masks (by
    their names), and for those of its subfolders that hold one file for each MR sequence; a folder of DICOM files, or
    of such folders named by MR sequences, for one volume.

    Raises:
        InputError: if there are none, a folder cannot be listed, or a case in it is incomplete.
    """
    places = places_of(images)
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
            raise InputError(f"{place}: no images in this folder; {elsewhere(folders)}")
        found += here + cases
        left_out += masks
    if not found:
        raise InputError("no image given; name at least one file or folder.")
    return found, left_out


def places_of(images: Place | Sequence[Place]) -> list[Path]:
    """Return the paths of one place or several.

    Raises:
        InputError: if one is no path, but an array, say.
    """
    given = [images] if isinstance(images, str | Path) else [*images]
    if strange := [place for place in given if not isinstance(place, str | Path)]:
        found = type(strange[0]).__name__
        raise InputError(f"images: give files or folders, not {found}; write an array to a file first.")
    return [Path(place) for place in given]


def unread(images: Place | Sequence[Place]) -> list[Path]:
    """Return the files in folders that are images too, but of formats that knife does not read."""
    inside = [path for place in places_of(images) if os.path.isdir(place) for path in listed(place)]
    return [path for path in inside if path.suffix.lower() in UNREAD]


def elsewhere(folders: Sequence[Path]) -> str:
    """Say what to give instead of a folder without images."""
    holding = [path for path in folders if any(is_image(file) for file in listed(path))]
    if not holding:
        return "give one of NIfTI, PNG, JPEG, TIFF or DICOM files."
    more = f" and {len(holding) - 1} more" if len(holding) > 1 else ""
    return f"there are some in {holding[0]}{more}: give these folders, each by its name."


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


def opened(files: Sequence[Path], wanted: Span | None, fill: float | None = None) -> Image | Stack:
    """Read an image, or a volume, of which some slices will be translated; `fill` stands for what is not finite.

    Raises:
        InputError: if it cannot be read, or `wanted` slices are asked of an image that is none of a volume.
    """
    if files[0].is_dir():
        return open_stack(dicom.open_case(files, fill), wanted)
    if is_volume_file(files[0]):
        return open_stack(open_volume(files, fill), wanted)
    if wanted is not None:
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
