"""Decoded images kept on disk: a training never waits for decoding, and need not hold its images in memory.

A prepared set is a folder named by a hash of everything that its pixels depend on: what lies in the files, the model's
size, range and channels. It holds pixels and masks as plain float32, mapped into memory when they are used, and an
index with their hashes, which are checked first. It is built beside its place and moved there whole, so that a killed
or a second writer does no harm: whoever comes first is kept.
"""

import hashlib
import json
import math
import mmap
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from knife.data import Case, Form, Loaded
from knife.errors import DiskError, InputError
from knife.files import room, write_safely
from knife.layouts import Entry

FORMAT = 1  # to be raised when knife decodes anything differently
FILES = ("pixels.f32", "masks.f32")
AT_ONCE = 256  # images that are decoded before they are written
STALE = 24 * 3600  # seconds after which a set that is still being built has no builder
HEADROOM = 1.05  # free disk that is asked for, against what the images take
NORESERVE = 0x4000 if sys.platform == "linux" else 0  # of mmap(2), which Python knows by name from 3.13 on
PRIVATELY: dict[str, int] = (  # how a file is mapped so that what is written stays in memory
    {"flags": mmap.MAP_PRIVATE | NORESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
    if sys.platform != "win32"
    else {"access": mmap.ACCESS_COPY}
)

Load = Callable[[Sequence[Entry]], Loaded]


def key(inventory: Mapping[str, str], form: Form) -> str:
    """Return the name of the prepared set of some files (name -> hash of their content) brought to a form."""
    told = json.dumps([FORMAT, sorted(inventory.items()), form._asdict()], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:24]


def prepared(folder: Path, entries: Sequence[Entry], form: Form, load: Load, progress: Callable[[int], None]) -> Loaded:
    """Return the images of some entries, decoded once and for all into `folder`.

    Args:
        folder: where the set lies, or will lie; its last part is its `key`.
        entries: what to decode if it is not there yet.
        form: what every image is brought to.
        load: decodes some entries; what it skips is remembered with its reason, and tried again if that may pass.
        progress: called with the number of entries done.

    Returns:
        The cases, whose pixels and masks are mapped from the disk: reading one reads it from there.

    Raises:
        DiskError: if the disk has too little room, or refuses.
        InputError: if what lies there is damaged.
    """
    if outdated(folder, entries, load):
        shutil.rmtree(folder)  # who has it mapped keeps it
    if not (folder / "index.json").exists():
        building = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
        remove_stale(folder)
        try:
            refuse_full_disk(folder, len(entries) * (len(form.channels) + 1) * form.size[0] * form.size[1] * 4)
            building.mkdir(parents=True)
            build(building, entries, form, load, progress)
            publish(building, folder)
        except OSError as error:
            raise DiskError(f"{folder}: cannot be written to ({error.strerror}); make room, or allow it.") from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
    progress(len(entries))
    return mapped(folder, form)


def outdated(folder: Path, entries: Sequence[Entry], load: Load) -> bool:
    """Tell whether images that the system failed to read when a set was built can be read, or judged, now."""
    try:
        failed = json.loads((folder / "index.json").read_text(encoding="utf-8")).get("passing", [])
    except (OSError, ValueError, AttributeError):
        return False  # there is none, or it is damaged, which `mapped` says
    again = [entry for entry in entries if entry.name in failed]
    return bool(again) and len(load(again).passing) < len(again)


def build(folder: Path, entries: Sequence[Entry], form: Form, load: Load, progress: Callable[[int], None]) -> None:
    """Decode entries part by part into the files of a new set."""
    told: list[dict[str, Any]] = []
    skipped, passing = dict[str, str](), set[str]()
    hashed = hashlib.sha256(), hashlib.sha256()
    with (folder / FILES[0]).open("xb") as pixels, (folder / FILES[1]).open("xb") as masks:
        for first in range(0, len(entries), AT_ONCE):
            part = load(entries[first : first + AT_ONCE])
            skipped |= part.skipped
            passing |= part.passing
            for case in part.cases:
                put(case.pixels, pixels, hashed[0])
                outlined = None if case.mask is None else masks.tell() // (4 * case.mask.numel())
                if case.mask is not None:
                    put(case.mask, masks, hashed[1])
                told.append({"name": case.name, "mask": outlined, "values": dict(case.values)})
            progress(min(first + AT_ONCE, len(entries)))
        for file in (pixels, masks):
            file.flush()
            os.fsync(file.fileno())
    hashes = dict(zip(FILES, (one.hexdigest() for one in hashed), strict=True))
    index = {"cases": told, "skipped": skipped, "passing": sorted(passing), "sha256": hashes}
    write_safely(folder / "index.json", json.dumps(index).encode())


def put(image: Tensor, file: BinaryIO, hashed: "hashlib._Hash") -> None:
    """Write an image, and count it into the hash of its file."""
    data = image.numpy().tobytes()
    file.write(data)
    hashed.update(data)


def refuse_changed(path: Path, wanted: str) -> None:
    """Raise ValueError if a file is not as it was written."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
            raise ValueError(f"{path} has changed")


def remove_stale(folder: Path) -> None:
    """Remove what writers of this set left behind that were killed long ago."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        if time.time() - left.stat().st_mtime > STALE:
            shutil.rmtree(left, ignore_errors=True)


def publish(building: Path, folder: Path) -> None:
    """Move a finished set to its place, unless another writer was quicker."""
    try:
        building.rename(folder)
    except OSError:
        if not (folder / "index.json").exists():
            raise


def mapped(folder: Path, form: Form) -> Loaded:
    """Map a prepared set into memory.

    Raises:
        InputError: if it is damaged.
    """
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        told, skipped = index["cases"], dict(index["skipped"])
        for name, wanted in index["sha256"].items():
            refuse_changed(folder / name, wanted)
        pixels = tensor(folder / FILES[0], [len(told), len(form.channels), *form.size])
        masks = tensor(folder / FILES[1], [sum(one["mask"] is not None for one in told), 1, *form.size])
        cases = [
            Case(one["name"], x, None if one["mask"] is None else masks[one["mask"]], one["values"])
            for one, x in zip(told, pixels, strict=True)
        ]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder}: this prepared data set is damaged; remove the folder, it is made anew.") from error
    return Loaded(cases, skipped, {*index.get("passing", [])})


def tensor(file: Path, shape: list[int]) -> Tensor:
    """Map a file into memory as a float32 tensor; what is written to the tensor never reaches the file.

    No swap is reserved for such writing: Linux would refuse to map what is larger than memory and swap together.
    """
    count = math.prod(shape)
    if file.stat().st_size != count * 4:
        raise ValueError(f"{file} is of another size")
    if not count:
        return torch.empty(shape)
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, **PRIVATELY)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


def refuse_full_disk(folder: Path, need: int) -> None:
    """Refuse to begin what the disk has no room for."""
    free = room(folder)
    if free < need * HEADROOM:
        found = f"{free / 2**30:.1f} GiB are free, and the decoded images need {need / 2**30:.1f}"
        raise DiskError(f"{folder.parent}: {found}; make room.")
