"""Images in, images out: choose the models that fit, encode, decode with guidance, write what happened beside them.

Everything is read and checked before the first network call, so that a refusal leaves nothing behind.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from knife import __version__, ops, panel, tasks
from knife.checkpoint import STARTER, Stored, check_fit, describe, digest, load
from knife.data import sequences
from knife.ddim import decode, encode
from knife.devices import enough_memory, resolve_device
from knife.errors import InputError, KnifeError, ModelError, SettingsError
from knife.image import NIFTI, SUFFIXES, Image, Picture, is_image, output_name, read, sequence_of, write, write_safely
from knife.schedule import path, timestep

Place = str | Path
Numbers = dict[str, list[float]]  # what a guide sees: a name, a number for each image
LOOKS = 10  # times that the guide is asked along the way
ABSURD = 1e6  # no pixel of a noisy image comes near this
LONGEST_STEM = 120  # bytes of an input's name that the names of its results keep
SYNTHETIC = "made by a generative model; for research, not for diagnosis"


@dataclass(frozen=True)
class Settings:
    """How a translation walks."""

    noise_level: int = 400  # L: how far an image is encoded
    steps: int = 100  # of encoding, and again of decoding
    scale: float | None = None  # the paper's s; None: `strength` over the steepness measured when the guide was trained
    strength: float = 0.12  # size of the guidance against that of the noise prediction
    batch_size: int = 8
    clamp: bool = False  # keep the predicted clean image x0 within the value range while decoding


DEFAULTS = Settings()


@dataclass(frozen=True)
class Pair:
    """A diffusion model, and the guide beside it."""

    diffusion: Stored
    guide: Stored

    @property
    def folder(self) -> Path:
        """Return the folder of both; its name is the word after --dataset."""
        return self.guide.path.parent

    @property
    def shipped(self) -> bool:
        """Tell whether knife brought these models along."""
        return self.folder.parent == STARTER


class Files(NamedTuple):
    """Where one image's results go."""

    image: Path  # a folder, where the input was several files
    difference: Path
    panel: Path
    record: Path


@dataclass(frozen=True, eq=False)
class Translation:
    """One translated image: what came in, what came out, and how."""

    source: Image
    result: Image
    change: Tensor  # [C, h, w] in the model's units, on the model's grid
    target: Tensor  # as the task understands it
    record: dict[str, Any]
    files: Files | None = None  # None: nothing was written


@dataclass(frozen=True)
class Seen:
    """What the guide saw in a batch of images: names, and a number for each image."""

    before: Numbers
    along: Sequence[tuple[int, Numbers]]  # the noise level, and what was seen there
    after: Numbers  # in the result as it is written
    seconds: float  # an image

    def record(self, i: int) -> dict[str, Any]:
        """Return the record of image number `i`."""

        def of(numbers: Numbers) -> dict[str, float]:
            return {name: values[i] for name, values in numbers.items()}

        along = [{"level": level, **of(numbers)} for level, numbers in self.along]
        return {"before": of(self.before), "after": of(self.after), "along": along, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Job:
    """What all images of one call share."""

    task: tasks.Task
    pair: Pair
    settings: Settings  # with nothing left open
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
    device: str = "auto",
    started: Callable[[Mapping[str, Any]], None] = lambda about: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Translation]:
    """Translate images so that a task's prediction becomes the target.

    Args:
        images: a file, a folder of images, a folder with one file for each MR sequence, or several of these.
        task: the task that guides: regress, classify, segment or a plugin's.
        target: the wanted value in the task's own terms, such as 0.3, healthy, mask.nii.
        out: the folder to write results, difference maps, panels and records into; None writes nothing.
        models: the folder of trained models; where it has none that fit, or None is given, the shipped ones serve.
        dataset: the name of the models' folder, if several fit.
        settings: noise level, steps, scale and the like.
        device: auto, cpu, cuda or cuda:N.
        started: called once before the first step with what each record begins with, the number of `images`, and the
            masks in folders that were `left_out`.
        progress: called with (steps done, steps in all) after every step of a batch.

    Returns:
        One translation for each image, in the order given; the images of a folder by name.

    Raises:
        KnifeError: before anything is computed or written, if an input, a target, a model or a setting cannot be used;
            later, if memory runs out, the disk refuses, or guidance blows an image up.
    """
    kind = tasks.task(task)
    where, why = resolve_device(device)
    found, left_out = expand(images)
    sources = [read(files) for files in found]
    pair = choose(task, sources, None if models is None else Path(models), dataset)
    settings = resolve(settings, pair)
    card = pair.guide.card
    targets = [kind.target(target, image, card.spec, card.config) for image in sources]
    plans = None if out is None else destinations(sources, task, target, Path(out))
    about = {
        "knife": __version__,
        "torch": torch.__version__,
        "synthetic": SYNTHETIC,
        "task": task,
        "target": without_folder(target),
        "settings": asdict(settings),
        "models": [{**model_record(stored), "shipped": pair.shipped} for stored in (pair.diffusion, pair.guide)],
        "device": f"{where}: {why}",
        "ops": ops.status(where.split(":")[0]).path,
    }
    total = 2 * settings.steps * -(-len(sources) // settings.batch_size)
    ticks = iter(range(1, total + 1))
    with enough_memory(where, "the models do", "give --device cpu, or use smaller ones"):
        nets = load(pair.diffusion, where), load(pair.guide, where)
    started({**about, "images": len(sources), "left_out": [mask.name for mask in left_out]})
    job = Job(kind, pair, settings, where, *nets, about, lambda: progress(next(ticks), total))
    results = run(job, sources, targets)
    return list(results) if plans is None else [save(one, files) for one, files in zip(results, plans, strict=True)]


# -------------------------------------------------------------------------------------------------------------- inputs


def expand(images: Place | Sequence[Place]) -> tuple[list[tuple[Path, ...]], list[Path]]:
    """Return the files of each image that files and folders stand for, and the masks that were left out.

    A folder stands for the images in it, but masks (by their names), and for those of its subfolders that hold one file
    for each MR sequence.

    Raises:
        InputError: if there are none, a folder cannot be listed, or a case in it is incomplete.
    """
    places = [images] if isinstance(images, str | Path) else images
    found: list[tuple[Path, ...]] = []
    left_out: list[Path] = []
    for place in map(Path, places):
        if not os.path.isdir(place):
            found.append((place,))
            continue
        here, masks = grouped(place, listed(place))
        folders = [inside for inside in listed(place) if inside.is_dir()]
        cases = [case for folder in folders for case in grouped(place, listed(folder))[0] if len(case) > 1]
        if not here + cases:
            raise InputError(f"{place}: no images in this folder; give one of NIfTI, PNG, JPEG or TIFF files.")
        found += here + cases
        left_out += masks
    if not found:
        raise InputError("no image given; name at least one file or folder.")
    return found, left_out


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
    if found is None:
        told = {path: sequence_of(path) for path in files}
        masks = [path for path, sequence in told.items() if sequence is not None and sequence.name == "seg"]
        return [(path,) for path in files if path not in masks], masks
    if found.skipped:
        raise InputError(f"{next(iter(found.skipped.values()))}; give it, or name the images one by one.")
    return [entry.files for entry in found.entries], []


# -------------------------------------------------------------------------------------------------------------- models


def choose(task: str, images: Sequence[Image], models: Path | None, dataset: str | None) -> Pair:
    """Return the models to use: those in `models` that have the task and fit the images, else the shipped ones.

    A model file that cannot be read counts as missing while another fits; it is never passed over for a shipped one.

    Raises:
        ModelError: if none fit, several do and `dataset` does not choose, or guide and diffusion model do not fit.
    """
    if models is not None and models != Path("models") and not models.is_dir():
        raise ModelError(f"--models {models}: no such folder; give one that holds trained models.")
    reasons: list[str] = []
    for folder in (models, STARTER):
        pairs, broken = ([], []) if folder is None else pairs_in(folder, task, dataset)
        problems = [misfit(pair, images) for pair in pairs]
        fitting = [pair for pair, problem in zip(pairs, problems, strict=True) if not problem]
        if len(fitting) > 1:
            names = ", ".join(pair.folder.name for pair in fitting)
            raise ModelError(f"--dataset: several models in {folder} fit the images; give one of {names}.")
        if fitting:
            check_fit(fitting[0].diffusion, fitting[0].guide)
            return fitting[0]
        if broken:
            raise broken[0]
        reasons += problems
    here, named = models or "knife's own", f" under the name {dataset}" if dataset else ""
    advice = f"run `knife train diffusion` and `knife train {task}`, or see `knife models list`"
    raise ModelError(reasons[0] if reasons else f"task {task}: no trained models in {here}{named}; {advice}.")


def pairs_in(models: Path, task: str, dataset: str | None) -> tuple[list[Pair], list[ModelError]]:
    """Return the diffusion models in a folder that have a guide of the task beside them, and what cannot be read."""
    pairs, broken = [], []
    for folder in sorted(place for place in models.glob("*") if dataset in (None, place.name)):
        files = [folder / f"{kind}.safetensors" for kind in ("diffusion", task)]
        if all(os.path.lexists(file) for file in files):
            try:
                pairs.append(Pair(*map(described, files)))
            except ModelError as error:
                broken.append(error)
    return pairs, broken


def described(file: Path) -> Stored:
    """Read the card of a model that must be of the kind its file is named by.

    Raises:
        ModelError: if it cannot be read or is of another kind.
    """
    stored = describe(file)
    if stored.card.kind != file.stem:
        raise ModelError(f"{file}: a model of kind {stored.card.kind} under the wrong name; rename it, or remove it.")
    return stored


def misfit(pair: Pair, images: Sequence[Image]) -> str:
    """Say why a model does not fit the images, or nothing if it does."""
    wanted = pair.diffusion.card.spec.channels
    whose = f"the shipped model {pair.folder.name}" if pair.shipped else f"{pair.folder}"
    trained = f"but {whose} was trained on {len(wanted)} ({', '.join(wanted)})"
    for image in images:
        found, name = image.channels, image.source.paths[0].name
        if len(found) != len(wanted):
            count = f"{len(found)} channel{'s' * (len(found) != 1)}"
            return f"{name}: {count}, {trained}; give such an image, or a folder with one file for each."
        if found != wanted and not (unnamed(found) or unnamed(wanted)):
            return f"{name}: its channels are {', '.join(found)}, {trained}; give such an image."
    return ""


def unnamed(channels: Sequence[str]) -> bool:
    """Tell whether channels have numbers for names, because no file told any."""
    return all(name.isdigit() for name in channels)


def model_record(stored: Stored) -> dict[str, Any]:
    """Return what a record says of a model: which it is, how long it was trained, and the hash of its file."""
    about = {"dataset": stored.card.dataset, "kind": stored.card.kind, "steps": stored.card.training.get("step")}
    return {**about, "sha256": digest(stored.path)}


def resolve(settings: Settings, pair: Pair) -> Settings:
    """Return the settings with nothing left open.

    Raises:
        SettingsError: if a setting is impossible, or no scale is given and none was measured.
    """
    T, steepness = pair.diffusion.card.schedule.T, pair.guide.card.guidance.get("gradient", 0.0)
    if not 1 <= settings.noise_level <= T:
        raise SettingsError(f"--noise-level {settings.noise_level}: give a level from 1 to {T}.")
    path(settings.noise_level, settings.steps)
    if settings.batch_size < 1:
        raise SettingsError(f"--batch-size {settings.batch_size}: give 1 or more.")
    for option, value in (("--scale", settings.scale), ("--strength", settings.strength)):
        if value is not None and not 0 <= value < math.inf:
            raise SettingsError(f"{option} {value:g}: give a number from 0 on.")
    if settings.scale is not None:
        return replace(settings, strength=settings.scale * steepness)
    if not 0 < steepness < math.inf:
        file = f"{pair.folder.name}/{pair.guide.path.name}"
        raise SettingsError(f"--scale: none was measured for {file}; give the paper's s, such as 100.")
    return replace(settings, scale=settings.strength / steepness)


# ------------------------------------------------------------------------------------------------------------ the work


def run(job: Job, sources: Sequence[Image], targets: Sequence[Tensor]) -> Iterator[Translation]:
    """Translate images batch by batch, in their order.

    Raises:
        DeviceError: if a batch does not fit into memory.
        KnifeError: if guidance blows an image up.
    """
    size = job.settings.batch_size
    for first in range(0, len(sources), size):
        batch = slice(first, first + size)
        count = len(sources[batch])
        remedy = f"lower --batch-size to less than {count}" if count > 1 else "give --device cpu, or use smaller models"
        with enough_memory(job.device, f"a batch of {count} does", remedy):
            done = translate_batch(job, sources[batch], torch.stack(list(targets[batch])))
        yield from done


def translate_batch(job: Job, images: Sequence[Image], targets: Tensor) -> list[Translation]:
    """Encode a batch of images, and decode it towards its targets [N, ...] (Algorithms 1 and 2)."""
    card, settings, wanted = job.pair.diffusion.card, job.settings, targets.to(job.device)
    levels, value_range, began = path(settings.noise_level, settings.steps), card.spec.value_range, time.perf_counter()
    looks = set(levels[:: max(1, settings.steps // LOOKS)])

    def track(level: int, x: Tensor) -> None:
        job.tick()
        check_sane(job, images, level, x)
        if level in looks:
            along.append((level, look(job, level, x, wanted)))

    x = stacked(job, images)
    before = look(job, 0, x, wanted)
    noisy = encode(job.net, x, card.schedule, levels, lambda level, x: job.tick())
    along = [(levels[-1], look(job, levels[-1], noisy, wanted))]
    clamp, score = value_range if settings.clamp else None, job.task.score(job.guide, wanted)
    y = decode(job.net, noisy, card.schedule, levels, score, settings.scale or 0.0, clamp, track)
    change = (y - x).cpu()
    results = [image.plus(delta, value_range) for image, delta in zip(images, change, strict=True)]
    after = look(job, 0, stacked(job, results), wanted)  # what was written, and not what the walk ended with
    seen = Seen(before, along, after, (time.perf_counter() - began) / len(images))
    records = [{**job.about, **image_record(job.pair, image), **seen.record(i)} for i, image in enumerate(images)]
    return [Translation(*parts) for parts in zip(images, results, change, targets, records, strict=True)]


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
    """Raise KnifeError, naming the images, if guidance has blown some of them up."""
    fine = (x.abs() < ABSURD).flatten(1).all(1).tolist()  # which NaN is not either
    if not all(fine):
        names = ", ".join(i.source.paths[0].name for i, ok in zip(images, fine, strict=True) if not ok)
        found = f"values beyond {ABSURD:g} at level {level}"
        raise KnifeError(f"{names}: {found}; give a smaller --scale than {job.settings.scale:g}.")


def image_record(pair: Pair, image: Image) -> dict[str, Any]:
    """Return what a record says of an image; channels without names get those that the model knows."""
    return {
        "input": [file.name for file in image.source.paths],
        "channels": list(pair.diffusion.card.spec.channels if unnamed(image.channels) else image.channels),
        "window": [[float(f"{end:.6g}") for end in ends] for ends in image.window.tolist()],
    }


# -------------------------------------------------------------------------------------------------------------- outputs


def destinations(sources: Sequence[Image], task: str, target: str, out: Path) -> list[Files]:
    """Return where each image's results go, named by input, task and target, and numbered where names would clash.

    Raises:
        InputError: if an input or the target would be overwritten.
        SettingsError: if the folder cannot be written to.
    """
    there = next(folder for folder in (out, *out.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise SettingsError(f"-o {out}: {there} is no folder that can be written to; give another one.")
    inputs: list[Place] = [*(file for image in sources for file in image.source.paths), target]
    taken = {identity(file) for file in inputs if os.path.exists(file)}
    word, names, plans = target_word(target), set[str](), []
    for image in sources:
        stem, suffix = output_name(image)
        name = unused(f"{safe(stem)}_{task}_{word}", names)
        files = files_of(out, name, suffix)
        within = [files.image / own.name for own in image.source.paths] if not suffix else []
        for file in (*files, *within):
            if os.path.exists(file) and identity(file) in taken:
                raise InputError(f"{file}: this is an input, and inputs are never overwritten; give another -o.")
        plans.append(files)
    return plans


def files_of(out: Path, name: str, suffix: str) -> Files:
    """Return the files of one image's results; the difference map is NIfTI beside NIfTI, else PNG."""
    map_suffix = suffix if suffix.lower() in NIFTI else ".png" if suffix else ".nii.gz"
    ends = (suffix, f"_difference{map_suffix}", "_panel.png", ".json")
    return Files(*(out / f"{name}{end}" for end in ends))


def identity(file: Place) -> tuple[int, int]:
    """Return what a file is known by, whatever the path to it."""
    status = os.stat(file)
    return status.st_dev, status.st_ino


def without_folder(target: str) -> str:
    """Return a target as the user gave it, but of a file its name alone: no record tells where files lie."""
    return Path(target).name or target if os.path.exists(target) or os.path.isabs(target) else target


def target_word(target: str) -> str:
    """Return a target as a part of a file name: "more" for +, "less" for -, a file's name without its suffix."""
    word = without_folder(target)
    for suffix in SUFFIXES:
        word = word[: -len(suffix)] if word.lower().endswith(suffix) else word
    return {"+": "more", "-": "less"}.get(word, re.sub(r"[^A-Za-z0-9.+-]+", "-", word)[:40])


def safe(stem: str) -> str:
    """Return an input's stem with nothing unprintable in it, and short enough to have an ending added."""
    printable = "".join(c if c.isprintable() else "_" for c in stem)
    return printable.encode()[:LONGEST_STEM].decode(errors="ignore")


def unused(name: str, names: set[str]) -> str:
    """Return a name that is not among `names` yet, numbered if need be, and add it to them."""
    numbered = (name if count == 1 else f"{name}_{count}" for count in range(1, len(names) + 2))
    free = next(one for one in numbered if one.lower() not in names)  # some file systems do not tell X from x
    names.add(free.lower())
    return free


def save(translation: Translation, files: Files) -> Translation:
    """Write the result, the difference map, the panel and, last, the record; return the translation with its files.

    Raises:
        SettingsError: if the disk refuses.
    """
    source, result = translation.source, translation.result
    difference = (result.pixels - source.pixels).abs().sum(0, keepdim=True)  # the paper's map: summed over channels
    peak = float(difference.max())
    about = {
        "files": [file.name for file in files],
        "difference": "sum over the channels of |output - input|"
        + (f"; white is {peak:g}" if files.difference.suffix == ".png" else ", in the intensities of the file"),
        "difference_peak": peak,
    }
    translation = replace(translation, record={**translation.record, **about}, files=files)
    text = json.dumps(translation.record, indent=1, allow_nan=False) + "\n"
    try:
        write(result, files.image)
        if isinstance(source.source.kind, Picture):
            write_safely(files.difference, panel.png(panel.grey(difference[0], 0, peak)))
        else:
            write(source.like(difference), files.difference)
        write_safely(files.panel, draw(translation))
        write_safely(files.record, text.encode())
    except OSError as error:
        reason = f"cannot be written to ({error.strerror or error})"
        raise SettingsError(f"-o {files.record.parent}: {reason}; make room, or allow it.") from error
    return translation


def draw(translation: Translation) -> bytes:
    """Draw input, output and change within the input's window, with the wanted mask if the target is one."""
    source, result, target, record = translation.source, translation.result, translation.target, translation.record
    is_mask = target.shape == (1, *translation.change.shape[1:])
    mask = source.from_grid(target.float())[0] > 0.5 if is_mask else None
    seen = [f"{name} {record['before'][name]:.3g} -> {record['after'][name]:.3g}" for name in record["after"]]
    title = ": ".join(filter(None, (f"{record['task']} {record['target']}", ", ".join(seen))))
    before, after = source.normalised(None, (0, 1)), result.normalised(None, (0, 1))
    return panel.translation(before, after, record["channels"], mask, title)
