"""How far up the noise levels a guide still sees, and what that says of the level to encode to.

Measured on images set apart, whose labels are known. For each task: noise the images to a level, and ask its network
how far they are from their own labels (`error`) and from the labels of other images (`chance`). Of the two,

    skill = 1 - error / chance

is 1 where the network is always right, and exactly 0 where its answer does not depend on the image, whatever the task
and its unit. For the diffusion model: how far encoding and decoding without guidance miss the image they began with.

`chosen` makes a default noise level of both. It is a rule of thumb, and --noise-level overrides it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count as counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knife import data, layouts, panel
from knife.checkpoint import STARTER, Card, Stored, describe, digest, load, read_about, read_tensors, save, write_safely
from knife.ddim import SOLVERS, decode, encode
from knife.devices import enough_memory, keep_freed_memory, resolve_device
from knife.errors import DiskError, InputError, KnifeError, ModelError, SamplingError, SettingsError, TaskError
from knife.files import room
from knife.finite import fill_of
from knife.lock import models_locked
from knife.schedule import Schedule, alpha_bar_on, noise, path, timestep
from knife.settings import BATCH, LEVEL, SPREAD, STANDARD
from knife.tasks import Task, task

SPLITS = ("val", "test", "train")  # whose images are measured on: the first that has enough of them
ENOUGH = 8  # images
LEVELS = 20  # steps from level 0 to T at which a guide is asked
ROUND_TRIPS = 8  # images that are encoded and decoded
ENCODED_TO = (0.2, 0.3, 0.4, 0.475, 0.5, 0.6, 0.75)  # of T
WALKED_IN = (10, 20, 50, 100)  # steps
NO_SKILL = 0.1  # a guide of less skill on clean images knows nothing of them
HIDDEN = 0.8  # of the skill on clean images is left at the level that is chosen
LOST = 0.5  # of it is left where a guide's window ends
LEAST_NOISE, MOST_NOISE = 0.1, 0.025  # alpha_bar at the lowest and the highest level that is chosen
FAITHFUL = 0.03  # error of the round trip, a share of the value range, that the chosen level keeps below
GRAIN = 40  # parts of T that chosen levels are rounded to
PICTURE = "calibration.png"
CHOICE, NOISE = range(2)  # what random numbers are drawn for

Choice = dict[str, int | None]  # noise_level, guide_below
Tick = Callable[[], None]
Walk = tuple[int, int]  # the noise level to encode to, and in how many steps


@dataclass(frozen=True)
class Subject:
    """A stored network, and the images that it is measured on."""

    stored: Stored
    sha256: str  # of its file
    x: Tensor  # [N, C, H, W]
    labels: Tensor | None = None  # [N, ...]; None: a diffusion model, which needs none

    @property
    def card(self) -> Card:
        """Return its card."""
        return self.stored.card

    @property
    def kind(self) -> str:
        """Return what it is: diffusion, or the name of a task."""
        return self.card.kind


@dataclass(frozen=True)
class Sight:
    """What a guide knows of images set apart, by noise level."""

    levels: Sequence[int]
    error: Sequence[float]  # mean distance of the images from their own labels, in the task's unit
    chance: Sequence[float]  # the same from the labels of other images
    images: int

    @property
    def skill(self) -> list[float]:
        """Return 1 - error / chance at each level; 0 where chance never errs, as when all labels are the same."""
        return [1 - error / chance if chance else 0.0 for error, chance in zip(self.error, self.chance, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Return what a card keeps of it."""
        error, chance = ([*map(brief, values)] for values in (self.error, self.chance))
        return {"levels": [*self.levels], "error": error, "chance": chance, "images": self.images}


@dataclass(frozen=True)
class RoundTrip:
    """How far encoding and decoding without guidance miss their input: mean absolute error, of the value range."""

    by_level: Mapping[Walk, float]  # to several levels in the default steps
    by_steps: Mapping[Walk, float]  # to the default level in several steps
    images: int

    def to_json(self) -> dict[str, Any]:
        """Return what a card keeps of it."""
        walks = {**self.by_level, **self.by_steps}.items()
        rows = [(level, steps, brief(error)) for (level, steps), error in walks]
        names = ("noise_level", "steps", "error")
        return {
            "reconstruction": dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)),
            "images": self.images,
        }


@dataclass(frozen=True)
class Calibration:
    """What was measured of the models of a data set, and stands in their cards now."""

    split: str  # whose images these are: val, test or train
    sights: Mapping[str, Sight]  # by task
    choices: Mapping[str, Choice]  # by task, as `chosen` returns them
    round_trip: RoundTrip | None  # None: there is no diffusion model
    left_out: Mapping[str, str]  # task -> why it was not measured
    picture: Path
    other_split: bool = False  # some of these may be images that the models have learnt from


def brief(value: float) -> float:
    """Return a number to six digits."""
    return float(f"{value:.6g}")


# --------------------------------------------------------------------------------------------- what a translation asks


def default_level(card: Card) -> int | None:
    """Return the noise level that a guide's calibration chose; None if there is none."""
    return told_level(card, "noise_level")


def told_level(card: Card, name: str) -> int | None:
    """Return a level 1..T out of a card's calibration, which may be a stranger's."""
    told = card.calibration.get(name) if isinstance(card.calibration, Mapping) else None
    return told if type(told) is int and 1 <= told <= card.schedule.T else None


# ------------------------------------------------------------------------------------------------------ the measurement


def calibrate(
    dataset: str,
    folder: Path,
    *,
    models: Path = Path("models"),
    count: int = 64,
    layout: str | None = None,
    slices: tuple[int, int] | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure the models of a data set on images set apart, and write what was found into their cards.

    Weights stay as they are, bit for bit, and judges are not measured. Nothing is written before all is measured.

    Args:
        dataset: the name of a folder in `models`.
        folder: the images; those that validate are taken, else those that test, else those that train.
        models: the folder of trained models.
        count: images at most.
        layout: how `folder` is laid out; None: as in the training, else what fits.
        slices: which axial slices of volumes, first and last + 1; None: as in the training.
        device: auto, cpu, cuda or cuda:N.
        progress: called with (done, total) as the measurement goes on.

    Raises:
        ModelError: if there are no such models, or they are damaged, or change meanwhile.
        DiskError: if they cannot be written to, or are being trained.
        InputError: if the images cannot be used, or have no labels for any of the tasks.
        TaskError: if no task tells how far an image is from its target, or its plugin fails.
        SettingsError: if `count` is too small, or `layout` or `slices` do not suit the folder.
        DeviceError: if the device is not there, or has too little memory.
        SamplingError: if the diffusion model blows images up.
    """
    if count < 2:
        raise SettingsError(f"--count {count}: give 2 or more; images are told from one another.")
    stored, where = stored_in(models, dataset), resolve_device(device)[0]
    keep_freed_memory()
    with models_locked(*(one.path for one in stored)):
        return of_stored(stored, opened(folder, stored, layout, slices), count, where, progress)


def of_stored(
    stored: Sequence[Stored], folder: layouts.Folder, count: int, where: str, progress: Callable[[int, int], None]
) -> Calibration:
    """Measure stored networks on images of a folder, and write what was found; see `calibrate`."""
    split, entries = set_apart(folder, count)
    subjects, left_out = subjects_of(stored, entries)
    total, done = sum(calls(one) for one in subjects), counter(1)
    with enough_memory(where, f"{BATCH} images at once do", "give --device cpu, or use smaller models"):
        found = [measured(one, where, lambda: progress(next(done), total)) for one in subjects]
    trip = next((one for one in found if isinstance(one, RoundTrip)), None)
    sights = {one.kind: seen for one, seen in zip(subjects, found, strict=True) if isinstance(seen, Sight)}
    choices = {one.kind: chosen(sights[one.kind], one.card.schedule, trip) for one in subjects if one.kind in sights}
    picture = stored[0].path.parent / PICTURE
    for one, seen in zip(subjects, found, strict=True):
        store(one, {**seen.to_json(), **choices.get(one.kind, {}), "split": split})
    write_safely(picture, drawn(picture.parent.name, sights, choices, trip))
    return Calibration(split, sights, choices, trip, left_out, picture, split_otherwise(stored, folder))


def measured(one: Subject, device: str, tick: Tick) -> Sight | RoundTrip:
    """Measure one network; `tick` is called `calls(one)` times."""
    net, x = load(one.stored, device), one.x.to(device)
    if one.labels is None:
        return round_trip(one.card, net, x, tick)
    return sight(one.card, net, x, one.labels.to(device), tick)


def calls(one: Subject) -> int:
    """Return in how many parts a network is measured."""
    if one.labels is None:
        return sum(2 * steps for _, steps in {*walks_by_level(one.card.schedule), *walks_by_steps(one.card.schedule)})
    return len(levels_of(one.card.schedule)) * -(-len(one.x) // BATCH)


@torch.no_grad()
def sight(card: Card, net: nn.Module, x0: Tensor, labels: Tensor, tick: Tick) -> Sight:
    """Measure what a guide knows of images [N, C, H, W] with labels [N, ...]; every level has the same noise."""
    kind, alpha_bar = task(card.kind), alpha_bar_on(card.schedule, x0.device)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(NOISE)).to(x0.device)
    images = torch.arange(len(x0), device=x0.device)
    means: list[tuple[float, float]] = []
    for level in levels_of(card.schedule):
        own, other = 0.0, 0.0
        for part in images.split(BATCH):
            k = torch.full_like(part, level)
            ask = partial(
                distance, kind, net, noise(x0[part], eps[part], alpha_bar[k]), timestep(k), config=card.config
            )
            own += float(ask(labels[part]).sum())
            other += float(ask(labels[part - 1]).sum())  # the first one's is that of the last
            tick()
        means.append((own / len(x0), other / len(x0)))
    error, chance = zip(*means, strict=True)
    return Sight(levels_of(card.schedule), error, chance, len(x0))


def distance(kind: Task, net: nn.Module, x: Tensor, t: Tensor, label: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return how far noised images are from labels, [N]."""
    values = kind.error(net, x, t, label, config)
    if values is None or not bool(values.isfinite().all()):
        raise TaskError(f"task {kind.name}: its hook error does not say how far an image is from a label.")
    return values


def levels_of(schedule: Schedule) -> list[int]:
    """Return the levels at which a guide is asked: from the clean image to nearly noise."""
    return path(schedule.T, min(LEVELS, schedule.T))


@torch.no_grad()
def round_trip(card: Card, net: nn.Module, x: Tensor, tick: Tick) -> RoundTrip:
    """Measure how far a diffusion model's unguided encoding and decoding miss images [N, C, H, W]."""
    low, high = card.spec.value_range

    @cache  # the default level in the default steps belongs to both
    def missed(walk: Walk) -> float:
        levels, solver, count = path(*walk, SPREAD), SOLVERS[STANDARD.solver], lambda level, x: tick()
        noisy, last = encode(net, x, card.schedule, levels, count, solver)
        y = decode(net, noisy, card.schedule, levels, track=count, solver=solver, before=last)
        if not bool(y.isfinite().all()):
            raise SamplingError(
                f"diffusion: encoding to level {walk[0]} and decoding blows images up; train it further."
            )
        return float((y - x).abs().mean()) / (high - low)

    by_level, by_steps = walks_by_level(card.schedule), walks_by_steps(card.schedule)
    return RoundTrip({w: missed(w) for w in by_level}, {w: missed(w) for w in by_steps}, len(x))


def walks_by_level(schedule: Schedule) -> list[Walk]:
    """Return walks to several noise levels, in the default steps or as many as there are levels."""
    levels = sorted({max(1, round(share * schedule.T)) for share in ENCODED_TO})
    return [(level, min(STANDARD.steps, level)) for level in levels]


def walks_by_steps(schedule: Schedule) -> list[Walk]:
    """Return walks to the default noise level, in several numbers of steps."""
    level = min(LEVEL, schedule.T)
    return [(level, steps) for steps in sorted({min(steps, level) for steps in WALKED_IN})]


# ---------------------------------------------------------------------------------------------------------- the choice


def chosen(seen: Sight, schedule: Schedule, trip: RoundTrip | None) -> Choice:
    """Choose the noise level to encode to, and the level below which the guide knows something.

    What the noise leaves to be seen, the diffusion model sees too, and makes again; what it has hidden, the guide can
    hardly steer. So the level is taken at which a guide has lost a fifth of the skill that it has on clean images:
    by then the noise hides part of what the task is about, and the guide still sees most of it. It is kept below the
    level at which the round trip misses its input by 3 % of the range, and, above all, between the levels at which a
    tenth and a fortieth of an image's variance is left, lest a weak guide ask for hardly any noise.

    This is a rule of thumb. Its numbers were set by a few models that translations were tried with, and noised images
    are not quite what encoding makes. Where a translation's result can be judged, a sweep of levels knows better.

    Returns:
        noise_level: the level to encode to; None if the guide knows nothing even of clean images.
        guide_below: the level at which the guide has lost half of its skill; likewise.
    """
    clean = seen.skill[0]
    if clean < NO_SKILL:
        return {"noise_level": None, "guide_below": None}
    hidden, lost = (crossing(seen.levels, [-skill for skill in seen.skill], -share * clean) for share in (HIDDEN, LOST))
    lowest, highest = (float((schedule.alpha_bar > left).sum()) for left in (LEAST_NOISE, MOST_NOISE))
    if trip:
        levels = [level for level, _ in trip.by_level]
        highest = min(highest, crossing(levels, [*trip.by_level.values()], FAITHFUL))
    return {
        "noise_level": rounded(max(min(hidden, highest), lowest), schedule),
        "guide_below": rounded(lost, schedule),
    }


def crossing(levels: Sequence[int], values: Sequence[float], limit: float) -> float:
    """Return where a curve first rises above a limit, on straight lines between points; its end if it never does."""
    if values[0] > limit:
        return levels[0]
    for (x, y), (next_x, next_y) in pairwise(zip(levels, values, strict=True)):
        if next_y > limit:
            return x + (next_x - x) * (limit - y) / (next_y - y)
    return levels[-1]


def rounded(level: float, schedule: Schedule) -> int:
    """Return the nearest of the levels that divide T into equal parts, at least 1."""
    grain = max(schedule.T / GRAIN, 1)
    return max(1, round(round(level / grain) * grain))


# ----------------------------------------------------------------------------------------------- models and images


def stored_in(models: Path, dataset: str) -> list[Stored]:
    """Return the diffusion model and the guides of a data set; judges are left out.

    Raises:
        ModelError: if there are none, or one of them is damaged.
        DiskError: if they could not be written.
    """
    place = models / dataset
    if not dataset or Path(dataset).name != dataset or not place.is_dir():
        shipped = f"; {dataset} is shipped with knife, copy {STARTER / dataset} there to measure it anew"
        raise ModelError(
            f"{place}: no such folder of models (knife models list)"
            f"{shipped if dataset and (STARTER / dataset).is_dir() else ''}."
        )
    files = [file for file in sorted(place.glob("*.safetensors")) if "." not in file.stem]  # no judge, and no state
    stored = [one for one in map(describe, files) if one.card.kind == one.path.stem and not one.card.judge]
    if not stored:
        raise ModelError(f"{place}: holds no diffusion model and no guide; train them first (knife train).")
    refuse_unwritable(place, max(one.path.stat().st_size for one in stored))
    return stored


def refuse_unwritable(folder: Path, need: int) -> None:
    """Refuse a folder that could not take what was measured, before minutes are spent."""
    try:
        free = room(folder)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be written to; copy the models, and give --models.") from error
    if free < need:
        raise DiskError(f"{folder}: {free / 2**20:.0f} MiB are free, a card takes {need / 2**20:.0f}; make room.")


def opened(
    folder: Path, stored: Sequence[Stored], layout: str | None, slices: tuple[int, int] | None
) -> layouts.Folder:
    """Open the folder of images, as the models' training did where nothing else is said."""
    trained: Mapping[str, Any] = next((s for one in stored if (s := one.card.training.get("settings"))), {})
    first_and_end = trained.get("slices")
    return layouts.open_folder(
        folder, layout or trained.get("layout"), slices or (tuple(first_and_end) if first_and_end else None)
    )


def split_otherwise(stored: Sequence[Stored], folder: layouts.Folder) -> bool:
    """Tell whether a network's training kept to another split than this folder's, or to none."""
    told = [one.card.training.get("split", folder.split_sha256) for one in stored]
    return any(split != folder.split_sha256 for split in told)


def set_apart(folder: layouts.Folder, count: int) -> tuple[str, list[layouts.Entry]]:
    """Return the name of the split that is measured on, and some of its images, the same every time."""
    splits = {name: folder.split(name) for name in SPLITS}
    enough = (name for name, entries in splits.items() if len(entries) >= ENOUGH)
    name = next(enough, max(splits, key=lambda name: len(splits[name])))
    order = torch.randperm(len(splits[name]), generator=torch.Generator().manual_seed(CHOICE)).tolist()
    return name, [splits[name][i] for i in order[:count]]


def subjects_of(stored: Sequence[Stored], entries: Sequence[layouts.Entry]) -> tuple[list[Subject], dict[str, str]]:
    """Return the networks with the images to measure them on, and why some tasks cannot be measured.

    Raises:
        InputError: if no image can be read.
        KnifeError: if there are guides and none of them can be measured: the first one's reason.
    """
    read = cache(lambda form: data.load(entries, form))
    subjects, reasons = [], dict[str, KnifeError]()
    for one in stored:
        loaded = read(form_of(one.card))
        if len(loaded.cases) < 2:
            why = next(iter(loaded.skipped.values()), "There are no more; give others.")
            raise InputError(f"--data: {len(loaded.cases)} of {len(entries)} images can be measured on. {why}")
        try:
            subjects.append(subject_of(one, loaded.cases))
        except (InputError, TaskError) as error:
            reasons[one.card.kind] = error
    if reasons and all(one.labels is None for one in subjects):
        raise next(iter(reasons.values()))
    return subjects, {kind: str(error) for kind, error in reasons.items()}


def form_of(card: Card) -> data.Form:
    """Return what a network's images are brought to, as its training did."""
    spec, trained = card.spec, card.training.get("settings", {})
    labels, brain = tuple(trained.get("mask_labels") or ()), trained.get("min_brain") or 0.0
    fill, synthetic = fill_of(trained.get("nan")), trained.get("synthetic", False)
    return data.Form(spec.channels, spec.size, spec.value_range, spec.crop, labels, brain, fill, synthetic)


def subject_of(stored: Stored, cases: Sequence[data.Case]) -> Subject:
    """Return a network with its images, and their labels if it is a guide.

    Raises:
        TaskError: if its task does not tell how far an image is from its target.
        InputError: if fewer than two images have a label.
    """
    card, sha256 = stored.card, digest(stored.path)
    if card.kind == "diffusion":
        return Subject(stored, sha256, data.stack(cases[:ROUND_TRIPS]))
    kind = task(card.kind)
    if "error" not in kind.hooks:
        raise TaskError(f"task {card.kind}: cannot be measured, its plugin has no hook error (knife plugins list).")
    examples, why = [], ""
    for case in cases:
        try:
            examples.append((case.pixels, kind.label(case, card.config)))
        except InputError as error:
            why = str(error)
    if len(examples) < 2:
        raise InputError(f"--data: {len(examples)} of {len(cases)} images have a label for {card.kind}. {why}")
    return Subject(stored, sha256, *map(torch.stack, zip(*examples, strict=True)))


def store(one: Subject, calibration: Mapping[str, Any]) -> None:
    """Write a calibration into the card of a stored network, whose weights stay as they are.

    Raises:
        ModelError: if the file is another than the one that was measured, or the disk refuses; it stays then.
    """
    file = one.stored.path
    tensors, about = read_tensors(file), read_about(file)
    if digest(file) != one.sha256:
        raise ModelError(f"{file}: has changed since it was measured; measure it again when its training has ended.")
    save(file, tensors, {**about, "calibration": calibration})


# --------------------------------------------------------------------------------------------------------- the picture


def drawn(dataset: str, sights: Mapping[str, Sight], choices: Mapping[str, Choice], trip: RoundTrip | None) -> bytes:
    """Draw the skill of every guide against the noise level, and the error of the round trip."""
    charts = []
    if sights:
        lines = [
            panel.Line(kind, [*zip(seen.levels, seen.skill, strict=True)], choices[kind]["noise_level"])
            for kind, seen in sights.items()
        ]
        charts.append(panel.chart(lines, "noise level", f"{dataset}: skill; dashed, the level that was chosen", high=1))
    if trip:
        of_level = panel.Line("", [(level, 100 * error) for (level, _), error in trip.by_level.items()])
        of_steps = panel.Line("", [(steps, 100 * error) for (_, steps), error in trip.by_steps.items()])
        level, _ = next(iter(trip.by_steps))
        charts.append(
            panel.chart([of_level], "noise level", f"error of the round trip in {STANDARD.steps} steps, % of the range")
        )
        charts.append(panel.chart([of_steps], "steps", f"error of the round trip to level {level}, % of the range"))
    return panel.png(panel.beside(charts), synthetic=False)
