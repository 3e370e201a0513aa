"""How good edits are: images set apart are translated towards several targets, as users do it, and measured.

What the guide sees in a result tells little, as the guide is what made it: a network is easily pleased by what is
drawn for it alone. So all that is read off a result is read twice, by the guide and by the judge, if there is one. Every
figure has a 95 % interval, from resampling patients (images, where no patient is known).

A row is one translation; what its names mean:

    wanted                   the target as a number, where the task has a single one
    guide_before, _after     the task's score: its only number, the Dice with the wanted mask, or p(wanted class)
    guide_error              the distance from the target, in the task's own unit
    guide_within             the number is within a tenth of the wanted one
    guide_flipped            the wanted class is the likeliest now; nothing where it was so before
    changed, ssim, ...       what stayed, see `knife.preservation`
    reconstruction, effect   mean size of what the unguided round trip, and guidance, changed
    drift: ...               by how much the number of a task moved that nobody asked
    reached, strength, decodes, seconds     what the closed loop took

and of each image: guide_own_error, the distance of the untouched image from its own label, if the data tell it, and
guide_rising, whether its numbers rise with the targets. The judge's are called judge_... likewise.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knife import data, panel, tasks
from knife.bootstrap import RESAMPLES, Figure, Statistic, figure, mean, median, slope, spearman
from knife.calibrate import form_of, opened
from knife.data import Case, Form
from knife.devices import resolve_device
from knife.errors import InputError, KnifeError, SettingsError, TargetError
from knife.files import room, write_safely
from knife.image import Image
from knife.layouts import SPLIT_NAMES, Entry, Folder
from knife.outputs import Edit, Translation, refusing_disk, without_folder
from knife.pairs import Pair, choose
from knife.settings import DEFAULTS, Settings, Wish
from knife.steering import Job, Reader, run
from knife.translation import Ticks, about_walk, absolute, asked, check, job_of, level_of
from knife.volume import Volume

WHO = ("guide", "judge")
NEAR = 0.1  # share of a wanted number that counts as near it
NO_FIGURE = ("image", "patient", "target", "wanted", *(f"{who}_{when}" for who in WHO for when in ("before", "after")))
SHARES = range(0, 101, 2)  # percent of the images, along the curves

Row = dict[str, Any]


class Sample(NamedTuple):
    """An image of the data folder, as it is translated and as its label is read."""

    entry: Entry
    image: Image
    case: Case


class Ask(NamedTuple):
    """One image and what is asked of it."""

    sample: Sample
    target: str  # as records say it
    text: str  # as the task reads it
    edit: Edit


class Files(NamedTuple):
    """What an evaluation leaves behind."""

    record: Path  # all of it, as JSON
    table: Path  # the rows, as CSV
    picture: Path


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    about: Mapping[str, Any]  # task, targets, split, settings, models and their hashes
    rows: Sequence[Row]  # a translation each
    images: Sequence[Row]
    figures: Mapping[str, Figure]
    by_target: Mapping[str, Mapping[str, Figure]]
    failed: Sequence[Row]  # image, target, and why it could not be translated
    skipped: Mapping[str, str]  # image -> why it could not be used
    files: Files

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            **self.about,
            "figures": told(self.figures),
            "by_target": {target: told(figures) for target, figures in self.by_target.items()},
            "failed": [*self.failed],
            "skipped": dict(self.skipped),
            "images": [*self.images],
            "rows": [*self.rows],
        }


def told(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """Return figures as JSON values."""
    return {name: one.to_json() for name, one in figures.items()}


# ------------------------------------------------------------------------------------------------------ the evaluation


def evaluate(
    dataset: str,
    folder: Path,
    task: str,
    targets: Sequence[str],
    *,
    out: Path,
    models: Path | None = Path("models"),
    split: str = "test",
    count: int = 64,
    layout: str | None = None,
    slices: tuple[int, int] | None = None,
    seed: int = 0,
    settings: Settings = DEFAULTS,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Translate images set apart towards each target, and measure the results.

    Args:
        dataset: the name of the models' folder.
        folder: the images.
        task: the task that guides.
        targets: what each image shall become, one after the other, as `translate` understands them.
        out: the folder for evaluation.json, evaluation.csv and evaluation.png.
        models: the folder of trained models; where it has none of that name, the shipped ones serve.
        split: whose images are translated: test, val or train.
        count: images at most, drawn by `seed`.
        layout: how `folder` is laid out; None: as in the training, else what fits.
        slices: which axial slices of volumes, first and last + 1; None: as in the training.
        seed: of the images' choice and of the resampling.
        settings: noise level, steps, strength and the like; by default as users get them.
        device: auto, cpu, cuda or cuda:N.
        progress: called with (steps done, steps in all) after every step of a batch.

    Raises:
        SettingsError: if an option is impossible, or the results could not be written.
        InputError: if no image of the split can be used.
        TargetError: if a target means nothing to the task.
        ModelError: if there are no such models, or they are damaged.
        DeviceError: if the device is not there, or has too little memory.
        KnifeError: if not one translation succeeds: why the first failed.
    """
    check_options(targets, split, count, out)
    wishes = [Wish(task, target) for target in dict.fromkeys(targets)]
    pair, (where, why) = choose(task, [], models, dataset), resolve_device(device)
    settings = settings.at(level_of([pair]))
    check(settings, wishes, [pair])
    source = opened(folder, [pair.guide, pair.diffusion], layout, slices)
    samples, skipped = read(set_apart(source, split), form_of(pair.guide.card), count, seed)
    job = job_of([tasks.task(task)], wishes[:1], [pair], settings, where)
    asks, failed = asks_of(job, wishes, samples)
    job = replace(job, tick=Ticks(job, len(asks), progress))
    rows = [row_of(ask, one, task) for ask, one in translated(job, asks, failed)]
    images = [image_row(job, sample, rows) for sample in samples]
    about = {
        "dataset": dataset,
        "task": task,
        "targets": [without_folder(wish.target) for wish in wishes],
        "split": split,
        **about_images(source, samples, pair, seed),
        "judge": job.guides[0].judge is not None,
        "device": f"{where}: {why}",
        **about_walk(job, [pair]),
    }
    by_target = {
        target: figures_of([row for row in rows if row["target"] == target], [], seed) for target in about["targets"]
    }
    files = Files(*(out / f"evaluation{end}" for end in (".json", ".csv", ".png")))
    found = Evaluation(about, rows, images, figures_of(rows, images, seed), by_target, failed, skipped, files)
    save(found)
    return found


def check_options(targets: Sequence[str], split: str, count: int, out: Path) -> None:
    """Refuse what cannot be done or written, before minutes are spent."""
    if not targets:
        raise SettingsError("--targets: none given; separate them by commas, as 0.02,0.05,0.1.")
    if split not in SPLIT_NAMES:
        raise SettingsError(f"--split {split}: no such split; give one of {', '.join(SPLIT_NAMES)}.")
    if count < 1:
        raise SettingsError(f"--count {count}: give 1 or more.")
    try:
        room(out)
    except OSError as error:
        raise SettingsError(f"-o {out}: {error.filename} is {error.strerror}; give another one.") from error


def about_images(source: Folder, samples: Sequence[Sample], pair: Pair, seed: int) -> dict[str, Any]:
    """Return what is to be known of the images; whether the models' training kept to another split.json too."""
    splits = [stored.card.training.get("split") for stored in (pair.guide, pair.diffusion)]
    return {
        "count": len(samples),
        "patients": len({sample.entry.key for sample in samples}),
        "layout": source.layout,
        "other_split": any(told is not None and told != source.split_sha256 for told in splits),
        "seed": seed,
        "resamples": RESAMPLES,
    }


# ---------------------------------------------------------------------------------------------------------- the images


def set_apart(source: Folder, split: str) -> list[Entry]:
    """Return the images of a split.

    Raises:
        InputError: if there are none.
    """
    entries = source.split(split)
    if not entries:
        sizes = ", ".join(f"{name} {len(source.split(name))}" for name in SPLIT_NAMES)
        raise InputError(
            f"--data {source.root}: no image is set apart as {split} ({sizes}); "
            "draw some by `knife data split` and train anew, or give another --split."
        )
    return entries


def read(entries: Sequence[Entry], form: Form, count: int, seed: int) -> tuple[list[Sample], dict[str, str]]:
    """Read images drawn at random until there are `count`, by name; and say which could not be used, and why.

    Raises:
        InputError: if none can be used.
    """
    rest = [entries[i] for i in np.random.default_rng(seed).permutation(len(entries))]
    samples, skipped = list[Sample](), dict[str, str]()
    while rest and len(samples) < count:
        missing = count - len(samples)
        for part in data.by_volume(rest[:missing]):
            for entry, found in zip(part, samples_of(part, form), strict=True):
                if isinstance(found, Sample):
                    samples.append(found)
                else:
                    skipped[entry.name] = found
        rest = rest[missing:]
    if not samples:
        raise InputError(f"--data: none of {len(entries)} images can be used. {next(iter(skipped.values()))}")
    return sorted(samples, key=lambda sample: sample.entry.name), skipped


def samples_of(entries: Sequence[Entry], form: Form) -> Iterator[Sample | str]:
    """Yield one image, or slices of one volume that is opened once; of what cannot be used the reason why."""
    source = None
    for entry in entries:
        try:
            if entry.slice is not None and source is None:
                source = data.volume_of(entry, form.fill)
            yield sample_of(entry, form, source)
        except InputError as error:
            yield str(error)


def sample_of(entry: Entry, form: Form, source: Volume | None) -> Sample:
    """Read an image; of a slice, its pixels alone stay in memory, and not those of its volume."""
    case = data.case_of(entry, form, source)
    image = data.image_of(entry, source, form.fill)
    return Sample(entry, replace(image, crop=form.crop, pixels=image.pixels.clone()), case)


def asks_of(job: Job, wishes: Sequence[Wish], samples: Sequence[Sample]) -> tuple[list[Ask], list[Row]]:
    """Return what is asked of which image; and of which it cannot be, as a mask that vanishes on it.

    Raises:
        InputError, TargetError: if a target can be asked of no image.
    """
    asks, failed = list[Ask](), list[Row]()
    for wish in wishes:
        target, errors = without_folder(wish.target), list[KnifeError]()
        for sample in samples:
            try:
                text = absolute(job, job.guides[0], wish.target, sample.image)
                _, [edit] = asked(job, [wish._replace(target=text)], None, sample.image)
                asks.append(Ask(sample, target, text, edit))
            except (InputError, TargetError) as error:
                errors.append(error)
                failed.append(miss(sample, target, error))
        if len(errors) == len(samples):
            raise errors[0]
    return asks, failed


def translated(job: Job, asks: Sequence[Ask], failed: list[Row]) -> Iterator[tuple[Ask, Translation]]:
    """Yield what was asked and what became of it; what fails is added to `failed`.

    Raises:
        KnifeError: if all fail: why the first did.
    """
    errors, done = list[KnifeError](), 0
    results = run(job, [ask.edit for ask in asks], lambda file, error: errors.append(error))
    for ask, one in zip(asks, results, strict=True):
        if one is None:
            failed.append(miss(ask.sample, ask.target, errors[len(asks) and -1]))
        else:
            done += 1
            yield ask, one
    if not done:
        raise errors[0]


def miss(sample: Sample, target: str, error: KnifeError) -> Row:
    """Return what is said of a translation that failed."""
    return {"image": sample.entry.name, "target": target, "why": str(error)}
