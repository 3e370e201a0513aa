"""Decodes images towards their targets: batch by batch, and as often as it takes.

A batch is encoded once. Its first decode holds the unguided control too. Where the strength is not given, images that
are not at their targets yet are decoded again with another one, and the gentlest attempt that is worth it counts.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knife.checkpoint import Stored
from knife.ddim import (
    SOLVERS,
    Guidance,
    Hold,
    Network,
    Play,
    Point,
    Solver,
    balanced,
    called,
    decode,
    decode_with_control,
    encode,
    keep_outside,
)
from knife.devices import enough_memory, memory_share, precision, staged
from knife.errors import DeviceError, InputError, KnifeError, SamplingError, TaskError
from knife.graphs import forget
from knife.image import Image
from knife.masks import soft_edged
from knife.outputs import Edit, Translation, wanted_masks
from knife.pairs import unnamed
from knife.preservation import changed_most, preserved
from knife.schedule import path, timestep
from knife.settings import BATCH, FIRST, MOST_AT_ONCE, ROUNDS, SPREAD, STRENGTH, Settings
from knife.tasks import Task

Failed = Callable[[Path, KnifeError], None]  # hears of a file that could not be translated, and why
Numbers = dict[str, list[float]]  # what a network sees: a name, a number for each image
LOOKS = 10  # times that the guides are asked along the way
WORTH = 0.8  # share that a harder pull must bring the error below, as it changes more of the rest
TINY = 1e-12  # tolerances below mean: as near as can be
ABSURD = 1e6  # no pixel of a noisy image comes near this


@dataclass(frozen=True)
class Reader:
    """A task's network that says what it sees in images: a guide, a judge, or another task's."""

    task: Task
    stored: Stored
    net: nn.Module

    @torch.no_grad()
    def numbers(self, x: Tensor, level: int, target: Tensor | None) -> Numbers:
        """Return its named numbers for images [N, C, h, w] at a noise level, and targets [N, ...]."""
        found = self.task.evaluate(self.net, x, timesteps(x, level), target, self.stored.card.config)
        return {name: rounded(values) for name, values in found.items()}

    @torch.no_grad()
    def error(self, x: Tensor, target: Tensor) -> list[float]:
        """Return how far clean images are from their targets; NaN where there is no telling."""
        found = self.task.error(self.net, x, timesteps(x, 0), target, self.stored.card.config)
        values = [math.nan] * len(x) if found is None else rounded(found)
        return [value if math.isfinite(value) else math.nan for value in values]


@dataclass(frozen=True)
class Guide(Reader):
    """A task's network that pulls."""

    weight: float = 1.0
    low: int = 0  # it pulls from noise levels above this
    high: float = math.inf  # up to this
    judge: Reader | None = None  # of the same task, to measure the results

    @property
    def steepness(self) -> float:
        """Return how steep its score usually is, 0 if nobody measured it."""
        return float(self.stored.card.guidance.get("gradient", 0.0))

    @property
    def told(self) -> bool:
        """Tell whether its card says how well it can tell, so that there is a target to be near to."""
        return "error" in self.stored.card.guidance or "tolerance" in self.stored.card.config

    def tolerance(self, error: float, settings: Settings) -> float:
        """Return how near its target an image must come that begins with an error; infinity if there is no telling.

        A tenth of the way is near enough, within limits: nearer than a quarter of what the network itself errs by on
        clean images nobody can tell, and farther than twice that error, or what the task says is near enough for
        anybody, is not near.
        """
        card = self.stored.card
        if not math.isfinite(error) or not (self.told or settings.tolerance is not None):
            return math.inf
        if settings.tolerance is not None:
            return settings.tolerance
        own = card.guidance.get("error", math.inf)
        return max(min(2 * own, max(error / 10, own / 4)), card.config.get("tolerance", 0.0))


class Ticks:
    """Counts the steps of all images, of which those that reach their targets early need fewer than were foreseen.

    images: how many there are, as far as is known. walks: how often each is walked at most, up or down. steps: of a
    walk.
    """

    def __init__(
        self, images: int = 1, walks: int = 1, steps: int = 1, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.total, self.each, self.progress = images * walks * steps, walks * steps, progress
        self.behind, self.ahead, self.size = 0, 0, 0

    def more(self, images: int) -> None:
        """Hear that there are more images than was known, or fewer."""
        self.total += images * self.each

    def batch(self, size: int) -> None:
        """Hear that a batch begins: what the one before it did not need is skipped."""
        self.behind, self.ahead = self.behind + self.each * self.size, 0
        self.size = size

    def step(self) -> None:
        """Hear of a step of the whole batch."""
        self.ahead += self.size
        self.tell(min(self.behind + min(self.ahead, self.each * self.size), self.total))

    def done(self) -> None:
        """Hear that the last batch is done."""
        if self.total:
            self.tell(self.total)

    def tell(self, done: int) -> None:
        """Pass on how far it is."""
        if self.progress:
            self.progress(done, self.total)


@dataclass(frozen=True)
class Job:
    """What all images of one call share."""

    diffusion: Stored
    net: nn.Module
    guides: tuple[Guide, ...]
    settings: Settings  # that say noise level and steps
    device: str
    onlookers: tuple[Reader, ...] = ()  # of tasks that do not guide, to see what happens to them
    about: Mapping[str, Any] = field(default_factory=dict)  # what each record begins with
    ticks: Ticks = field(default_factory=Ticks)  # hears of every step
    play: Play = called  # takes the steps

    @property
    def levels(self) -> list[int]:
        """Return the noise levels of the walk, rising."""
        assert self.settings.noise_level is not None
        assert self.settings.steps is not None
        return path(self.settings.noise_level, self.settings.steps, SPREAD)

    @property
    def solver(self) -> Solver:
        """Return what makes a step's eps of what the network tells."""
        assert self.settings.solver is not None
        return SOLVERS[self.settings.solver]

    @property
    def at_once(self) -> int:
        """Return how many images are translated at once at most."""
        return self.settings.batch_size or (MOST_AT_ONCE if self.device.startswith("cuda") else BATCH)

    @property
    def rounds(self) -> int:
        """Return how often an image is decoded at most."""
        told = self.settings.tolerance is not None or any(guide.told for guide in self.guides)
        return ROUNDS if told and self.settings.closed else 1

    def precisely(self, network: Network) -> Network:
        """Return a network, or a score, that computes in the precision that the settings say."""
        return partial(answer, self.device, self.settings.precision, network)

    def name(self, guide: Reader, name: str) -> str:
        """Return what a record calls a guide's number: of several guides, the task is said too."""
        return name if len(self.guides) == 1 else f"{guide.task.name} {name}"


def answer(device: str, wanted: str, network: Network, x: Tensor, t: Tensor) -> Tensor:
    """Ask a network in a precision that is wanted on a device."""
    with precision(device, wanted):
        return network(x, t)


@dataclass(frozen=True)
class Start:
    """What every attempt at a batch begins with."""

    edits: Sequence[Edit]
    limits: Sequence[Mapping[str, float]]  # of each image: task -> tolerance, where one is known
    x: Tensor  # [N, C, h, w] the images as the model sees them
    noisy: Tensor  # the same, encoded
    last: Point  # where the last step of encoding began
    trajectory: Mapping[int, Tensor]  # on the way there, level -> images; empty if nothing is held on it
    region: Tensor | None = None  # [N, 1, h, w] from 0 to 1, where they may change; None: anywhere
    base: Tensor | None = None  # what guided decodes are compared with, once it is known

    def part(self, rows: Sequence[int]) -> "Start":
        """Return the start of some of the images."""
        chosen = torch.tensor(rows, device=self.x.device)
        return Start(
            [self.edits[i] for i in rows],
            [self.limits[i] for i in rows],
            self.x[chosen],
            self.noisy[chosen],
            self.last.part(chosen),
            {level: x[chosen] for level, x in self.trajectory.items()},
            None if self.region is None else self.region[chosen],
            None if self.base is None else self.base[chosen],
        )

    @property
    def hold(self) -> Hold | None:
        """Return what keeps a decode on the trajectory outside the region."""
        return None if self.region is None else keep_outside(self.region, self.trajectory)


@dataclass(frozen=True, eq=False)
class Attempt:
    """One decode of one image."""

    strength: float | None  # of the guidance; None: by the paper's s
    change: Tensor  # [C, h, w] in the model's units
    result: Image
    after: Mapping[str, float]  # what the guides see in the result as it is written
    error: Mapping[str, float]  # task -> distance from its target
    along: Sequence[Mapping[str, float]]  # what they saw on the way
    miss: float  # the largest error in tolerances: at 1 and below the targets are reached


# ------------------------------------------------------------------------------------------------------------- batches


def run(job: Job, batches: Iterable[Sequence[Edit]], failed: Failed | None = None) -> Iterator[Translation | None]:
    """Translate images batch by batch, in their order; None stands for one that failed.

    A batch of more than the settings allow is cut; if they say nothing, the first is small, and those that follow as
    large as half of a GPU's memory holds. One that does not fit into memory is halved, and so are those that follow.

    Raises:
        DeviceError: if not even one image fits into memory.
        SamplingError: if guidance blows an image up, and nobody hears of those that failed.
        InputError: if the model does not know such an image, and nobody hears of it.
    """
    size, most = job.settings.batch_size or BATCH, job.at_once
    for batch in batches:
        rest = batch
        while part := rest[:size]:
            try:
                with (
                    enough_memory(job.device, "one image does", "give --device cpu, or use smaller models"),
                    memory_share(job.device) as share,
                ):
                    done = each_on_its_own(job, part, failed)
                fits = min(max(size, int(len(part) / (2 * share()))), most)
            except DeviceError:
                if len(part) == 1:
                    raise
                fits = most = len(part) // 2
                done = []
            if fits != size:
                forget(job.play)  # what was recorded of batches of another size, and would keep its memory
            size = fits
            yield from done
            rest = rest[len(done) :]
    job.ticks.done()


def each_on_its_own(job: Job, batch: Sequence[Edit], failed: Failed | None) -> list[Translation | None]:
    """Translate a batch so that an image that fails takes no other with it."""
    try:
        return [*translate_batch(job, batch)]
    except (SamplingError, InputError) as error:
        if len(batch) > 1:
            return [one for edit in batch for one in each_on_its_own(job, [edit], failed)]
        if failed is None:
            raise
        failed(batch[0].image.source.paths[0], error)
        return [None]


def translate_batch(job: Job, edits: Sequence[Edit]) -> list[Translation]:
    """Encode a batch of images, and decode it towards its targets (Algorithms 1 and 2).

    Raises:
        SamplingError: if guidance blows one up.
        InputError: if the model does not know one: unguided, it does not come back.
    """
    began = time.perf_counter()
    job.ticks.batch(len(edits))
    start = encoded(job, edits)
    strengths = first_strengths(job, start)
    start, tried = attempt(job, start, strengths)
    if job.settings.auto_region:
        start = with_region(job, start, tried)
        start, tried = attempt(job, start, strengths)
    attempts, ended = [[one] for one in tried], set[int]()
    for _ in range(job.rounds - 1):
        rows = [i for i, made in enumerate(attempts) if i not in ended and 1 < best(made).miss < math.inf]
        ended |= another(job, start, rows, attempts) if rows else set()
    each = (time.perf_counter() - began) / len(edits)
    return translations(job, start, attempts, each)


def first_strengths(job: Job, start: Start) -> list[float | None]:
    """Return the strength of each image's first attempt; None where the paper's s counts.

    Where a target has no end, as with "more", there is nothing to come near to, and the usual strength serves.
    """
    settings, count = job.settings, len(start.edits)
    if not settings.closed:
        return [settings.strength] * count
    return [FIRST if limits else STRENGTH for limits in start.limits]


def limits_of(job: Job, errors: Mapping[str, Sequence[float]], i: int) -> dict[str, float]:
    """Return the tolerances of image number `i`, which begins with some errors, task -> a distance for each image."""
    limits = {guide.task.name: guide.tolerance(errors[guide.task.name][i], job.settings) for guide in job.guides}
    return {task: limit for task, limit in limits.items() if limit < math.inf}


def errors_from_targets(job: Job, edits: Sequence[Edit], x: Tensor) -> dict[str, list[float]]:
    """Return how far the guides see clean images [N, C, h, w] from their targets, task -> a distance each."""
    return {guide.task.name: guide.error(x, targets_of(edits, k, x)) for k, guide in enumerate(job.guides)}


def targets_of(edits: Sequence[Edit], number: int, x: Tensor) -> Tensor:
    """Return the targets of guide number `number`, [N, ...], beside images."""
    return torch.stack([edit.targets[number] for edit in edits]).to(x.device)


def another(job: Job, start: Start, rows: Sequence[int], attempts: Sequence[list[Attempt]]) -> set[int]:
    """Decode some images once more, with other strengths; return those that this blew up, which stay as they are."""
    try:
        _, tried = attempt(job, start.part(rows), [next_strength(attempts[i]) for i in rows])
    except SamplingError:
        if len(rows) == 1:
            return {*rows}
        return {i for row in rows for i in another(job, start, [row], attempts)}
    for i, one in zip(rows, tried, strict=True):
        attempts[i].append(one)
    return set()


def best(attempts: Sequence[Attempt]) -> Attempt:
    """Return the gentlest attempt that reached its targets; if none did, one that came nearest by what is worth it."""
    chosen, *stronger = sorted(attempts, key=lambda one: one.strength or 0.0)
    for one in stronger:
        if one.miss <= 1 < chosen.miss or (one.miss < WORTH * chosen.miss and chosen.miss > 1):
            chosen = one
    return chosen


def next_strength(attempts: Sequence[Attempt]) -> float:
    """Return what to try next: twice the strength while that helps, then what lies between the two nearest."""
    ranked = sorted((one for one in attempts if one.strength), key=lambda one: one.miss)
    nearest = ranked[0].strength or 0.0
    if nearest == max(one.strength or 0.0 for one in ranked):
        return 2 * nearest
    return math.sqrt(nearest * (ranked[1].strength or nearest))


# ------------------------------------------------------------------------------------------------------------ one walk


def encoded(job: Job, edits: Sequence[Edit]) -> Start:
    """Encode a batch of images."""
    x, levels = stacked(job, [edit.image for edit in edits]), job.levels
    held = job.settings.auto_region or any(edit.region is not None for edit in edits)
    trajectory = {0: x} if held else {}

    def climb(level: int, x: Tensor) -> None:
        job.ticks.step()
        if held:
            trajectory[level] = x

    noisy, last = encode(job.precisely(job.net), x, job.diffusion.card.schedule, levels, climb, job.solver, job.play)
    check_sane(job, edits, levels[-1], noisy)
    errors = errors_from_targets(job, edits, x)
    limits = [limits_of(job, errors, i) for i in range(len(edits))]
    return Start(edits, limits, x, noisy, last, trajectory, regions_of(job, edits))


def attempt(job: Job, start: Start, strengths: Sequence[float | None]) -> tuple[Start, list[Attempt]]:
    """Decode a batch with a strength for each image; return the start too, which now knows what to compare with.

    Raises:
        SamplingError: if guidance blows one up.
        InputError: if the model does not know one.
    """
    looks = set(job.levels[:: max(1, (len(job.levels) - 1) // LOOKS)])
    along: list[tuple[int, Numbers]] = [(job.levels[-1], seen(job, start, job.levels[-1], start.noisy))]
    latest = job.levels[-1], start.noisy

    def descend(level: int, x: Tensor) -> None:
        nonlocal latest
        latest = level, x[: len(start.edits)]  # without controls
        job.ticks.step()
        if level in looks or job.device == "cpu":  # a GPU would have to be waited for
            check_sane(job, start.edits, *latest)
        if level in looks:
            along.append((level, seen(job, start, *latest)))

    spec, settings = job.diffusion.card.spec, job.settings
    guidance = [guidance_of(job, start, number, strengths) for number in range(len(job.guides))]
    clamp = spec.value_range if settings.clamp else None
    schedule, hold = job.diffusion.card.schedule, start.hold
    net, levels = job.precisely(job.net), job.levels
    walk = (net, start.noisy, schedule, levels, guidance, clamp, descend, hold, job.solver, start.last, job.play)
    try:
        y, control = decode_with_control(*walk) if settings.control and start.base is None else (decode(*walk), start.x)
    except TaskError:
        check_sane(job, start.edits, *latest)  # of values without bounds a guide may say what it will
        raise
    if start.base is None:
        start = replace(start, base=control)
        if settings.control:
            refuse_unknown(job, start)
    assert start.base is not None
    return start, attempts_of(job, start, strengths, (y - start.base).cpu(), along)


def guidance_of(job: Job, start: Start, number: int, strengths: Sequence[float | None]) -> Guidance:
    """Return how one guide pulls at a batch."""
    guide = job.guides[number]
    score = job.precisely(guide.task.score(guide.net, targets_of(start.edits, number, start.x)))
    if job.settings.scale is not None:
        return Guidance(score, guide.weight * job.settings.scale, guide.low, guide.high)
    strength = guide.weight * torch.tensor(strengths, dtype=torch.float64, device=start.x.device)
    scale = balanced(strength, guide.steepness) if strength.any() else 0.0
    return Guidance(score, scale, guide.low, guide.high, fresh=True)


def attempts_of(
    job: Job,
    start: Start,
    strengths: Sequence[float | None],
    change: Tensor,
    along: Sequence[tuple[int, Numbers]],
) -> list[Attempt]:
    """Return what became of each image: the change [N, C, h, w] added to it, and measured as it will be written."""
    value_range = job.diffusion.card.spec.value_range
    results = [e.image.plus(delta, value_range, e.region) for e, delta in zip(start.edits, change, strict=True)]
    x = stacked(job, results)
    after = seen(job, start, 0, x)
    errors = errors_from_targets(job, start.edits, x)
    made = []
    for i, result in enumerate(results):
        error = of(i, errors)
        limits = start.limits[i]
        miss = max((error[task] / max(limits[task], TINY) for task in limits if task in error), default=math.inf)
        course = [{"level": level, **of(i, numbers)} for level, numbers in along]
        made.append(Attempt(strengths[i], change[i], result, of(i, after), error, course, miss))
    return made


def refuse_unknown(job: Job, start: Start) -> None:
    """Raise InputError if a model does not know an image: unguided, it does not give it back."""
    assert start.base is not None
    limit = job.settings.max_reconstruction
    for edit, error in zip(start.edits, sizes(job, start.base - start.x), strict=True):
        if not error <= limit:  # nor NaN
            raise InputError(
                f"{edit.image.source.paths[0].name}: unguided, the model gives it back with an error of {error:.1%} of "
                f"the range, more than --max-reconstruction {limit:.1%}; it does not know such images: give models "
                "trained on such ones, more --steps, or a lower --noise-level."
            )


def with_region(job: Job, start: Start, attempts: Sequence[Attempt]) -> Start:
    """Return the start of another decode, in which images may change only where they changed most."""
    regions = [
        (edit.image.from_grid(changed_most(one.change)) > 0.5).float()
        for edit, one in zip(start.edits, attempts, strict=True)
    ]
    edits = [edit._replace(region=region) for edit, region in zip(start.edits, regions, strict=True)]
    return replace(start, edits=edits, region=regions_of(job, edits), base=None)


def regions_of(job: Job, edits: Sequence[Edit]) -> Tensor | None:
    """Return where images may change on the model's grid, [N, 1, h, w] from 0 to 1, or None for anywhere."""
    size = job.diffusion.card.spec.size
    masks = [soft_edged(edit.image.on_grid(edit.region, size)) for edit in edits if edit.region is not None]
    return torch.stack(masks).to(job.device) if masks else None


def stacked(job: Job, images: Sequence[Image]) -> Tensor:
    """Return images as the model sees them, [N, C, h, w]."""
    spec = job.diffusion.card.spec
    x = torch.stack([image.normalised(spec.size, spec.value_range) for image in images])
    return staged(x.contiguous(memory_format=torch.channels_last), job.device).to(job.device, non_blocking=True)


def check_sane(job: Job, edits: Sequence[Edit], level: int, x: Tensor) -> None:
    """Raise SamplingError, naming the images, if guidance has blown some of them up."""
    fine = (x.abs() < ABSURD).flatten(1).all(1).tolist()  # which NaN is not either
    if not all(fine):
        names = ", ".join(e.image.source.paths[0].name for e, ok in zip(edits, fine, strict=True) if not ok)
        fixed = {"--scale": job.settings.scale, "--strength": job.settings.strength}
        given = [f"a smaller {option} than {value:g}" for option, value in fixed.items() if value is not None]
        advice = given[0] if given else f"a --strength below {FIRST:g}"
        raise SamplingError(f"{names}: values beyond {ABSURD:g} at level {level}; give {advice}.")


# ------------------------------------------------------------------------------------------------------------- records


def translations(job: Job, start: Start, attempts: Sequence[Sequence[Attempt]], seconds: float) -> list[Translation]:
    """Return what was made of a batch, each with its record."""
    chosen = [best(made) for made in attempts]
    before = seen(job, start, 0, start.x)
    x = stacked(job, [one.result for one in chosen])
    told = {**judgements(job, start, x), **others(job, start, x)}
    sized = errors_of(job, start, torch.stack([one.change for one in chosen]))
    made = []
    for i, (edit, one) in enumerate(zip(start.edits, chosen, strict=True)):
        record = {
            **job.about,
            **image_record(job, edit.image),
            "wanted": {guide.task.name: text for guide, text in zip(job.guides, edit.wanted, strict=False)},
            "before": of(i, before),
            "after": dict(one.after),
            "along": list(one.along),
            **of(i, sized),
            **{name: {when: of(i, numbers) for when, numbers in parts.items()} for name, parts in told.items()},
            **loop_record(attempts[i], start.limits[i]),
            "preservation": preserved(edit.image, one.result, inside_of(edit, one.change)),
            "seconds": round(seconds, 3),
        }
        made.append(Translation(edit.image, one.result, one.change, edit.targets, record, region=edit.region))
    return made


def loop_record(attempts: Sequence[Attempt], limits: Mapping[str, float]) -> dict[str, Any]:
    """Return what a record says of the targets: how far off, whether reached, and what was tried for it."""
    one = best(attempts)
    told: dict[str, Any] = {"error": dict(one.error)} if one.error else {}
    if limits and one.error:
        known = {task: float(f"{limit:.4g}") for task, limit in limits.items()}
        told |= {"tolerance": known, "reached": one.miss <= 1}
    if one.strength is not None:
        tried = [{"strength": float(f"{made.strength:.4g}"), "error": dict(made.error)} for made in attempts]
        told |= {"strength": tried[attempts.index(one)]["strength"], "attempts": tried}
    return told


def errors_of(job: Job, start: Start, change: Tensor) -> Numbers:
    """Return the sizes of what guidance changed and, with a control, of what encoding and decoding did."""
    assert start.base is not None
    told = {"effect": sizes(job, change)}
    return told | ({"reconstruction": sizes(job, start.base - start.x)} if job.settings.control else {})


def judgements(job: Job, start: Start, x: Tensor) -> dict[str, dict[str, Numbers]]:
    """Return what judges see in the images and their results x [N, C, h, w], and how far these are from the targets.

    One that fails on them is left out: nothing depends on it.
    """
    told: dict[str, Numbers] = {"before": {}, "after": {}, "error": {}}
    for k, guide in enumerate(job.guides):
        judged = [wanted for edit in start.edits if (wanted := edit.judged[k]) is not None]
        if guide.judge is None or len(judged) < len(start.edits):
            continue
        target = torch.stack(judged).to(x.device)
        try:
            numbers = {when: guide.judge.numbers(y, 0, target) for when, y in (("before", start.x), ("after", x))}
            told["error"][guide.task.name] = guide.judge.error(x, target)
        except KnifeError:
            continue
        for when, values in numbers.items():
            told[when] |= {job.name(guide, name): value for name, value in values.items()}
    return {"judge": told} if told["after"] else {}


def others(job: Job, start: Start, x: Tensor) -> dict[str, dict[str, Numbers]]:
    """Return what tasks that were not asked see in the images and their results x [N, C, h, w].

    One that cannot tell is left out: nothing depends on it.
    """
    told: dict[str, Numbers] = {"before": {}, "after": {}}
    for reader in job.onlookers:
        try:
            numbers = {when: reader.numbers(y, 0, None) for when, y in (("before", start.x), ("after", x))}
        except TaskError:
            continue
        for when, seen in numbers.items():
            told[when] |= {f"{reader.task.name} {name}": values for name, values in seen.items()}
    return {"others": told} if told["after"] else {}


def seen(job: Job, start: Start, level: int, x: Tensor) -> Numbers:
    """Return what the guides see in images [N, C, h, w] at a noise level."""
    with precision(job.device, job.settings.precision if level else "float32"):  # clean ones decide: no rounding
        return {
            job.name(guide, name): values
            for k, guide in enumerate(job.guides)
            for name, values in guide.numbers(x, level, targets_of(start.edits, k, x)).items()
        }


def inside_of(edit: Edit, change: Tensor) -> Tensor | None:
    """Return where an image may well change, [1, H, W] bool: wanted masks, outlines, its region; None if unknown."""
    masks = [*wanted_masks(edit.image, edit.targets, change), edit.outlined, edit.region]
    known = [mask > 0 for mask in masks if mask is not None]
    return torch.stack(known).any(0) if known else None


def image_record(job: Job, image: Image) -> dict[str, Any]:
    """Return what a record says of an image; channels without names get those that the model knows."""
    return {
        "input": [file.name for file in image.source.paths],
        "channels": list(job.diffusion.card.spec.channels if unnamed(image.channels) else image.channels),
        **({"filled": image.source.filled} if image.source.filled else {}),  # pixels that were not finite
        "window": [[float(f"{end:.6g}") for end in ends] for ends in image.window.tolist()],
    }


def timesteps(x: Tensor, level: int) -> Tensor:
    """Return the timestep of a noise level for each image, [N]."""
    return timestep(torch.full((len(x),), level, device=x.device))


def rounded(values: Tensor) -> list[float]:
    """Return numbers as a record says them."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def of(i: int, numbers: Numbers) -> dict[str, float]:
    """Return the numbers of image number `i`; one that is not known is left out."""
    return {name: values[i] for name, values in numbers.items() if not math.isnan(values[i])}


def sizes(job: Job, difference: Tensor) -> list[float]:
    """Return the mean size of a difference [N, C, h, w] for each image, as a share of the value range."""
    low, high = job.diffusion.card.spec.value_range
    return [float(f"{share:.3g}") for share in (difference.abs().flatten(1).mean(1) / (high - low)).tolist()]
