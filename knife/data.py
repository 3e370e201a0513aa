"""What a data folder means: which images, masks, values and patients it holds, and how they split.

A layout is a plain function from a folder and its image files to what it finds, or None if the folder is not laid out
that way; `LAYOUTS` is the table, and the first that finds something counts. To add one: a function, its row in the
table, and a test that makes such a folder.
"""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from knife.errors import InputError
from knife.image import NIFTI, SEQUENCES, SUFFIXES, Image, is_image, read, read_mask, sequence_of

SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
MEMORY_SHARE = 0.8  # of the free memory that images may take
SAMPLE = 25  # images that are looked at to learn which channels a folder has


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
    why: str = ""  # one clause: what the layout was recognised by
    skipped: Mapping[str, str] = field(default_factory=dict)  # images that have no place in the layout -> why

    def split(self, name: str) -> list[Entry]:
        """Return the entries of one split: train, val or test.

        Where the folder does not say, the patient's name decides; if that leaves none to train on, all are trained on.
        """
        places = [e.split or split_of(e.group or e.name) for e in self.entries]
        if "train" not in places:
            places = [e.split or "train" for e in self.entries]
        return [e for e, place in zip(self.entries, places, strict=True) if place == name]


@dataclass(frozen=True)
class Found:
    """What a layout makes of a folder; the fields mean the same as those of `Folder`."""

    entries: list[Entry]
    why: str
    skipped: Mapping[str, str] = field(default_factory=dict)


def split_of(group: str) -> str:
    """Assign a patient (or an image without one) to train, val or test, 90 : 5 : 5, by its name alone."""
    share = int.from_bytes(hashlib.sha256(encoded(group)).digest()[:4], "big") / 2**32
    return "train" if share < 0.9 else "val" if share < 0.95 else "test"


def open_folder(root: Path) -> Folder:
    """Recognise a data folder's layout and list its entries, sorted by name.

    A folder of train/ and test/ (or val/) folders is recognised by what lies in each of them.

    Raises:
        InputError: if the folder is missing, cannot be listed or holds no images, or if its manifest is not right.
    """
    if not os.path.isdir(root):
        raise InputError(f"--data {root}: no such folder; give a folder of images.")
    parts = [] if (root / MANIFEST).exists() else split_folders(root)
    folder = joined(root, parts) if parts else recognised(root)
    return replace(folder, entries=sorted(folder.entries, key=lambda e: e.name))


def recognised(root: Path) -> Folder:
    """Return what the first layout that fits makes of a folder."""
    paths = walk(root)
    for layout, find in LAYOUTS.items():
        found = find(root, paths)
        if found and found.entries:
            return Folder(root, layout, found.entries, found.why, found.skipped)
    raise InputError(f"--data {root}: no images in there; knife reads NIfTI, PNG, JPEG and TIFF files.")


def split_folders(root: Path) -> list[Path]:
    """Return the folders train/, val/, test/ or the like, if there are two of them and no image lies elsewhere."""
    parts = [root / name for name in sorted({path.relative_to(root).parts[0] for path in walk(root)})]
    splits = {SPLITS.get(part.name.lower()) for part in parts}
    return parts if len(splits) >= 2 and None not in splits else []


def joined(root: Path, parts: Sequence[Path]) -> Folder:
    """Recognise each split's folder on its own, and join them; the first one that is trained on names the layout."""
    folders = {part: recognised(part) for part in parts}
    entries: list[Entry] = []
    skipped: dict[str, str] = {}
    for part, folder in folders.items():
        told = SPLITS[part.name.lower()]
        entries += [replace(e, name=f"{part.name}/{e.name}", split=told) for e in folder.entries]
        skipped |= {f"{part.name}/{name}": why for name, why in folder.skipped.items()}
    first = next((f for p, f in folders.items() if SPLITS[p.name.lower()] == "train"), folders[parts[0]])
    names = ", ".join(f"{part.name}/" for part in parts)
    return Folder(root, first.layout, entries, f"{first.why}, in {names}", skipped)


# ------------------------------------------------------------------------------------------------------------- manifest

MANIFEST = "manifest.csv"
RESERVED = ("image", "mask", "group", "split", "channels")


def manifest(root: Path, paths: Sequence[Path]) -> Found | None:
    """Read manifest.csv: a column image, optionally mask, group, split, channels; the rest are values.

    Several files of one image, and several channel names, are separated by semicolons.
    """
    path = root / MANIFEST
    if not path.exists():
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table ({error}); save it as CSV in UTF-8.") from error
    if not rows:
        raise InputError(f"{path}: has no rows; give a line for every image, under a head with a column image.")
    head = list(rows[0][1])
    if "image" not in head:
        raise InputError(f"{path}: has no column named image (found: {', '.join(map(str, head))}).")
    entries = [manifest_entry(path, line, row) for line, row in rows]
    refuse_missing(path, entries)
    values = ", ".join(sorted({value for entry in entries for value in entry.values})) or "no values"
    return Found(entries, f"{MANIFEST} with {values}")


def manifest_entry(path: Path, line: int, row: Mapping[str, str | None]) -> Entry:
    """Turn a row of the manifest into an entry whose files lie inside the folder."""
    if not row["image"] or None in row:
        raise InputError(f"{path}: line {line} names no image, or has more columns than the head; correct it.")
    values = {k: v for k, v in row.items() if k not in RESERVED and v}
    files = tuple(inside(path, name) for name in row["image"].split(";"))
    mask, names, split = row.get("mask"), row.get("channels"), row.get("split") or ""
    if split and split.lower() not in SPLITS:
        raise InputError(f"{path}: line {line} has the split {split!r}; give train, val or test, or leave it empty.")
    return Entry(
        name=row["image"],
        files=files,
        mask=inside(path, mask) if mask else None,
        values=values,
        group=row.get("group") or "",
        split=SPLITS[split.lower()] if split else "",
        channels=tuple(names.split(";")) if names else (),
    )


def inside(manifest: Path, name: str) -> Path:
    """Resolve a file named in a manifest, refusing what lies outside its folder."""
    root = manifest.parent
    if "\0" in name or not (root / name).resolve().is_relative_to(root.resolve()):
        raise InputError(f"{manifest}: {name!r} lies outside the folder; give paths below it.")
    return root / name


def refuse_missing(manifest: Path, entries: Sequence[Entry]) -> None:
    """Refuse a manifest that names files which are not there."""
    files = [file for e in entries for file in (*e.files, *([e.mask] if e.mask else []))]
    missing = [str(file.relative_to(manifest.parent)) for file in files if not file.is_file()]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(f"{manifest}: {len(missing)} of {len(files)} files are not there ({some}); correct the paths.")


# -------------------------------------------------------------------------------------------------------------- layouts


def sequences(root: Path, paths: Sequence[Path]) -> Found | None:
    """BraTS-like: the files t1, t1ce, t2, flair (or those that most cases have) and seg of otherwise one name."""
    cases: dict[Place, dict[str, Path]] = {}
    skipped = {}
    for path in paths:
        if (told := sequence_of(path)) and path.name.lower().endswith(NIFTI):
            cases.setdefault((path.parent, *around(stem(path), told.token)), {})[told.name] = path
        else:
            name = str(path.relative_to(root))
            skipped[name] = f"{name}: its name tells no sequence"
    wanted = usual(cases.values())
    if not wanted or len(skipped) > len(paths) / 2:
        return None
    entries, patients = [], patients_of(root, list(cases))
    for (folder, before, after), files in cases.items():
        name = str((folder / f"{before}{after}").relative_to(root))
        if lacking := [s for s in wanted if s not in files]:
            skipped[name] = f"{name}: lacks {', '.join(lacking)}"
        else:
            group = patients[folder, before, after]
            entries.append(Entry(name, tuple(files[s] for s in wanted), files.get("seg"), group=group))
    return Found(entries, f"files named {', '.join(wanted)}; {len({e.group for e in entries})} patients", skipped)


Place = tuple[Path, str, str]  # folder, file name before the sequence, and after it


def usual(cases: Collection[Mapping[str, Path]]) -> tuple[str, ...]:
    """Return the sequences that most cases have, in canonical order; a lone one counts only beside masks."""
    sets = Counter(tuple(s for s in SEQUENCES if s in files) for files in cases)
    wanted = max(sets, key=lambda s: (sets[s] if s else 0, len(s)), default=())
    return wanted if len(wanted) > 1 or any("seg" in files for files in cases) else ()


def patients_of(root: Path, places: Sequence[Place]) -> dict[Place, str]:
    """Return whose each case is: the name before the sequence tells, or the folder where every name differs there."""
    folders, names = {folder for folder, _, _ in places}, {before for _, before, _ in places}
    by_folder = len(names) == len(places) and 1 < len(folders) < len(places)
    told = {p: "" if by_folder else p[1].strip(" ._-") for p in places}
    return {p: name or str(p[0].relative_to(root)) for p, name in told.items()}


def around(name: str, word: str) -> tuple[str, str]:
    """Split a name at the last place where a word stands on its own: x_001_t1_080 at t1 -> x_001, _080."""
    places = list(re.finditer(rf"(?:^|[^A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", name))
    return name[: places[-1].start()], name[places[-1].end() :]


UTKFACE = re.compile(r"(?P<age>\d{1,3})_(?P<gender>[01])_(?P<race>[0-4])_\d+")


def utkface(root: Path, paths: Sequence[Path]) -> Found | None:
    """UTKFace: age_gender_race_stamp.jpg; the gender, as a word, is the first class, and the age the first number."""
    entries, skipped = [], {}
    for path in paths:
        name = str(path.relative_to(root))
        if told := UTKFACE.match(path.name):
            gender = ("male", "female")[int(told["gender"])]
            entries.append(Entry(name, (path,), values={"gender": gender, "age": told["age"], "race": told["race"]}))
        else:
            skipped[name] = f"{name}: its name is not age_gender_race_stamp"
    return Found(entries, "files named age_gender_race_stamp", skipped) if len(entries) > len(skipped) else None


MASK = re.compile(r"[_-](mask|segm?|labels?)$", re.IGNORECASE)


def masked(root: Path, paths: Sequence[Path]) -> Found | None:
    """Pairs x.png and x_mask.png, in one folder a patient where there are folders; or images/ beside masks/."""
    images, masks = root / "images", root / "masks"
    if images.is_dir() and masks.is_dir():
        found = [path for path in paths if path.is_relative_to(images)]
        theirs = [path for path in paths if path.is_relative_to(masks)]
        why = "images/ beside masks/"
    else:
        images = masks = root
        found = [path for path in paths if not MASK.search(stem(path))]
        theirs = [path for path in paths if MASK.search(stem(path))]
        why = "x_mask beside x"
    mask_of = {MASK.sub("", place(path, masks)): path for path in theirs}
    entries = [pair(root, images, path, mask_of.get(place(path, images))) for path in found]
    used = {file for entry in entries for file in (*entry.files, entry.mask)}
    if used.isdisjoint(theirs):
        return None
    patients = len({entry.group for entry in entries if entry.group})
    known = f"{patients} folders as patients" if patients else "no patients known"
    lone = [str(path.relative_to(root)) for path in paths if path not in used]
    return Found(entries, f"{why}; {known}", {name: f"{name}: belongs to no image" for name in lone})


def pair(root: Path, images: Path, path: Path, mask: Path | None) -> Entry:
    """Return the entry of an image and its mask; the folders between are the patient, except one that names a split."""
    between = path.parent.relative_to(images).parts
    split = SPLITS.get(between[0].lower(), "") if between and images != root else ""
    return Entry(
        str(path.relative_to(root)), (path,), mask, group="/".join(between[1:] if split else between), split=split
    )


def place(path: Path, folder: Path) -> str:
    """Return a file's path below a folder without its suffix."""
    return str(path.relative_to(folder).with_name(stem(path)))


def folders(root: Path, paths: Sequence[Path]) -> Found | None:
    """One folder a class, ImageFolder's way; folders that are all named by numbers are ages."""
    names = {path.parent.name for path in paths}
    if len(names) < 2 or any(path.parent.parent != root for path in paths):
        return None
    attribute = "age" if all(name.isdecimal() for name in names) else "class"
    entries = [Entry(str(p.relative_to(root)), (p,), values={attribute: p.parent.name}) for p in paths]
    return Found(entries, f"{len(names)} folders, each named by its images' {attribute}")


def flat(root: Path, paths: Sequence[Path]) -> Found | None:
    """Nothing but images: enough for a diffusion model."""
    return Found([Entry(str(path.relative_to(root)), (path,)) for path in paths], "images and nothing that labels them")


LAYOUTS: dict[str, Callable[[Path, Sequence[Path]], Found | None]] = {
    "manifest": manifest,
    "sequences": sequences,
    "utkface": utkface,
    "masked": masked,
    "folders": folders,
    "flat": flat,
}


def walk(root: Path) -> list[Path]:
    """Return every image file below a folder, sorted, without hidden ones; links are followed, never in a circle."""
    found: list[Path] = []
    seen = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse_folder, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [Path(folder, name) for name in files if is_image(name)]
    return sorted(found)


def refuse_folder(error: OSError) -> NoReturn:
    """Refuse a folder that cannot be listed: images that silently stay out would be worse."""
    raise InputError(
        f"--data {error.filename}: cannot be listed ({error.strerror}); allow it or move it away."
    ) from error


def stem(path: Path) -> str:
    """Return a file's name without .nii.gz, .png and the like."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


# -------------------------------------------------------------------------------------------------------------- loading


@dataclass
class Loaded:
    """Images in memory on the model's grid, and what could not be read."""

    cases: list[Case]
    skipped: dict[str, str]  # name -> why


def load(
    entries: Sequence[Entry],
    size: tuple[int, int],
    value_range: tuple[float, float],
    channels: tuple[str, ...],
    progress: Callable[[int], None] | None = None,
) -> Loaded:
    """Read entries into memory, in parallel; what cannot be read or has other channels is skipped with its reason.

    `progress` is called about a hundred times with the number of entries done.

    Raises:
        InputError: if the images would not fit into memory.
    """

    def one(entry: Entry) -> Case | str:
        try:
            return case_of(entry, size, value_range, channels)
        except InputError as error:
            return str(error)

    refuse_too_many(entries, size, len(channels))
    loaded = Loaded([], {})
    with ThreadPoolExecutor() as pool:
        for done, (entry, case) in enumerate(zip(entries, pool.map(one, entries), strict=True), start=1):
            if isinstance(case, str):
                loaded.skipped[entry.name] = case
            else:
                loaded.cases.append(case)
            if progress and (done % max(1, len(entries) // 100) == 0 or done == len(entries)):
                progress(done)
    return loaded


def refuse_too_many(entries: Sequence[Entry], size: tuple[int, int], channels: int) -> None:
    """Refuse images that need more memory than there is, before the first one is read."""
    planes = len(entries) * channels + sum(entry.mask is not None for entry in entries)
    need, free = planes * size[0] * size[1] * 4, available_memory()
    if free is not None and need > MEMORY_SHARE * free:
        raise InputError(
            f"--data: {len(entries)} images of {channels} x {size[0]} x {size[1]} pixels need {need / 2**30:.1f} GiB "
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


def image_of(entry: Entry) -> Image:
    """Read the image of an entry."""
    return read(entry.files if len(entry.files) > 1 else entry.files[0])


def case_of(entry: Entry, size: tuple[int, int], value_range: tuple[float, float], channels: tuple[str, ...]) -> Case:
    """Read one entry as a case.

    Raises:
        InputError: if it cannot be read, or its channels are not those wanted.
    """
    image = image_of(entry)
    names = named(entry, image)
    if len(names) != len(channels):
        raise InputError(
            f"{entry.name}: {len(names)} channels, the others have {len(channels)} ({', '.join(channels)})."
        )
    if any(a != b for a, b in zip(names, channels, strict=True) if not (a.isdecimal() or b.isdecimal())):
        raise InputError(f"{entry.name}: its channels are {', '.join(names)}, the others have {', '.join(channels)}.")
    mask = image.on_grid(read_mask(entry.mask, image), size).round() if entry.mask else None
    return Case(entry.name, image.normalised(size, value_range), mask, entry.values)


def named(entry: Entry, image: Image) -> tuple[str, ...]:
    """Return the names of an image's channels: those the folder gives, else those that its files tell."""
    if entry.channels and len(entry.channels) != len(image.channels):
        raise InputError(
            f"{entry.name}: {len(entry.channels)} channels are named ({', '.join(entry.channels)}), "
            f"the image has {len(image.channels)}; correct the manifest."
        )
    return entry.channels or image.channels


def channels_of(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Return the channel names that most of a sample of the entries have: what the others are compared with.

    Raises:
        InputError: if none of the sample can be read.
    """
    entries = list(entries)
    reason, names = "there is none", Counter[tuple[str, ...]]()
    for entry in entries[:: len(entries) // SAMPLE + 1]:
        try:
            names[named(entry, image_of(entry))] += 1
        except InputError as error:
            reason = str(error)
    if not names:
        raise InputError(f"--data: no image could be read; the last reason was: {reason}")
    return names.most_common(1)[0][0]


def fingerprint(entries: Sequence[Entry]) -> str:
    """Return a short hash over names, values and file sizes: it tells one data set from another."""
    lines = [
        f"{e.name}|{sorted(e.values.items())}|{[file_size(f) for f in e.files]}|{e.mask and file_size(e.mask)}"
        for e in entries
    ]
    return short_hash(*lines)


def inventory(entries: Sequence[Entry]) -> dict[str, str]:
    """Return short hashes, name -> values and file contents of every entry, to tell later what has changed."""

    def one(entry: Entry) -> tuple[str, str]:
        files = [*entry.files, *([entry.mask] if entry.mask else [])]
        return short_hash(entry.name), short_hash(str(sorted(entry.values.items())), *(content(file) for file in files))

    with ThreadPoolExecutor() as pool:
        return dict(pool.map(one, entries))


def short_hash(*lines: str) -> str:
    """Return sixteen characters that stand for some text."""
    return hashlib.sha256(encoded("\n".join(lines))).hexdigest()[:16]


def encoded(text: str) -> bytes:
    """Return a text as bytes, file names that are no proper text included."""
    return text.encode(errors="surrogateescape")


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
