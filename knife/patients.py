"""Whose an image is, as far as the names of its file and folders tell.

Images of one patient must never fall into different splits. Where names leave it open, more is taken for one patient
rather than less: a patient too many in one is seen in the count of patients, one in two splits is not.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
BRATS2020 = r"(?P<patient>brats(?:17|18|19|20)_\w+)"
BRATS2021 = r"(?P<patient>brats2021_\d+)"
BRATS2023 = r"(?P<patient>brats-[a-z]+-\d+)(?:-\d+)?"
BRATS_SLICES = r"(?P<patient>brats_[a-z]+_\d+)_\d+_w"
PATIENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<patient>brats(?:20_[a-z]+|2021)_\d+)_\d+", BRATS2020, BRATS2021, BRATS2023, BRATS_SLICES,
        r"(?P<patient>patient\d+)_frame\d+",  # ACDC
        r"(?P<patient>sub-[a-z0-9]+)(?:_.+)?",  # BIDS
    )
)  # fmt: skip
NOBODY = r"(?:ses(?:sion)?|visit|time[\W_]?point|tp|baseline|follow[\W_]?up|slice|v(?=[\W_]*\d))[\W_]*\d*"
NOBODYS_FOLDER = re.compile(rf"{'|'.join(SPLITS)}|hgg|lgg|{NOBODY}", re.IGNORECASE)  # a split, a grade, a visit
NOBODYS_ENDING = re.compile(rf"(?:^|[\W_]+){NOBODY}$", re.IGNORECASE)


class Place(NamedTuple):
    """Where the files of one case lie: a folder, and their name before and after the sequence."""

    folder: Path
    before: str
    after: str


def patients_of(root: Path, places: Sequence[Place]) -> dict[Place, str]:
    """Return whose each case is: the first folder where folders branch, else what the name says before the sequence.

    Folders that stand for a split or a visit do not count. Where all lie in one folder and their names begin with the
    sequence, what follows it tells.
    """
    folders = {place: persons_folders(root, place.folder) for place in places}
    shared = sum(1 for _ in takewhile(lambda level: len({*level}) == 1, zip(*folders.values(), strict=False)))
    first = {place: (*parts[shared:], "")[0] for place, parts in folders.items()}
    alone = len({place.folder for place in places}) == 1
    if told_by_names(first):
        first = dict.fromkeys(places, "")
    return {
        place: first[place]
        or person(place.before)
        or place.before.strip(" ._-")
        or (place.after.strip(" ._-") if alone else "")
        or "/".join(folders[place])
        or str(place.folder.relative_to(root))
        for place in places
    }


def persons_folders(root: Path, folder: Path) -> tuple[str, ...]:
    """Return the folders on the way to one, but those that stand for a split, a tumour's grade or a visit."""
    return tuple(part for part in folder.relative_to(root).parts if not NOBODYS_FOLDER.fullmatch(part))


def told_by_names(first: Mapping[Place, str]) -> bool:
    """Tell whether names tell patients better than each case's first folder: slices of a patient, a folder each.

    Those have names of their own in the whole set, and begin alike in several folders.
    """
    if len({*first.values()} - {""}) < 2:
        return True
    names, befores = {(place.before, place.after) for place in first}, {place.before for place in first}
    across = {(place.before, folder) for place, folder in first.items()}
    return len(names) == len(first) and len(befores) < len(across) and all(person(before) for before in befores)


def person(name: str) -> str:
    """Return whose a name is, without a visit at its end; "" if it names a visit alone, or nothing."""
    return published_patient(name) or NOBODYS_ENDING.sub("", name).strip(" ._-")


def published_patient(name: str) -> str:
    """Return the patient in a name that a published set gave to one of his visits, frames or slices, or ""."""
    return next((told["patient"] for pattern in PATIENTS if (told := pattern.fullmatch(name))), "")
