"""The one training loop; a diffusion model, a task network and a judge differ in their loss and their draws alone.

    prepare     read the data, let the task look at its labels     -> Job, which stays the same
    start       a fresh network, or where an earlier run stopped   -> State, which every step changes
    train_step  noise a batch, descend, follow with the average
    keep        write the model, the state to resume from, the log, and a sheet that shows how good it is

Every random draw is a function of (seed, step, purpose), so that a resumed run walks the same way as one that was never
interrupted. Several processes (`torchrun`) make the same draws, and each takes its rows of every batch: the steps are
those of one process, up to rounding, however many there are.

A judge is a task network that measures results and never guides. So that it does not share its guide's mistakes, it
has another architecture, draws other random numbers, and learns from clean images of half of the patients; a training
with --spare-judge learns from the other half.
"""

import copy
import hashlib
import json
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from knife import __version__, data, layouts
from knife.balance import Strata, capped, strata
from knife.checkpoint import Card, describe, file_name, read_about, read_tensors, ready, save, write_safely
from knife.ddim import decode, gradient
from knife.ddpm import hybrid_loss
from knife.devices import enough_memory, precision
from knife.errors import InputError, ModelError, SettingsError, TaskError
from knife.files import room
from knife.finite import fill_of
from knife.image import PERCENTILES
from knife.panel import curve, grid
from knife.prepared import key, prepared
from knife.ranks import ALONE, Team, processes, team
from knife.schedule import Schedule, noise, path, timestep
from knife.spec import preset
from knife.tasks import Task, task

T = TypeVar("T")
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]  # (net, x0, label, level, eps) -> scalar
Example = tuple[Tensor, Tensor]  # image [C, H, W] and its label
FREE = ("steps", "every", "device", "accumulate", "command", "tensorboard")  # may differ when a run is resumed
PREPARED = ".prepared"  # the folder beside the data sets' that keeps decoded images
LOWER = 1.5  # power by which levels are drawn lower for task networks: 71 of 100 lie below 600 of 1000
PARTS, BANDS = 4, 10  # parts of a task's batch by noise level, and bands of levels whose usual loss is known
USUAL = 0.98  # decay of the moving average that is the usual loss
PATIENCE = 10  # steps in a row whose loss or gradient is not finite, before a run gives up
LOG_EVERY = 20  # steps a line of the log
VALIDATED_ON = 64  # images at most
NOISE, EPOCH, SHEET, CURVE, STEEPNESS, CHOICE, NETWORK, CAP, MATCH = range(9)  # what random numbers are drawn for
JUDGES_DRAW = 0x6A75_6467  # turns a seed into a judge's
BYTES_A_PARAMETER = 36  # the model 4, the state 16, and a new state beside the old one until it takes its place


@dataclass(frozen=True)
class Run:
    """What to train, on what, and how.

    Raises SettingsError if a value is impossible.
    """

    kind: str  # diffusion, or the name of a task
    data: Path
    models: Path
    dataset: str
    preset: str
    steps: int
    batch: int
    lr: float
    ema: float
    seed: int = 0
    schedule: str = "linear"
    label: str | None = None
    layout: str | None = None  # of the data folder; None: whichever fits
    slices: tuple[int, int] | None = None  # of a volume, first and last + 1; None: all
    crop: bool = False  # fill the network's image size and cut off what is beyond, instead of padding
    mask_labels: tuple[int, ...] = ()  # of a mask's label map, those that count; none: all above 0
    min_brain: float = 0.0  # least share of the image that a volume's slice must show
    nan: str | None = None  # fill=0 reads pixels that are not finite as 0; None: such an image is skipped
    balance: bool = False  # show every class, or tenth of the label's range, equally often
    cap: int | None = None  # images of one class or value at most
    device: str = "cpu"
    accumulate: int = 1  # split each batch into so many parts
    every: int = 500  # steps between checkpoints and sheets
    command: str = ""  # the command line, for the record
    tensorboard: bool = False
    judge: bool = False  # train a network that measures results, and never guides
    spare_judge: bool = False  # leave out the half of the patients that judges learn from

    def __post_init__(self) -> None:
        if not self.dataset or Path(self.dataset).name != self.dataset or self.dataset.startswith("."):
            raise SettingsError(f"--dataset {self.dataset!r}: not the name of a folder; give a plain word.")
        if not (0 < self.lr < math.inf and 0 <= self.ema < 1):
            raise SettingsError(
                f"--lr {self.lr:g} --ema {self.ema:g}: give a rate above 0, and a decay of 0 to below 1."
            )
        for option, value in {"steps": self.steps, "batch-size": self.batch, "every": self.every}.items():
            if value < 1:
                raise SettingsError(f"--{option} {value}: give 1 or more.")
        if self.slices and not 0 <= self.slices[0] < self.slices[1]:
            raise SettingsError(f"--slices {self.slices[0]}:{self.slices[1]}: give the first slice and the last + 1.")
        fill_of(self.nan)
        if not 0 <= self.min_brain < 1:
            raise SettingsError(f"--min-brain {self.min_brain:g}: give a share of the image, from 0 to below 1.")
        if self.cap is not None and self.cap < 1:
            raise SettingsError(f"--cap {self.cap}: give 1 or more.")
        if self.kind == "diffusion" and (self.balance or self.cap):
            raise SettingsError("--balance and --cap: a diffusion model has no labels to go by; give them to a task.")
        if self.judge and self.kind == "diffusion":
            raise SettingsError("--judge: a diffusion model tells nothing of an image; give a task instead.")
        if self.judge and self.spare_judge:
            raise SettingsError("--judge and --spare-judge: a judge learns from what others spare; give one of them.")
        if not 0 <= self.seed < 2**32:
            raise SettingsError(f"--seed {self.seed}: give 0 to {2**32 - 1}.")
        if not 1 <= self.accumulate <= self.batch:
            raise SettingsError(f"--accumulate {self.accumulate}: give 1 to {self.batch}, the images of a batch.")

    @property
    def path(self) -> Path:
        """Return where the trained model goes."""
        return self.models / self.dataset / file_name(self.kind, self.judge)

    @property
    def drawn_from(self) -> int:
        """Return the seed of the run's draws: a judge's differ from those of a guide of the same seed."""
        return self.seed ^ JUDGES_DRAW if self.judge else self.seed

    @property
    def at_once(self) -> int:
        """Return how many images the device holds at once; a guide's batch comes in parts by noise level anyway."""
        parts = 1 if self.kind == "diffusion" or self.judge else PARTS
        return -(-self.batch // max(self.accumulate, parts))

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must agree on."""
        values = {k: [*v] if isinstance(v, tuple) else v for k, v in asdict(self).items()}  # as JSON gives it back
        return {k: v for k, v in values.items() if k not in (*FREE, "data", "models")}


@dataclass(frozen=True)
class Budget:
    """What a run is about to spend, and on what; said before the first step."""

    images: int
    half: str  # in words, where not all of the patients are learnt from
    skipped: Mapping[str, str]  # name -> why
    layout: str
    parameters: int
    done: int
    steps: int
    seconds_a_step: float
    device: str
    why: str  # one clause: what the layout was recognised by
    validation: str  # one clause: what the sheets show
    config: Mapping[str, Any]  # what a task made of the labels: which one it chose, its classes or range


class Watch(Protocol):
    """What a caller may want to see of a run."""

    def loading(self, done: int, total: int) -> None:
        """Hear some two hundred times how many images have been read."""

    def budget(self, budget: Budget) -> None:
        """Hear once, before the first step, what the run will take."""

    def step(self, step: int, loss: float) -> None:
        """Hear of every step."""

    def saved(self, path: Path) -> None:
        """Hear of every file that was written."""


class Unwatched:
    """Hears all that a `Watch` does, and tells nobody."""

    def loading(self, done: int, total: int) -> None:
        """Hear how many images have been read."""

    def budget(self, budget: Budget) -> None:
        """Hear what the run will take."""

    def step(self, step: int, loss: float) -> None:
        """Hear of a step."""

    def saved(self, path: Path) -> None:
        """Hear of a file."""


@dataclass(frozen=True)
class Job:
    """What a run works on: all that stays the same from its first step to its last."""

    run: Run
    card: Card
    task: Task | None  # None: a diffusion model
    examples: Sequence[Example]
    validation: Sequence[Example]
    set_apart: int  # images in `validation` that are not trained on: all of them, or none
    folder: layouts.Folder
    skipped: Mapping[str, str]
    fingerprint: str
    inventory: Mapping[str, str]
    strata: Strata | None = None  # by which images are balanced, if they are
    team: Team = ALONE  # the processes that share the work

    @property
    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must agree on, its data included."""
        return {**self.run.settings(), "data": self.fingerprint}


@dataclass
class State:
    """All that a training is, between two steps."""

    net: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    in_a_row: int = 0  # how many of the last steps were such
    seconds: float = 0.0  # spent in steps, by earlier runs too
    usual: Tensor = field(default_factory=lambda: torch.zeros(BANDS, dtype=torch.float64))  # a task's loss by level


def train(run: Run, watch: Watch, stop: Callable[[], bool] = lambda: False) -> int:
    """Train one network, resuming where an earlier run of the same settings stopped; return the step it reached.

    Raises:
        SettingsError: if an earlier run used other settings or data (the message lists the differences), or the loss
            is not finite again and again.
        InputError: if the data cannot be used.
        ModelError: if the state to resume from is damaged, or the models folder cannot be written to.
        DeviceError: if a batch does not fit into memory, or another of several processes ends before its time.
        TaskError: if the task is unknown, or its plugin broken.
    """
    if run.batch < processes():
        raise SettingsError(f"--batch-size {run.batch}: {processes()} processes share a batch; give one image each.")
    with team(run.device) as mine:
        writer = tensorboard() if run.tensorboard and mine.first else None
        watch = watch if mine.first else Unwatched()
        with mine.after_the_first():
            job = replace(prepare(run, watch), team=mine)
        with enough_memory(run.device, f"a batch of {run.batch} in parts of {run.at_once} does", more_memory(run)):
            state = start(job)
            watch.budget(budget(state, job))
            with closing(Log(job, state, writer)) as log:
                walk(state, job, log, watch, stop)
    return state.step


def walk(state: State, job: Job, log: "Log", watch: Watch, stop: Callable[[], bool]) -> None:
    """Take all steps that are left, or until one of several processes shall stop, and keep what comes of them."""
    run, kept = job.run, state.step if job.run.path.exists() else 0
    while state.step < run.steps and not job.team.total(stop()):
        loss = train_step(state, job)
        log.step(state, loss)
        watch.step(state.step, loss)
        if state.step % run.every == 0:
            kept = keep(state, job, log, watch)
    if state.step != kept:
        keep(state, job, log, watch)


# -------------------------------------------------------------------------------------------------------------- the job


def prepare(run: Run, watch: Watch) -> Job:
    """Read the data, and let the task look at its labels."""
    plan, kind = preset(run.preset), None if run.kind == "diffusion" else task(run.kind)
    folder = layouts.open_folder(run.data, run.layout, run.slices)
    entries = folder.split("train")
    others = some(folder.split("val")) if kind else []  # a diffusion model shows samples of its own
    fill = fill_of(run.nan)
    channels = data.channels_of(entries, fill)
    spec = replace(plan.spec(run.kind, channels), crop=run.crop)
    spec = spec.for_judge() if run.judge else spec
    card = Card(run.kind, run.dataset, spec, Schedule(run.schedule), judge=run.judge)
    form = data.Form(channels, spec.size, spec.value_range, run.crop, run.mask_labels, run.min_brain, fill)
    read = partial(data.load, form=form)
    first, total = len(entries), len(entries) + len(others)
    refuse_full_disk(run.path.parent, 0)
    inventory = data.inventory(entries)
    place = run.models / PREPARED / key(inventory, form)
    loaded = prepared(place, entries, form, read, lambda done: watch.loading(done, total))
    held_out = read(others, progress=lambda done: watch.loading(first + done, total))
    loaded = half_of(run, loaded, entries)
    refuse_too_few(run, loaded)
    card = replace(card, config=kind.configure(loaded.cases, run.label) if kind else {})
    examples, validation = (labelled(kind, part, card.config) for part in (loaded, held_out))
    refuse_too_few(run, loaded)
    examples, kinds = sampled(run, examples, loaded, entries if "classes" in card.config else [])
    return Job(
        run=run,
        card=card,
        task=kind,
        examples=examples,
        validation=validation or some(examples),
        set_apart=len(validation),
        folder=folder,
        skipped={**folder.skipped, **loaded.skipped, **held_out.skipped},
        fingerprint=data.fingerprint(entries),
        inventory=inventory,
        strata=kinds,
    )


def half_of(run: Run, loaded: data.Loaded, entries: Sequence[layouts.Entry]) -> data.Loaded:
    """Leave out the patients that a judge, or a run that spares the judge's, does not learn from."""
    if not (run.judge or run.spare_judge):
        return loaded
    names = {entry.name for entry in entries if is_judges(entry.key) == run.judge}
    skipped = {name: why for name, why in loaded.skipped.items() if name in names}
    return data.Loaded([case for case in loaded.cases if case.name in names], skipped)


def is_judges(patient: str) -> bool:
    """Tell whether judges learn from a patient: from about half of them, told by a hash of the name."""
    return hashlib.sha256(layouts.encoded(f"judge {patient}")).digest()[0] < 128


def which_half(run: Run) -> str:
    """Say which patients are learnt from, if not from all."""
    return "of the judge's half" if run.judge else "without the judge's half" if run.spare_judge else ""


def sampled(
    run: Run, examples: list[Example], loaded: data.Loaded, sliced: Sequence[layouts.Entry]
) -> tuple[list[Example], Strata | None]:
    """Leave out what --cap says, and sort what stays for --balance, by the heights of entries in `sliced` too."""
    names = [case.name for case in loaded.cases]
    if run.cap is not None:
        kept = capped([label for _, label in examples], run.cap, generator(run.drawn_from, 0, CAP))
        examples, names = [examples[i] for i in kept], [names[i] for i in kept]
    if not run.balance:
        return examples, None
    heights = {entry.name: entry.height for entry in sliced}
    return examples, strata([label for _, label in examples], [heights.get(name) for name in names])


def validated_on(kind: Task | None, set_apart: int) -> str:
    """Say what the sheets will show."""
    if kind is None:
        return "samples from noise"
    return f"{set_apart} images set apart" if set_apart else "training images, for want of others set apart"


def refuse_too_few(run: Run, loaded: data.Loaded) -> None:
    """Refuse fewer than two images."""
    if len(loaded.cases) < 2:
        reason = next(iter(loaded.skipped.values()), "there are no more")
        found = f"{len(loaded.cases)} {which_half(run)}".strip()
        raise InputError(f"--data {run.data}: too few images to train on, {found} ({reason}); give more.")


def labelled(kind: Task | None, loaded: data.Loaded, config: Mapping[str, Any]) -> list[Example]:
    """Return images with their labels; a case without one is moved to what was skipped, with its reason."""
    examples, cases = [], list(loaded.cases)
    loaded.cases.clear()
    for case in cases:
        try:
            examples.append((case.pixels, kind.label(case, config) if kind else torch.zeros(())))
            loaded.cases.append(case)
        except InputError as error:
            loaded.skipped[case.name] = str(error)
    shapes = {tuple(label.shape) for _, label in examples}
    if kind and len(shapes) > 1:
        found = ", ".join(map(str, sorted(shapes)))
        raise TaskError(
            f"task {kind.name}: its hook label returned tensors of shapes {found}; it must return one shape."
        )
    return examples


def some(items: Sequence[T]) -> list[T]:
    """Return as many items as are validated on, chosen at random, the same every time."""
    order = torch.randperm(len(items), generator=generator(0, 0, CHOICE)).tolist()
    return [items[i] for i in order[:VALIDATED_ON]]


def stacked(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return images [N, C, H, W] and labels [N, ...]."""
    return torch.stack([x for x, _ in examples]), torch.stack([label for _, label in examples])


def loss_of(kind: Task | None, schedule: Schedule) -> Loss:
    """Return what a step descends: the hybrid loss, or the task's own loss on noised images."""
    if kind is None:
        return lambda net, x0, label, level, eps: hybrid_loss(net, x0, level, eps, schedule).mean()

    def loss(net: nn.Module, x0: Tensor, label: Tensor, level: Tensor, eps: Tensor) -> Tensor:
        x = noise(x0, eps, schedule.alpha_bar.to(x0.device)[level])
        return kind.train(net, x, timestep(level), label)

    return loss


def budget(state: State, job: Job) -> Budget:
    """Find out what a run will take, and refuse one whose checkpoints would not fit on the disk."""
    parameters = sum(p.numel() for p in state.net.parameters())
    refuse_full_disk(job.run.path.parent, parameters * BYTES_A_PARAMETER)
    return Budget(
        images=len(job.examples),
        half=which_half(job.run),
        skipped=job.skipped,
        layout=job.folder.layout,
        parameters=parameters,
        done=state.step,
        steps=job.run.steps,
        seconds_a_step=time_a_step(state, job) if state.step < job.run.steps else 0.0,
        device=job.run.device,
        why=job.folder.why,
        validation=validated_on(job.task, job.set_apart),
        config=job.card.config,
    )


def refuse_full_disk(folder: Path, need: int) -> None:
    """Refuse a folder that cannot be written to or has too little room, before hours are spent."""
    try:
        free = room(folder)
    except OSError as error:
        raise ModelError(f"--models: {error.filename} is {error.strerror}; allow it, or give another one.") from error
    if free < need:
        raise ModelError(
            f"--models: {folder} has {free / 2**20:.0f} MiB free, and checkpoints need {need / 2**20:.0f}; make room."
        )


def more_memory(run: Run) -> str:
    """Say how a run would need less memory."""
    if run.at_once == 1:
        return "choose a smaller --preset"
    parts = -(-run.batch // run.at_once)
    return f"split it by --accumulate {min(2 * parts, run.batch)}, which changes nothing else"


# --------------------------------------------------------------------------------------------------------- the one step


def seed_of(seed: int, step: int, purpose: int) -> int:
    """Return the seed of one step's draws for one purpose."""
    return (seed * 1_000_003 + step) * 101 + purpose


def generator(seed: int, step: int, purpose: int) -> torch.Generator:
    """Return the source of one step's draws for one purpose."""
    return torch.Generator().manual_seed(seed_of(seed, step, purpose))


@lru_cache(maxsize=4)
def order_of(seed: int, epoch: int, count: int) -> list[int]:
    """Return the order in which an epoch sees the images."""
    return torch.randperm(count, generator=generator(seed, epoch, EPOCH)).tolist()


def batch_of(step: int, run: Run, count: int, kinds: Strata | None = None) -> list[int]:
    """Return which images a step sees: every epoch is a permutation of its own, and runs on into the next.

    Balanced, each image of the permutation brings one of every other kind with it.
    """
    places = range(step * run.batch, (step + 1) * run.batch)
    if kinds:
        order, random = partial(order_of, run.drawn_from), partial(generator, run.drawn_from, purpose=MATCH)
        return [kinds.draw(place, order, random) for place in places]
    epochs = {i // count for i in places}
    orders = {epoch: order_of(run.drawn_from, epoch, count) for epoch in epochs}
    return [orders[i // count][i % count] for i in places]


def draw(run: Run, step: int, x0: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Draw the noise levels 1..T [N] and the noise [N, C, H, W] of a step.

    Task networks see low levels more often, as nobody is guided by what is nearly noise alone; a judge sees level 0.
    """
    g = generator(run.drawn_from, step, NOISE)
    if run.judge:
        level = torch.zeros(len(x0), dtype=torch.long)
    elif run.kind == "diffusion":
        level = torch.randint(1, T + 1, (len(x0),), generator=g)
    else:
        level = (T * torch.rand(len(x0), generator=g) ** LOWER).ceil().long().clamp(min=1)
    return level, torch.randn(x0.shape, generator=g)


def backward(net: nn.Module, step: int, job: Job, usual: Tensor | None = None) -> float:
    """Compute the gradients of one batch, in as many parts as `run.accumulate` says; return the loss.

    Args:
        net: the network.
        step: the number of the step, which decides what is drawn.
        job: what it is trained on.
        usual: of a task, the usual size of the loss in each band of noise levels, which is brought up to date.
    """
    run, loss = job.run, loss_of(job.task, job.card.schedule)
    x0, labels = stacked([job.examples[i] for i in batch_of(step, run, len(job.examples), job.strata)])
    level, eps = draw(run, step, x0, job.card.schedule.T)
    own = seed_of(run.drawn_from, step, NETWORK) ^ job.team.number << 48
    torch.manual_seed(own)  # for networks that draw on their own, as dropout does
    total = 0.0
    for band, rows in bands_of(level, job):
        weight, found = 1.0 if usual is None else weight_of(usual, band), 0.0
        for part in filter(len, job.team.part(rows).split(run.at_once)):
            x, label, k, e = (tensor[part].to(run.device) for tensor in (x0, labels, level, eps))
            x = x.to(memory_format=torch.channels_last)
            with precision(run.device):
                value = loss(net, x, label, k, e) * len(part) / len(x0)
            torch.autograd.backward(weight * value)
            found += value.item()
        found = job.team.total(found)
        total += found
        if usual is not None and math.isfinite(found):
            size = abs(found) * len(x0) / len(rows)
            usual[band] += (1 - USUAL if usual[band] else 1.0) * (size - usual[band])
    job.team.add_gradients(net)
    return total


def bands_of(level: Tensor, job: Job) -> list[tuple[int, Tensor]]:
    """Return the rows of a batch by the band of noise levels they lie in; a diffusion model has but one band."""
    if job.task is None or job.run.judge:
        return [(0, torch.arange(len(level)))]
    parts = level.argsort(stable=True).chunk(PARTS)
    T = job.card.schedule.T
    return [(min(int(level[part].double().mean() * BANDS / T), BANDS - 1), part) for part in parts]


def weight_of(usual: Tensor, band: int) -> float:
    """Return what a band of noise levels counts: the inverse of its usual loss.

    A task's loss falls by orders of magnitude from noise to clean images. So that its network learns to tell well where
    things can be told well, each band counts by how much better it gets, not by how much there is to get better; a
    usual loss below a hundredth of the largest counts as that, and one not known yet as the largest.
    """
    most = float(usual.max())
    return 1 / max(float(usual[band]) or most, most / 100) if most else 1.0


def train_step(state: State, job: Job) -> float:
    """Take one step of Adam and follow it with the moving average; return the loss.

    A loss or gradient that is not finite leaves the weights as they are; after `PATIENCE` of them in a row it raises.
    """
    began = time.perf_counter()
    value = backward(state.net, state.step, job, state.usual)
    gradients = [p.grad for p in state.net.parameters() if p.grad is not None]
    state.in_a_row = 0 if math.isfinite(value) and all_finite(gradients) else state.in_a_row + 1
    if state.in_a_row:
        state.skipped += 1
    else:
        state.optimizer.step()
        state.ema.update_parameters(state.net)
    state.optimizer.zero_grad()
    state.step += 1
    state.seconds += time.perf_counter() - began
    if state.in_a_row == PATIENCE:
        raise SettingsError(
            f"{job.run.kind}: the loss was not finite in {PATIENCE} steps in a row, up to step {state.step}; "
            f"give an --lr below {job.run.lr:g}, or look for odd values in the data. What was saved before stays."
        )
    return value


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Tell whether no value is NaN or infinite: then and only then is the norm finite."""
    return bool(torch.nn.utils.get_total_norm(tensors).isfinite())


def time_a_step(state: State, job: Job) -> float:
    """Return the seconds of a step, by computing the gradients of a copy twice."""
    net, seconds = copy.deepcopy(state.net), 0.0
    for _ in range(2):
        began = time.perf_counter()
        backward(net, state.step, job)
        seconds = time.perf_counter() - began
    return seconds


# ---------------------------------------------------------------------------------------------------- start and resume


def start(job: Job) -> State:
    """Return the state of an earlier run of the same settings, or a fresh one."""
    run = job.run
    torch.manual_seed(run.drawn_from)
    net = ready(job.card.build(), run.device)
    state = State(
        net, AveragedModel(net, multi_avg_fn=averaging(run.ema)), torch.optim.Adam(net.parameters(), lr=run.lr)
    )
    before = resume_path(run)
    if before.exists():
        restore(state, before, job)
    elif run.path.exists() and describe(run.path).card.training.get("settings") != job.settings:
        raise SettingsError(
            f"{run.path}: a model is there that this run did not begin, and no state to resume it from; "
            f"move it away, or give another --dataset name."
        )
    return state


def averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return the moving average of the weights, quicker in the first steps, so that it forgets the random start."""

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        n = int(count)  # read once: on a GPU each reading waits
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return average


def resume_path(run: Run) -> Path:
    """Return where the state lies that a run resumes from."""
    return run.path.with_suffix(".resume.safetensors")


def restore(state: State, before: Path, job: Job) -> None:
    """Read the state of an earlier run, refusing other settings and other data."""
    about, stored = read_about(before), read_tensors(before)
    try:
        differences = compare(about, job)
        if not differences:
            fill(state, about, stored)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{before}: does not hold the state of this run ({reason}); move it away to begin anew."
        ) from error
    if differences:
        raise SettingsError(
            f"{before}: this run was begun with other settings ({'; '.join(differences)}). "
            f"Give the same ones to resume it, or another --dataset name to begin anew."
        )


def compare(about: Mapping[str, Any], job: Job) -> list[str]:
    """Return in words what differs between an earlier run and this one."""
    then, now = about["settings"], job.settings
    differ = [k for k in {**then, **now} if k != "data" and (then.get(k) or None) != (now.get(k) or None)]
    found = [f"{k}: {then.get(k)} then, {now.get(k)} now" for k in differ]
    files = about.get("files")
    if files is not None and files != job.inventory:
        added, removed = job.inventory.keys() - files.keys(), files.keys() - job.inventory.keys()
        changed = [name for name in job.inventory.keys() & files.keys() if job.inventory[name] != files[name]]
        found.append(f"data: {len(added)} images added, {len(removed)} removed, {len(changed)} changed since")
    elif then["data"] != now["data"]:
        found.append("data: names, values or sizes of the images have changed since")
    return found


def fill(state: State, about: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
    """Put what was read of an earlier run in the place of a fresh state."""
    state.net.load_state_dict(below(stored, "net."))
    state.ema.module.load_state_dict(below(stored, "ema."))
    parameters = state.optimizer.param_groups[0]["params"]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in below(stored, "adam.").items():
        index, key = name.split(".")
        like = parameters[int(index)]  # keeps its layout in memory
        moments.setdefault(int(index), {})[key] = tensor if key == "step" else torch.empty_like(like).copy_(tensor)
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    state.step, state.skipped = int(about["step"]), int(about.get("skipped", 0))
    state.seconds = float(about.get("seconds", 0.0))
    state.usual.copy_(stored.get("usual", state.usual))
    state.ema.n_averaged.fill_(state.step - state.skipped)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------------- keeping


def keep(state: State, job: Job, log: "Log", watch: Watch) -> int:
    """Write the log, the model (its moving average), the state to resume from, and a sheet; return the step.

    The state comes after log and model: killed in between, a run resumes from an older state and writes both anew. Of
    several processes the first does it, and the others go on until they need it.
    """
    if not job.team.first:
        return state.step
    run, ema = job.run, state.ema.module.eval().requires_grad_(False)
    tensors = tensors_of(state)
    if not all_finite([tensor for tensor in tensors.values() if tensor.is_floating_point()]):
        raise SettingsError(
            f"{run.kind}: weights are not finite after step {state.step}, not saved; give a lower --lr."
        )
    log.write()
    with precision(run.device):
        guidance = measured(job, job.task, ema) if job.task else {}
        drawn = sheet_of(job, job.task, ema) if job.task else samples(ema, job.card)
    training = {**record(state, job), **origin(job), "loss": mean(log.losses)}
    save(run.path, ema.state_dict(), replace(job.card, guidance=guidance, training=training).to_json())
    save(resume_path(run), tensors, {**record(state, job), "files": dict(job.inventory)})
    sheet = run.path.with_suffix(".png")
    write_safely(sheet, drawn)
    watch.saved(run.path)
    watch.saved(sheet)
    return state.step


def tensors_of(state: State) -> dict[str, Tensor]:
    """Return all that a run resumes from, but for its counts."""
    nets = {"net": state.net, "ema": state.ema.module}
    weights = {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
    moments = state.optimizer.state_dict()["state"]
    weights["usual"] = state.usual
    return weights | {f"adam.{i}.{key}": value for i, values in moments.items() for key, value in values.items()}


def record(state: State, job: Job) -> dict[str, Any]:
    """Return how far a run is, and with which settings."""
    counts = {"step": state.step, "skipped": state.skipped, "seconds": round(state.seconds, 3)}
    return {"settings": job.settings, **counts}


def origin(job: Job) -> dict[str, Any]:
    """Return where a model comes from: command, data, versions."""
    return {
        "command": job.run.command,
        "images": len(job.examples),
        "processes": job.team.count,
        "layout": job.folder.layout,
        "split": job.folder.split_sha256,
        "percentiles": list(PERCENTILES),
        "knife": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": job.run.device,
    }


@torch.no_grad()
def samples(net: nn.Module, card: Card, count: int = 8, steps: int = 50) -> bytes:
    """Draw a sheet of images made from nothing but noise, the same noise every time."""
    device = next(net.parameters()).device
    shape = (count, len(card.spec.channels), *card.spec.size)
    x = torch.randn(shape, generator=generator(0, 0, SHEET)).to(device)
    x = decode(net, x, card.schedule, path(card.schedule.T, steps), clamp=card.spec.value_range)
    return grid(x.cpu(), card.spec.value_range)


def measured(job: Job, kind: Task, net: nn.Module) -> dict[str, float]:
    """Return what the card tells of a task network: how steep a guide's score is, and the mean error at level 0.

    Of images that were trained on, no error is told: it would be too small.
    """
    found = {} if job.run.judge else {"gradient": steepness(job, kind, net)}
    errors = clean_errors(job, kind, net) if job.set_apart else None
    if errors is not None and bool(errors.isfinite().all()):  # a distance to an empty mask may have no end
        found["error"] = float(errors.mean())
    return found


@torch.no_grad()
def clean_errors(job: Job, kind: Task, net: nn.Module) -> Tensor | None:
    """Return how far from the truth each validation image is told at noise level 0, [N], in the user's units.

    It is how well the network can tell at all. None if the task has no hook for it.
    """
    config = job.card.config
    parts = [kind.error(net, x, timestep(at_level(0, x)), y, config) for x, y, _ in validation(job, CURVE)]
    told = [part.float().cpu() for part in parts if part is not None]
    return torch.cat(told) if told else None


def sheet_of(job: Job, kind: Task, net: nn.Module) -> bytes:
    """Draw how good a task network is: a guide at every noise level, a judge from its best to its worst image."""
    if not job.run.judge:
        return error_curve(job, kind, net)
    errors, what = clean_errors(job, kind, net), "error"
    if errors is None:
        errors, what = clean_losses(job, kind, net), "loss"
    best_first = errors.sort().values.tolist()
    return curve(range(1, len(best_first) + 1), best_first, "images, best to worst,", f"judge of {kind.name}: {what}")


@torch.no_grad()
def clean_losses(job: Job, kind: Task, net: nn.Module) -> Tensor:
    """Return the loss of each validation image at noise level 0, [N]."""
    parts = [(x[i : i + 1], y[i : i + 1]) for x, y, _ in validation(job, CURVE) for i in range(len(x))]
    return torch.stack([kind.train(net, x, timestep(at_level(0, x)), y).cpu() for x, y in parts])


@torch.no_grad()
def error_curve(job: Job, kind: Task, net: nn.Module) -> bytes:
    """Draw the validation loss of a task against the noise level."""
    loss = loss_of(kind, job.card.schedule)
    levels = path(job.card.schedule.T, 10)[1:]
    losses = []
    for level in levels:
        parts = [(loss(net, x0, y, at_level(level, x0), eps), len(x0)) for x0, y, eps in validation(job, CURVE)]
        losses.append(sum(float(value) * count for value, count in parts) / len(job.validation))
    return curve(levels, losses, "noise level", f"{kind.name}: validation loss")


def steepness(job: Job, kind: Task, net: nn.Module) -> float:
    """Measure how steep a task's score is: the median size of sqrt(1 - ab) g against eps, whose size is 1 a pixel.

    Every image is pulled towards the label of another. The inverse of this number is the scale at which guidance is as
    large as the noise prediction, which is what makes a scale portable between data sets and tasks.
    """
    sizes = []
    for level in path(job.card.schedule.T // 2, 5)[1:]:
        for x0, wanted, eps in validation(job, STEEPNESS, roll=1):
            k = at_level(level, x0)
            ab = job.card.schedule.alpha_bar.to(x0.device)[k]
            g = gradient(kind.score(net, wanted), noise(x0, eps, ab), timestep(k))
            sizes.append((1 - ab).sqrt() * g.flatten(1).square().mean(1).sqrt())
    return float(torch.cat(sizes).median())


def validation(job: Job, purpose: int, roll: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield images, labels (of another image, if rolled) and noise, always the same, as many at once as in a step."""
    x0, labels = stacked(job.validation)
    eps = torch.randn(x0.shape, generator=generator(0, 0, purpose))
    for part in torch.split(torch.arange(len(x0)), job.run.at_once):
        x, y, e = (tensor[part].to(job.run.device) for tensor in (x0, labels.roll(roll, 0), eps))
        yield x, y, e


def at_level(level: int, x0: Tensor) -> Tensor:
    """Return one noise level for each image, [N]."""
    return torch.full((len(x0),), level, device=x0.device)


# ----------------------------------------------------------------------------------------------------------------- log


class Log:
    """Loss and speed as JSON lines, one for every twenty steps, and for TensorBoard if its writer is given."""

    def __init__(self, job: Job, state: State, writer: Any = None) -> None:
        board, self.batch = job.run.path.parent / "tensorboard" / job.run.path.stem, job.run.batch
        self.path = job.run.path.with_suffix(".log.jsonl")
        self.lines = earlier_lines(self.path, state.step)
        self.losses: deque[float] = deque(maxlen=200)  # finite ones
        self.since = (state.step, state.skipped, state.seconds)  # at the last line
        self.board = writer(str(board), purge_step=state.step + 1) if writer else None

    def step(self, state: State, loss: float) -> None:
        """Take note of a step."""
        if not state.in_a_row:
            self.losses.append(loss)
        if state.step % LOG_EVERY == 0:
            values = self.values(state)
            self.lines.append(json.dumps({"step": state.step, **values}))
            if self.board:
                for name, value in values.items():
                    self.board.add_scalar(name, value, state.step)
            self.since = (state.step, state.skipped, state.seconds)

    def values(self, state: State) -> dict[str, float]:
        """Return what has happened since the last line; without a finite loss there is none to tell."""
        step, skipped, seconds = self.since
        values: dict[str, float] = {}
        steps, bad = state.step - step, state.skipped - skipped
        if steps > bad:
            values["loss"] = mean(list(self.losses)[bad - steps :])
        values["images_per_second"] = round(steps * self.batch / max(state.seconds - seconds, 1e-9), 2)
        return values | ({"skipped": bad} if bad else {})

    def write(self) -> None:
        """Write the log, whole."""
        write_safely(self.path, "".join(f"{line}\n" for line in self.lines).encode())

    def close(self) -> None:
        """Let TensorBoard write what it still holds."""
        if self.board:
            self.board.close()


def earlier_lines(path: Path, step: int) -> list[str]:
    """Return the lines of a log up to a step: what an interrupted run wrote beyond it will be walked again."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if json.loads(line)["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def mean(values: Collection[float]) -> float:
    """Return the mean to six places, 0 of nothing."""
    return round(sum(values) / max(len(values), 1), 6)


def tensorboard() -> Any:
    """Return the class that writes TensorBoard's files.

    Raises:
        SettingsError: if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingsError(
            "--tensorboard: not installed; pip install 'knife-diffusion[tensorboard]', or leave the option out."
        ) from error
    return SummaryWriter
