"""How fast knife is on this machine, and how near it comes to what the machine can do: what `knife bench` measures.

Whole translations are timed in few steps and their seconds drawn on to as many as usual. The networks' calls stand
beside a large matrix product, the fused step beside a plain copy of as many bytes: nobody can be faster than those. The
scripts in benchmarks/ measure more, with the clocks and counts of this module.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from knife import __version__, ops
from knife.checkpoint import Card, Stored, load
from knife.ddim import Score, slope
from knife.devices import computed_in, enough_memory, keep_freed_memory, precision, resolve_device
from knife.errors import DeviceError, KnifeError, ModelError, SettingsError, TargetError, TaskError
from knife.image import Image, read
from knife.pairs import Pair, choose
from knife.phantom import write_nifti
from knife.schedule import timestep
from knife.settings import DEFAULTS, STRENGTH, Wish
from knife.spec import ImageSpec
from knife.tasks import Task, names, task
from knife.translation import level_of, translate

FEW = (5, 10)  # steps that are timed; guides are asked along the way as often as in more
REPEATS = 5
BLOCK = 2e-3  # seconds that a short call is repeated for, to be timed
PEAK_SIDE, PEAK_SIDE_GPU = 2048, 8192  # of the matrices whose product is the yardstick: small ones leave a GPU idle
STEP_SIZE = (16, 4, 256, 256)  # images of the fused step, 16 MiB in float32: more than most caches hold
PASSES = 4  # of the step over its images: x, eps and the gradient are read, x' is written
UNKNOWN = 1e9  # reconstruction error that is let pass: no model knows noise
SHAPE = "ellipse:50%,50%,20%,20%"  # a target of tasks that want a mask

Clock = Callable[[], float]
Calls = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Subject:
    """A task that has models, and a target that it understands."""

    task: Task
    pair: Pair
    text: str  # as after --target
    target: Tensor  # the same, for one image


@dataclass(frozen=True)
class Pace:
    """Seconds an image of whole translations of one task: files read and written, one decode with its control."""

    task: str
    batch: int
    steps: int  # as many as usual
    seconds: float  # of so many, on the line through those timed
    timed: Mapping[int, float]  # steps -> seconds


@dataclass(frozen=True)
class Call:
    """A call of the diffusion model, or the gradient of a guide over the pixels."""

    network: str
    batch: int
    milliseconds: float
    gflops: float  # 10^9 operations of convolutions and matrix products a second
    of_peak: float  # as a share of the matrix product's


@dataclass(frozen=True)
class Step:
    """The fused step, beside a copy of as many bytes."""

    size: tuple[int, ...]
    gigabytes: float  # a second, over four passes
    copy_gigabytes: float
    of_copy: float


@dataclass(frozen=True)
class Bench:
    """What was measured."""

    about: Mapping[str, Any]  # machine, device, threads, versions, models
    peak_gflops: float  # of the matrix product
    paces: Sequence[Pace]
    calls: Sequence[Call]
    step: Step
    left_out: Mapping[str, str]  # task -> why it was not measured

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self)


def bench(
    dataset: str | None = None,
    *,
    models: Path = Path("models"),
    batch: int = 8,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Measure this machine, the networks of a data set, and translations by every task that has a guide there.

    Args:
        dataset: the name of the models' folder; None: the shipped ones.
        models: the folder that `dataset` lies in; where it does not, the shipped ones serve.
        batch: images at once, beside one at a time.
        device: auto, cpu, cuda or cuda:N.
        progress: called with (pieces of work done, pieces in all).

    Raises:
        SettingsError: if `batch` is below 2.
        ModelError: if no task has models there, or none of them can be used.
        DeviceError: if the device is not there, or has too little memory.
    """
    if batch < 2:
        raise SettingsError(f"--batch-size {batch}: give 2 or more; one image at a time is measured in any case.")
    where, why = resolve_device(device)
    pairs, left_out = guided(models if dataset else None, dataset)
    keep_freed_memory()
    with enough_memory(where, f"a batch of {batch} does", "give a smaller --batch-size"), TemporaryDirectory() as name:
        images = drawn(Path(name), pairs[0].diffusion.card.spec, batch)
        subjects = subjects_of(pairs, read(images[0]), left_out)
        works = [(subject, size) for subject in subjects for size in (1, batch)]
        total = len(works) + 3
        peak = peak_gflops(where, dtype=getattr(torch, computed_in(where)))
        step = step_beside_copy(where)
        progress(1, total)
        calls = list[Call]()
        for done, size in enumerate((1, batch), 2):
            with precision(where):
                calls += calls_of(subjects, size, where, peak)
            progress(done, total)
        paces = list[Pace]()
        for done, (subject, size) in enumerate(works, 4):
            with left_out_if_refused(subject.task.name, left_out):
                paces.append(pace(subject, images[:size], where))
            progress(done, total)
    return Bench(about(where, why, pairs[0].diffusion), peak, paces, calls, step, left_out)


def about(where: str, why: str, diffusion: Stored) -> dict[str, Any]:
    """Return what the figures hold for."""
    status, card = ops.status(torch.device(where).type), diffusion.card
    return {
        "machine": machine(where),
        "device": f"{where}: {why}",
        "precision": computed_in(where),
        "threads": torch.get_num_threads(),
        "knife": __version__,
        "torch": torch.__version__,
        "ops": f"{status.path} ({status.reason})",
        "models": card.dataset,
        "channels": len(card.spec.channels),
        "size": list(card.spec.size),
    }


# ------------------------------------------------------------------------------------------------ what is measured with


@contextmanager
def left_out_if_refused(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Note why a task cannot be measured, so that the others are; memory that runs out ends it all."""
    try:
        yield
    except DeviceError:
        raise
    except KnifeError as error:
        left_out[name] = str(error)


def guided(models: Path | None, dataset: str | None) -> tuple[list[Pair], dict[str, str]]:
    """Return the models of each task, and why tasks have none.

    Raises:
        ModelError: if none has any: why the first has none.
    """
    pairs, left_out = list[Pair](), dict[str, str]()
    for name in names():
        with left_out_if_refused(name, left_out):
            pairs.append(choose(name, [], models, dataset))
    if not pairs:
        raise ModelError(next(iter(left_out.values()), "no task is installed; reinstall knife (knife plugins list)."))
    return pairs, left_out


def drawn(folder: Path, spec: ImageSpec, count: int) -> list[Path]:
    """Write images of smooth noise, of a model's size and channels: no walk takes longer for what it sees."""
    coarse = torch.rand(count, len(spec.channels), 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(coarse, spec.size, mode="bilinear").numpy()
    files = [folder / f"{i}.nii" for i in range(count)]
    for file, rows in zip(files, pixels, strict=True):
        write_nifti(file, rows)
    return files


def subjects_of(pairs: Sequence[Pair], image: Image, left_out: dict[str, str]) -> list[Subject]:
    """Return what can be measured: the tasks that load, each with a target.

    Raises:
        ModelError: if there is none: why the first cannot be.
    """
    subjects = list[Subject]()
    for pair in pairs:
        with left_out_if_refused(pair.guide.card.kind, left_out):
            kind = task(pair.guide.card.kind)
            subjects.append(Subject(kind, pair, *usual_target(kind, pair.guide.card, image)))
    if not subjects:
        raise ModelError(next(iter(left_out.values())))
    return subjects


def usual_target(kind: Task, card: Card, image: Image) -> tuple[str, Tensor]:
    """Return a target that a task understands, in words and as it reads them: more, a class or a shape.

    Raises:
        TaskError: if it understands none of them.
    """
    words = ("+", *reversed(card.config.get("classes", ())), SHAPE)
    for text in words:
        with suppress(TargetError, TaskError):
            return text, kind.target(text, image, card.spec, card.config)
    raise TaskError(f"task {kind.name}: not measured, as none of {', '.join(words)} means anything to it.")


# ----------------------------------------------------------------------------------------------------- what is measured


def pace(subject: Subject, images: Sequence[Path], where: str) -> Pace:
    """Time whole translations of a batch in few steps."""
    usual = DEFAULTS.at(level_of([subject.pair]))
    assert usual.steps is not None
    pair, timed = subject.pair, dict[int, float]()
    for steps in (1, *FEW):  # the first warms up
        settings = replace(DEFAULTS, steps=steps, strength=STRENGTH, batch_size=len(images), max_reconstruction=UNKNOWN)
        run = partial(
            translate,
            list(images),
            Wish(subject.task.name, subject.text),
            out=images[0].parent / f"{subject.task.name}_{len(images)}_{steps}",
            models=None if pair.shipped else pair.folder.parent,
            dataset=pair.folder.name,
            settings=settings,
            device=where,
        )
        timed[steps] = seconds(run, where) / len(images)
    timed.pop(1)
    return Pace(subject.task.name, len(images), usual.steps, drawn_on(timed, usual.steps), timed)


def drawn_on(timed: Mapping[int, float], steps: int) -> float:
    """Return the seconds of so many steps, on the line through two numbers of steps that were timed."""
    (few, first), (more, second) = sorted(timed.items())
    return second + (steps - more) * max(second - first, 0.0) / (more - few)


def calls_of(subjects: Sequence[Subject], batch: int, where: str, peak: float) -> list[Call]:
    """Time a call of the diffusion model, and the gradient of each guide, as a step asks for them."""
    card = subjects[0].pair.diffusion.card
    x = torch.randn(batch, len(card.spec.channels), *card.spec.size, device=where)
    x = x.to(memory_format=torch.channels_last)
    t = timestep(torch.full((batch,), card.schedule.T // 2, device=where))
    net = load(subjects[0].pair.diffusion, where)
    calls: dict[str, Callable[[], object]] = {"diffusion": partial(forward, net, x, t)}
    work = {"diffusion": operations(calls["diffusion"])}
    for subject in subjects:
        target = subject.target.expand(batch, *subject.target.shape).to(where)
        score = subject.task.score(load(subject.pair.guide, where), target)
        calls[subject.task.name] = partial(slope, score, x, t)
        work[subject.task.name] = gradient_operations(score, x, t)
    times = medians(calls, REPEATS, where)
    rates = {name: work[name] / times[name] / 1e9 for name in calls}
    return [Call(name, batch, times[name] * 1e3, rates[name], rates[name] / peak) for name in calls]


@torch.no_grad()
def forward(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Call a U-Net as a step does."""
    answer: Tensor = net(x, t)
    return answer


def step_beside_copy(where: str) -> Step:
    """Time the fused step beside a copy."""
    x, grad = torch.randn(2, *STEP_SIZE, device=where)
    output = torch.randn(STEP_SIZE[0], 2 * STEP_SIZE[1], *STEP_SIZE[2:], device=where)
    times = medians(step_and_copy(x, output, grad), REPEATS, where)
    rates = {name: gigabytes(x) / time for name, time in times.items()}
    return Step(STEP_SIZE, rates["step"], rates["copy"], rates["step"] / rates["copy"])


def step_and_copy(x: Tensor, output: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    """Set up a guided step from x, [N, C, H, W], and the copy of as many bytes into memory that is there already.

    eps is the first half of the channels of `output`, [N, 2C, H, W], as in a translation.
    """
    alpha_bar = torch.full(x.shape[:1], 0.5, dtype=torch.float64, device=x.device)
    eps, numbers = output[:, : x.shape[1]], (alpha_bar, alpha_bar + 0.01, alpha_bar * 6)
    source = torch.randn(2 * len(x), *x.shape[1:], device=x.device).to(x.dtype)
    target = torch.empty_like(source)
    return {"step": lambda: ops.ddim_step(x, eps, grad, *numbers), "copy": lambda: target.copy_(source)}


def gigabytes(x: Tensor) -> float:
    """Return how much a guided step of images moves."""
    return PASSES * x.numel() * x.element_size() / 1e9


# ---------------------------------------------------------------------------------------------------- clocks and counts


def machine(device: str) -> str:
    """Name the processor or GPU that is measured."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores"


def peak_gflops(device: str, clock: Clock = time.perf_counter, dtype: torch.dtype = torch.float32) -> float:
    """Return the GFLOP/s of the best of ten products of two large matrices: the most that a machine was seen to do."""
    side = PEAK_SIDE if torch.device(device).type == "cpu" else PEAK_SIDE_GPU
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / min(seconds(lambda: a @ b, device, clock) for _ in range(10)) / 1e9


def operations(call: Callable[[], object]) -> int:
    """Count the floating-point operations of the convolutions and matrix products in a call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def gradient_operations(score: Score, x: Tensor, t: Tensor) -> int:
    """Count the operations of a score's gradient; torch counts none of a network that is given a leaf."""
    return operations(lambda: slope(lambda x, t: score(x.clone(), t), x, t))


def medians(calls: Calls, repeats: int, device: str, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Time calls in turn, there and back as the second finds warm caches; return the median seconds of each.

    Each is called once before, to warm up; short ones are timed in blocks of about two milliseconds.
    """
    blocks = dict[str, int]()
    for name, call in calls.items():
        call()
        blocks[name] = max(1, round(BLOCK / max(seconds(call, device, clock), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats):
        for name, call in list(calls.items())[:: 1 if i % 2 else -1]:
            times[name].append(seconds(call, device, clock, blocks[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(call: Callable[[], object], device: str, clock: Clock = time.perf_counter, count: int = 1) -> float:
    """Return the mean seconds of a call, the device's work included."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    synchronize()
    start = clock()
    for _ in range(count):
        call()
    synchronize()
    return (clock() - start) / count
