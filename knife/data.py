"""The images of a data folder in memory: read on the model's grid, named, told from other data.

What a folder holds is the business of `knife.layouts`.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from knife import volume
from knife.errors import InputError
from knife.image import SEQUENCES, Image, by_sequence, decoded, joined, not_constant, read_mask
from knife.layouts import Entry, encoded
from knife.volume import Volume

MEMORY_SHARE = 0.8  # of the free memory that images may take
SAMPLE = 25  # images that are looked at to learn which channels a folder has
MADE_HERE = "marked as made by knife, and a model learns nothing true from what a model made"
VOLUMES_AT_ONCE = 4  # in memory, and no more than `knife.volume` keeps masks of


@dataclass(frozen=True)
class Case:
    """One image as a task sees it: on the model's grid, in the model's value range."""

    name: str
    pixels: Tensor  # [C, H, W]
    mask: Tensor | None  # [1, H, W], 0 or 1
    values: Mapping[str, str]


class Form(NamedTuple):
    """What every image of a training is brought to."""

    channels: tuple[str, ...]  # names in order; an image of others is skipped
    size: tuple[int, int]  # height, width
    value_range: tuple[float, float]
    crop: bool = False  # fill the size and cut off what is beyond, instead of padding
    labels: tuple[int, ...] = ()  # of a mask's label map, those that count; none: all above 0
    min_brain: float = 0.0  # a volume's slice whose brain covers less than this share of it is skipped
    fill: float | None = None  # what stands for pixels that are NaN or infinite; None: such an image is skipped
    synthetic: bool = False  # take images that say that knife made them; else they are skipped


@dataclass
class Loaded:
    """Images in memory on the model's grid, and what could not be read."""

    cases: list[Case]
    skipped: dict[str, str]  # name -> why
    passing: set[str] = field(default_factory=set)  # of these, the names of those that may well be read another time


class Skip(NamedTuple):
    """Why an image cannot be used, and whether that may pass."""

    why: str
    passing: bool


def load(entries: Sequence[Entry], form: Form, progress: Callable[[int], None] | None = None) -> Loaded:
    """Read entries into memory, in parallel; what cannot be read or has other channels is skipped with its reason.

    A volume is opened once for all of its slices.
    `progress` is called about a hundred times with the number of entries done.

    Raises:
        InputError: if the images would not fit into memory.
    """

    def several(entries: Sequence[Entry]) -> list[Case | Skip]:
        return cases_of(entries, form)

    refuse_too_many(entries, form)
    parts = by_volume(entries)
    loaded, done, told = Loaded([], {}), 0, 0
    with ThreadPoolExecutor(VOLUMES_AT_ONCE if len(parts) < len(entries) else None) as pool:
        for part, cases in zip(parts, pool.map(several, parts), strict=True):
            loaded.cases += [case for case in cases if isinstance(case, Case)]
            skips = {e.name: case for e, case in zip(part, cases, strict=True) if isinstance(case, Skip)}
            loaded.skipped |= {name: skip.why for name, skip in skips.items()}
            loaded.passing |= {name for name, skip in skips.items() if skip.passing}
            done += len(part)
            if progress and (done - told >= max(1, len(entries) // 100) or done == len(entries)):
                told = done
                progress(done)
    return loaded


def by_volume(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Return the slices of each volume together, and every other entry on its own."""
    parts: dict[object, list[Entry]] = {}
    for i, entry in enumerate(entries):
        parts.setdefault(i if entry.slice is None else entry.files, []).append(entry)
    return list(parts.values())


def cases_of(entries: Sequence[Entry], form: Form) -> list[Case | Skip]:
    """Read one image, or slices of one volume, as cases; of what cannot be used the reason why."""

    def one(entry: Entry, source: Volume | None) -> Case | Skip:
        try:
            return case_of(entry, form, source)
        except InputError as error:
            return Skip(str(error), may_pass(error))

    try:
        source = None if entries[0].slice is None else volume_of(entries[0], form.fill)
    except InputError as error:
        return [Skip(str(error), may_pass(error))] * len(entries)
    return [one(entry, source) for entry in entries]


def may_pass(error: BaseException) -> bool:
    """Tell whether the system failed at reading a file, as a disk that stumbles does, and not what is in the file."""
    cause = error.__cause__ or error.__context__
    system = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
    return system or (cause is not None and may_pass(cause))  # pillow and gzip raise OSErrors of no number


def refuse_too_many(entries: Sequence[Entry], form: Form) -> None:
    """Refuse images that need more memory than there is, before the first one is read."""
    channels, (height, width) = len(form.channels), form.size
    planes = len(entries) * channels + sum(entry.mask is not None for entry in entries)
    need, free = planes * height * width * 4, available_memory()
    if free is not None and need > MEMORY_SHARE * free:
        raise InputError(
            f"--data: {len(entries)} images of {channels} x {height} x {width} pixels need {need / 2**30:.1f} GiB "
            f"of memory, and {free / 2**30:.1f} GiB are free; give fewer images, or a preset of smaller ones."
        )


def available_memory() -> int | None:
    """Return the bytes of memory that can be had without swapping, or None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def image_of(entry: Entry, source: Volume | None = None, fill: float | None = None) -> Image:
    """Read the image of an entry; of a slice, out of its volume if that is open already.

    fill: what stands for pixels that are NaN or infinite; None: they are refused.
    """
    if entry.slice is not None:
        return (source or volume_of(entry, fill)).slice(entry.slice)
    return not_constant(picture_of(entry, fill))


def picture_of(entry: Entry, fill: float | None = None) -> Image:
    """Read the image of an entry that is no slice of a volume, its files joined; a constant one too."""
    if len(entry.files) == 1:
        return decoded(entry.files[0], fill)
    files = files_by_channel(entry)
    return joined(tuple(files), [decoded(file, fill) for file in files.values()])


def volume_of(entry: Entry, fill: float | None = None) -> Volume:
    """Open the volume that a slice is part of, its files joined."""
    if len(entry.files) == 1:
        return volume.open_volume(entry.files[0], fill)
    files = files_by_channel(entry)
    return volume.joined(tuple(files), [volume.open_volume(file, fill) for file in files.values()])


def files_by_channel(entry: Entry) -> dict[str, Path]:
    """Return the files of an entry by channel: as it names them, else by the sequences that their names tell.

    MR sequences come in their own order, whatever the folder's: images to translate are read in it too.

    Raises:
        InputError: if the files do not have a name each, of their own.
    """
    if not entry.channels:
        return by_sequence(entry.files)
    named = dict(zip(entry.channels, entry.files, strict=False))
    if not len(named) == len(entry.channels) == len(entry.files):
        names = ", ".join(entry.channels)
        raise InputError(f"{entry.name}: {len(entry.files)} files, named {names}; give each a name of its own.")
    known = {name: named[name] for name in SEQUENCES if name in named}
    return known if len(known) == len(named) else named


def case_of(entry: Entry, form: Form, source: Volume | None = None) -> Case:
    """Read one entry as a case; `source` is the volume of a slice.

    Raises:
        InputError: if it cannot be read, knife made it, its channels are not those wanted, or a slice shows too little.
    """
    if entry.slice is not None:
        source = source or volume_of(entry, form.fill)
    image = replace(image_of(entry, source, form.fill), crop=form.crop)
    if image.source.synthetic and not form.synthetic:
        raise InputError(f"{entry.name}: {MADE_HERE}; leave it out, or give --allow-synthetic.")
    check_channels(entry.name, named(entry, image.channels), form.channels)
    if source is not None:
        refuse_bare(entry, image, form.min_brain)
    mask = gridded_mask(entry, image, source, form) if entry.mask else None
    return Case(entry.name, image.normalised(form.size, form.value_range), mask, entry.values)


def gridded_mask(entry: Entry, image: Image, source: Volume | None, form: Form) -> Tensor:
    """Read the mask of an entry on the model's grid, [1, H, W] of 0 and 1.

    Raises:
        InputError: if it cannot be read, or something is outlined, but so little that nothing is left on the grid: the
            image is not healthy, and must not be learnt as such.
    """
    assert entry.mask is not None
    mask = mask_of(entry.mask, image, entry, source, form.labels)
    gridded = image.on_grid(mask, form.size).round()
    if mask.any() and not gridded.any():
        grid = " x ".join(map(str, form.size))
        raise InputError(
            f"{entry.name}: what its mask outlines ({int((mask > 0).sum())} pixels) vanishes on the model's grid of "
            f"{grid}; it is left out, as it is no healthy image. Use a larger --preset to keep it."
        )
    return gridded


def mask_of(path: Path, image: Image, entry: Entry, source: Volume | None, labels: Collection[int] = ()) -> Tensor:
    """Read the mask [1, H, W] of an image, or of a slice of a volume."""
    if source is None or entry.slice is None:
        return read_mask(path, image, labels)
    return source.mask(path, entry.slice, labels)


def refuse_bare(entry: Entry, image: Image, min_brain: float) -> None:
    """Refuse a slice whose brain, all that is not background, covers too little of the image; an empty one always."""
    share = 1 - float(image.background.float().mean())
    if share < min_brain:
        raise InputError(f"{entry.name}: brain covers {share:.3g} of the image, less than --min-brain {min_brain:g}.")
    if bool((image.pixels == image.pixels[:, :1, :1]).all()):
        raise InputError(f"{entry.name}: every pixel is the same; such a slice shows nothing.")


def named(entry: Entry, found: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the channels found in an entry's files: of a single file, those the folder gives count.

    Raises:
        InputError: if the folder names another number of them.
    """
    if len(entry.files) > 1 or not entry.channels:
        return found
    if len(entry.channels) != len(found):
        raise InputError(
            f"{entry.name}: {len(entry.channels)} channels are named ({', '.join(entry.channels)}), "
            f"the image has {len(found)}; correct the manifest."
        )
    return entry.channels


def check_channels(name: str, found: Sequence[str], usual: Sequence[str]) -> None:
    """Raise InputError if an image's channels are not those of the others; a number for a name fits every name."""
    if len(found) != len(usual):
        raise InputError(f"{name}: {len(found)} channels, the others have {len(usual)} ({', '.join(usual)}).")
    if any(a != b for a, b in zip(found, usual, strict=True) if not (a.isdecimal() or b.isdecimal())):
        raise InputError(f"{name}: its channels are {', '.join(found)}, the others have {', '.join(usual)}.")


def channels_of(entries: Iterable[Entry], fill: float | None = None) -> tuple[str, ...]:
    """Return the channel names that most of a sample of the entries have: what the others are compared with.

    fill: as of `image_of`.

    Raises:
        InputError: if none of the sample can be read.
    """
    entries = [part[0] for part in by_volume(entries)]
    reason, names = "there is none", Counter[tuple[str, ...]]()
    for entry in entries[:: len(entries) // SAMPLE + 1]:
        try:
            names[told_channels(entry) or named(entry, image_of(entry, fill=fill).channels)] += 1
        except InputError as error:
            reason = str(error)
    if not names:
        raise InputError(f"--data: no image could be read; the last reason was: {reason}")
    return names.most_common(1)[0][0]


def told_channels(entry: Entry) -> tuple[str, ...]:
    """Return the channel names that the folder gives a slice; () where the file must be asked."""
    if entry.slice is None or not entry.channels:
        return ()
    return tuple(files_by_channel(entry)) if len(entry.files) > 1 else entry.channels


def fingerprint(entries: Sequence[Entry]) -> str:
    """Return a short hash over names, values and file sizes: it tells one data set from another."""
    size = {file: file_size(file) for file in files_of(entries)}
    lines = [
        f"{e.name}|{sorted(e.values.items())}|{[size[f] for f in e.files]}|{e.mask and size[e.mask]}" for e in entries
    ]
    return short_hash(*lines)


def inventory(entries: Sequence[Entry]) -> dict[str, str]:
    """Return short hashes, name -> values and file contents of every entry, to tell later what has changed."""
    files = files_of(entries)
    with ThreadPoolExecutor() as pool:
        told = dict(zip(files, pool.map(content, files), strict=True))
    return {
        short_hash(e.name): short_hash(str(sorted(e.values.items())), *(told[file] for file in files_of([in_order(e)])))
        for e in entries
    }


def in_order(entry: Entry) -> Entry:
    """Return an entry whose files come as its channels do: two that changed places hold another image."""
    try:
        return replace(entry, files=tuple(files_by_channel(entry).values())) if len(entry.files) > 1 else entry
    except InputError:  # said when it is read
        return entry


def files_of(entries: Iterable[Entry]) -> list[Path]:
    """Return the files of entries, masks included, each once."""
    return list(dict.fromkeys(f for e in entries for f in (*e.files, *([e.mask] if e.mask else []))))


def short_hash(*lines: str) -> str:
    """Return sixteen characters that stand for some text."""
    return hashlib.sha256(encoded("\n".join(lines))).hexdigest()[:16]


def content(path: Path) -> str:
    """Return the hash of a file's bytes, or nothing for what is no file (opening a FIFO would wait for ever)."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    except OSError:
        return ""


def file_size(path: Path) -> int | None:
    """Return a file's size in bytes, or None if it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def stack(cases: Sequence[Case]) -> Tensor:
    """Return the pixels of cases as one tensor [N, C, H, W]."""
    return torch.stack([case.pixels for case in cases])
