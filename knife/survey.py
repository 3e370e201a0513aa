"""What a data folder holds and what is wrong with it, before anything is trained on it.

Every image, or volume, is read once and leaves a record of a few numbers (`look`); plain functions fold the records
into one report, a dict that is JSON as it stands. No more than a few images are in memory at a time.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor

from knife import data, nifti, volume
from knife.data import by_volume, named, picture_of, volume_of
from knife.errors import InputError
from knife.files import refusing, regular
from knife.image import Image, Picture, Source, decoded, suffix_of
from knife.layouts import SPLIT_FILE, SPLIT_NAMES, Entry, Folder, recognise, relative, sliced, text_of, with_split
from knife.nifti import Array
from knife.picture import TYPES
from knife.volume import Volume

SAMPLE = 2**20  # pixels of each channel that percentiles are taken of, spread over all images
LEAST = 16  # pixels of any image that are among them
PERCENTILES = (0.5, 50.0, 99.5)
BINS = 10
FEW = 10  # different numbers in a column up to which each is counted
BLURRED = 16  # labels in one mask from which on its edges are taken for blurred


@dataclass(frozen=True)
class Look:
    """What was seen of one image, or of the wanted slices of one volume."""

    entry: Entry  # the image, or the volume's first slice
    name: str
    count: int  # images in it: 1, or the slices of a volume
    hashes: tuple[str, ...]  # of the bytes of each file
    fault: str = ""  # why it cannot be used; nothing below is known then
    channels: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()  # how each file is stored: ".png uint8"
    shape: tuple[int, ...] = ()  # rows, columns; of a volume: slices, rows, columns
    pixels: str = ""  # hash of the pixels
    low: tuple[float, ...] = ()  # of each channel
    high: tuple[float, ...] = ()
    sample: Array | None = None  # [C, n] pixels, all of them if they are few
    empty: int = 0  # images in which every pixel is the same
    synthetic: bool = False
    filled: int = 0  # pixels of its files that were no number, and have been filled
    sizes: tuple[float, ...] = ()  # of the mask of each image that has one, relative to the brain; 0: it is empty
    labels: tuple[float, ...] = ()  # values in the masks, but for 0
    mask_fault: str = ""


def survey(
    root: Path,
    layout: str | None = None,
    slices: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    fill: float | None = None,
) -> dict[str, Any]:
    """Return what a data folder holds, what to know about it (`notes`) and what is wrong with it (`problems`).

    Args:
        root: the folder.
        layout: the only layout to try; None: whichever fits.
        slices: first and last + 1 of each volume's axial slices; None: all of them.
        progress: called with the number of images and volumes that are done, and of all, about a hundred times.
        fill: what stands for pixels that are NaN or infinite; None: such images cannot be read.

    Returns:
        A dict that is JSON: `problems` has lists of sentences by kind, each of which names files; none if all is well.

    Raises:
        InputError: if the folder cannot be recognised at all.
        SettingsError: if there is no such layout, or no volume to take `slices` of.
    """
    folder, split_faults = opened(root, layout, slices)
    entries = settled(folder)
    looks = look_at(by_volume(entries), progress or (lambda done, total: None), fill)
    usual = usual_channels(looks)
    faults = {"left out": [*folder.skipped.values()], "splits": [*split_faults, *torn_patients(entries)]}
    return {
        "folder": str(root),
        **recognised(folder, looks),
        "splits": {"told_by": teller(folder), **splits(entries)},
        "stored": counted(kind for look in looks for kind in look.stored),
        "shapes": counted(shape_text(look.shape) for look in looks if look.shape),
        "channels": intensities(looks),
        "sampled": any(look.sample is not None and look.sample.shape[1] < pixel_count(look) for look in looks),
        "labels": {name: column(texts) for name in columns(looks) if (texts := values_of(looks, name))},
        "masks": masks(looks),
        "notes": [*notes(looks)],
        "problems": problems(root, looks, usual, faults),
    }


def opened(root: Path, layout: str | None, slices: tuple[int, int] | None) -> tuple[Folder, list[str]]:
    """Recognise a folder as `open_folder` does; what is wrong with its split.json is returned, and refuses nothing."""
    folder, faults = recognise(root, layout), []
    try:
        faults = [f"{root / SPLIT_FILE}: names {name}, which is not there." for name in gone(folder)]
        folder = with_split(folder)
    except InputError as error:
        faults = [*faults, str(error)]
    return sliced(folder, slices), faults


def settled(folder: Folder) -> list[Entry]:
    """Return the entries sorted by name, each with the split that a training takes it for."""
    entries = [replace(entry, split=split) for split in SPLIT_NAMES for entry in folder.split(split)]
    return sorted(entries, key=lambda entry: entry.name)


def gone(folder: Folder) -> list[str]:
    """Return the names in split.json that no entry has; what else may be wrong with it is said by `with_split`."""
    path, there = folder.root / SPLIT_FILE, {entry.key for entry in folder.entries}
    try:
        lists = json.loads(text_of(path)) if path.exists() else {}
        return [name for split in SPLIT_NAMES for name in lists.get(split, []) if name not in there]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []


# ------------------------------------------------------------------------------------------------------------- looking


def look_at(
    parts: Sequence[Sequence[Entry]], progress: Callable[[int, int], None], fill: float | None = None
) -> list[Look]:
    """Look at images and volumes, in parallel."""
    samples = max(LEAST, SAMPLE // max(len(parts), 1))
    volumes = any(part[0].slice is not None for part in parts)
    looks = []
    with ThreadPoolExecutor(data.VOLUMES_AT_ONCE if volumes else None) as pool:
        for seen in pool.map(lambda part: look(part, samples, fill), parts):
            looks.append(seen)
            if len(looks) % max(1, len(parts) // 100) == 0 or len(looks) == len(parts):
                progress(len(looks), len(parts))
    return looks


def look(part: Sequence[Entry], samples: int, fill: float | None = None) -> Look:
    """Look at one image, or at the slices of one volume."""
    entry = part[0]
    name = entry.name if entry.slice is None else entry.name.rpartition(":")[0]
    seen = Look(entry, name, len(part), tuple(data.content(file) for file in entry.files))
    try:
        source: Image | Volume = picture_of(entry, fill) if entry.slice is None else volume_of(entry, fill)
        seen = replace(
            seen,
            channels=named(entry, source.channels),
            stored=stored(source.source),
            shape=tuple(source.pixels.shape[1:]),
            synthetic=source.source.synthetic,
            filled=source.source.filled,
        )
        seen = measured(seen, stack_of(source, part), samples)
    except InputError as error:
        return replace(seen, fault=str(error))
    try:
        return outlined(seen, source, part)
    except InputError as error:
        return replace(seen, mask_fault=str(error))


def stack_of(source: Image | Volume, part: Sequence[Entry]) -> Tensor:
    """Return the pixels [C, D, H, W] of an image (D = 1), or of the wanted slices of a volume."""
    if isinstance(source, Image):
        return source.pixels[:, None]
    wanted = [entry.slice for entry in part if entry.slice is not None]
    return source.pixels if len(wanted) == source.count else source.pixels[:, wanted]


def stored(source: Source) -> tuple[str, ...]:
    """Return how each file of an image is stored: its suffix and the type of its pixels."""
    if isinstance(source.kind, Picture):
        alpha = "" if source.kind.alpha is None else " with alpha"
        types = [f"{np.dtype(TYPES[source.kind.top]).name}{alpha}"]
    else:
        types = [voxel_type(path) for path in source.paths]
    return tuple(f"{suffix_of(path).lower()} {kind}" for path, kind in zip(source.paths, types, strict=True))


def voxel_type(path: Path) -> str:
    """Return the type of a NIfTI file's voxels, as its header names it."""
    with refusing(path, "a NIfTI file"), regular(path) as file:
        _, _, header = nifti.begin(file, path)
        return str(header.get_data_dtype().name)


def measured(seen: Look, x: Tensor, samples: int) -> Look:
    """Add what the pixels [C, D, H, W] tell: their hash, ranges, and a sample that is drawn by the image's name."""
    low, high = x.amin((2, 3)), x.amax((2, 3))
    flat = np.ascontiguousarray(x.flatten(1).numpy())
    digest = hashlib.sha256(repr(tuple(x.shape)).encode())
    digest.update(flat.data)
    if samples < flat.shape[1]:
        chosen = np.random.default_rng(int(data.short_hash(seen.name), 16)).integers(flat.shape[1], size=samples)
    return replace(
        seen,
        pixels=digest.hexdigest(),
        low=tuple(low.amin(1).tolist()),
        high=tuple(high.amax(1).tolist()),
        sample=flat[:, chosen] if samples < flat.shape[1] else flat,
        empty=int((low == high).all(0).sum()),
    )


def outlined(seen: Look, source: Image | Volume, part: Sequence[Entry]) -> Look:
    """Add what the masks tell.

    Raises:
        InputError: if one cannot be read, or is not on the grid of its image.
    """
    sizes, labels = [], set[float]()
    for entry in part:
        if entry.mask is None:
            continue
        whole = source if isinstance(source, Volume) else None
        image = source if isinstance(source, Image) else source.slice(entry.slice or 0)
        sizes.append(relative_size(data.mask_of(entry.mask, image, entry, whole), image))
        plane = decoded(entry.mask).pixels if whole is None else volume.mask_volume(entry.mask).pixels[:, entry.slice]
        labels |= set(plane[plane > 0].unique().tolist())
    return replace(seen, sizes=tuple(sizes), labels=tuple(sorted(labels)))


def relative_size(mask: Tensor, image: Image) -> float:
    """Return the area of a mask over the brain's (all that is clearly brighter than the darkest), as regress does."""
    if not bool(mask.any()):
        return 0.0
    x = image.normalised(None, (0.0, 1.0))
    floor = x.amin((1, 2), keepdim=True)
    brain = (x > floor + 0.05 * (x.amax((1, 2), keepdim=True) - floor)).any(0)
    return float(mask.sum() / brain.sum().clamp(min=1))


# -------------------------------------------------------------------------------------------------------- what it holds


def recognised(folder: Folder, looks: Sequence[Look]) -> dict[str, Any]:
    """Return what the folder was taken for and why, and how much there is."""
    return {
        "layout": folder.layout,
        "why": folder.why,
        "images": len(folder.entries),  # each slice of a volume is one
        "volumes": sum(look.entry.slice is not None for look in looks),
        "patients": patients(folder.entries),
        "readable": sum(look.count for look in looks if not look.fault),
    }


def patients(entries: Iterable[Entry]) -> int:
    """Return how many patients are told apart; 0 where none are known."""
    return len({entry.group for entry in entries} - {""})


def teller(folder: Folder) -> str:
    """Return who says which split an image is in."""
    return SPLIT_FILE if folder.split_sha256 else "folder" if any(e.split for e in folder.entries) else "names"


def splits(entries: Sequence[Entry]) -> dict[str, dict[str, int]]:
    """Return how many images and patients each split has."""
    shares = {split: [entry for entry in entries if entry.split == split] for split in SPLIT_NAMES}
    return {split: {"images": len(share), "patients": patients(share)} for split, share in shares.items()}


def usual_channels(looks: Iterable[Look]) -> tuple[str, ...]:
    """Return the channels that most images have."""
    names = Counter[tuple[str, ...]]()
    for look in looks:
        names[look.channels] += 0 if look.fault else look.count
    return max(names, key=lambda channels: names[channels], default=())


def intensities(looks: Iterable[Look]) -> dict[str, dict[str, Any]]:
    """Return for each channel how many images have it, and how its pixels are spread."""
    parts = defaultdict[str, list[tuple[Look, int]]](list)
    for look in looks:
        for i, channel in enumerate(look.channels if not look.fault else ()):
            parts[channel].append((look, i))
    return {channel: spread(mine) for channel, mine in parts.items()}


def spread(parts: Sequence[tuple[Look, int]]) -> dict[str, Any]:
    """Return how the pixels of one channel are spread; percentiles are those of what is not 0 in the sample."""
    sample = np.concatenate([look.sample[i] for look, i in parts if look.sample is not None])
    shown = sample[sample != 0]
    ends = np.percentile(shown, PERCENTILES).tolist() if shown.size else [0.0] * len(PERCENTILES)
    return {
        "images": sum(look.count for look, _ in parts),
        "min": min(look.low[i] for look, i in parts),
        "percentiles": dict(zip(map(str, PERCENTILES), ends, strict=True)),
        "max": max(look.high[i] for look, i in parts),
        "zeros": 1 - shown.size / sample.size,
    }


def pixel_count(look: Look) -> int:
    """Return how many pixels of each channel were looked at."""
    return look.count * math.prod(look.shape[-2:])


def columns(looks: Sequence[Look]) -> list[str]:
    """Return the columns of values, in the order of the image that has most of them."""
    fullest_first = sorted(looks, key=lambda look: -len(look.entry.values))
    return list(dict.fromkeys(name for look in fullest_first for name in look.entry.values))


def values_of(looks: Iterable[Look], name: str) -> list[str]:
    """Return what a column says of the images that have it; a volume counts once."""
    return [look.entry.values[name] for look in looks if name in look.entry.values]


def column(texts: Sequence[str]) -> dict[str, Any]:
    """Return the histogram of a column: words, and few different numbers, are counted; numbers are put into bins."""
    counts, numbers = counted(texts), numbers_of(texts)
    if not of_numbers(texts):
        return {"kind": "words", "images": len(texts), "counts": counts}
    few = len(counts) <= FEW and len(numbers) == len(texts)
    ranked = {text: counts[text] for text in sorted(counts, key=float)} if few else None
    return {"kind": "numbers", "images": len(texts), **histogram(numbers), "counts": ranked}


def of_numbers(texts: Sequence[str]) -> bool:
    """Tell whether a column is one of numbers: at least half of it is."""
    return len(numbers_of(texts)) >= len(texts) / 2


def numbers_of(texts: Iterable[str]) -> list[float]:
    """Return the texts that are finite numbers, as such."""
    return [number for text in texts if (number := number_of(text)) is not None]


def number_of(text: str) -> float | None:
    """Return a text as a finite number, or None if it is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def histogram(numbers: Sequence[float]) -> dict[str, Any]:
    """Return where numbers lie, and how many of them in each tenth of their range."""
    counts, edges = np.histogram(numbers, bins=BINS, range=(min(numbers), max(numbers)))
    bins = [
        {"from": low, "to": high, "count": count}
        for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    ]
    return {"min": min(numbers), "median": median(numbers), "max": max(numbers), "bins": bins}


def masks(looks: Sequence[Look]) -> dict[str, Any]:
    """Return how many images have masks, what is in them, and how large they are, relative to the brain."""
    sizes = [size for look in looks for size in look.sizes]
    marked = [size for size in sizes if size]
    labels = counted(f"{label:g}" for look in looks for label in look.labels)
    return {
        "with": len(sizes),
        "without": sum(look.count for look in looks) - len(sizes),
        "empty": len(sizes) - len(marked),
        "labels": {label: labels[label] for label in sorted(labels, key=float)},
        "sizes": histogram(marked) if marked else None,
    }


def counted(texts: Iterable[str]) -> dict[str, int]:
    """Return how often each text occurs, the most frequent first."""
    return dict(Counter(texts).most_common())


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as 240 x 240, and of volumes the number of slices."""
    plane = " x ".join(map(str, shape[-2:]))
    return plane if len(shape) == 2 else f"{plane}, {shape[0]} slices"


# ---------------------------------------------------------------------------------------- what to know, what to mend


def notes(looks: Sequence[Look]) -> Iterator[str]:
    """Yield what a training copes with, and its owner may want to know."""
    planes = {look.shape[-2:] for look in looks if look.shape}
    if len(planes) > 1:
        yield f"Images are of {len(planes)} different shapes; a training resizes each on its own."
    slices = [look for look in looks if look.entry.slice is not None]
    if empty := sum(look.empty for look in slices):
        yield f"{empty} of {sum(look.count for look in slices)} slices show nothing; a training leaves them out."
    for look in looks:
        dark = [c for c, low, high in zip(look.channels, look.low, look.high, strict=True) if low == high]
        if 0 < len(dark) < len(look.channels):
            yield f"{look.name}: shows nothing in {', '.join(dark)}."
        if look.filled:
            yield f"{look.name}: {look.filled:,} of its pixels were no number, and have been filled."
        if len(look.labels) >= BLURRED:
            yield f"{look.name}: its mask has {len(look.labels)} labels; any above 0 counts, blurred edges too."


def problems(
    root: Path, looks: Sequence[Look], usual: Sequence[str], faults: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return what is wrong by kind, sentences that name files each; `faults` are those known without looking."""
    readable = [look for look in looks if not look.fault]
    twins = duplicates([look for look in readable if look.empty < look.count])
    found: dict[str, Iterable[str]] = {
        "unreadable": [look.fault for look in looks if look.fault],
        "left out": faults["left out"],
        "constant": [f"{x.name}: every pixel is the same; it shows nothing." for x in readable if x.empty == x.count],
        "channels": other_channels(readable, usual),
        "masks": [look.mask_fault for look in looks if look.mask_fault],
        "duplicates": [*(same_image(group) for group in twins if not torn(group)), *same_files(looks)],
        "splits": [*faults["splits"], *(same_image(group) for group in twins if torn(group))],
        "labels": label_faults(looks),
        "names": same_names(root, looks),
        "synthetic": [
            f"{x.name}: marked as made by knife; train on images of your own." for x in readable if x.synthetic
        ],
    }
    lists = {kind: list(sentences) for kind, sentences in found.items()}
    return {kind: sentences for kind, sentences in lists.items() if sentences}


def other_channels(looks: Iterable[Look], usual: Sequence[str]) -> Iterator[str]:
    """Yield which images have other channels than most."""
    for look in looks:
        try:
            data.check_channels(look.name, look.channels, usual)
        except InputError as error:
            yield str(error)


def duplicates(looks: Iterable[Look]) -> list[list[Look]]:
    """Return images of the same pixels together."""
    groups = defaultdict[str, list[Look]](list)
    for look in looks:
        groups[look.pixels].append(look)
    return [group for group in groups.values() if len(group) > 1]


def torn(group: Iterable[Look]) -> bool:
    """Tell whether images are in more than one split."""
    return len({look.entry.split for look in group}) > 1


def same_image(group: Sequence[Look]) -> str:
    """Say that some images are one, and how their labels differ."""
    names = [f"{look.name} ({look.entry.split})" if torn(group) else look.name for look in group]
    how = "the same pixels in different files" if len({look.hashes for look in group}) > 1 else "the same image"
    where = " in more than one split" if torn(group) else ""
    told = {name: sorted(set(values_of(group, name))) for name in columns(group)}
    other = "; ".join(f"{name} is {' and '.join(values)}" for name, values in told.items() if len(values) > 1)
    return f"{', '.join(names)}: {how}{where}{other and f', but {other}'}."


def same_files(looks: Iterable[Look]) -> Iterator[str]:
    """Yield which files hold the same bytes, though one image needs both or the images differ otherwise."""
    holders = defaultdict[str, dict[Path, Look]](dict)
    for look in looks:
        for file, told in zip(look.entry.files, look.hashes, strict=True):
            holders[told][file] = look
    for told, files in holders.items():
        one_image = len({look.name for look in files.values()}) == 1
        if told and len(files) > 1 and (one_image or len({look.pixels for look in files.values()}) > 1):
            yield f"{', '.join(map(str, files))}: the same bytes, in files of different channels or images."


def torn_patients(entries: Iterable[Entry]) -> Iterator[str]:
    """Yield which patients are in more than one split."""
    places = defaultdict[str, dict[str, str]](dict)
    for entry in entries:
        places[entry.key].setdefault(entry.split, entry.name)
    for key, told in places.items():
        if len(told) > 1:
            yield f"{key}: in {' and in '.join(f'{split} ({name})' for split, name in told.items())}."


def label_faults(looks: Sequence[Look]) -> Iterator[str]:
    """Yield which labels are missing, are no number where most are, or are the same everywhere."""
    for name in columns(looks):
        texts = values_of(looks, name)
        numbers = of_numbers(texts)
        if len(looks) > 1 and len(set(texts)) == 1:
            yield f"{looks[0].name} and all others with a value: {name} is {texts[0]}; there is nothing to learn from."
        for look in looks:
            text = look.entry.values.get(name)
            if text is None:
                yield f"{look.name}: has no {name}."
            elif numbers and number_of(text) is None:
                yield f"{look.name}: {name} is {text}, and no number."
    outlined = [look for look in looks if look.sizes]
    if outlined and not any(size for look in outlined for size in look.sizes):
        yield f"{outlined[0].name} and all others with a mask: the mask is empty; there is nothing to learn from."


def same_names(root: Path, looks: Iterable[Look]) -> Iterator[str]:
    """Yield which files have names that differ in capital letters alone."""
    spelt = defaultdict[str, list[str]](list)
    for file in data.files_of(look.entry for look in looks):
        name = relative(root, file)
        spelt[name.casefold()].append(name)
    for names in spelt.values():
        if len(names) > 1:
            yield f"{', '.join(names)}: differ in capital letters alone; macOS and Windows take them for one file."
