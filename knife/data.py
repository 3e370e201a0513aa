"""What a data folder means: which images, masks, values and patients it holds, and how they split.

A layout is a plain function from a folder to its entries, or None if the folder is not laid out that way; `LAYOUTS` is the table.
"""

import csv
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from knife.errors import InputError
from knife.image import SEQUENCES, Image, is_image, read, read_mask, sequence_of


@dataclass(frozen=True)
class Entry:
    """One image of a data folder, before it is read."""

    name: str
    files: tuple[Path, ...]  # one file, or one for each channel
    mask: Path | None = None
    values: Mapping[str, str] = field(default_factory=dict)  # what the folder says of it: age, class, size
    group: str = ""  # patient; images of one group never fall into different splits
    split: str = ""  # train, val or test where the folder says so
    channels: tuple[str, ...] = ()  # names of the channels where the folder says so


@dataclass(frozen=True)
class Case:
    """One image as a task sees it: on the model's grid, in the model's value range."""

    name: str
    pixels: Tensor  # [C, H, W]
    mask: Tensor | None  # [1, H, W], 0 or 1
    values: Mapping[str, str]


@dataclass(frozen=True)
class Folder:
    """A data folder as it was recognised."""

    root: Path
    layout: str
    entries: list[Entry]

    def split(self, name: str) -> list[Entry]:
        """Return the entries of one split: train, val or test."""
        return [e for e in self.entries if (e.split or split_of(e.group or e.name)) == name]


def split_of(group: str) -> str:
    """Assign a patient (or an image without one) to train, val or test, 90 : 5 : 5, by its name alone."""
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.9 else "val" if share < 0.95 else "test"


def open_folder(root: Path) -> Folder:
    """Recognise a data folder's layout and list its entries, sorted by name.

    Raises:
        InputError: if the folder is missing or holds no images.
    """
    if not root.is_dir():
        raise InputError(f"--data {root}: no such folder; give a folder of images.")
    for layout, entries_of in LAYOUTS.items():
        entries = entries_of(root)
        if entries:
            return Folder(root, layout, sorted(entries, key=lambda e: e.name))
    raise InputError(f"--data {root}: no images in there; knife reads NIfTI, PNG, JPEG and TIFF files.")


RESERVED = ("image", "mask", "group", "split", "channels")


def manifest(root: Path) -> list[Entry] | None:
    """Read manifest.csv: a column image, optionally mask, group, split, channels; the rest are values.

    Several files of one image, and several channel names, are separated by semicolons.
    """
    path = root / "manifest.csv"
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and "image" not in rows[0]:
        raise InputError(f"{path}: has no column named image (found: {', '.join(rows[0])}).")
    return [manifest_entry(root, path, row) for row in rows]


def manifest_entry(root: Path, path: Path, row: Mapping[str, str]) -> Entry:
    """Turn a row of the manifest into an entry whose files lie inside the folder."""
    values = {k: v for k, v in row.items() if k not in RESERVED and v}
    files = tuple(inside(root, path, name) for name in row["image"].split(";"))
    mask = inside(root, path, row["mask"]) if row.get("mask") else None
    names = tuple(row["channels"].split(";")) if row.get("channels") else ()
    return Entry(row["image"], files, mask, values, row.get("group") or "", row.get("split") or "", names)


def inside(root: Path, manifest: Path, name: str) -> Path:
    """Resolve a file named in a manifest, refusing what lies outside its folder."""
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{manifest}: {name!r} lies outside the folder; give paths below it.")
    return path


def sequences(root: Path) -> list[Entry] | None:
    """BraTS-like folders: one folder a case, one file for each of t1, t1ce, t2, flair, and seg; 2-D slices."""
    cases: dict[tuple[Path, str], dict[str, Path]] = {}
    patients: dict[tuple[Path, str], str] = {}
    for path in walk(root):
        if found := sequence_of(path):
            patient, rest = re.split(rf"[_-]?{found.token}(?=[_.-])", path.name, maxsplit=1)
            case = (path.parent, patient + rest)
            cases.setdefault(case, {})[found.name] = path
            patients[case] = patient or path.parent.name
    entries = []
    for (folder, name), files in cases.items():
        if set(SEQUENCES) <= set(files):
            images = tuple(files[sequence] for sequence in SEQUENCES)
            entries.append(Entry(str((folder / name).relative_to(root)), images, files.get("seg"), group=patients[folder, name]))
    return entries or None


UTKFACE = re.compile(r"(?P<age>\d{1,3})_(?P<gender>[01])_(?P<race>[0-4])_\d+")


def utkface(root: Path) -> list[Entry] | None:
    """UTKFace: age_gender_race_stamp.jpg."""
    entries = [
        Entry(str(path.relative_to(root)), (path,), values=match.groupdict())
        for path in walk(root)
        if (match := UTKFACE.match(path.name))
    ]
    return entries or None


def masked(root: Path) -> list[Entry] | None:
    """Pairs x.png and x_mask.png, in one folder a patient where there are folders; or images/ beside masks/."""
    paths = {path: stem(path) for path in walk(root)}
    masks = {path.with_name(name.removesuffix("_mask")): path for path, name in paths.items() if name.endswith("_mask")}
    if (root / "images").is_dir() and (root / "masks").is_dir():
        by_stem = {stem(p).removesuffix("_mask"): p for p in paths if p.parent == root / "masks"}
        pairs = [(p, by_stem.get(stem(p))) for p in paths if p.parent == root / "images"]
    elif masks:
        pairs = [(p, masks.get(p.with_name(name))) for p, name in paths.items() if not name.endswith("_mask")]
    else:
        return None
    return [
        Entry(str(p.relative_to(root)), (p,), mask, group=p.parent.name if p.parent not in (root, root / "images") else "")
        for p, mask in pairs
    ]


def folders(root: Path) -> list[Entry] | None:
    """One folder a class, ImageFolder's way; folders that are all named by numbers are ages."""
    names = sorted({path.parent for path in walk(root) if path.parent != root})
    if not names or any(folder.parent != root for folder in names):
        return None
    attribute = "age" if all(folder.name.isdigit() for folder in names) else "class"
    return [
        Entry(str(path.relative_to(root)), (path,), values={attribute: path.parent.name})
        for path in walk(root)
        if path.parent != root
    ]


def flat(root: Path) -> list[Entry] | None:
    """Nothing but images: enough for a diffusion model."""
    return [Entry(str(path.relative_to(root)), (path,)) for path in walk(root)]


LAYOUTS: dict[str, Callable[[Path], list[Entry] | None]] = {
    "manifest": manifest,
    "sequences": sequences,
    "utkface": utkface,
    "masked": masked,
    "folders": folders,
    "flat": flat,
}


def walk(root: Path) -> list[Path]:
    """Return every image file below a folder, sorted."""
    return sorted(path for path in root.rglob("*") if is_image(path))


def stem(path: Path) -> str:
    """Return a file's name without .nii.gz, .png and the like."""
    return path.name.split(".")[0]


@dataclass
class Loaded:
    """Images in memory on the model's grid, and what could not be read."""

    cases: list[Case]
    skipped: dict[str, str]  # name -> why


def load(
    entries: Sequence[Entry], size: tuple[int, int], value_range: tuple[float, float], channels: tuple[str, ...]
) -> Loaded:
    """Read entries into memory, in parallel; what cannot be read or has other channels is skipped with its reason."""

    def one(entry: Entry) -> Case | str:
        try:
            return case_of(entry, size, value_range, channels)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        results = list(zip(entries, pool.map(one, entries), strict=True))
    return Loaded(
        [case for _, case in results if isinstance(case, Case)],
        {entry.name: why for entry, why in results if isinstance(why, str)},
    )


def image_of(entry: Entry) -> Image:
    """Read the image of an entry."""
    return read(entry.files if len(entry.files) > 1 else entry.files[0])


def case_of(entry: Entry, size: tuple[int, int], value_range: tuple[float, float], channels: tuple[str, ...]) -> Case:
    """Read one entry as a case."""
    image = image_of(entry)
    if len(image.channels) != len(channels):
        raise InputError(f"{entry.name}: {len(image.channels)} channels, the others have {len(channels)}.")
    mask = image.on_grid(read_mask(entry.mask, image), size).round() if entry.mask else None
    return Case(entry.name, image.normalised(size, value_range), mask, entry.values)


def channels_of(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Return the channel names of the first entry that can be read: what the others are compared with.

    Raises:
        InputError: if none of the first hundred can be read.
    """
    reason = "it is empty"
    for entry in islice(entries, 100):
        try:
            return entry.channels or image_of(entry).channels
        except InputError as error:
            reason = str(error)
    raise InputError(f"--data: no image could be read; the last reason was: {reason}")


def fingerprint(entries: Sequence[Entry]) -> str:
    """Return a short hash over names, values and file sizes: has the data set changed since?"""
    lines = [
        f"{e.name}|{sorted(e.values.items())}|{[f.stat().st_size for f in e.files]}|{e.mask and e.mask.stat().st_size}"
        for e in entries
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def stack(cases: Sequence[Case]) -> Tensor:
    """Return the pixels of cases as one tensor [N, C, H, W]."""
    return torch.stack([case.pixels for case in cases])
