"""Images in, images out: choose the models that fit, encode, decode with guidance, write what happened beside them.

Everything is read and checked before the first network call, so that a refusal leaves nothing behind.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from knife import __version__, dicom, ops, outputs, stacks, tasks
from knife.checkpoint import load
from knife.ddim import Scale, Track, balanced, decode, decode_with_control, encode, keep_outside
from knife.devices import enough_memory, resolve_device
from knife.errors import DeviceError, InputError, KnifeError, SamplingError, SettingsError, TargetError
from knife.image import NIFTI, SEQUENCES, Image, check_dtype, is_image, read, sequence_of
from knife.layouts import cases_of, sequences
from knife.masks import read_target_mask, soft_edged
from knife.outputs import Edit, Files, Translation, Unit, destinations, without_folder
from knife.pairs import Pair, choose, model_record, unnamed
from knife.schedule import path, timestep
from knife.settings import DEFAULTS, Settings
from knife.stacks import Stack, open_stack
from knife.volume import axial_count, open_volume

Place = str | Path
T = TypeVar("T")
Failed = Callable[[Path, KnifeError], None]  # hears of a file that could not be translated, and why
Numbers = dict[str, list[float]]  # what a guide sees: a name, a number for each image
LOOKS = 10  # times that the guide is asked along the way
ABSURD = 1e6  # no pixel of a noisy image comes near this
SYNTHETIC = "made by a generative model; for research, not for diagnosis"


@dataclass(frozen=True)
class Seen:
    """What the guide saw in a batch of images: names, and a number for each image."""

    before: Numbers
    along: Sequence[tuple[int, Numbers]]  # the noise level, and what was seen there
    after: Numbers  # in the result as it is written
    errors: Numbers  # how far the unguided decode is from the input, and the guided one from that
    seconds: float  # an image

    def record(self, i: int) -> dict[str, Any]:
        """Return the record of image number `i`."""

        def of(numbers: Numbers) -> dict[str, float]:
            return {name: values[i] for name, values in numbers.items()}

        along = [{"level": level, **of(numbers)} for level, numbers in self.along]
        seen = {"before": of(self.before), "after": of(self.after), "along": along}
        return {**seen, **of(self.errors), "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Job:
    """What all images of one call share."""

    task: tasks.Task
    pair: Pair
    settings: Settings
    device: str
    net: nn.Module
    guide: nn.Module
    about: Mapping[str, Any]  # what each record begins with
    tick: Callable[[], None]  # called after every step


def translate(
    images: Place | Sequence[Place],
    task: str,
    target: str,
    *,
    out: Place | None = None,
    models: Place | None = "models",
    dataset: str | None = None,
    settings: Settings = DEFAULTS,
    slices: stacks.Span | None = None,
    region: str | None = None,
    device: str = "auto",
    started: Callable[[Mapping[str, Any]], None] = lambda about: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    failed: Failed | None = None,
) -> list[Translation]:
    """Translate images so that a task's prediction becomes the target.

    Args:
        images: a file, a folder of images, a folder with one file for each MR sequence, or several of these; what
            is 3-D is translated slice by slice, and written as a volume again.
        task: the task that guides: regress, classify, segment or a plugin's.
        target: the wanted value in the task's own terms, such as 0.3, healthy, mask.nii.
        out: the folder to write results, difference maps, panels and records into; None writes nothing.
        models: the folder of trained models; where it has none that fit, or None is given, the shipped ones serve.
        dataset: the name of the models' folder, if several fit.
        settings: noise level, steps, scale and the like.
        slices: which axial slices of volumes, first and last + 1; None: all that show enough brain. A lone one is
            written as an image too.
        region: a mask file, or a shape such as ellipse:120,100,20,15, within which images may change; None: anywhere.
        device: auto, cpu, cuda or cuda:N.
        started: called once before the first step with what each record begins with, the number of `images` to
            do, how many slices an earlier call has `done`, and the masks in folders that were `left_out`.
        progress: called with (steps done, steps in all) after every step of a batch.
        failed: called with (file, why) for each input that cannot be read or is blown up by guidance, while the others
            go on; None: the first such ends it all.

    Returns:
        One translation for each image or slice, in the order given; the images of a folder by name.

    Raises:
        KnifeError: before anything is computed or written, if an input, a target, a model or a setting cannot be used;
            later, if memory runs out, the disk refuses, or guidance blows an image up.
    """
    kind = tasks.task(task)
    where, why = resolve_device(device)
    found, left_out = expand(images)
    sources = good([partial(opened, files, slices) for files in found], [files[0] for files in found], failed)
    samples = [source.images[0] if isinstance(source, Stack) else source for source in sources]
    pair = choose(task, samples, None if models is None else Path(models), dataset)
    check(settings, pair)
    spec = pair.diffusion.card.spec
    sources = [replace(source, crop=spec.crop) for source in sources]
    ask = partial(asked, kind, pair, target, region)
    wishes = good([partial(ask, source) for source in sources], [source.source.paths[0] for source in sources], failed)
    places = [source.source for source, _ in wishes]
    plans = [None] * len(places) if out is None else destinations(places, task, target, Path(out), region)
    about = {
        "task": task,
        "target": without_folder(target),
        "region": region and without_folder(region),
        "device": f"{where}: {why}",
        "ops": ops.status(where.split(":")[0]).path,
        **about_walk(settings, pair),
    }
    units = [unit_of(*parts, files, about, spec.value_range) for parts, files in zip(wishes, plans, strict=True)]
    todo = [edit for unit in units for edit in unit.todo]
    total = 2 * settings.steps * -(-len(todo) // settings.batch_size)
    ticks = count(1)
    with enough_memory(where, "the models do", "give --device cpu, or use smaller ones"):
        nets = load(pair.diffusion, where), load(pair.guide, where)
    numbers = {"images": len(todo), "done": sum(unit.done for unit in units)}
    started({**about, **numbers, "left_out": [mask.name for mask in left_out]})
    results = run(
        Job(kind, pair, settings, where, *nets, about, lambda: progress(min(next(ticks), total), total)), todo, failed
    )
    return [one for unit in units for one in unit.deliver(islice(results, len(unit.todo)))]


def about_walk(settings: Settings, pair: Pair) -> dict[str, Any]:
    """Return what every record says of program, settings and models."""
    return {
        "knife": __version__,
        "torch": torch.__version__,
        "synthetic": SYNTHETIC,
        "settings": asdict(settings) | ({} if settings.scale is None else {"strength": None}),
        "models": [{**model_record(stored), "shipped": pair.shipped} for stored in (pair.diffusion, pair.guide)],
    }


def asked(
    kind: tasks.Task, pair: Pair, target: str, region: str | None, source: Image | Stack
) -> tuple[Image | Stack, list[Edit]]:
    """Return an input, and what is asked of its images: target and region, read from the user's words.

    Slices of a volume that these say nothing of, as one that a mask does not reach, are left as they are.
    """
    card = pair.guide.card

    def ask(image: Image) -> Edit:
        wanted = kind.target(target, image, card.spec, card.config)
        return Edit(image, wanted, None if region is None else read_target_mask(region, image, "--region"))

    if isinstance(source, Image):
        return source, [ask(source)]
    told, errors = dict[int, Edit](), list[KnifeError]()
    for k, image in zip(source.slices, source.images, strict=True):
        try:
            told[k] = ask(image)
        except (InputError, TargetError) as error:
            errors.append(error)
    if not told:
        raise errors[0]
    return replace(source, slices=tuple(told)), [*told.values()]


def good(works: Sequence[Callable[[], T]], files: Sequence[Path], failed: Failed | None) -> list[T]:
    """Do several works, each on a file; with somebody to hear of what failed, the others go on.

    Raises:
        InputError, TargetError: if one fails and nobody hears of it, or if all fail.
    """
    done, errors = list[T](), list[KnifeError]()
    for work, file in zip(works, files, strict=True):
        try:
            done.append(work())
        except (InputError, TargetError) as error:
            errors.append(error)
            if failed is None:
                raise
            failed(file, error)
    if not done:
        raise errors[0]
    return done


def those_done(fresh: Iterable[Translation | None]) -> list[Translation]:
    """Return what did not fail."""
    return [one for one in fresh if one]


def unit_of(
    source: Image | Stack,
    edits: list[Edit],
    files: Files | None,
    about: Mapping[str, Any],
    value_range: tuple[float, float],
) -> Unit:
    """Return what is to do of an input; of a stack that is not written, all."""
    if isinstance(source, Image):
        return outputs.unit(edits[0], files, about["settings"]["dtype"])
    return Unit(edits, those_done) if files is None else stacks.unit(source, edits, files, about, value_range)


# -------------------------------------------------------------------------------------------------------------- inputs


def expand(images: Place | Sequence[Place]) -> tuple[list[tuple[Path, ...]], list[Path]]:
    """Return the files of each image that files and folders stand for, and the masks that were left out.

    3-D files of one case, a sequence each, stand for one volume. A folder stands for the images in it, but masks (by
    their names), and for those of its subfolders that hold one file for each MR sequence; a folder of DICOM files, or
    of such folders named by MR sequences, for one volume.

    Raises:
        InputError: if there are none, a folder cannot be listed, or a case in it is incomplete.
    """
    places = [Path(place) for place in ([images] if isinstance(images, str | Path) else images)]
    found: list[tuple[Path, ...]] = []
    left_out: list[Path] = []
    joined = volumes_among(places)
    for place in places:
        if not os.path.isdir(place):
            if place not in joined or joined[place] not in found:
                found.append(joined.get(place, (place,)))
            continue
        inside = listed(place)
        if series := dicom.case_of(place):
            found.append(series)
            continue
        here, masks = grouped(place, inside)
        folders = [path for path in inside if path.is_dir()]
        cases = [case for folder in folders for case in grouped(place, listed(folder))[0] if len(case) > 1]
        if not here + cases:
            raise InputError(f"{place}: no images in this folder; give one of NIfTI, PNG, JPEG, TIFF or DICOM files.")
        found += here + cases
        left_out += masks
    if not found:
        raise InputError("no image given; name at least one file or folder.")
    return found, left_out


def volumes_among(places: Sequence[Path]) -> dict[Path, tuple[Path, ...]]:
    """Return the 3-D files that belong together, a sequence each of otherwise one name: file -> all of its case."""
    files = [place for place in places if not os.path.isdir(place) and sequence_of(place) and is_volume_file(place)]
    cases, _ = cases_of(Path(), files)
    together = [tuple(case[name] for name in SEQUENCES if name in case) for case in cases.values()]
    return {file: case for case in together if len(case) > 1 for file in case}


def is_volume_file(file: Path) -> bool:
    """Tell whether a file is a NIfTI volume; what cannot be read is refused when it is read."""
    try:
        return file.name.lower().endswith(NIFTI) and axial_count(file) is not None
    except InputError:
        return False


def opened(files: Sequence[Path], slices: stacks.Span | None) -> Image | Stack:
    """Read an image, or a volume, of which some slices will be translated.

    Raises:
        InputError: if it cannot be read, or `slices` are asked of an image that is none of a volume.
    """
    if files[0].is_dir():
        return open_stack(dicom.open_case(files), slices)
    if is_volume_file(files[0]):
        return open_stack(open_volume(files), slices)
    if slices is not None:
        raise InputError(f"--slices: {files[0]} is a single slice and no volume; leave the option out.")
    return read(files)


def listed(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name.

    Raises:
        InputError: if it cannot be listed.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); allow it, or name the images.") from error


def grouped(root: Path, paths: Sequence[Path]) -> tuple[list[tuple[Path, ...]], list[Path]]:
    """Return the image files among some paths, those of one case and slice together, and the masks among them.

    Raises:
        InputError: if a case lacks a sequence that the others have.
    """
    files = [path for path in paths if is_image(path) and not path.is_dir()]
    found = sequences(root, files)
    if isinstance(found, str):
        told = {path: sequence_of(path) for path in files}
        masks = [path for path, sequence in told.items() if sequence is not None and sequence.name == "seg"]
        return [(path,) for path in files if path not in masks], masks
    if found.skipped:
        raise InputError(f"{next(iter(found.skipped.values()))}; complete the case, or move that file away.")
    return [entry.files for entry in found.entries], []


def check(settings: Settings, pair: Pair) -> None:
    """Refuse settings that the models cannot walk by.

    Raises:
        SettingsError: if a setting is impossible, or neither a scale is given nor a steepness known.
    """
    T = pair.diffusion.card.schedule.T
    if not 1 <= settings.noise_level <= T:
        raise SettingsError(f"--noise-level {settings.noise_level}: give a level from 1 to {T}.")
    path(settings.noise_level, settings.steps)
    if not 0 <= settings.guide_above < settings.noise_level:
        raise SettingsError(f"--guide-above {settings.guide_above}: give a level from 0 to below --noise-level.")
    if settings.batch_size < 1:
        raise SettingsError(f"--batch-size {settings.batch_size}: give 1 or more.")
    check_dtype(settings.dtype)
    for option, value in (("--scale", settings.scale), ("--strength", settings.strength)):
        if value is not None and not 0 <= value < math.inf:
            raise SettingsError(f"{option} {value:g}: give a number from 0 on.")
    if settings.scale is None and not 0 < steepness_of(pair) < math.inf:
        file = f"{pair.folder.name}/{pair.guide.path.name}"
        raise SettingsError(f"--strength: no steepness is known of {file}; give --scale, the paper's s, such as 100.")


def steepness_of(pair: Pair) -> float:
    """Return how steep the guide's score usually is, 0 if nobody measured it."""
    return pair.guide.card.guidance.get("gradient", 0.0)


def scale_of(settings: Settings, pair: Pair) -> float | Scale:
    """Return what multiplies the gradient."""
    if settings.scale is not None:
        return settings.scale
    return balanced(settings.strength, steepness_of(pair)) if settings.strength else 0.0


# ------------------------------------------------------------------------------------------------------------ the work


def run(job: Job, edits: Sequence[Edit], failed: Failed | None) -> Iterator[Translation | None]:
    """Translate images batch by batch, in their order; None stands for one that failed.

    A batch that does not fit into memory is halved, for all that follows too.

    Raises:
        DeviceError: if not even one image fits into memory.
        SamplingError: if guidance blows an image up, and nobody hears of those that failed.
    """
    size, first = job.settings.batch_size, 0
    while first < len(edits):
        batch = edits[first : first + size]
        try:
            with enough_memory(job.device, "one image does", "give --device cpu, or use smaller models"):
                done = each_on_its_own(job, batch, failed)
        except DeviceError:
            if len(batch) == 1:
                raise
            size = len(batch) // 2
            continue
        first += len(batch)
        yield from done


def each_on_its_own(job: Job, batch: Sequence[Edit], failed: Failed | None) -> list[Translation | None]:
    """Translate a batch so that an image that is blown up takes no other with it."""
    try:
        return [*translate_batch(job, batch)]
    except SamplingError as error:
        if len(batch) > 1:
            return [one for edit in batch for one in each_on_its_own(job, [edit], failed)]
        if failed is None:
            raise
        failed(batch[0].image.source.paths[0], error)
        return [None]


def translate_batch(job: Job, edits: Sequence[Edit]) -> list[Translation]:
    """Encode a batch of images, and decode it towards its targets (Algorithms 1 and 2)."""
    images, targets = [edit.image for edit in edits], torch.stack([edit.target for edit in edits])
    spec, settings, wanted = job.pair.diffusion.card.spec, job.settings, targets.to(job.device)
    began, along = time.perf_counter(), list[tuple[int, Numbers]]()
    looks = set(path(settings.noise_level, settings.steps)[:: max(1, settings.steps // LOOKS)])

    def track(level: int, x: Tensor) -> None:
        x = x[: len(images)]  # without the controls
        check_sane(job, images, level, x)
        if level in looks:
            along.append((level, look(job, level, x, wanted)))

    x = stacked(job, images)
    before = look(job, 0, x, wanted)
    y, start = edited(job, x, wanted, regions_of(job, edits), track)
    change = (y - start).cpu()
    results = [e.image.plus(delta, spec.value_range, e.region) for e, delta in zip(edits, change, strict=True)]
    after = look(job, 0, stacked(job, results), wanted)  # what was written, and not what the walk ended with
    errors = {"effect": sizes(y - start, spec.value_range)}
    errors |= {"reconstruction": sizes(start - x, spec.value_range)} if settings.control else {}
    seen = Seen(before, along, after, errors, (time.perf_counter() - began) / len(images))
    records = [{**job.about, **image_record(job.pair, image), **seen.record(i)} for i, image in enumerate(images)]
    return [Translation(*parts) for parts in zip(images, results, change, targets, records, strict=True)]


def edited(job: Job, x: Tensor, wanted: Tensor, region: Tensor | None, track: Track) -> tuple[Tensor, Tensor]:
    """Encode images [N, C, h, w] and decode them with guidance; return the result, and what it is compared with.

    That is the unguided decode, or without control the images themselves.
    """
    schedule, settings = job.pair.diffusion.card.schedule, job.settings
    levels, trajectory = path(settings.noise_level, settings.steps), {0: x}

    def climb(level: int, x: Tensor) -> None:
        job.tick()
        if region is not None:
            trajectory[level] = x

    def descend(level: int, x: Tensor) -> None:
        job.tick()
        track(level, x)

    noisy = encode(job.net, x, schedule, levels, climb)
    track(levels[-1], noisy)
    score, scale = job.task.score(job.guide, wanted), scale_of(settings, job.pair)
    clamp = job.pair.diffusion.card.spec.value_range if settings.clamp else None
    hold = None if region is None else keep_outside(region, trajectory)
    walk = (job.net, noisy, schedule, levels, score, scale, clamp, descend, hold, settings.guide_above)
    return decode_with_control(*walk) if settings.control else (decode(*walk), x)


def regions_of(job: Job, edits: Sequence[Edit]) -> Tensor | None:
    """Return where images may change on the model's grid, [N, 1, h, w] from 0 to 1, or None for anywhere."""
    size = job.pair.diffusion.card.spec.size
    masks = [soft_edged(edit.image.on_grid(edit.region, size)) for edit in edits if edit.region is not None]
    return torch.stack(masks).to(job.device) if masks else None


def sizes(difference: Tensor, value_range: tuple[float, float]) -> list[float]:
    """Return the mean size of a difference [N, C, h, w] for each image, as a share of the value range."""
    shares = difference.abs().flatten(1).mean(1) / (value_range[1] - value_range[0])
    return [float(f"{share:.3g}") for share in shares.tolist()]


def stacked(job: Job, images: Sequence[Image]) -> Tensor:
    """Return images as the model sees them, [N, C, h, w]."""
    spec = job.pair.diffusion.card.spec
    x = torch.stack([image.normalised(spec.size, spec.value_range) for image in images])
    return x.to(job.device, memory_format=torch.channels_last)


@torch.no_grad()
def look(job: Job, level: int, x: Tensor, wanted: Tensor) -> Numbers:
    """Return what the guide sees in images [N, C, h, w] at a noise level."""
    t = timestep(torch.full((len(x),), level, device=x.device))
    numbers = job.task.evaluate(job.guide, x, t, wanted, job.pair.guide.card.config)
    return {name: [float(f"{value:.6g}") for value in values.tolist()] for name, values in numbers.items()}


def check_sane(job: Job, images: Sequence[Image], level: int, x: Tensor) -> None:
    """Raise SamplingError, naming the images, if guidance has blown some of them up."""
    fine = (x.abs() < ABSURD).flatten(1).all(1).tolist()  # which NaN is not either
    if not all(fine):
        names = ", ".join(i.source.paths[0].name for i, ok in zip(images, fine, strict=True) if not ok)
        found = f"values beyond {ABSURD:g} at level {level}"
        scale, strength = job.settings.scale, job.settings.strength
        given = f"--strength than {strength:g}" if scale is None else f"--scale than {scale:g}"
        raise SamplingError(f"{names}: {found}; give a smaller {given}.")


def image_record(pair: Pair, image: Image) -> dict[str, Any]:
    """Return what a record says of an image; channels without names get those that the model knows."""
    return {
        "input": [file.name for file in image.source.paths],
        "channels": list(pair.diffusion.card.spec.channels if unnamed(image.channels) else image.channels),
        "window": [[float(f"{end:.6g}") for end in ends] for ends in image.window.tolist()],
    }
