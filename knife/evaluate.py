"""How good edits are: images set apart are translated towards several targets, as users do it, and measured.

What the guide sees in a result tells little, as the guide is what made it: a network is easily pleased by what is
drawn for it alone. So all that is read off a result is read twice, by the guide and by the judge, if there is one.
Every figure has a 95 % interval, from resampling patients (images, where no patient is known).

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

and of each image: guide_own_error, the distance of the untouched image from its own label, if the data tell it,
guide_own, the number seen in it, label, the number it should be, and guide_rising, whether its numbers rise with the
targets. The judge's are called judge_... likewise. guide_own_slope is that of guide_own over label: a network that sees
but half of what differs between true images sees no more of what differs between edited ones.
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
from knife.bootstrap import RESAMPLES, Figure, Statistic, figure, mean, median, rounded, slope, spearman
from knife.calibrate import form_of, opened, split_otherwise
from knife.data import Case, Form
from knife.devices import keep_freed_memory, resolve_device
from knife.errors import InputError, KnifeError, SettingsError, TargetError, TaskError
from knife.files import write_safely
from knife.image import Image
from knife.layouts import SPLIT_NAMES, Entry, Folder
from knife.outputs import Edit, Translation, refuse_unwritable, refusing_disk, without_folder
from knife.pairs import Pair, choose, doubts, judge_of
from knife.settings import DEFAULTS, Settings, Wish
from knife.steering import Job, Reader, Ticks, run
from knife.survey import number_of
from knife.translation import AUTO, about_walk, absolute, asked, check, job_of, level_of
from knife.volume import Volume

WHO = ("guide", "judge")
NEAR = 0.1  # share of a wanted number that counts as near it
NO_FIGURE = (
    *("image", "patient", "target", "wanted", "label"),
    *(f"{who}_{when}" for who in WHO for when in ("before", "after", "own")),
)
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
    region: str | None = None,
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
        region: where images may change, as `translate` understands it; None: anywhere.
        settings: noise level, steps, strength and the like; by default as users get them.
        device: auto, cpu, cuda or cuda:N.
        progress: called with (steps done, steps in all) after every step of a batch.

    Raises:
        SettingsError: if an option is impossible.
        DiskError: if the results could not be written.
        InputError: if no image of the split can be used.
        TargetError: if a target means nothing to the task.
        ModelError: if there are no such models, or they are damaged.
        DeviceError: if the device is not there, or has too little memory.
        KnifeError: if not one translation succeeds: why the first failed.
    """
    check_options(targets, split, count, out)
    wishes = [Wish(task, target) for target in dict.fromkeys(targets)]
    pair, (where, why) = choose(task, [], models, dataset), resolve_device(device)
    keep_freed_memory()
    settings = replace(settings.at(level_of([pair])), auto_region=region == AUTO)
    region = None if region == AUTO else region
    check(settings, wishes, [pair])
    source = opened(folder, [pair.guide, pair.diffusion], layout, slices)
    samples, skipped = read(set_apart(source, split), form_of(pair.guide.card), count, seed)
    job = job_of([tasks.task(task)], wishes[:1], [pair], settings, where)
    asks, failed = asks_of(job, wishes, region, samples)
    job = replace(job, ticks=Ticks(len(asks), 1 + settings.auto_region + job.rounds, len(job.levels) - 1, progress))
    rows = [row_of(ask, one) for ask, one in translated(job, asks, failed)]
    images = [image_row(job, sample, rows) for sample in samples]
    parts = {ask.target: [row for row in rows if row["target"] == ask.target] for ask in asks}
    about = {
        "dataset": dataset,
        "task": task,
        "targets": [*parts],
        "split": split,
        **about_images(source, samples, pair, seed),
        "judge": job.guides[0].judge is not None,
        "doubts": doubts([pair]),
        "region": AUTO if settings.auto_region else region and without_folder(region),
        "device": f"{where}: {why}",
        **about_walk(job, [pair]),
    }
    by_target = {target: figures_of(part, [], seed) for target, part in parts.items()}
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
    refuse_unwritable("-o", out)


def about_images(source: Folder, samples: Sequence[Sample], pair: Pair, seed: int) -> dict[str, Any]:
    """Return what is to be known of the images; whether models or judge were trained by another split of them too."""
    networks = [pair.guide, pair.diffusion, *filter(None, [judge_of(pair)])]
    return {
        "count": len(samples),
        "patients": len({sample.entry.key for sample in samples}),
        "layout": source.layout,
        "other_split": split_otherwise(networks, source),
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


def asks_of(
    job: Job, wishes: Sequence[Wish], region: str | None, samples: Sequence[Sample]
) -> tuple[list[Ask], list[Row]]:
    """Return what is asked of which image; and of which it cannot be, as a mask that vanishes on it.

    Raises:
        InputError, TargetError: if a target can be asked of no image, or a region lies on none.
    """
    asks, failed = list[Ask](), list[Row]()
    for wish in wishes:
        target, errors = without_folder(wish.target), list[KnifeError]()
        for sample in samples:
            try:
                text = absolute(job, job.guides[0], wish.target, sample.image)
                _, [edit] = asked(job, [wish._replace(target=text)], region, sample.image)
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
    errors = list[KnifeError]()
    reasons = iter(errors)  # heard in the order of the images that fail
    results = run(job, [[ask.edit for ask in asks]], lambda file, error: errors.append(error))
    for ask, one in zip(asks, results, strict=True):
        if one is None:
            failed.append(miss(ask.sample, ask.target, next(reasons)))
        else:
            yield ask, one
    if len(errors) == len(asks):
        raise errors[0]


def miss(sample: Sample, target: str, error: KnifeError) -> Row:
    """Return what is said of a translation that failed."""
    return {"image": sample.entry.name, "target": target, "why": str(error)}


# ------------------------------------------------------------------------------------------------------------ the rows


def row_of(ask: Ask, one: Translation) -> Row:
    """Return what one translation came to."""
    record, entry = one.record, ask.sample.entry
    drift = record.get("others", {"before": {}, "after": {}})
    return {
        "image": entry.name,
        "patient": entry.key,
        "target": ask.target,
        "wanted": number_of(ask.text) if len(record["after"]) == 1 else None,
        **reading("guide", ask, record),
        **reading("judge", ask, record.get("judge", {})),
        **record["preservation"],
        **{name: record[name] for name in ("reconstruction", "effect") if name in record},
        **{f"drift: {name}": rounded(abs(value - drift["before"][name])) for name, value in drift["after"].items()},
        **{name: record[name] for name in ("reached", "strength") if name in record},
        "decodes": len(record.get("attempts", [()])),
        "seconds": record["seconds"],
    }


def reading(who: str, ask: Ask, seen: Mapping[str, Any]) -> Row:
    """Return what a network sees of one translation: `seen` has its numbers before and after, and the error."""
    before, after = seen.get("before", {}), seen.get("after", {})
    name = score_of(after, ask.text)
    if name is None:
        return {f"{who}_error": error_in(seen)}
    row = {f"{who}_before": before[name], f"{who}_after": after[name], f"{who}_error": error_in(seen)}
    wanted = number_of(ask.text)
    if len(after) == 1 and wanted:  # a tenth of nothing is nothing
        row[f"{who}_within"] = abs(after[name] - wanted) <= NEAR * abs(wanted)
    if name.startswith("p("):
        row[f"{who}_flipped"] = None if likeliest(before) == name else likeliest(after) == name
    return row


def score_of(numbers: Mapping[str, float], target: str) -> str | None:
    """Return which of a task's numbers says how it stands: p(wanted class), the Dice, or its only one."""
    for name in (f"p({target})", "dice"):
        if name in numbers:
            return name
    return next(iter(numbers)) if len(numbers) == 1 else None


def likeliest(numbers: Mapping[str, float]) -> str:
    """Return the name of the largest number."""
    return max(numbers, key=lambda name: numbers[name])


def error_in(seen: Mapping[str, Any]) -> float | None:
    """Return the one task's distance from its target, if there is one."""
    error = next(iter(seen.get("error", {}).values()), None)
    return error if error is not None and math.isfinite(error) else None


def image_row(job: Job, sample: Sample, rows: Sequence[Row]) -> Row:
    """Return what is known of one image over all of its translations."""
    guide, mine = job.guides[0], [row for row in rows if row["image"] == sample.entry.name]
    row: Row = {"image": sample.entry.name, "patient": sample.entry.key}
    row["label"] = guide.task.value(sample.case, guide.stored.card.config)
    for who, reader in zip(WHO, (guide, guide.judge), strict=True):
        if reader:
            error, number = own(reader, sample.case, job.device)
            row |= {f"{who}_own_error": error, f"{who}_own": number, f"{who}_rising": rising(who, mine)}
    return row


def own(reader: Reader, case: Case, device: str) -> tuple[float | None, float | None]:
    """Return how far a network is from an image's own label, and the single number it sees; None if there is none."""
    x = case.pixels[None].to(device)
    try:
        label = reader.task.label(case, reader.stored.card.config)
        [error], numbers = reader.error(x, label[None].to(device)), reader.numbers(x, 0, None)
    except (InputError, TaskError):  # there is no label, or a judge from elsewhere fails on the image
        return None, None
    return error if math.isfinite(error) else None, numbers.popitem()[1][0] if len(numbers) == 1 else None


def rising(who: str, rows: Sequence[Row]) -> bool | None:
    """Tell whether the numbers of an image's results rise with those wanted; None of fewer than two."""
    told = [row for row in rows if row["wanted"] is not None and f"{who}_after" in row]
    points = sorted((row["wanted"], row[f"{who}_after"]) for row in told)
    return all(a[1] < b[1] for a, b in pairwise(points)) if len(points) > 1 else None


# --------------------------------------------------------------------------------------------------------- the figures


def figures_of(rows: Sequence[Row], images: Sequence[Row], seed: int) -> dict[str, Figure]:
    """Return all figures that translations and images have, by name, each with its interval."""
    kinds = [(rows, *one) for one in measures(rows)] + [(images, *one) for one in measures(images)]
    found = ((name, measured(table, statistic, columns, seed)) for table, name, statistic, columns in kinds)
    return {name: one for name, one in found if one}


def measures(rows: Sequence[Row]) -> Iterator[tuple[str, Statistic, tuple[str, ...]]]:
    """Yield what can be measured of rows: a name, the statistic, and its columns."""
    alike = len({row.get("target") for row in rows}) == 1 or all(row.get("wanted") is None for row in rows)
    for who in WHO:
        before, after, error = (f"{who}_{word}" for word in ("before", "after", "error"))
        yield f"{error}_median", median, (error,)
        if alike:  # of several numbers wanted, a median says nothing
            yield f"{before}_median", median, (before,)
            yield f"{after}_median", median, (after,)
        for name, x, y in ((who, "wanted", after), (f"{who}_own", "label", f"{who}_own")):
            yield f"{name}_spearman", spearman, (x, y)
            yield f"{name}_slope", slope, (x, y)
    for column in columns_of(rows):
        if column not in NO_FIGURE:
            yield column, mean, (column,)


def measured(rows: Sequence[Row], statistic: Statistic, columns: Sequence[str], seed: int) -> Figure | None:
    """Measure the rows that have all of some columns; None if there are none, or it is not defined for them."""
    full = [row for row in rows if all(row.get(column) is not None for column in columns)]
    values = np.array([[row[column] for column in columns] for row in full], dtype=float)
    return figure(statistic, values, [row["patient"] for row in full], seed)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of all columns, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row))


# ----------------------------------------------------------------------------------------------------------- the files


def save(found: Evaluation) -> None:
    """Write the picture, the table and, last, the record.

    Raises:
        DiskError: if the disk refuses.
    """
    text = json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n"
    with refusing_disk("-o", found.files.record.parent):
        write_safely(found.files.picture, drawn(found))
        write_safely(found.files.table, table(found.rows))
        write_safely(found.files.record, text.encode())


def table(rows: Sequence[Row]) -> bytes:
    """Return rows as CSV; a cell without a value is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")


def drawn(found: Evaluation) -> bytes:
    """Draw wanted against achieved numbers, or the scores before and after; the errors; and what changed."""
    charts = [
        panel.chart(lines, x_name, title) for lines, x_name, title in curves(found) if any(x.points for x in lines)
    ]
    return panel.png(panel.beside(charts), synthetic=False)


def curves(found: Evaluation) -> Iterator[tuple[list[panel.Line], str, str]]:
    """Yield the charts as their lines, the name of the x axis, and the title."""
    rows, task, of_images = found.rows, found.about["task"], "% of the translations, sorted"
    wanted = [row["wanted"] for row in rows if row["wanted"] is not None]
    if len({*wanted}) > 1:
        ends = [(end, end) for end in (min(wanted), max(wanted))]
        yield [panel.Line("wanted", ends), *(response(who, found) for who in WHO)], "wanted", f"{task}: median achieved"
    else:
        lines = [sorted_values("before", rows, "judge_before" if found.about["judge"] else "guide_before")]
        lines += [sorted_values(who, rows, f"{who}_after") for who in WHO]
        yield lines, of_images, f"{task}: score, before and after"
    blank = panel.Line("", [])  # leaves guide and judge their colours
    errors = [sorted_values(who, rows, f"{who}_error") for who in WHO]
    yield [blank, *errors], of_images, f"{task}: distance from the target"
    changes = [sorted_values(name, rows, name, 100) for name in ("changed", "changed_outside")]
    yield changes, of_images, "mean change, % of the image's window"


def response(who: str, found: Evaluation) -> panel.Line:
    """Return the line of the median numbers achieved over those wanted, a point for each target."""
    points = []
    for target in found.about["targets"]:
        pairs = [(row["wanted"], row.get(f"{who}_after")) for row in found.rows if row["target"] == target]
        known = np.array([pair for pair in pairs if None not in pair], dtype=float)
        if len(known):
            wanted, achieved = np.median(known, axis=0).tolist()
            points.append((wanted, achieved))
    return panel.Line(who if points else "", sorted(points))


def sorted_values(name: str, rows: Sequence[Row], column: str, unit: float = 1.0) -> panel.Line:
    """Return the line of a column's quantiles: at x percent of the translations the value is at most y."""
    values = [unit * row[column] for row in rows if row.get(column) is not None]
    if not values:
        return panel.Line("", [])
    return panel.Line(name, [(float(x), float(np.percentile(values, x))) for x in SHARES])
