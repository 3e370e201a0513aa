"""How data folders are laid out: which images, masks, values and patients a folder holds, and how they split.

A layout is a plain function from a folder and its image files to what it finds there, or to one clause that says why
the folder is not laid out that way. LAYOUTS is the table, in order of standing: a folder is taken for the layout of the
first line that claims it, and refused if two of one line do. To add one: a function, its place in the table, and a test
that makes such a folder.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from knife import volume
from knife.errors import InputError, SettingsError
from knife.files import regular, write_safely
from knife.image import NIFTI, SEQUENCES, SUFFIXES, is_image, sequence_of
from knife.patients import (
    BRATS2020,
    BRATS2021,
    BRATS2023,
    BRATS_SLICES,
    SPLITS,
    Place,
    patients_of,
    published_patient,
)

SPLIT_NAMES = ("train", "val", "test")
SPLIT_FILE = "split.json"
LONGEST_TEXT = 64 * 2**20  # bytes of a list that a folder holds: 400,000 images of a long line each
LONGEST_NAME = 80  # characters of a name from a list that a message quotes


@dataclass(frozen=True)
class Entry:
    """One image of a data folder, before it is read."""

    name: str
    files: tuple[Path, ...]  # one file, or one for each channel
    mask: Path | None = None
    values: Mapping[str, str] = field(default_factory=dict)  # what the folder says of it: age, class, size
    group: str = ""  # patient; images of one group never fall into different splits
    split: str = ""  # train, val or test where the folder says so
    channels: tuple[str, ...] = ()  # names of the channels, in the order of the files, where the folder says so
    slice: int | None = None  # of a volume: the index along its axial axis
    height: float | None = None  # of a slice: how far up its volume it lies, 0 to 1

    @property
    def key(self) -> str:
        """Return what splits go by: the patient, or the image where none is known."""
        return self.group or self.name


@dataclass(frozen=True)
class Found:
    """What a layout makes of a folder; the fields mean the same as those of `Folder`."""

    entries: list[Entry]
    why: str
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def claims(self) -> bool:
        """Tell whether more images have their place in the layout than have none."""
        return sum(len(entry.files) + (entry.mask is not None) for entry in self.entries) > len(self.skipped)


@dataclass(frozen=True)
class Folder:
    """A data folder as it was recognised."""

    root: Path
    layout: str
    entries: list[Entry]
    why: str = ""  # one clause: what the layout was recognised by
    skipped: Mapping[str, str] = field(default_factory=dict)  # images that have no place in the layout -> why
    split_sha256: str = ""  # of split.json, if there is one

    def split(self, name: str) -> list[Entry]:
        """Return the entries of one split: train, val or test.

        Where the folder does not say, what it says of the patient's other images decides, else the patient's name; if
        that leaves none to train on, all are trained on.
        """
        told = {entry.key: entry.split for entry in self.entries if entry.split}
        places = [e.split or told.get(e.key) or split_of(e.key) for e in self.entries]
        if "train" not in places:
            places = [e.split or told.get(e.key) or "train" for e in self.entries]
        return [e for e, place in zip(self.entries, places, strict=True) if place == name]


Layout = Callable[[Path, Sequence[Path]], Found | str]


def open_folder(root: Path, layout: str | None = None, slices: tuple[int, int] | None = None) -> Folder:
    """Recognise a data folder's layout and list its entries, sorted by name.

    A folder of train/ and test/ (or val/) folders is recognised by what lies in each of them. A volume stands for its
    axial slices, an entry each. What split.json says of the splits counts before what the folder says.

    Args:
        root: the folder.
        layout: the only layout to try, a name in LAYOUTS; None: whichever fits.
        slices: first and last + 1 of each volume's slices; None: all of them.

    Raises:
        InputError: if the folder is missing, cannot be listed, holds no images or nothing of `layout`, if two layouts
            of equal standing claim it, or if its manifest or split.json is not right.
        SettingsError: if there is no such layout, or no volume to take `slices` of.
    """
    folder = sliced(with_split(recognise(root, layout)), slices)
    return replace(folder, entries=sorted(folder.entries, key=lambda e: e.name))


# --------------------------------------------------------------------------------------------------------- recognition


def recognise(root: Path, layout: str | None = None) -> Folder:
    """Return what a folder holds, or what lies in its train/, val/ and test/ together; volumes are one entry each."""
    if layout and layout not in all_layouts():
        raise SettingsError(f"--layout {layout}: no such layout; give one of {', '.join(all_layouts())}.")
    if not os.path.isdir(root):
        raise InputError(f"--data {root}: no such folder; give a folder of images.")
    parts = [] if any((root / name).exists() for name in MANIFESTS) else split_folders(root)
    return joined(root, parts, layout) if parts else recognised(root, layout)


def recognised(root: Path, layout: str | None = None) -> Folder:
    """Return what the layout of highest standing that claims a folder makes of it, or the one layout asked for."""
    paths = walk(root)
    if layout:
        found = all_layouts()[layout](root, paths)
        if isinstance(found, str) or not found.entries:
            reason = found if isinstance(found, str) else next(iter(found.skipped.values()), "no images in there")
            raise InputError(f"--data {root}: not laid out as {layout} ({reason}); give another --layout, or none.")
        return Folder(root, layout, found.entries, found.why, found.skipped)
    for equals in LAYOUTS:
        if "flat" in equals and (refused := masks_unlearnt(root, paths)):
            raise InputError(f"--data {root}: {refused}. Or write a manifest.csv; --layout flat takes all for images.")
        tried = {name: find(root, paths) for name, find in equals.items()}
        claims = {name: found for name, found in tried.items() if isinstance(found, Found) and found.claims}
        if len(claims) > 1:
            either = " or ".join(f"{name} ({found.why})" for name, found in claims.items())
            wanted = " or ".join(f"--layout {name}" for name in claims)
            raise InputError(f"--data {root}: may be laid out as {either}; say which by {wanted}.")
        for name, found in claims.items():
            return Folder(root, name, found.entries, found.why, found.skipped)
    raise InputError(f"--data {root}: no images in there; knife reads NIfTI, PNG, JPEG and TIFF files.")


def split_folders(root: Path) -> list[Path]:
    """Return the folders train/, val/, test/ or the like, if there are two of them and no image lies elsewhere."""
    parts = [root / name for name in sorted({path.relative_to(root).parts[0] for path in walk(root)})]
    splits = {SPLITS.get(part.name.lower()) for part in parts}
    return parts if len(splits) >= 2 and None not in splits else []


def joined(root: Path, parts: Sequence[Path], layout: str | None = None) -> Folder:
    """Recognise each split's folder on its own, and join them; the first one that is trained on names the layout."""
    folders = {part: recognised(part, layout) for part in parts}
    entries: list[Entry] = []
    skipped: dict[str, str] = {}
    for part, folder in folders.items():
        told = SPLITS[part.name.lower()]
        entries += [replace(e, name=f"{part.name}/{e.name}", split=told) for e in folder.entries]
        skipped |= {f"{part.name}/{name}": f"{part.name}/{why}" for name, why in folder.skipped.items()}
    first = next((f for p, f in folders.items() if SPLITS[p.name.lower()] == "train"), folders[parts[0]])
    names = ", ".join(f"{part.name}/" for part in parts)
    return Folder(root, first.layout, entries, f"{first.why}, in {names}", skipped)


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


# ------------------------------------------------------------------------------------------------------------- volumes


def sliced(folder: Folder, slices: tuple[int, int] | None) -> Folder:
    """Put the axial slices of each volume, or some of them, in its place."""
    files = list(dict.fromkeys(entry.files[0] for entry in folder.entries if is_nifti(entry.files[0])))
    with ThreadPoolExecutor() as pool:
        counts = dict(zip(files, pool.map(count_of, files), strict=True))
    wanted = "" if slices is None else f"{slices[0]}:{slices[1]}"
    if not any(counts.values()):
        if wanted:
            raise SettingsError(f"--slices {wanted}: {folder.root} holds no volumes; leave the option out.")
        return folder
    entries: list[Entry] = []
    skipped = dict(folder.skipped)
    for entry in folder.entries:
        count = counts.get(entry.files[0])
        found = [entry] if count is None else list(slices_of(entry, count, slices))
        entries += found
        if not found:
            skipped[entry.name] = f"{entry.name}: has {count} slices, none of --slices {wanted}"
    if not entries:
        raise InputError(f"--slices {wanted}: no volume in {folder.root} has such slices; give others.")
    some = f"{sum(count is not None for count in counts.values())} volumes, slices {wanted or 'all'}"
    return replace(folder, entries=entries, skipped=skipped, why=f"{folder.why}; {some}")


def count_of(file: Path) -> int | None:
    """Return how many axial slices a file has, or None if it is no volume; what is damaged is said when it is read."""
    try:
        return volume.axial_count(file)
    except InputError:
        return None


def slices_of(entry: Entry, count: int, slices: tuple[int, int] | None) -> Iterator[Entry]:
    """Yield the wanted slices of a volume, as images of one patient."""
    first, end = slices or (0, count)
    for k in range(first, min(end, count)):
        yield replace(entry, name=f"{entry.name}:{k:03d}", group=entry.key, slice=k, height=k / count)


# -------------------------------------------------------------------------------------------------------------- splits


def split_of(key: str) -> str:
    """Assign a patient (or an image without one) to train, val or test, 90 : 5 : 5, by its name alone."""
    share = int.from_bytes(hashlib.sha256(encoded(key)).digest()[:4], "big") / 2**32
    return "train" if share < 0.9 else "val" if share < 0.95 else "test"


def with_split(folder: Folder) -> Folder:
    """Return a folder whose splits are those of its split.json, if there is one.

    Raises:
        InputError: if the file is damaged, does not name everybody, or names somebody twice.
    """
    path = folder.root / SPLIT_FILE
    if not path.exists():
        return folder
    again = f"run `knife data split {folder.root}` again"
    try:
        lists = json.loads(text_of(path))
        told = [(key, name) for name in SPLIT_NAMES for key in [*lists[name]]]
        place = dict(told)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: does not list train, val and test; {again}.") from error
    if len(place) < len(told):
        twice = next(key for key, times in Counter(key for key, _ in told).items() if times > 1)
        raise InputError(f"{path}: {twice} stands in it twice; {again}.")
    unknown = sorted({entry.key for entry in folder.entries} - place.keys())
    if unknown:
        raise InputError(f"{path}: does not say where {unknown[0]} belongs (nor {len(unknown) - 1} others); {again}.")
    entries = [replace(entry, split=place[entry.key]) for entry in folder.entries]
    return replace(folder, entries=entries, split_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def write_split(folder: Folder, seed: int = 0, val: float = 0.05, test: float = 0.05) -> dict[str, list[str]]:
    """Write split.json into a folder: who is trained on, who validates, who tests; return what it says.

    Patients are drawn, or images where none are known; the same arguments draw the same ones. A split that the folder
    itself tells of, by its own folders or its manifest, stays as it is.

    Raises:
        SettingsError: if the shares leave nobody to train on.
        InputError: if the folder has a patient in two splits, or cannot be written to.
    """
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise SettingsError(f"--val {val:g} --test {test:g}: give shares of 0 or more, together less than 1.")
    place = told_places(folder)
    free = sorted((k for k, told in place.items() if told in ("", "train")), key=lambda k: ranked(seed, k))
    shares = {name: share for name, share in (("val", val), ("test", test)) if name not in place.values()}
    for name, share in shares.items():
        count = max(round(share * len(place)), 1 if share else 0)
        place |= dict.fromkeys(free[:count], name)
        free = free[count:]
    place |= dict.fromkeys(free, "train")
    if not free:
        raise SettingsError(f"--val {val:g} --test {test:g}: {len(place)} in all leave none to train on; give less.")
    splits = {name: sorted(key for key, told in place.items() if told == name) for name in SPLIT_NAMES}
    about = {"by": "patient" if any(e.group for e in folder.entries) else "image", "seed": seed, "shares": shares}
    try:
        write_safely(folder.root / SPLIT_FILE, (json.dumps({**about, **splits}, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"{folder.root / SPLIT_FILE}: cannot be written ({error.strerror}); allow it.") from error
    return splits


def told_places(folder: Folder) -> dict[str, str]:
    """Return for every patient the split that the folder tells of, or "".

    Raises:
        InputError: if one is told to be in two.
    """
    place: dict[str, str] = {}
    for entry in folder.entries:
        if place.setdefault(entry.key, entry.split) != entry.split:
            both = " and ".join(told or "no split" for told in (place[entry.key], entry.split))
            raise InputError(f"{folder.root}: {entry.key} is in {both} ({entry.name}); keep a patient in one split.")
    return place


def ranked(seed: int, key: str) -> bytes:
    """Return what a patient is sorted by to be drawn."""
    return hashlib.sha256(encoded(f"{seed}|{key}")).digest()


# ------------------------------------------------------------------------------------------------------------- manifest

MANIFESTS = ("manifest.csv", "manifest.tsv", "manifest.jsonl")
RESERVED = ("image", "mask", "group", "split", "channels")
Row = Mapping[str, str | None]


def manifest(root: Path, paths: Sequence[Path]) -> Found | str:
    """Read manifest.csv, .tsv or .jsonl: a column image, optionally mask, group, split, channels; the rest are values.

    Several files of one image, and several channel names, are separated by semicolons (or are lists, in JSON).
    """
    there = [root / name for name in MANIFESTS if (root / name).exists()]
    if not there:
        return f"no {', '.join(MANIFESTS[:-1])} or {MANIFESTS[-1]}"
    path = there[0]
    if len(there) > 1:
        raise InputError(f"{path}: {there[1].name} lies beside it; keep one of them.")
    rows = rows_of(path)
    if not rows:
        raise InputError(f"{path}: has no rows; give a line for every image, under a head with a column image.")
    head = list(dict.fromkeys(name for _, row in rows for name in row))
    if "image" not in head:
        raise InputError(f"{path}: has no column named image (found: {', '.join(map(str, head))}).")
    entries = [manifest_entry(path, line, row) for line, row in rows]
    refuse_missing(path, entries)
    values = ", ".join(sorted({value for entry in entries for value in entry.values})) or "no values"
    return Found(entries, f"{path.name} with {values}")


def rows_of(path: Path) -> list[tuple[int, Row]]:
    """Return the rows of a table by the line they stand in.

    Raises:
        InputError: if it is no table.
    """
    file = io.StringIO(text_of(path), newline="")
    try:
        if path.suffix == ".jsonl":
            return [(i, texts(json.loads(line))) for i, line in enumerate(file, start=1) if line.strip()]
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        return [(reader.line_num, row) for row in reader]
    except (ValueError, RecursionError, csv.Error) as error:
        kind = path.suffix[1:].upper()
        raise InputError(f"{path}: cannot be read as a table ({error}); save it as {kind} in UTF-8.") from error


def texts(record: Any) -> dict[str, str | None]:
    """Return a record of JSON as a row of a table: a list becomes its items with semicolons between."""
    if not isinstance(record, dict) or any(isinstance(value, dict) for value in record.values()):
        raise ValueError("a line is no flat object")
    lists = {name: value if isinstance(value, list) else [value] for name, value in record.items()}
    return {name: ";".join(str(item) for item in items if item is not None) for name, items in lists.items()}


def manifest_entry(path: Path, line: int, row: Row) -> Entry:
    """Turn a row of the manifest into an entry whose files lie inside the folder."""
    image = row.get("image")
    if not image or None in row:
        raise InputError(f"{path}: line {line} names no image, or has more columns than the head; correct it.")
    values = {k: v for k, v in row.items() if k not in RESERVED and v}
    files = tuple(inside(path, name) for name in image.split(";"))
    mask, names, split = row.get("mask"), row.get("channels"), row.get("split") or ""
    if split and split.lower() not in SPLITS:
        raise InputError(f"{path}: line {line} has the split {split!r}; give train, val or test, or leave it empty.")
    return Entry(
        name=image,
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
    try:
        below = (root / name).resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # no file can have such a name, or links go round in a circle
        below = False
    if not below:
        raise InputError(f"{manifest}: {name[:LONGEST_NAME]!r} lies outside the folder; give paths below it.")
    return root / name


def refuse_missing(manifest: Path, entries: Sequence[Entry]) -> None:
    """Refuse a manifest that names files which are not there."""
    files = [file for e in entries for file in (*e.files, *([e.mask] if e.mask else []))]
    missing = [str(file.relative_to(manifest.parent)) for file in files if not os.path.isfile(file)]
    if missing:
        some = ", ".join(name[:LONGEST_NAME] for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(f"{manifest}: {len(missing)} of {len(files)} files are not there ({some}); correct the paths.")


# ------------------------------------------------------------------------------------ a NIfTI file for each MR sequence


Cases = dict[Place, dict[str, Path]]  # the files of each case by sequence, the mask as "seg"


def sequences(root: Path, paths: Sequence[Path]) -> Found | str:
    """BraTS-like: the files t1, t1ce, t2, flair (or those that most cases have) and seg of otherwise one name."""
    cases, skipped = cases_of(root, paths)
    wanted = usual(cases.values())
    if not wanted or len(skipped) > len(paths) / 2:
        return "most files are no NIfTI files with a sequence (t1, t1ce, t2, flair) in their names"
    if len(wanted) == 1 and not any("seg" in files and len(files) > 1 for files in cases.values()):
        return f"the only sequence is {wanted[0]}, and there are no masks of its name"
    return gathered(root, cases, wanted, patients_of(root, list(cases)), skipped)


def brats2020(root: Path, paths: Sequence[Path]) -> Found | str:
    """BraTS 2018 to 2020: BraTS20_Training_001/BraTS20_Training_001_t1.nii; one mask there has a name of its own."""
    return published(root, paths, "BraTS 2018 to 2020", BRATS2020)


def brats2021(root: Path, paths: Sequence[Path]) -> Found | str:
    """BraTS 2021: BraTS2021_00000/BraTS2021_00000_t1.nii.gz."""
    return published(root, paths, "BraTS 2021", BRATS2021)


def brats2023(root: Path, paths: Sequence[Path]) -> Found | str:
    """BraTS from 2023 on: BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz, the patient and his visit."""
    return published(root, paths, "BraTS from 2023 on", BRATS2023)


def brats_slices(root: Path, paths: Sequence[Path]) -> Found | str:
    """Slices of BraTS as the authors' codes ship them: training/000001/brats_train_001_t1_080_w.nii.gz."""
    return published(root, paths, "slices of BraTS", BRATS_SLICES)


def published(root: Path, paths: Sequence[Path], what: str, pattern: str) -> Found | str:
    """Find cases whose names match a published set's; the pattern's group `patient` tells whose they are."""
    name = re.compile(pattern, re.IGNORECASE)
    cases, skipped = cases_of(root, paths)
    adopt_masks(cases)
    told = {place: name.fullmatch(place.before + place.after) for place in cases}
    mine = {place: files for place, files in cases.items() if told[place]}
    wanted = usual(mine.values())
    if not wanted:
        return f"no NIfTI files named as those of {what}"
    others = [relative(root, path) for place, files in cases.items() if not told[place] for path in files.values()]
    skipped |= {file: f"{file}: its name is not one of {what}" for file in others}
    return gathered(root, mine, wanted, {p: m["patient"] for p, m in told.items() if m}, skipped, f"{what}: ")


def cases_of(root: Path, paths: Sequence[Path]) -> tuple[Cases, dict[str, str]]:
    """Return NIfTI files of otherwise one name together, and the reasons of what has no place in that."""
    cases: Cases = {}
    skipped = {}
    for path in paths:
        if is_nifti(path) and (told := sequence_of(path)):
            cases.setdefault(Place(path.parent, *around(stem(path), told.token)), {})[told.name] = path
        else:
            name = relative(root, path)
            skipped[name] = f"{name}: its name tells no sequence"
    return cases, skipped


def around(name: str, word: str) -> tuple[str, str]:
    """Split a name at the last place where a word stands on its own: x_001_t1_080 at t1 -> x_001, _080."""
    places = list(re.finditer(rf"(?:^|[^A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", name))
    return name[: places[-1].start()], name[places[-1].end() :]


def adopt_masks(cases: Cases) -> None:
    """Give the mask of another name that lies alone beside a case without one to that case (number 355 of 2020)."""
    by_folder: dict[Path, list[Place]] = {}
    for place in cases:
        by_folder.setdefault(place.folder, []).append(place)
    for places in by_folder.values():
        lone = [place for place in places if cases[place].keys() == {"seg"}]
        bare = [place for place in places if "seg" not in cases[place]]
        if len(lone) == len(bare) == 1 and len(places) == 2:
            cases[bare[0]] |= cases.pop(lone[0])


def usual(cases: Collection[Mapping[str, Path]]) -> tuple[str, ...]:
    """Return the sequences that most cases have, in canonical order."""
    sets = Counter(tuple(s for s in SEQUENCES if s in files) for files in cases)
    return max(sets, key=lambda s: (sets[s] if s else 0, len(s)), default=())


def gathered(
    root: Path,
    cases: Cases,
    wanted: tuple[str, ...],
    patients: Mapping[Place, str],
    skipped: Mapping[str, str],
    what: str = "",
) -> Found:
    """Make an entry of every case that has the wanted sequences."""
    entries, skipped = [], dict(skipped)
    for place, files in cases.items():
        name = relative(root, place.folder / f"{place.before}{place.after}")
        if lacking := [s for s in wanted if s not in files]:
            skipped[name] = f"{name}: lacks {', '.join(lacking)}"
        else:
            images = tuple(files[s] for s in wanted)
            entries.append(Entry(name, images, files.get("seg"), group=patients[place], channels=wanted))
    count = len({entry.group for entry in entries})
    return Found(entries, f"{what}files named {', '.join(wanted)}; {count} patient{'s' * (count != 1)}", skipped)


def bids(root: Path, paths: Sequence[Path]) -> Found | str:
    """BIDS: sub-01/[ses-1/]anat/sub-01_T1w.nii.gz, and what participants.tsv says of each subject as values."""
    anatomical = [path for path in paths if path.parent.name == "anat" and subject(root, path.parent)]
    if not anatomical:
        return "no images in sub-*/anat"
    cases, skipped = cases_of(root, anatomical)
    wanted = usual(cases.values())
    if not wanted:
        return "no T1w, T2w or FLAIR images in sub-*/anat"
    whose = {place: subject(root, place.folder) for place in cases}
    found = gathered(root, cases, wanted, whose, skipped, "sub-*/anat: ")
    values = participants(root / "participants.tsv")
    columns = ", ".join(dict.fromkeys(column for row in values.values() for column in row)) or "no values"
    entries = [replace(entry, values=values.get(entry.group, {})) for entry in found.entries]
    return Found(entries, f"{found.why}; participants.tsv with {columns}", found.skipped)


def subject(root: Path, folder: Path) -> str:
    """Return the subject that a folder of a BIDS tree belongs to, or ""."""
    first = (*folder.relative_to(root).parts, "")[0]
    return first if first.startswith("sub-") else ""


def participants(path: Path) -> dict[str, dict[str, str]]:
    """Return what participants.tsv says of each subject, but for what is n/a."""
    rows = [row for _, row in rows_of(path)] if path.exists() else []
    return {
        f"sub-{(row.get('participant_id') or '').removeprefix('sub-')}": {
            column: value
            for column, value in row.items()
            if column not in (None, "participant_id") and value not in (None, "", "n/a")
        }
        for row in rows
    }


NO_DATASET = "no dataset.json"


def nnunet(root: Path, paths: Sequence[Path]) -> Found | str:
    """nnU-Net: dataset.json names the channels of imagesTr/CASE_0000.nii.gz, ...; masks are labelsTr/CASE.nii.gz.

    Channels are told by name, since their order differs; a case may also be one file of all channels. Patients are
    told where a case's name is one that a published set gave.
    """
    channels = nnunet_channels(root / "dataset.json")
    if isinstance(channels, str):
        return channels
    masks = {(path.parent.name, stem(path)): path for path in paths if path.parent.parent == root}
    entries, skipped = [], {}
    for part, labels, split in (("imagesTr", "labelsTr", ""), ("imagesTs", "labelsTs", "test")):
        for case, files in nnunet_cases(root / part, paths, several=len(channels) > 1).items():
            name, mask, group = f"{part}/{case}", masks.get((labels, case)), published_patient(case)
            if None in files:
                names = tuple(channels[i] for i in sorted(channels))
                entries.append(Entry(name, (files[None],), mask, group=group, split=split, channels=names))
            elif lacking := [channel for i, channel in channels.items() if i not in files]:
                skipped[name] = f"{name}: lacks {', '.join(lacking)}"
            else:
                images, names = tuple(files[i] for i in channels), tuple(channels.values())
                entries.append(Entry(name, images, mask, group=group, split=split, channels=names))
    known = patients_known(entries)
    return Found(entries, f"dataset.json with the channels {', '.join(channels.values())}; {known}", skipped)


def nnunet_cases(folder: Path, paths: Sequence[Path], several: bool) -> dict[str, dict[int | None, Path]]:
    """Return the files of each case in imagesTr or imagesTs by their number; None: the one file of all channels.

    Where there are several channels, a picture _0000 of each case and no other file holds all of them: RGB.
    """
    cases: dict[str, dict[int | None, Path]] = {}
    for path in (path for path in paths if path.parent == folder):
        told = re.fullmatch(r"(.+)_(\d{4})", stem(path))
        cases.setdefault(told[1] if told else stem(path), {})[int(told[2]) if told else None] = path
    if several and all(files.keys() == {0} and not is_nifti(files[0]) for files in cases.values()):
        return {case: {None: files[0]} for case, files in cases.items()}
    return cases


def nnunet_channels(path: Path) -> dict[int, str] | str:
    """Return the channels that dataset.json names by their number, the known sequences first; or why there are none."""
    if not path.is_file():
        return NO_DATASET
    try:
        told = json.loads(text_of(path))
        named = told.get("channel_names") or told["modality"]
        names = {int(number): str(name).strip().lower() for number, name in named.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "dataset.json names no channels (channel_names or modality)"
    known = {number: told.name for number, name in names.items() if (told := sequence_of(name))}
    names = {**names, **known} if len({*known.values()}) == len(known) else names
    order = list(SEQUENCES)
    return dict(sorted(names.items(), key=lambda n: (order.index(n[1]) if n[1] in order else len(order), n[0])))


# ------------------------------------------------------------------------------------------------------- named pictures

UTKFACE = re.compile(r"(?P<age>\d{1,3})_(?P<gender>[01])_(?P<race>[0-4])_\d+\.")


def utkface(root: Path, paths: Sequence[Path]) -> Found | str:
    """UTKFace: age_gender_race_stamp.jpg; the gender, as a word, is the first class, and the age the first number."""
    entries, skipped = [], {}
    for path in paths:
        name = relative(root, path)
        if told := UTKFACE.match(path.name):
            gender = ("male", "female")[int(told["gender"])]
            entries.append(Entry(name, (path,), values={"gender": gender, "age": told["age"], "race": told["race"]}))
        else:
            skipped[name] = f"{name}: its name is not age_gender_race_stamp"
    return Found(entries, "files named age_gender_race_stamp", skipped)


CELEBA_SPLITS = {"0": "train", "1": "val", "2": "test"}
CELEBA_WORDS = {"1": "yes", "-1": "no", "0": "no"}


def celeba(root: Path, paths: Sequence[Path]) -> Found | str:
    """CelebA: list_attr_celeba.csv or .txt says yes or no to forty attributes; splits and persons as its lists tell."""
    table = celeba_list(root, "list_attr_celeba")
    rows = {row[0]: row[1:] for row in table if len(row) > 2 and is_image(row[0])}
    if not rows:
        return "no list_attr_celeba.csv or list_attr_celeba.txt with images"
    width = len(next(iter(rows.values())))
    head = next(row for row in table if len(row) > 1)[-width:]
    if len(head) < width:
        raise InputError(f"{root}: list_attr_celeba names {len(head)} attributes, its lines {width}; copy it anew.")
    persons, places = (
        {row[0]: row[1] for row in celeba_list(root, name) if len(row) == 2}
        for name in ("identity_CelebA", "list_eval_partition")
    )
    entries, skipped = [], {}
    for path in paths:
        name, attributes = relative(root, path), rows.get(path.name, [])
        if len(attributes) != width:
            skipped[name] = f"{name}: the list of attributes does not have it, or not whole"
            continue
        values = {n: CELEBA_WORDS.get(a, a) for n, a in zip(head, attributes, strict=True)}
        split, person = CELEBA_SPLITS.get(places.get(path.name, ""), ""), persons.get(path.name, "")
        entries.append(Entry(name, (path,), values=values, group=person, split=split))
    return Found(entries, f"list_attr_celeba with {width} attributes", skipped)


def celeba_list(root: Path, name: str) -> list[list[str]]:
    """Return the rows of one of CelebA's lists, as published or as CSV; none if it is not there."""
    for file in (folder / f"{name}{s}" for folder in (root, root / "Anno", root / "Eval") for s in (".csv", ".txt")):
        if file.is_file():
            return [line.replace(",", " ").split() for line in text_of(file).splitlines()]
    return []


# ------------------------------------------------------------------------------------------------------ general folders

MASK = re.compile(r"[_-](mask|seg(?:m|mentation)?|labels?|gt)$", re.IGNORECASE)
IMAGES_FOLDER = re.compile(r"images?|imgs?", re.IGNORECASE)
MASKS_FOLDER = re.compile(r"masks?|labels?|gt|annotations?|seg(?:mentation)?s?", re.IGNORECASE)
IMAGES_BESIDE = re.compile(r"images.*|imgs", re.IGNORECASE)  # names that no class has
MASKS_BESIDE = re.compile(
    r"(?:.*[\W_])?(?:masks|labels.*|gt|annotations?|.*ground[\W_]?truths?|segs?|segm|segment.*)", re.IGNORECASE
)


def pairs(root: Path, paths: Sequence[Path]) -> Found | str:
    """Pairs x.png and x_mask.png, in one folder a patient where there are folders; or images/ beside masks/."""
    folders = {path.parent for path in paths}
    base = Path(os.path.commonpath(folders)) if folders else root
    masks = {folder: name for folder in folders if (name := folder_named(base, folder, MASKS_FOLDER))}
    images = {folder: name for folder in folders - {*masks} if (name := folder_named(base, folder, IMAGES_FOLDER))}
    if apart := bool(images and masks):
        found = [path for path in paths if path.parent in images]
        theirs = [path for path in paths if path.parent in masks]
        why = f"{images[found[0].parent]}/ beside {masks[theirs[0].parent]}/"
    else:
        base, why = root, "x_mask beside x"
        found = [path for path in paths if not MASK.search(stem(path))]
        theirs = [path for path in paths if MASK.search(stem(path))]
    mask_of = {(between(base, path), MASK.sub("", stem(path))): path for path in theirs}
    entries = [pair(root, path, between(base, path), mask_of, apart) for path in found]
    used = {file for entry in entries for file in (*entry.files, entry.mask)}
    if used.isdisjoint(theirs):
        return "no image has a mask of its name (x_mask beside x, or images/ beside masks/)"
    known = patients_known(entries, "folders as patients" if any(between(base, path) for path in found) else "")
    lone = [relative(root, path) for path in paths if path not in used]
    return Found(entries, f"{why}; {known}", {name: f"{name}: belongs to no image" for name in lone})


def pair(
    root: Path, path: Path, between: tuple[str, ...], mask_of: Mapping[tuple[tuple[str, ...], str], Path], apart: bool
) -> Entry:
    """Return the entry of an image and its mask.

    The folders between are the patient, except one that names a split where images and masks lie apart; where there are
    none, a name that a published set gave tells.
    """
    split = SPLITS.get(between[0].lower(), "") if between and apart else ""
    group = "/".join(between[1:] if split else between) or published_patient(stem(path))
    return Entry(relative(root, path), (path,), mask_of.get((between, stem(path))), group=group, split=split)


def folder_named(base: Path, folder: Path, words: re.Pattern[str]) -> str:
    """Return the first name on the way from one folder to another below it that is one of such words, or ""."""
    return next((part for part in folder.relative_to(base).parts if words.fullmatch(part)), "")


def between(base: Path, path: Path) -> tuple[str, ...]:
    """Return the folders on the way from `base` to a file, but those that say whether images or masks are in them."""
    parts = path.parent.relative_to(base).parts
    return tuple(part for part in parts if not (IMAGES_FOLDER.fullmatch(part) or MASKS_FOLDER.fullmatch(part)))


def patients_known(entries: Iterable[Entry], words: str = "") -> str:
    """Return how many patients are known, and as what if not by their names."""
    count = len({entry.group for entry in entries} - {""})
    return f"{count} {words or 'patient' + 's' * (count != 1)}" if count else "no patients known"


def masks_unlearnt(root: Path, paths: Sequence[Path]) -> str:
    """Return why a folder must not be taken for images alone: folders in it look like masks; "" if none does."""
    names = {part for folder in {path.parent for path in paths} for part in folder.relative_to(root).parts}
    images = {name for name in names if IMAGES_FOLDER.fullmatch(name) or IMAGES_BESIDE.fullmatch(name)}
    masks = {name for name in names if MASKS_BESIDE.fullmatch(name) or (images and MASKS_FOLDER.fullmatch(name))}
    if not masks:
        return ""
    listed = "folders named " + ", ".join(f"{name}/" for name in (*sorted(images - masks), *sorted(masks)))
    channels = nnunet_channels(root / "dataset.json")
    if {name.lower() for name in names} & {"imagestr", "labelstr"} and isinstance(channels, str):
        said = "dataset.json is missing" if channels == NO_DATASET else channels
        return f"{listed} look like a set for nnU-Net, but {said}; it must name the channels of the images"
    return (
        f"{listed} look like images beside masks, but no mask has the name of an image; knife understands images/ or "
        "imgs/ beside masks/, labels/, gt/, annotations/ or segmentations/, and x.png there for the mask of x.png, or "
        "x_mask, x_seg, x_segmentation, x_label or x_gt"
    )


def ages(root: Path, paths: Sequence[Path]) -> Found | str:
    """One folder an age, named by its number."""
    return by_folder(root, paths, "age", str.isdecimal)


def classes(root: Path, paths: Sequence[Path]) -> Found | str:
    """One folder a class, ImageFolder's way."""
    return by_folder(root, paths, "class", bool)


def by_folder(root: Path, paths: Sequence[Path], attribute: str, wanted: Callable[[str], bool]) -> Found | str:
    """Take the names of folders for the values of the images in them."""
    told = {path: path.parent.parent == root and wanted(path.parent.name) for path in paths}
    mine = [path for path in paths if told[path]]
    count = len({path.parent for path in mine})
    if count < 2:
        return f"{count} folders of images that are named by an {attribute}, two are the least"
    if refused := masks_unlearnt(root, mine):
        return refused
    if beside := sorted({path.parent.name for path in mine if IMAGES_BESIDE.fullmatch(path.parent.name)}):
        return f"{beside[0]}/ names no {attribute}"
    entries = [Entry(relative(root, path), (path,), values={attribute: path.parent.name}) for path in mine]
    others = [relative(root, path) for path in paths if not told[path]]
    skipped = {name: f"{name}: lies in no folder that is named by its {attribute}" for name in others}
    return Found(entries, f"{count} folders, each named by its images' {attribute}", skipped)


def flat(root: Path, paths: Sequence[Path]) -> Found | str:
    """Nothing but images: enough for a diffusion model."""
    return Found([Entry(relative(root, path), (path,)) for path in paths], "images and nothing that labels them")


LAYOUTS: tuple[dict[str, Layout], ...] = (
    {"manifest": manifest},  # what the user wrote
    {  # names that a published data set gave
        "brats2020": brats2020, "brats2021": brats2021, "brats2023": brats2023, "brats-slices": brats_slices,
        "nnunet": nnunet, "bids": bids, "celeba": celeba, "utkface": utkface,
    },
    {"sequences": sequences, "pairs": pairs},  # names of files that belong together
    {"ages": ages},  # folders named by numbers
    {"classes": classes},  # folders of any name
    {"flat": flat},  # nothing to go by
)  # fmt: skip


def all_layouts() -> dict[str, Layout]:
    """Return the layouts by name, in order of standing."""
    return {name: find for equals in LAYOUTS for name, find in equals.items()}


# --------------------------------------------------------------------------------------------------------------- names


def stem(path: Path) -> str:
    """Return a file's name without .nii.gz, .png and the like."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def bare(path: Path, folder: Path) -> str:
    """Return a file's path below a folder without its suffix."""
    return relative(folder, path.with_name(stem(path)))


def relative(root: Path, path: Path) -> str:
    """Return a file's path below a folder."""
    return str(path.relative_to(root))


def is_nifti(path: Path) -> bool:
    """Tell whether a file's name is that of a NIfTI file."""
    return path.name.lower().endswith(NIFTI)


def text_of(path: Path) -> str:
    """Read a small text file of a data folder.

    Raises:
        InputError: if it cannot be read, or not as UTF-8.
    """
    try:
        with regular(path) as file:
            data = file.read(LONGEST_TEXT + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be read ({reason}); allow it, or look after the disk.") from error
    except ValueError as error:
        raise InputError(f"{path}: cannot be read ({error}); save it as text in UTF-8.") from error
    if len(data) > LONGEST_TEXT:
        raise InputError(f"{path}: longer than {LONGEST_TEXT} bytes; no list of images is, so split the folder.")
    return text


def encoded(text: str) -> bytes:
    """Return a text as bytes, file names that are no proper text included."""
    return text.encode(errors="surrogateescape")
