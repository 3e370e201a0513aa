"""Images in, images out: choose the models that fit, encode, decode with guidance, and write what happened beside the result."""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knife import __version__, panel
from knife.checkpoint import STARTER, Stored, check_fit, digest, load, stored_models
from knife.ddim import decode, encode
from knife.devices import resolve_device
from knife.errors import InputError, KnifeError, ModelError, SettingsError
from knife.image import NIFTI, Image, is_image, output_name, read, sequence_files, write, write_safely
from knife.schedule import path, timestep
from knife.tasks import Task, task


@dataclass(frozen=True)
class Settings:
    """How a translation walks; None means: the default that was measured for the model."""

    noise_level: int = 400
    steps: int = 100
    scale: float | None = None  # the paper's s; None: `strength` over the steepness measured when the guide was trained
    strength: float = 0.3  # size of the guidance against that of the noise prediction
    batch_size: int = 8
    clamp: bool = False


@dataclass(frozen=True)
class Pair:
    """A diffusion model and the guide that goes with it."""

    diffusion: Stored
    guide: Stored


@dataclass(frozen=True)
class Translation:
    """One translated image: what came in, what came out, and the record of how."""

    source: Image
    result: Image
    change: Tensor  # [C, h, w] in the model's units, on the model's grid
    target: Tensor  # as the task understands it
    record: dict[str, Any]
    files: tuple[Path, ...] = ()


def translate(
    images: str | Path | Sequence[str | Path],
    task_name: str,
    target: str,
    *,
    out: str | Path | None = None,
    models: str | Path | None = "models",
    dataset: str | None = None,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Translation]:
    """Translate images so that a task's prediction becomes the target.

    Args:
        images: a file, a folder of images, a folder with one file for each MR sequence, or several of these.
        task_name: the task that guides: regress, classify, segment or a plugin's.
        target: the wanted value in the task's own terms, such as 0.3, healthy, mask.nii.
        out: the folder to write results, difference maps, panels and records into; None writes nothing.
        models: the folder of trained models; where it has none that fit, or None is given, the shipped ones serve.
        dataset: which models to use if several fit.
        settings: noise level, steps, scale and the like.
        device: auto, cpu, cuda or cuda:N.
        progress: called with (network calls done, network calls in all).

    Returns:
        One translation for each image, in the order given.

    Raises:
        KnifeError: before anything is computed or written, if an input, a target, a model or a setting cannot be used.
    """
    guide_task = task(task_name)
    places = [Path(images)] if isinstance(images, str | Path) else [Path(image) for image in images]
    sources = [read(place) for place in expand(places)]
    pair = choose(task_name, sources, None if models is None else Path(models), dataset)
    settings = resolve(settings, pair)
    targets = [guide_task.target(target, image, pair.guide.card.spec, pair.guide.card.config) for image in sources]
    names = output_names(sources, task_name, target) if out is not None else []
    where, why = resolve_device(device)
    batches = -(-len(sources) // settings.batch_size)
    steps = iter(range(1, 2 * settings.steps * batches + 1))
    job = Job(
        guide_task,
        pair,
        settings,
        where,
        load(pair.diffusion, where),
        load(pair.guide, where),
        lambda: progress(next(steps), 2 * settings.steps * batches),
    )
    about = {
        "knife": __version__,
        "synthetic": "made by a generative model; for research, not for diagnosis",
        "task": task_name,
        "target": target,
        "settings": vars(settings),
        "device": f"{where}: {why}",
        "models": [model_record(pair.diffusion), model_record(pair.guide)],
    }
    results = run(job, sources, targets, about)
    if out is None:
        return list(results)
    return [save(result, Path(out), name) for result, name in zip(results, names, strict=True)]


def expand(places: Iterable[Path]) -> list[Path]:
    """Return the images that files and folders stand for; a folder with one file for each MR sequence is one image."""
    found: list[Path] = []
    for place in places:
        if not place.is_dir() or sequence_files(place):
            found.append(place)
            continue
        inside = sorted(p for p in place.iterdir() if is_image(p) or (p.is_dir() and sequence_files(p)))
        if not inside:
            raise InputError(f"{place}: no images in this folder; give a folder of NIfTI, PNG, JPEG or TIFF files.")
        found.extend(inside)
    return found


def choose(task_name: str, images: Sequence[Image], models: Path | None, dataset: str | None) -> Pair:
    """Return the models to use: those in `models` that have the task and fit the images, else the shipped ones.

    Raises:
        ModelError: if none fit, or several do and `dataset` does not choose.
    """
    reasons: list[str] = []
    for folder in filter(None, (models, STARTER)):
        pairs = [pair for pair in pairs_in(folder, task_name) if dataset in (None, pair.guide.card.dataset)]
        problems = {pair.guide.card.dataset: misfit(pair, images) for pair in pairs}
        fitting = [pair for pair in pairs if not problems[pair.guide.card.dataset]]
        reasons += [why for why in problems.values() if why]
        if len(fitting) > 1:
            names = ", ".join(pair.guide.card.dataset for pair in fitting)
            raise ModelError(f"--dataset: several models in {folder} fit the image ({names}); say which.")
        if fitting:
            check_fit(fitting[0].diffusion, fitting[0].guide)
            return fitting[0]
    named = f" of data set {dataset}" if dataset else ""
    raise ModelError(
        reasons[0]
        if reasons
        else f"task {task_name}: no trained model{named} in {models}; run `knife train diffusion` and `knife train {task_name}`."
    )


def pairs_in(folder: Path, task_name: str) -> list[Pair]:
    """Return the diffusion models of a folder that have a guide for the task beside them."""
    pairs = []
    for _, group in groupby(stored_models(folder), key=lambda stored: stored.path.parent):
        by_kind = {stored.card.kind: stored for stored in group}
        if "diffusion" in by_kind and task_name in by_kind:
            pairs.append(Pair(by_kind["diffusion"], by_kind[task_name]))
    return pairs


def misfit(pair: Pair, images: Iterable[Image]) -> str:
    """Say why a model does not fit the images, or nothing if it does."""
    wanted = pair.diffusion.card.spec.channels
    for image in images:
        found, name = image.channels, image.source.paths[0].name
        trained = f"the model {pair.diffusion.card.dataset} was trained on {len(wanted)} ({', '.join(wanted)})"
        if len(found) != len(wanted):
            return f"{name}: {len(found)} channel{'s' * (len(found) != 1)}, but {trained}."
        if found != wanted and not (unnamed(found) or unnamed(wanted)):
            return f"{name}: channels {', '.join(found)}, but {trained}."
    return ""


def unnamed(channels: Sequence[str]) -> bool:
    """Tell whether channels have numbers for names, because no file told any."""
    return all(name.isdigit() for name in channels)


def resolve(settings: Settings, pair: Pair) -> Settings:
    """Fill in what the settings leave open.

    Raises:
        SettingsError: if a setting is impossible for the model.
    """
    T = pair.diffusion.card.schedule.T
    if not 1 <= settings.noise_level <= T:
        raise SettingsError(f"--noise-level {settings.noise_level}: give a level from 1 to {T}.")
    path(settings.noise_level, settings.steps)
    if settings.batch_size < 1:
        raise SettingsError(f"--batch-size {settings.batch_size}: give at least 1.")
    if settings.scale is not None:
        return settings
    return replace(settings, scale=settings.strength / max(pair.guide.card.guidance.get("gradient", 1.0), 1e-12))


Numbers = dict[str, list[float]]  # what a guide sees: a name, a number for each image


@dataclass(frozen=True)
class Job:
    """What all batches of one call share."""

    task: Task
    pair: Pair
    settings: Settings
    device: str
    net: nn.Module
    guide: nn.Module
    tick: Callable[[], None]  # called after every step


def run(job: Job, sources: Sequence[Image], targets: Sequence[Tensor], about: dict[str, Any]) -> Iterator[Translation]:
    """Translate images batch by batch; `about` begins each record."""
    size, value_range = job.settings.batch_size, job.pair.diffusion.card.spec.value_range
    for first in range(0, len(sources), size):
        batch, wanted = sources[first : first + size], torch.stack(list(targets[first : first + size]))
        began = time.perf_counter()
        change, seen = translate_batch(job, batch, wanted)
        seconds = (time.perf_counter() - began) / len(batch)
        for i, image in enumerate(batch):
            along = [{"level": level, **{name: values[i] for name, values in numbers.items()}} for level, numbers in seen]
            record = {
                **about,
                "input": [p.name for p in image.source.paths],
                "window": image.window.tolist(),
                "before": along[0],
                "after": along[-1],
                "along": along,
                "seconds": round(seconds, 3),
            }
            yield Translation(image, image.plus(change[i], value_range), change[i], wanted[i], record)


def translate_batch(job: Job, batch: Sequence[Image], wanted: Tensor) -> tuple[Tensor, list[tuple[int, Numbers]]]:
    """Encode and decode one batch; return the change [N, C, h, w] and what the guide saw before, along and after."""
    card, settings = job.pair.diffusion.card, job.settings
    spec, levels = card.spec, path(settings.noise_level, settings.steps)
    x = torch.stack([image.normalised(spec.size, spec.value_range) for image in batch])
    x, wanted = x.to(job.device, memory_format=torch.channels_last), wanted.to(job.device)
    seen: list[tuple[int, Numbers]] = []
    looks = set(levels[:: max(1, settings.steps // 10)])

    @torch.no_grad()
    def look(level: int, image: Tensor) -> None:
        t = timestep(torch.full((len(batch),), level, device=job.device))
        numbers = job.task.evaluate(job.guide, image, t, wanted, job.pair.guide.card.config)
        seen.append((level, {name: [round(v, 6) for v in values.tolist()] for name, values in numbers.items()}))

    def track(level: int, image: Tensor) -> None:
        job.tick()
        if not bool(image.isfinite().all()):
            raise KnifeError(f"--scale {settings.scale:g}: the image is no longer finite at level {level}; give a smaller one.")
        if level in looks:
            look(level, image)

    look(0, x)
    noisy = encode(job.net, x, card.schedule, levels, lambda level, image: job.tick())
    clamp = spec.value_range if settings.clamp else None
    y = decode(job.net, noisy, card.schedule, levels, job.task.score(job.guide, wanted), settings.scale or 0.0, clamp, track)
    return (y - x).cpu(), seen


def model_record(stored: Stored) -> dict[str, Any]:
    """Return what a record says of a model: which it is, and the hash of its file."""
    return {"dataset": stored.card.dataset, "kind": stored.card.kind, "sha256": digest(stored.path)}


def output_names(sources: Sequence[Image], task_name: str, target: str) -> list[str]:
    """Return the stems that results are written under: input, task and target; numbered where two would be the same."""
    word = {"+": "more", "-": "less"}.get(target, Path(target).name.split(".nii")[0] if Path(target).exists() else target)
    word = re.sub(r"[^A-Za-z0-9.+-]+", "-", word)
    names: list[str] = []
    for image in sources:
        name = base = f"{output_name(image)[0]}_{task_name}_{word}"
        count = 1
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names.append(name)
    return names


def save(translation: Translation, out: Path, name: str) -> Translation:
    """Write the result, the difference map, the panel and the record; return the translation with its files."""
    source, result = translation.source, translation.result
    suffix = output_name(source)[1]
    image_file = out / f"{name}{suffix}"
    write(result, image_file)
    difference = (result.pixels - source.pixels).abs().sum(0, keepdim=True)  # the paper's map: summed over channels
    map_suffix = suffix or ".nii.gz"
    peak = float(difference.max())
    if map_suffix not in NIFTI:
        map_suffix, difference = ".png", (difference / max(peak, 1e-12) * 255).round()
    map_file = out / f"{name}_difference{map_suffix}"
    write(source.like(difference), map_file)
    panel_file, record_file = out / f"{name}_panel.png", out / f"{name}.json"
    write_safely(panel_file, draw(translation))
    files = (image_file, map_file, panel_file, record_file)
    record = {**translation.record, "difference_peak": peak, "files": [file.name for file in files]}
    write_safely(record_file, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    return replace(translation, record=record, files=files)


def draw(translation: Translation) -> bytes:
    """Draw input, output and difference as the model's window shows them, with the wanted mask if there is one."""
    source, result, target = translation.source, translation.result, translation.target
    mask = source.from_grid(target.float())[0] > 0.5 if target.ndim == 3 else None
    before, after = source.normalised(None, (0, 1)), result.normalised(None, (0, 1))
    record = translation.record
    words = [f"{name} {record['before'][name]:.3g} -> {record['after'][name]:.3g}" for name in record["after"] if name != "level"]
    return panel.translation(before, after, source.channels, mask, f"{record['task']} {record['target']}", ", ".join(words))
