"""What a translation leaves behind: the result, the difference map, the panel and the record, and their names.

The record says what the results depend on, by a hash (`key`), and the hashes of their files. So a later call knows
which are made already, and as they should be; these it reads back instead of making them again.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from knife import panel
from knife.errors import DiskError, InputError, KnifeError, SettingsError
from knife.files import room, sha256_of, shown, write_safely
from knife.image import NIFTI, SUFFIXES, Image, Nifti, Picture, output_name, own_name, read, suffix_of, write
from knife.settings import Wish
from knife.spec import ImageSpec
from knife.volume import Volume

Place = str | Path
LONGEST_STEM = 120  # bytes of an input's name that the names of its results keep
FREE = ("device", "ops", "torch")  # what a record says that results do not depend on, or by no more than rounding
FREE_SETTINGS = ("batch_size",)


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
    kept: bool = False  # an earlier call made it

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
    """One input that has results of its own: what is to be translated of it, and what becomes of that.

    Of each image of `todo` that does not fail, `keep` is given its number and what became of it; then `finish` is
    called. Both return the translations that are ready by then.
    """

    todo: list[Edit]
    keep: Callable[[int, Translation], list[Translation]] = lambda i, one: [one]
    finish: Callable[[], list[Translation]] = list
    done: int = 0  # images that an earlier call has translated
    refused: tuple[tuple[Path, KnifeError], ...] = ()  # a file, and why it or a slice of it cannot be translated

    @property
    def images(self) -> int:
        """Return how many images there are."""
        return len(self.todo) + self.done


def unit(edit: Edit, files: Files | None, about: Mapping[str, Any], spec: ImageSpec) -> Unit:
    """Return the unit of one image, which may be done already; without files nothing is written.

    Raises:
        InputError: if the results of another image lie there.
    """
    if files is None:
        return Unit([edit])
    refuse_another(edit.image, files)
    key = key_of(edit.image, about, [edit])
    if done := again(edit, files, key, spec):
        return Unit([], finish=lambda: [done], done=1)
    return Unit([edit], lambda i, one: [save(one, files, about["settings"]["dtype"], key)])


# ----------------------------------------------------------------------------------------------- what is done already


def key_of(source: Image | Volume, about: Mapping[str, Any], edits: Sequence[Edit]) -> str:
    """Return a hash of all that results depend on: the input, what is asked of it, the settings and the models."""
    settings = {name: value for name, value in about["settings"].items() if name not in FREE_SETTINGS}
    told = {name: value for name, value in about.items() if name not in FREE} | {"settings": settings}
    words = [told, input_hash(source), [edit.wanted for edit in edits]]
    hashed = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
    asked = [tensor for edit in edits for tensor in (*edit.targets, edit.region, edit.outlined) if tensor is not None]
    for tensor in (source.window, *asked):
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def input_hash(source: Image | Volume) -> str:
    """Return a hash of an input: its files' names, what a result takes over from them, and all pixels."""
    hashed = hashlib.sha256(json.dumps([path.name for path in source.source.paths]).encode())
    kind = source.source.kind
    for file in [kind] if isinstance(kind, Picture) else kind:
        hashed.update(form_of(file))
    hashed.update(source.pixels.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def told_of(source: Image | Volume) -> dict[str, str]:
    """Return by what a record knows its input again: its hash, and four digits of that of where it lies.

    So few tell inputs of one name apart, and hardly tell a stranger which of many folders it was.
    """
    place = hashlib.sha256(os.fsencode(os.path.realpath(source.source.paths[0]))).hexdigest()
    return {"input_sha256": input_hash(source), "input_place": place[:4]}


def refuse_another(source: Image | Volume, files: Files) -> None:
    """Refuse to write over the results of another input of the same name; one that has changed where it lies is none.

    Raises:
        InputError: if a record tells of another one.
    """
    try:
        record, mine = json.loads(files.record.read_bytes()), told_of(source)
        other = all(name in record and record[name] != value for name, value in mine.items())
    except (OSError, ValueError, RecursionError, TypeError):
        return
    if other:
        raise InputError(
            f"{shown(source.source.paths[0])}: {files.record} tells of another input of that name; give another --out, "
            "or remove that record to have its results overwritten."
        )


def form_of(kind: Picture | Nifti) -> bytes:
    """Return what a result takes over from a file beside its pixels."""
    if isinstance(kind, Picture):
        alpha = b"" if kind.alpha is None else kind.alpha.tobytes()
        return alpha + f"{kind.mode} {sorted(kind.options.items())}".encode()
    return bytes(kind.header.binaryblock) + f"{kind.shape} {kind.dtype}".encode()


def again(edit: Edit, files: Files, key: str, spec: ImageSpec) -> Translation | None:
    """Return the translation that an earlier call made of an image; None if it is not there, or not as it was."""
    paths = members(files, edit.image.source.paths)
    record = kept_record(files, key, [*paths, files.difference, files.panel])
    if record is None:
        return None
    try:
        return reread(edit, read(paths).pixels, record, files, spec)
    except InputError:
        return None


def members(files: Files, paths: Sequence[Path]) -> list[Path]:
    """Return the files of a result: one, or in a folder one for each file of the input."""
    apart = len(paths) > 1 and not suffix_of(files.image)
    return [files.image / own_name(own) for own in paths] if apart else [files.image]


def kept_record(files: Files, key: str, written: Sequence[Path]) -> dict[str, Any] | None:
    """Return the record that an earlier call left, if it is of this key, and all files are as they were written."""
    try:
        record: dict[str, Any] = json.loads(files.record.read_bytes())
        return record if record["key"] == key and record["sha256"] == hashes(files, written) else None
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None


def hashes(files: Files, written: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of files, by their names within the folder of the results.

    Raises:
        OSError: if one cannot be read.
    """
    return {file.relative_to(files.record.parent).as_posix(): sha256_of(file) for file in written}


def reread(edit: Edit, pixels: Tensor, record: dict[str, Any], files: Files, spec: ImageSpec) -> Translation:
    """Return a translation from what was written of it; its change is what the model sees of it."""
    result = edit.image.like(pixels)
    before, after = (image.normalised(spec.size, spec.value_range) for image in (edit.image, result))
    return Translation(edit.image, result, after - before, edit.targets, record, files, edit.region, kept=True)


# -------------------------------------------------------------------------------------------------------- where it goes


def destinations(
    inputs: Sequence[tuple[Path, ...]], wishes: Sequence[Wish], out: Path, region: str | None = None, part: str = ""
) -> list[Files]:
    """Return where the results of each image or volume go, named by input, tasks, targets and the part asked for.

    Names that would be the same are numbered.

    Raises:
        InputError: if an input or a target would be overwritten.
        SettingsError: if it is no folder.
        DiskError: if it cannot be written to.
    """
    refuse_unwritable("-o", out)
    given: list[Place] = [
        *(file for paths in inputs for file in paths),
        *(wish.target for wish in wishes),
        *([region] if region else []),
    ]
    taken = {identity(file) for file in given if os.path.exists(file)}
    words = "_".join(f"{wish.task}_{target_word(wish.target)}" for wish in wishes)
    names, plans = set[str](), []
    for paths in inputs:
        stem, suffix = output_name(paths)
        name = unused("_".join(filter(None, (safe(stem), words, part))), names)
        files = files_of(out, name, suffix)
        for file in (*files, *members(files, paths)):
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


# -------------------------------------------------------------------------------------------------------------- writing


def save(translation: Translation, files: Files, dtype: str = "same", key: str | None = None) -> Translation:
    """Write the result, the difference map, the panel and, last, the record; return the translation with its files.

    dtype: what NIfTI files are stored as, see `knife.image.write`. key: what the results depend on, see `key_of`.

    Raises:
        DiskError: if the disk refuses.
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
    with refusing_disk("-o", files.record.parent):
        write(result, files.image, dtype=dtype)
        if isinstance(source.source.kind, Picture):
            write_safely(files.difference, panel.png(panel.grey(difference[0], 0, peak)))
        else:
            write(source.like(difference), files.difference)
        write_safely(files.panel, draw(translation))
        written = [*members(files, source.source.paths), files.difference, files.panel]
        record = translation.record | told_of(source)
        record |= {"key": key, "sha256": hashes(files, written)} if key else {}
        write_record(record, files)
    return replace(translation, record=record)


def write_record(record: Mapping[str, Any], files: Files) -> None:
    """Write a record; once it is there, so are the files that it tells of."""
    write_safely(files.record, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def refuse_unwritable(option: str, folder: Path) -> None:
    """Refuse a folder for results before minutes are spent.

    Raises:
        SettingsError: if it is no folder.
        DiskError: if it cannot be written to.
    """
    try:
        room(folder)
    except NotADirectoryError as error:
        raise SettingsError(f"{option} {folder}: {error.filename} is {error.strerror}; give another one.") from error
    except OSError as error:
        raise DiskError(f"{option} {folder}: {error.filename} is {error.strerror}; allow it.") from error


@contextmanager
def refusing_disk(option: str, folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a DiskError that names the folder of the results."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be written to ({error.strerror or error})"
        raise DiskError(f"{option} {folder}: {reason}; make room, or allow it.") from error


def draw(translation: Translation) -> bytes:
    """Draw input, output and change within the input's window, with the wanted mask if the target is one."""
    source, result, record = translation.source, translation.result, translation.record
    seen = [f"{name} {record['before'][name]:.3g} -> {record['after'][name]:.3g}" for name in record["after"]]
    where = f"slice {record['slice']}, " if "slice" in record else ""
    title = ": ".join(filter(None, (f"{where}{record['task']} {record['target']}", ", ".join(seen))))
    before, after = source.normalised(None, (0, 1)), result.normalised(None, (0, 1))
    return panel.translation(before, after, record["channels"], translation.wanted, title)
