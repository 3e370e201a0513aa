"""What a training works on: its settings, its images with their labels, and where every random draw comes from.

A `Job` stays the same from the first step to the last. Every draw is a function of (seed, step, purpose), so that a
resumed run walks the same way as one that was never interrupted.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from knife import data, layouts
from knife.balance import Strata, capped, kinds_of, strata
from knife.checkpoint import Card, file_name
from knife.ddpm import hybrid_loss
from knife.errors import DiskError, InputError, SettingsError, TaskError
from knife.files import room
from knife.finite import fill_of
from knife.prepared import key, prepared
from knife.ranks import ALONE, Team
from knife.schedule import Schedule, alpha_bar_on, noise, timestep
from knife.settings import PRECISIONS, one_of
from knife.spec import preset
from knife.tasks import Task, task

T = TypeVar("T")
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]  # (net, x0, label, level, eps) -> scalar
Example = tuple[Tensor, Tensor]  # image [C, H, W] and its label
FREE = (  # may differ when a run is resumed
    "steps", "every", "device", "accumulate", "command", "tensorboard", "accept_data", "steal_lock", "deterministic",
    "skip_bad", "precision",
)  # fmt: skip
FAILED = "not read"  # stands for the content of an image that the system failed to read, and may read another time
PREPARED = ".prepared"  # the folder beside the data sets' that keeps decoded images
PARTS, BANDS = 4, 10  # parts of a task's batch by noise level, and bands of levels whose usual loss is known
VALIDATED_ON = 64  # images at most
NOISE, EPOCH, SHEET, CURVE, STEEPNESS, CHOICE, NETWORK, CAP, MATCH = range(9)  # what random numbers are drawn for
JUDGES_DRAW = 0x6A75_6467  # turns a seed into a judge's


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
    synthetic: bool = False  # take images that say that knife made them
    balance: bool = False  # show every class, or tenth of the label's range, equally often
    cap: int | None = None  # images of one class or value at most
    device: str = "cpu"
    accumulate: int = 1  # split each batch into so many parts
    every: int = 500  # steps between checkpoints and sheets
    command: str = ""  # the command line, for the record
    tensorboard: bool = False
    judge: bool = False  # train a network that measures results, and never guides
    spare_judge: bool = False  # leave out the half of the patients that judges learn from
    accept_data: bool = False  # resume though the images have changed
    steal_lock: bool = False  # train though a process of another machine has left its lock
    precision: str = "auto"  # what the network computes in, see `knife.devices.computed_in`
    deterministic: bool = False  # the same bits every time, on a GPU too
    skip_bad: bool = False  # go on without an image that changes on the disk while the training runs

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
        one_of("precision", self.precision, PRECISIONS)
        if self.cap is not None and self.cap < 1:
            raise SettingsError(f"--cap {self.cap}: give 1 or more.")
        if self.kind == "diffusion" and (self.balance or self.cap or self.label):
            raise SettingsError("--label, --balance, --cap: a diffusion model has no labels; give them to a task.")
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
        left_out = (*FREE, "data", "models", *([] if self.synthetic else ["synthetic"]))  # earlier runs do not know it
        return {k: v for k, v in values.items() if k not in left_out}


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Images with their labels, each made when it is asked for: labels may be larger than the images.

    The images lie on the disk, and so memory need not hold a data set in any form.
    """

    cases: Sequence[data.Case]
    task: Task | None  # None: a diffusion model, which has no labels
    config: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.cases)

    @overload
    def __getitem__(self, i: int) -> Example: ...

    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...

    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[place] for place in range(len(self))[i]]
        case = self.cases[i]
        return case.pixels, self.task.label(case, self.config) if self.task else torch.zeros(())


@dataclass(frozen=True)
class Job:
    """What a run works on: all that stays the same from its first step to its last."""

    run: Run
    card: Card
    task: Task | None  # None: a diffusion model
    examples: Sequence[Example]
    cases: Sequence[data.Case]  # of the examples
    validation: Sequence[Example]
    set_apart: int  # images in `validation` that are not trained on: all of them, or none
    folder: layouts.Folder
    skipped: Mapping[str, str]
    fingerprint: str
    inventory: Mapping[str, str]
    strata: Strata | None = None  # by which images are balanced, if they are
    without: frozenset[int] = frozenset()  # examples that went bad: they are drawn as ever, and not learnt from
    team: Team = ALONE  # the processes that share the work

    @property
    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must agree on, its data included."""
        return {**self.run.settings(), "data": self.fingerprint}


# -------------------------------------------------------------------------------------------------------------- data


def prepare(
    run: Run,
    loading: Callable[[int, int], None] = lambda done, total: None,
    config: Mapping[str, Any] | None = None,
) -> Job:
    """Read the data, telling `loading` how many of how many images are read, and let the task look at its labels.

    config: what the task remembers of other images, which labels shall mean the same as; None: it looks at these.
    """
    plan, kind = preset(run.preset), None if run.kind == "diffusion" else task(run.kind)
    folder = layouts.open_folder(run.data, run.layout, run.slices)
    entries = folder.split("train")
    others = some(folder.split("val")) if kind else []  # a diffusion model shows samples of its own
    fill = fill_of(run.nan)
    channels = data.channels_of(entries, fill)
    spec = replace(plan.spec(run.kind, channels), crop=run.crop)
    spec = spec.for_judge() if run.judge else spec
    card = Card(run.kind, run.dataset, spec, Schedule(run.schedule), judge=run.judge)
    form = data.Form(
        channels, spec.size, spec.value_range, run.crop, run.mask_labels, run.min_brain, fill, run.synthetic
    )
    read = partial(data.load, form=form)
    first, total = len(entries), len(entries) + len(others)
    inventory = data.inventory(entries)
    place = run.models / PREPARED / key(inventory, form)
    loaded = prepared(place, entries, form, read, lambda done: loading(done, total))
    held_out = read(others, progress=lambda done: loading(first + done, total))
    loaded = half_of(run, loaded, entries)
    refuse_too_few(run, loaded)
    if kind:
        card = replace(card, config=kind.configure(loaded.cases, run.label) if config is None else config)
    found, validation = (labelled(kind, part, card.config) for part in (loaded, held_out))
    refuse_too_few(run, loaded)
    examples, kinds = sampled(run, found, entries if "classes" in card.config else [])
    return Job(
        run=run,
        card=card,
        task=kind,
        examples=examples,
        cases=examples.cases,
        validation=[*validation] or some(examples),
        set_apart=len(validation),
        folder=folder,
        skipped={**folder.skipped, **loaded.skipped, **held_out.skipped},
        fingerprint=data.fingerprint(entries),
        inventory=inventory | as_read([entry for entry in entries if entry.name in loaded.passing]),
        strata=kinds,
    )


def as_read(failed: Sequence[layouts.Entry]) -> dict[str, str]:
    """Return the inventory of images that the system failed to read, so that it differs if they are read one day."""
    told = data.inventory(failed)
    there = [e for e in failed if all(data.file_size(file) is not None for file in data.files_of([e]))]
    return told | {data.short_hash(entry.name): FAILED for entry in there}


def half_of(run: Run, loaded: data.Loaded, entries: Sequence[layouts.Entry]) -> data.Loaded:
    """Leave out the patients that a judge, or a run that spares the judge's, does not learn from."""
    if not (run.judge or run.spare_judge):
        return loaded
    names = {entry.name for entry in entries if is_judges(entry.key) == run.judge}
    skipped = {name: why for name, why in loaded.skipped.items() if name in names}
    return data.Loaded([case for case in loaded.cases if case.name in names], skipped, loaded.passing & names)


def is_judges(patient: str) -> bool:
    """Tell whether judges learn from a patient: from about half of them, told by a hash of the name."""
    return hashlib.sha256(layouts.encoded(f"judge {patient}")).digest()[0] < 128


def which_half(run: Run) -> str:
    """Say which patients are learnt from, if not from all."""
    return "of the judge's half" if run.judge else "without the judge's half" if run.spare_judge else ""


def sampled(run: Run, examples: Examples, sliced: Sequence[layouts.Entry]) -> tuple[Examples, Strata | None]:
    """Leave out what --cap says, and sort what stays for --balance, by the heights of entries in `sliced` too.

    Returns the examples, and their kinds if they are balanced.
    """
    kind, cases = examples.task, examples.cases
    if kind is None or not (run.balance or run.cap):
        return examples, None
    alike, near = kinds_of(kind, cases, examples.config)
    kept = capped(alike, run.cap, generator(run.drawn_from, 0, CAP)) if run.cap else range(len(cases))
    examples = replace(examples, cases=[cases[i] for i in kept])
    if not run.balance:
        return examples, None
    heights = {entry.name: entry.height for entry in sliced}
    return examples, strata([near[i] for i in kept], [heights.get(cases[i].name) for i in kept])


def refuse_too_few(run: Run, loaded: data.Loaded) -> None:
    """Refuse fewer than two images."""
    if len(loaded.cases) < 2:
        reason = next(iter(loaded.skipped.values()), "there are no more")
        found = f"{len(loaded.cases)} {which_half(run)}".strip()
        raise InputError(f"--data {run.data}: too few images to train on, {found} ({reason}); give more.")


def labelled(kind: Task | None, loaded: data.Loaded, config: Mapping[str, Any]) -> Examples:
    """Return images with their labels, all of which are looked at, one at a time, and none is kept.

    A case without one is moved to what was skipped, with its reason.

    Raises:
        TaskError: if labels differ in shape or type, or one is not finite.
    """
    cases, shapes, types = list(loaded.cases), set[str](), set[str]()
    loaded.cases.clear()
    for case in cases:
        try:
            label = kind.label(case, config) if kind else torch.zeros(())
        except InputError as error:
            loaded.skipped[case.name] = str(error)
            continue
        if kind and not label.isfinite().all():
            raise kind.violation("label", label, f"finite numbers, not this for {case.name}")
        loaded.cases.append(case)
        shapes.add(str(tuple(label.shape)))
        types.add(str(label.dtype).removeprefix("torch."))
    for what, found in (("shape", shapes), ("type", types)):
        if kind and len(found) > 1:
            told = f"returned tensors of {what}s {', '.join(sorted(found))}; it must return one {what}"
            raise TaskError(f"task {kind.name}: its hook label {told}.")
    return Examples(loaded.cases, kind, config)


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
        x = noise(x0, eps, alpha_bar_on(schedule, x0.device)[level])
        return kind.train(net, x, timestep(level), label)

    return loss


def refuse_full_disk(folder: Path, need: int) -> None:
    """Refuse a folder that cannot be written to or has too little room, before hours are spent."""
    try:
        free = room(folder)
    except OSError as error:
        raise DiskError(f"--models: {error.filename} is {error.strerror}; allow it, or give another one.") from error
    if free < need:
        raise DiskError(
            f"--models: {folder} has {free / 2**20:.0f} MiB free, and checkpoints need {need / 2**20:.0f}; make room."
        )


# -------------------------------------------------------------------------------------------------------------- draws


def seed_of(seed: int, step: int, purpose: int) -> int:
    """Return the seed of one step's draws for one purpose."""
    return (seed * 1_000_003 + step) * 101 + purpose


def generator(seed: int, step: int, purpose: int) -> torch.Generator:
    """Return the source of one step's draws for one purpose."""
    return torch.Generator().manual_seed(seed_of(seed, step, purpose))
