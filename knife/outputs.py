"""What a translation leaves behind: the result, the difference map, the panel and the record, and their names."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from knife import panel
from knife.errors import InputError, SettingsError
from knife.files import room, write_safely
from knife.image import NIFTI, SUFFIXES, Image, Picture, Source, output_name, own_name, write
from knife.settings import Wish

Place = str | Path
LONGEST_STEM = 120  # bytes of an input's name that the names of its results keep


class Files(NamedTuple):
    """Where one image's results go."""

    image: Path  # a folder, where the input was several files
    difference: Path
    panel: Path
    record: Path


@dataclass(frozen=True, eq=False)
class Translation:
    """One translated image: what came in, what came out, and how."""

    source: Image
    result: Image
    change: Tensor  # [C, h, w] in the model's units, on the model's grid
    targets: tuple[Tensor, ...]  # as the tasks understand them
    record: dict[str, Any]
    files: Files | None = None  # None: nothing was written
    region: Tensor | None = None  # where it was free to change, [1, H, W], 0 or 1; None: anywhere

    @property
    def wanted(self) -> Tensor | None:
        """Return where a target wants something, [H, W] bool on the image's grid, if one is a mask."""
        masks = wanted_masks(self.source, self.targets, self.change)
        return masks[0][0] if masks else None


def wanted_masks(image: Image, targets: Sequence[Tensor], change: Tensor) -> list[Tensor]:
    """Return the targets that are masks on the grid of a change [C, h, w], on the image's grid, [1, H, W] bool."""
    return [image.from_grid(one.float()) > 0.5 for one in targets if one.shape == (1, *change.shape[1:])]


class Edit(NamedTuple):
    """What is asked of one image."""

    image: Image
    targets: tuple[Tensor, ...]  # as the tasks understand them
    region: Tensor | None = None  # where it may change, [1, H, W], 0 or 1; None: anywhere
    judged: tuple[Tensor | None, ...] = ()  # the targets as the tasks' judges understand them, where there are any
    wanted: tuple[str, ...] = ()  # the targets in words, of what counts from the image the number it comes to
    outlined: Tensor | None = None  # where a tumour is known to be, [1, H, W] bool; it may well change there


class Unit(NamedTuple):
    """One input that has results of its own: what is to be translated of it, and what becomes of that."""

    todo: list[Edit]
    deliver: Callable[[Iterable[Translation | None]], list[Translation]]  # takes those of `todo`, in order; None failed
    done: int = 0  # images that an earlier call has translated


def unit(edit: Edit, files: Files | None, dtype: str) -> Unit:
    """Return the unit of one image; without files nothing is written."""

    def deliver(fresh: Iterable[Translation | None]) -> list[Translation]:
        return [save(one, files, dtype) if files else one for one in fresh if one]

    return Unit([edit], deliver)


def destinations(
    sources: Sequence[Source], wishes: Sequence[Wish], out: Path, region: str | None = None
) -> list[Files]:
    """Return where the results of each image or volume go, named by input, tasks, targets and the slices asked for.

    Names that would be the same are numbered.

    Raises:
        InputError: if an input or a target would be overwritten.
        SettingsError: if the folder cannot be written to.
    """
    try:
        room(out)
    except OSError as error:
        raise SettingsError(f"-o {out}: {error.filename} is {error.strerror}; give another one.") from error
    inputs: list[Place] = [
        *(file for source in sources for file in source.paths),
        *(wish.target for wish in wishes),
        *([region] if region else []),
    ]
    taken = {identity(file) for file in inputs if os.path.exists(file)}
    words = "_".join(f"{wish.task}_{target_word(wish.target)}" for wish in wishes)
    names, plans = set[str](), []
    for source in sources:
        stem, suffix = output_name(source)
        name = unused("_".join(filter(None, (safe(stem), words, source.part))), names)
        files = files_of(out, name, suffix)
        within = [files.image / own_name(own) for own in source.paths] if not suffix else []
        for file in (*files, *within):
            if os.path.exists(file) and identity(file) in taken:
                raise InputError(f"{file}: this is an input, and inputs are never overwritten; give another -o.")
        plans.append(files)
    return plans


def files_of(out: Path, name: str, suffix: str) -> Files:
    """Return the files of one image's results; the difference map is NIfTI beside NIfTI, else PNG."""
    map_suffix = suffix if suffix.lower() in NIFTI else ".png" if suffix else ".nii.gz"
    ends = (suffix, f"_difference{map_suffix}", "_panel.png", ".json")
    return Files(*(out / f"{name}{end}" for end in ends))


def identity(file: Place) -> tuple[int, int]:
    """Return what a file is known by, whatever the path to it."""
    status = os.stat(file)
    return status.st_dev, status.st_ino


def without_folder(target: str) -> str:
    """Return a target as the user gave it, but of a file its name alone: no record tells where files lie."""
    return Path(target).name or target if os.path.exists(target) or os.path.isabs(target) else target


def target_word(target: str) -> str:
    """Return a target as a part of a file name: "more" for +, "less" for -, a file's name without its suffix."""
    word = without_folder(target)
    for suffix in SUFFIXES:
        word = word[: -len(suffix)] if word.lower().endswith(suffix) else word
    return {"+": "more", "-": "less"}.get(word, re.sub(r"[^A-Za-z0-9.+-]+", "-", word)[:40])


def safe(stem: str) -> str:
    """Return an input's stem with nothing unprintable in it, and short enough to have an ending added."""
    printable = "".join(c if c.isprintable() else "_" for c in stem)
    return printable.encode()[:LONGEST_STEM].decode(errors="ignore")


def unused(name: str, names: set[str]) -> str:
    """Return a name that is not among `names` yet, numbered if need be, and add it to them."""
    numbered = (name if count == 1 else f"{name}_{count}" for count in range(1, len(names) + 2))
    free = next(one for one in numbered if one.lower() not in names)  # some file systems do not tell X from x
    names.add(free.lower())
    return free


def save(translation: Translation, files: Files, dtype: str = "same") -> Translation:
    """Write the result, the difference map, the panel and, last, the record; return the translation with its files.

    dtype: what NIfTI files are stored as, see `knife.image.write`.

    Raises:
        SettingsError: if the disk refuses.
    """
    source, result = translation.source, translation.result
    difference = (result.pixels - source.pixels).abs().sum(0, keepdim=True)  # the paper's map: summed over channels
    peak = float(difference.max())
    about = {
        "files": [file.name for file in files],
        "difference": "sum over the channels of |output - input|"
        + (f"; white is {peak:g}" if files.difference.suffix == ".png" else ", in the intensities of the file"),
        "difference_peak": peak,
    }
    translation = replace(translation, record={**translation.record, **about}, files=files)
    text = json.dumps(translation.record, indent=1, allow_nan=False) + "\n"
    with refusing_disk(files.record.parent):
        write(result, files.image, dtype=dtype)
        if isinstance(source.source.kind, Picture):
            write_safely(files.difference, panel.png(panel.grey(difference[0], 0, peak)))
        else:
            write(source.like(difference), files.difference)
        write_safely(files.panel, draw(translation))
        write_safely(files.record, text.encode())
    return translation


@contextmanager
def refusing_disk(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a SettingsError that names the folder of the results."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be written to ({error.strerror or error})"
        raise SettingsError(f"-o {folder}: {reason}; make room, or allow it.") from error


def draw(translation: Translation) -> bytes:
    """Draw input, output and change within the input's window, with the wanted mask if the target is one."""
    source, result, record = translation.source, translation.result, translation.record
    seen = [f"{name} {record['before'][name]:.3g} -> {record['after'][name]:.3g}" for name in record["after"]]
    title = ": ".join(filter(None, (f"{record['task']} {record['target']}", ", ".join(seen))))
    before, after = source.normalised(None, (0, 1)), result.normalised(None, (0, 1))
    return panel.translation(before, after, record["channels"], translation.wanted, title)
