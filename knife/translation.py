"""Images in, images out: read the inputs, choose the models that fit, and see that results are written beside them.

Options, models, the folder of the results and the first batch of images are checked before the first step, so that a
refusal leaves nothing behind. Then one thread reads the next batch and one writes the last while the network works, so
that a thousand images take no more memory than a few, and what an earlier call has made is not made again.
"""

import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import torch

from knife import __version__, ops, outputs, stacks, streams, tasks
from knife.calibrate import default_level
from knife.checkpoint import Stored, load
from knife.ddim import called
from knife.devices import computed_in, enough_memory, keep_freed_memory, resolve_device
from knife.errors import ApartError, InputError, KnifeError, ModelError, SettingsError, TargetError, TaskError
from knife.files import shown
from knife.finite import fill_of
from knife.graphs import player
from knife.image import Image, check_dtype
from knife.inputs import Place, expand, opened, shard_of, unread
from knife.judges import Offered, judges_record, offered
from knife.masks import read_target_mask
from knife.outputs import Edit, Files, Translation, Unit, destinations, without_folder
from knife.pairs import Pair, choose, doubts, judge_of, misfit, model_record, onlookers
from knife.schedule import path
from knife.settings import DEFAULTS, LEVEL, Settings, Wish
from knife.stacks import Stack
from knife.steering import Failed, Guide, Job, Reader, Ticks, run, stacked

P = ParamSpec("P")
SYNTHETIC = "made by a generative model; for research, not for diagnosis"
AUTO = "auto"  # the region found from what guidance changed
BY = re.compile(r"by:([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(%?)")  # a target that counts from what the image has


class Input(NamedTuple):
    """One input."""

    files: tuple[Path, ...]
    results: Files | None  # where they go; None: nowhere
    source: Image | stacks.Stack | KnifeError | None = None  # what was read, or why it could not be; None: not yet


def translations(
    images: Place | Sequence[Place],
    *wishes: Wish,
    out: Place | None = None,
    models: Place | None = "models",
    dataset: str | None = None,
    settings: Settings = DEFAULTS,
    slices: stacks.Span | None = None,
    region: str | None = None,
    nan: str | None = None,
    shard: str | None = None,
    device: str = "auto",
    started: Callable[[Mapping[str, Any]], None] = lambda about: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    failed: Failed | None = None,
) -> Iterator[Translation]:
    """Translate images so that the predictions of tasks become their targets.

    `translations` yields each as soon as it is written; `translate` waits for all, and returns them as a list.

    Args:
        images: a file, a folder of images, a folder with one file for each MR sequence, or several of these; what
            is 3-D is translated slice by slice, and written as a volume again.
        wishes: the tasks that guide, and what each wants: Wish("regress", "0.3"). Their order does not matter.
        out: the folder to write results, difference maps, panels and records into; None, the default, writes nothing.
            What lies there already, from the same input, wishes, settings and models, is read back and not made again.
        models: the folder of trained models; where it has none that fit, or None is given, the shipped ones serve.
        dataset: the name of the models' folder, if several fit the first image.
        settings: noise level, steps, strength and the like.
        slices: which axial slices of volumes, first and last + 1; None: all that show enough brain. A lone one is
            written as an image too.
        region: a mask file, or a shape such as ellipse:120,100,20,15, within which images may change; auto: where a
            first decode changes most; None: anywhere.
        nan: fill=0 reads pixels that are not finite as 0, in the file's own intensities; None: such a file is refused.
        shard: 2/8 is the second of eight parts of the inputs, None all; auto: as a SLURM array, srun or torchrun say.
        device: auto, cpu, cuda or cuda:N.
        started: called once before the first step with what each record begins with, the number of `inputs`, which
            `shard` of them, the masks in folders that were `left_out`, files there of formats `unread`, and the
            `doubts` about the guides, in words.
        progress: called with (steps done, steps in all) after every step of a batch; a volume counts as one image until
            it is read, and what is done already does not count.
        failed: called with (file, why) for each input that cannot be read or is blown up by guidance, while the others
            go on; None: the first such ends it all.

    Yields:
        One translation for each image or slice, in the order given; the images of a folder by name.

    Raises:
        KnifeError: before anything is computed or written, if a target, a model, a setting or one of the first batch of
            images cannot be used; later, if another image cannot, memory runs out, the disk refuses, or guidance blows
            an image up.
    """
    wishes = checked(wishes)
    kinds = [tasks.task(wish.task) for wish in wishes]
    where, why = resolve_device(str(device))
    keep_freed_memory()
    settings = replace(settings, auto_region=region == AUTO)
    region = None if region == AUTO else region
    found, left_out = expand(images)
    mine = shard_of(shard, len(found), os.environ)
    inputs = planned(found, wishes, out, region, slices)[mine.number - 1 :: mine.of]
    if not inputs:
        return
    head, rest = first_read(inputs, partial(opened, wanted=slices, fill=fill_of(nan)), failed)
    pairs = chosen(wishes, [sample_of(head[-1].source)], None if models is None else Path(models), dataset)
    settings = settings.at(level_of(pairs))
    check(settings, wishes, pairs)
    job = job_of(kinds, wishes, pairs, settings, where)
    about = {
        **about_wishes(wishes, region, settings),
        "device": f"{where}: {why}",
        "ops": ops.status(where.split(":")[0]).path,
        **about_walk(job, pairs),
    }
    ticks = Ticks(len(inputs), 1 + settings.auto_region + job.rounds, len(job.levels) - 1, progress)
    job = replace(job, about=about, ticks=ticks)
    told = {**about, "inputs": len(inputs), "shard": mine, "left_out": [mask.name for mask in left_out]}
    told |= {"unread": [file.name for file in unread(images)], "doubts": doubts(pairs)}
    units = (unit_of(job, pairs[0], wishes, region, one, failed is None) for one in chain(head, rest))
    with closing(streams.ahead(units, lambda unit: max(unit.images, 1), job.at_once)) as read:
        works = followed(job, heard(read, ticks, partial(started, told), failed), failed)
        with closing(streams.behind(works, 2 * job.at_once)) as written:
            for ready in written:
                yield from ready


def listed(name: str, stream: Callable[P, Iterator[Translation]]) -> Callable[P, list[Translation]]:
    """Return a function that returns a list of all that another yields."""

    def all_of(*args: P.args, **kwargs: P.kwargs) -> list[Translation]:
        return [*stream(*args, **kwargs)]

    all_of.__name__ = all_of.__qualname__ = name
    all_of.__doc__ = (stream.__doc__ or "").replace("Yields:", "Returns:")
    told = signature(stream).replace(return_annotation=list[Translation])
    setattr(all_of, "__signature__", told)  # noqa: B010 - functions have no such attribute to the type checker
    return all_of


translate = listed("translate", translations)  # for the few: all images stay in memory


# -------------------------------------------------------------------------------------------------- one after the other


def planned(
    found: Sequence[tuple[Path, ...]],
    wishes: Sequence[Wish],
    out: Place | None,
    region: str | None,
    slices: stacks.Span | None,
) -> list[Input]:
    """Return the inputs, and where the results of each go, whether it can be read or not."""
    if out is None:
        return [Input(files, None) for files in found]
    plans = destinations(found, wishes, Path(out), region, stacks.part_of(slices))
    return [Input(*one) for one in zip(found, plans, strict=True)]


def first_read(
    inputs: Sequence[Input], read: Callable[[Sequence[Path]], Image | Stack], failed: Failed | None
) -> tuple[list[Input], Iterator[Input]]:
    """Read inputs until one can be; return them, and an iterator that reads the others when asked for them.

    Raises:
        InputError: if none can be read, or one cannot, or is not there, and nobody hears of it.
    """
    for one in inputs if failed is None else ():
        for file in one.files:
            if not os.path.exists(file):
                raise InputError(f"{shown(file)}: no such file; check the name.")

    def tried(one: Input) -> Input:
        try:
            return one._replace(source=read(one.files))
        except InputError as error:
            return one._replace(source=error)

    rest, head = map(tried, inputs), list[Input]()
    for one in rest:
        head.append(one)
        if not isinstance(one.source, KnifeError):
            return head, rest
        if failed is None:
            break
    assert isinstance(head[0].source, KnifeError)
    raise head[0].source


def sample_of(source: Image | Stack | KnifeError | None) -> Image:
    """Return an image to see what an input is like."""
    assert isinstance(source, Image | Stack)
    return source.first if isinstance(source, Stack) else source


def unit_of(job: Job, pair: Pair, wishes: Sequence[Wish], region: str | None, one: Input, strict: bool) -> Unit:
    """Return what is to do of an input; of one that cannot be used nothing, and why; if `strict`, of its slices too."""
    refused = list[tuple[Path, KnifeError]]()

    def hear(file: Path, why: KnifeError) -> None:
        refused.append((file, why))

    try:
        unit = unit_to_do(job, pair, wishes, region, one, None if strict else hear)
    except (InputError, ModelError, TargetError) as error:
        refused, unit = [(one.files[0], error)], Unit([])
    return unit._replace(refused=tuple(refused))


def unit_to_do(
    job: Job, pair: Pair, wishes: Sequence[Wish], region: str | None, one: Input, failed: Failed | None
) -> Unit:
    """Return what is to do of an input; of a stack that is not written, all.

    Raises:
        InputError, ModelError, TargetError: if it cannot be used.
    """
    if isinstance(one.source, KnifeError):
        raise one.source
    if problem := misfit(pair, [sample_of(one.source)]):
        raise ModelError(problem)
    assert one.source is not None
    spec = job.diffusion.card.spec
    source, edits = asked(job, wishes, region, replace(one.source, crop=spec.crop), failed)
    if isinstance(source, Image):
        return outputs.unit(edits[0], one.results, job.about, spec)
    return Unit(edits) if one.results is None else stacks.unit(source, edits, one.results, job.about, spec)


def heard(units: Iterable[Unit], ticks: Ticks, begin: Callable[[], None], failed: Failed | None) -> Iterator[Unit]:
    """Yield units; tell on the way what was refused, how many images there are, and that it begins.

    Raises:
        KnifeError: if something was refused and nobody hears of it, or if all was: why the first was.
    """
    errors, begun = list[KnifeError](), False
    for unit in units:
        for file, why in unit.refused:
            if failed is None:
                raise why
            failed(file, why)
            errors += [why] if not begun else []
        ticks.more(len(unit.todo) - 1)
        if unit.images and not begun:
            begun = True
            begin()
        yield unit
    if not begun:
        raise errors[0]


def followed(job: Job, units: Iterator[Unit], failed: Failed | None) -> Iterator[Callable[[], list[Translation]]]:
    """Translate units; yield what follows from each result, which is to be called, in the order of the inputs.

    Batches are filled across units, but none waits for an image that lies behind many that are done already.
    """
    edits, waiting, size = deque[Edit](), deque[Unit](), job.at_once

    def another() -> bool:
        for unit in islice(units, 1):
            waiting.append(unit)
            edits.extend(unit.todo)
            return True
        return False

    def batches() -> Iterator[list[Edit]]:
        while edits or another():
            while len(edits) < size and sum(unit.done for unit in waiting) < size and another():
                pass
            yield [edits.popleft() for _ in range(min(size, len(edits)))]

    results = run(job, batches(), failed)
    while waiting or another():
        unit = waiting.popleft()
        for i, one in enumerate(islice(results, len(unit.todo))):
            if one:
                yield partial(unit.keep, i, one)
        yield unit.finish
    next(results, None)  # there is none; only so it hears of the end


# ------------------------------------------------------------------------------------------------------------- the work


def checked(wishes: Sequence[Wish]) -> tuple[Wish, ...]:
    """Return wishes by the name of the task, so that their order does not matter; numbers as the words for them.

    Raises:
        SettingsError: if there is none, a task has two, or a weight or window is impossible.
    """
    if not wishes:
        raise SettingsError("--task: none given; name at least one, as in --task regress --target 0.1.")
    if strange := [wish for wish in wishes if not isinstance(wish, Wish)]:
        raise SettingsError(f'wishes: {strange[0]!r} is none; give knife.Wish("regress", "0.1").')
    wishes = [wish._replace(target=str(wish.target)) for wish in wishes]
    for wish in wishes:
        if [other.task for other in wishes].count(wish.task) > 1:
            raise SettingsError(f"--task {wish.task}: given twice; a task has one target.")
        if not 0 < wish.weight < math.inf:
            raise SettingsError(f"--weight {wish.weight:g}: give a number above 0.")
        if wish.window and not 0 <= wish.window[0] < wish.window[1]:
            raise SettingsError("--window {}:{}: give two noise levels, the lower one first.".format(*wish.window))
    return tuple(sorted(wishes))


def chosen(wishes: Sequence[Wish], images: Sequence[Image], models: Path | None, dataset: str | None) -> list[Pair]:
    """Return the models for each wish; those of several lie in one folder."""
    first = choose(wishes[0].task, images, models, dataset)
    others = [choose(wish.task, images, models, first.folder.name) for wish in wishes[1:]]
    for wish, pair in zip(wishes[1:], others, strict=True):
        if pair.folder != first.folder:
            raise ModelError(
                f"--task {wish.task}: its models lie in {pair.folder}, those of {wishes[0].task} in {first.folder}; "
                "tasks that guide together need one diffusion model: train it there."
            )
    return [first, *others]


def level_of(pairs: Sequence[Pair]) -> int:
    """Return the noise level where none is asked for: the highest that a guide is calibrated for, or the usual one."""
    levels = [default_level(pair.guide.card) for pair in pairs]
    T = pairs[0].diffusion.card.schedule.T
    return max([level for level in levels if level is not None], default=min(LEVEL, T))


def job_of(
    kinds: Sequence[tasks.Task], wishes: Sequence[Wish], pairs: Sequence[Pair], settings: Settings, device: str
) -> Job:
    """Load all networks.

    Raises:
        ModelError: if one is damaged.
        DeviceError: if they do not fit into memory.
    """
    settings = replace(settings, precision=computed_in(device, settings.precision))

    def reader(kind: tasks.Task, stored: Stored) -> Reader:
        return Reader(kind, stored, load(stored, device))

    with enough_memory(device, "the models do", "give --device cpu, or use smaller ones"):
        guides, reasons = list[Guide](), list[str]()
        for kind, wish, pair in zip(kinds, wishes, pairs, strict=True):
            (judge, why), (low, high) = judging(kind, pair, device), wish.window or (0, math.inf)
            parts = (kind, pair.guide, load(pair.guide, device), wish.weight, int(low), high)
            guides.append(Guide(*parts, judge))
            reasons += why
        looking = []
        for kind, stored in onlookers(pairs[0], [wish.task for wish in wishes]):
            with suppress(ModelError, TaskError):  # nothing depends on them
                looking.append(reader(kind, stored))
        net = load(pairs[0].diffusion, device)
    about = judges_record([guide.judge.net for guide in guides if guide.judge], reasons)
    alone = not any(wish.target.startswith("by:") for wish in wishes)  # these ask the guide where images are read
    play = player() if alone else called
    return Job(pairs[0].diffusion, net, tuple(guides), settings, device, tuple(looking), about, play=play)


def judging(kind: tasks.Task, pair: Pair, device: str) -> tuple[Reader | None, list[str]]:
    """Return the judge that was trained for a guide, else one that a plugin offers; and why others are left out."""
    if stored := judge_of(pair):
        return Reader(kind, stored, load(stored, device)), []
    net, reasons = offered(kind, pair.guide.card.spec, pair.guide.card.config, device)
    return None if net is None else Reader(kind, pair.guide, net), reasons


def about_wishes(wishes: Sequence[Wish], region: str | None, settings: Settings) -> dict[str, Any]:
    """Return what every record says of what was asked for; of files their names alone."""
    told = [{**wish._asdict(), "target": without_folder(wish.target)} for wish in wishes]
    return {
        "task": ", ".join(wish["task"] for wish in told),
        "target": ", ".join(wish["target"] for wish in told),
        "wishes": told,
        "region": AUTO if settings.auto_region else region and without_folder(region),
    }


def about_walk(job: Job, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return what every record says of program, settings and models."""
    judges = [guide.judge for guide in job.guides if guide.judge]
    trained = [judge.stored for judge in judges if not isinstance(judge.net, Offered)]
    shipped = pairs[0].shipped
    return {
        "knife": __version__,
        "torch": torch.__version__,
        "synthetic": SYNTHETIC,
        "settings": asdict(job.settings),
        "models": [
            {**model_record(stored), "shipped": shipped}
            for stored in (job.diffusion, *(guide.stored for guide in job.guides), *trained)
        ],
        **job.about,
    }


def asked(
    job: Job, wishes: Sequence[Wish], region: str | None, source: Image | Stack, failed: Failed | None = None
) -> tuple[Image | Stack, list[Edit]]:
    """Return an input, and what is asked of its images: targets and region, read from the user's words.

    Slices of a volume that a mask does not reach are left as they are; `failed` hears of those that are refused.
    """

    def ask(image: Image) -> Edit:
        texts = [absolute(job, guide, wish.target, image) for guide, wish in zip(job.guides, wishes, strict=True)]
        targets = [target_of(job, guide, text, image) for guide, text in zip(job.guides, texts, strict=True)]
        judged = [judged_target(job, guide, text, image) for guide, text in zip(job.guides, texts, strict=True)]
        where = None if region is None else read_target_mask(region, image, "--region")
        return Edit(image, tuple(targets), where, tuple(judged), tuple(without_folder(text) for text in texts))

    if isinstance(source, Image):
        return source, [ask(source)]
    told, apart, refused = dict[int, Edit](), list[KnifeError](), dict[int, KnifeError]()
    for k, image in zip(source.slices, source.images, strict=True):
        try:
            told[k] = ask(image)._replace(outlined=None if source.mask is None else source.mask[k][None])
        except ApartError as error:
            apart.append(error)
        except (InputError, TargetError) as error:
            refused[k] = error
    if refused and (failed is None or not told):
        raise next(iter(refused.values()))
    if not told:
        raise apart[0]
    for k, why in refused.items():
        if failed is not None:
            failed(source.source.paths[0], TargetError(f"slice {k}: {why}"))
    return replace(source, slices=tuple(told), refused=tuple(refused)), [*told.values()]


def target_of(job: Job, reader: Reader, text: str, image: Image, beyond: bool = False) -> torch.Tensor:
    """Return a target as a network understands it; `beyond`: it may lie outside the values that it was trained on."""
    card = reader.stored.card
    config = {**card.config, "extrapolate": True} if job.settings.extrapolate or beyond else card.config
    return reader.task.target(text, image, card.spec, config)


def judged_target(job: Job, guide: Guide, text: str, image: Image) -> torch.Tensor | None:
    """Return a target as the guide's judge understands it; None if there is no judge, or it means nothing to it."""
    if guide.judge is None:
        return None
    try:
        return target_of(job, guide.judge, text, image, beyond=True)
    except TargetError:
        return None


def absolute(job: Job, guide: Guide, target: str, image: Image) -> str:
    """Return a target that counts from what the guide sees in the image, by:+15% or by:-0.02, as a number.

    Raises:
        TargetError: if what follows by: is no number, or the task sees no single number to count from.
    """
    if not target.startswith("by:") or os.path.exists(target):
        return target
    told = BY.fullmatch(target)
    if told is None:
        raise TargetError(f"--by {target[3:]}: give what to add, as -0.02, or a share of what is there, as +15%.")
    numbers = [*guide.numbers(stacked(job, [image]), 0, None).values()]
    if len(numbers) != 1:
        raise TargetError(f"--by {target[3:]}: the task {guide.task.name} has no single number to count from.")
    step, share, value = float(told[1]), bool(told[2]), numbers[0][0]
    return f"{value * (1 + step / 100) if share else value + step:.6g}"


def check(settings: Settings, wishes: Sequence[Wish], pairs: Sequence[Pair]) -> None:
    """Refuse settings that the models cannot walk by.

    Raises:
        SettingsError: if a setting is impossible, or neither a scale is given nor a steepness known.
    """
    T, level = pairs[0].diffusion.card.schedule.T, settings.noise_level or 0
    if not 1 <= level <= T:
        raise SettingsError(f"--noise-level {settings.noise_level}: give a level from 1 to {T}.")
    levels = path(level, settings.steps or 0)
    for wish in wishes:
        if wish.window and not any(wish.window[0] < step <= wish.window[1] for step in levels):
            raise SettingsError(
                "--window {}:{}: no step of the walk to {} lies in it; give a wider one.".format(*wish.window, level)
            )
    if settings.batch_size is not None and settings.batch_size < 1:
        raise SettingsError(f"--batch-size {settings.batch_size}: give 1 or more.")
    check_dtype(settings.dtype)
    given = {
        "scale": settings.scale,
        "strength": settings.strength,
        "tolerance": settings.tolerance,
        "max-reconstruction": settings.max_reconstruction,
    }
    for option, value in given.items():
        if value is not None and not 0 <= value < math.inf:
            raise SettingsError(f"--{option} {value:g}: give a number from 0 on.")
    for pair in pairs if settings.scale is None else ():
        if not 0 < pair.guide.card.guidance.get("gradient", 0.0) < math.inf:
            file = f"{pair.folder.name}/{pair.guide.path.name}"
            raise SettingsError(
                f"--strength: no steepness is known of {file}; give --scale, the paper's s, such as 100."
            )
