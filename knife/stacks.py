"""Whole volumes through a translation: which slices, what is done already, and the volume, table and record at the end.

Each finished slice is kept in a hidden folder beside the results until all are there, so that the same command goes on
where it was stopped. What is kept counts only for the same inputs, models, target and settings, see `outputs.key_of`.
"""

import csv
import io
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knife import checkpoint, volume
from knife.errors import InputError, ModelError
from knife.files import write_safely
from knife.image import Image, Source, is_image
from knife.layouts import adopt_masks, cases_of
from knife.outputs import (
    Edit,
    Files,
    Translation,
    Unit,
    draw,
    hashes,
    kept_record,
    key_of,
    members,
    refuse_another,
    refusing_disk,
    reread,
    save,
    told_of,
    write_record,
)
from knife.spec import ImageSpec
from knife.volume import Volume

BRAIN = 0.1  # share of its pixels that makes a slice worth translating, where nothing else is said
Span = tuple[int, int]  # first, last + 1
PART = r"_slices\d+-\d+$"  # how the name of a result tells the slices that were asked for, see `part_of`


@dataclass(frozen=True, eq=False)
class Stack:
    """A volume of which some slices are translated.

    slices: their numbers, rising. mask: the outlined tumour beside it, [D, H, W] bool, if there is one. refused: those
    among the slices asked for for which the target means nothing.
    """

    volume: Volume
    slices: tuple[int, ...]
    mask: Tensor | None = None
    crop: bool = False  # as of an Image
    refused: tuple[int, ...] = ()

    @property
    def source(self) -> Source:
        """Return where the volume came from."""
        return self.volume.source

    @property
    def first(self) -> Image:
        """Return the first of the slices, to look at."""
        return replace(self.volume.slice(self.slices[0]), crop=self.crop)

    @cached_property
    def images(self) -> list[Image]:
        """Return the slices."""
        return [replace(self.volume.slice(k), crop=self.crop) for k in self.slices]


# -------------------------------------------------------------------------------------------------------------- opening


def open_stack(stack: Volume, wanted: Span | None) -> Stack:
    """Choose slices of a volume: those wanted (first, last + 1), else all that show enough brain.

    Slices on which every pixel is the same are never translated.

    Raises:
        InputError: if there is nothing to translate.
    """
    name = stack.source.paths[0].name
    flat = stack.pixels.flatten(2)
    shows = (flat != flat[..., :1]).any(2).any(0).tolist()
    first, end = wanted or (0, stack.count)
    there, least = range(max(first, 0), min(end, stack.count)), 0.0 if wanted else BRAIN
    chosen = [k for k in there if shows[k] and stack.brain(k) >= least]
    if not chosen:
        asked = f"--slices {first}:{end}" if wanted else "none of its slices"
        raise InputError(f"{name}: {asked}: nothing to translate there; its axial slices are 0 to {stack.count - 1}.")
    return Stack(stack, tuple(chosen), outlined(stack))


def part_of(wanted: Span | None) -> str:
    """Return how the names of results tell which slices were asked for: "slices80-128"; all is ""."""
    return f"slices{wanted[0]}-{wanted[1] - 1}" if wanted else ""


def outlined(stack: Volume) -> Tensor | None:
    """Return the mask that lies beside a volume of several files and on its grid, [D, H, W] bool, if there is one."""
    if len(stack.files) == 1:
        return None
    first = stack.source.paths[0]
    cases, _ = cases_of(first.parent, [file for file in first.parent.iterdir() if is_image(file)])
    adopt_masks(cases)
    mine = [files["seg"] for files in cases.values() if "seg" in files and (first.is_dir() or first in files.values())]
    if len(mine) != 1:
        return None
    try:
        return torch.stack([stack.mask(mine[0], k)[0] > 0 for k in range(stack.count)])
    except InputError:
        return None


# ----------------------------------------------------------------------------------------------- what is done already


def unit(stack: Stack, edits: Sequence[Edit], files: Files, about: Mapping[str, Any], spec: ImageSpec) -> Unit:
    """Return the unit of a stack: what is still to do of it, if anything is.

    Raises:
        InputError: if the results of another input lie there.
    """
    refuse_another(stack.volume, files)
    key = key_of(stack.volume, about, edits)
    if whole := again(stack, edits, files, key, spec):
        return Unit([], finish=lambda: whole, done=len(whole))
    folder, dtype = place_of(files), about["settings"]["dtype"]
    done = kept(stack, folder, key, edits, spec.value_range)
    todo = {k: edit for k, edit in zip(stack.slices, edits, strict=True) if k not in done}
    numbers = [*todo]

    def keep_slice(i: int, one: Translation) -> list[Translation]:
        keep(one, numbers[i], folder, key)
        done[numbers[i]] = one
        return []

    def all_there() -> list[Translation]:
        return finish(stack, {k: done[k] for k in stack.slices if k in done}, files, dtype, key) if done else []

    return Unit(list(todo.values()), keep_slice, all_there, len(done))


def again(stack: Stack, edits: Sequence[Edit], files: Files, key: str, spec: ImageSpec) -> list[Translation] | None:
    """Return the slices of a volume that an earlier call finished; None if it is not there, or not as it was."""
    record = kept_record(files, key, written(files, stack))
    if record is None:
        return None
    try:
        result = volume.open_volume(members(files, stack.source.paths))
    except InputError:
        return None
    return [
        reread(edit, result.pixels[:, k], slice_record(record, k), files, spec)
        for k, edit in zip(stack.slices, edits, strict=True)
    ]


def place_of(files: Files) -> Path:
    """Return the folder that keeps the finished slices until all are there."""
    return files.record.with_name(f".{files.record.stem}.part")


def kept(
    stack: Stack, folder: Path, key: str, edits: Sequence[Edit], value_range: tuple[float, float]
) -> dict[int, Translation]:
    """Return the slices that an earlier call finished, slice number -> translation; what is damaged is done again."""
    done = {}
    for k, edit in zip(stack.slices, edits, strict=True):
        try:
            about = checkpoint.read_about(folder / f"{k}.safetensors")
            if about.get("key") == key:
                stored = checkpoint.read_tensors(folder / f"{k}.safetensors")
                change, region = stored["change"], stored.get("region")  # an automatic one is known here alone
                result = edit.image.plus(change, value_range, region)
                record = about["record"]
                done[k] = Translation(edit.image, result, change, edit.targets, record, region=region, kept=True)
        except (ModelError, KeyError):
            continue
    return done


def keep(translation: Translation, k: int, folder: Path, key: str) -> None:
    """Keep a finished slice until all are there."""
    about = {"key": key, "record": translation.record}
    region = {} if translation.region is None else {"region": translation.region}
    checkpoint.save(folder / f"{k}.safetensors", {"change": translation.change, **region}, about)


# -------------------------------------------------------------------------------------------------------------- the end

OWN = (  # what a record says of one slice alone
    "wanted", "before", "after", "along", "effect", "reconstruction", "error", "reached", "strength", "attempts",
    "judge", "others", "preservation", "seconds",
)  # fmt: skip
WHOLE = ("panel", "slices", "failed")  # and of the volume


def finish(stack: Stack, done: Mapping[int, Translation], files: Files, dtype: str, key: str) -> list[Translation]:
    """Write the volume, its difference map, panel, table and record; return its slices' translations.

    A lone slice is written as an image of its own too. What was kept of the slices is removed, unless some failed: then
    the record has no key, and the same command tries those alone again.

    Raises:
        DiskError: if the disk refuses.
    """
    whole = stack.volume
    said = {
        k: {"slice": k, **{name: one.record[name] for name in OWN if name in one.record}} for k, one in done.items()
    }
    result = whole.with_slices({k: one.result.pixels for k, one in done.items()})
    difference = (result.pixels - whole.pixels).abs().sum(0, keepdim=True)  # the paper's map: summed over channels
    failed = [k for k in stack.slices if k not in done]
    most = max(done, key=lambda k: float(difference[0, k].sum()))
    record = {
        **{name: value for name, value in done[most].record.items() if name not in OWN},
        "files": [file.name for file in (*files, table_of(files))],
        "difference": "sum over the channels of |output - input|, in the intensities of the file",
        "panel": f"slice {most}, the one that changed most",
        "slices": list(said.values()),
        "failed": sorted({*failed, *stack.refused}),
    }
    with refusing_disk("-o", files.record.parent):
        volume.write(result, files.image, dtype)
        volume.write(whole.like(difference), files.difference)
        write_safely(files.panel, draw(replace(done[most], record={**done[most].record, "slice": most})))
        write_safely(table_of(files), table([row_of(one) for one in said.values()]))
        if len(stack.slices) == 1:
            save(done[most], alone(files, most), dtype)
        record |= told_of(whole)
        record |= {} if failed else {"key": key, "sha256": hashes(files, written(files, stack))}
        write_record(record, files)
    if not failed:
        shutil.rmtree(place_of(files), ignore_errors=True)
    return [replace(one, record=slice_record(record, k), files=files) for k, one in done.items()]


def slice_record(record: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Return the record of one slice, out of that of its volume."""
    mine = next(one for one in record["slices"] if one["slice"] == k)
    return {**{name: value for name, value in record.items() if name not in WHOLE}, **mine}


def written(files: Files, stack: Stack) -> list[Path]:
    """Return the files of a volume's results, but its record."""
    whole = [*members(files, stack.source.paths), files.difference, files.panel, table_of(files)]
    if len(stack.slices) > 1:
        return whole
    lone = alone(files, stack.slices[0])
    return [*whole, *members(lone, stack.source.paths), lone.difference, lone.panel]


def row_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the table: what the guide saw before and after, and how much changed."""
    seen = {f"{name} {when}": said[when][name] for name in said["after"] for when in ("before", "after")}
    return {
        "slice": said["slice"],
        **seen,
        **{name: said["preservation"].get(name) for name in ("changed", "changed_inside", "changed_outside")},
        "seconds": said["seconds"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def alone(files: Files, k: int) -> Files:
    """Return where the only slice goes as an image of its own: its number takes the place of the range."""
    stem = files.record.stem
    named = f"{re.sub(PART, '', stem)}_slice{k}"
    return Files(*(file.with_name(f"{named}{file.name[len(stem) :]}") for file in files))


def table_of(files: Files) -> Path:
    """Return where the table goes: a row for each slice."""
    return files.record.with_suffix(".csv")
