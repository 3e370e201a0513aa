"""What a step learns from: images, labels, noise levels and noise; made in a thread while the step before computes.

    batch_of    which images a step sees
    draw        its noise levels and its noise
    made        all of it, as rows that only have to be copied to the device
    Ahead       the thread, which is always one step ahead

A batch is a function of (step, job) alone, so that it does not matter when and where it is made. What plugins do for it
(their hook `label`) is done in that thread too, and always there: no two of their calls for batches overlap.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from knife.balance import Strata
from knife.data import Case
from knife.devices import staged, without_helpers
from knife.job import BANDS, EPOCH, MATCH, NOISE, PARTS, Job, Run, generator, stacked
from knife.tasks import Task

T = TypeVar("T")
LOWER = 1.5  # power by which levels are drawn lower for task networks: 71 of 100 lie below 600 of 1000


@dataclass(frozen=True)
class Rows:
    """The rows of a batch whose noise levels lie in one band."""

    band: int
    count: int  # of all processes together
    tensors: Sequence[Tensor]  # of this process: images [n, C, H, W], labels [n, ...], levels [n], noise [n, C, H, W]

    def parts(self, most: int) -> Iterator[Sequence[Tensor]]:
        """Yield the tensors of at most so many rows at a time."""
        if len(self.tensors[0]):
            yield from zip(*(tensor.split(most) for tensor in self.tensors), strict=True)


@dataclass(frozen=True)
class Batch:
    """What a step learns from; without the images that are left out."""

    step: int
    count: int  # images, of all processes together
    bands: Sequence[Rows]


# ------------------------------------------------------------------------------------------------------ which, and what


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


def made(step: int, job: Job) -> Batch:
    """Read and draw what a step learns from."""
    drawn = batch_of(step, job.run, len(job.examples), job.strata)
    x0, labels = stacked([job.examples[i] for i in readable(drawn, job)])
    level, eps = draw(job.run, step, x0, job.card.schedule.T)
    good = torch.tensor([i not in job.without for i in drawn])

    def rows(band: int, places: Tensor) -> Rows:
        learnt = places[good[places]]
        mine = job.team.part(learnt)
        return Rows(band, len(learnt), [staged(whole[mine], job.run.device) for whole in (x0, labels, level, eps)])

    return Batch(step, int(good.sum()), [rows(*one) for one in bands_of(level, job)])


def readable(drawn: Sequence[int], job: Job) -> list[int]:
    """Return which examples are read for those that are drawn: in the place of one that is left out, any other.

    What has gone bad may no longer have a label, and no row of a batch that is left out comes to the network.
    """
    good = (i for i in chain(drawn, range(len(job.examples))) if i not in job.without)
    other = next(good, drawn[0])
    return [other if i in job.without else i for i in drawn]


def bands_of(level: Tensor, job: Job) -> list[tuple[int, Tensor]]:
    """Return the rows of a batch by the band of noise levels they lie in; a diffusion model has but one band."""
    if job.task is None or job.run.judge:
        return [(0, torch.arange(len(level)))]
    parts = level.argsort(stable=True).chunk(PARTS)
    T = job.card.schedule.T
    return [(min(int(level[part].double().mean() * BANDS / T), BANDS - 1), part) for part in parts]


def checksums(step: int, job: Job) -> dict[int, int]:
    """Return the checksum of every image that a step learns from."""
    drawn = batch_of(step, job.run, len(job.examples), job.strata)
    return {i: checksum(job.cases[i], job.task) for i in {*drawn} - job.without}


def checksum(case: Case, kind: Task | None) -> int:
    """Return a checksum of an image, and of its mask if a task may look at it: of all that lies on the disk."""
    found = 0
    for tensor in (case.pixels, case.mask if kind else None):
        if tensor is not None:
            found = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


# ----------------------------------------------------------------------------------------------------------- the thread


class Ahead:
    """Makes batches in a thread: as soon as one is taken, it begins with the next, and after the last with none.

    What making one raises is raised where that one is asked for; who asks again has it made anew.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "knife-batches")
        without_helpers(self.thread)
        self.coming: dict[object, Future[Any]] = {}  # what is made of which step -> where it will be

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the thread; what it has begun it ends, and nobody takes it."""
        self.thread.shutdown(cancel_futures=True)

    def checksums(self, step: int, job: Job) -> dict[int, int]:
        """Return the checksum of every image that a step learns from."""
        return self.begun(checksums, step, job).result()

    def batch(self, step: int, job: Job) -> Batch:
        """Return what a step learns from, and let the thread begin with the next.

        Checksums are taken last, so that nothing is learnt from that had changed on the disk when it was read.
        """
        batch = self.begun(made, step, job).result()
        if step + 1 < job.run.steps:
            self.coming = {key(work, step + 1, job): self.begun(work, step + 1, job) for work in (made, checksums)}
        return batch

    def begun(self, work: Callable[[int, Job], T], step: int, job: Job) -> "Future[T]":
        """Return where a work is being done: since before, or from now on."""
        return self.coming.pop(key(work, step, job), None) or self.thread.submit(work, step, job)


def key(work: Callable[[int, Job], object], step: int, job: Job) -> object:
    """Tell works apart: of a job in training nothing else changes that they depend on."""
    return work, step, job.without
