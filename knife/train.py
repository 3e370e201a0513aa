"""The one training loop; a diffusion model, a task network and a judge differ in their loss and their draws alone.

    prepare     read the data, let the task look at its labels     -> Job, which stays the same     (job.py)
    start       a fresh network, or where an earlier run stopped   -> State, which every step changes (resume.py)
    Ahead       read and draw the next step's batch in a thread    -> Batch, which the step learns from (batches.py)
    train_step  noise a batch, descend, follow with the average
    keep        write the log, the model, a sheet that shows how good it is, and the state to resume from

A run that is killed at any moment goes on from its last state, and ends as if it had never been. Several processes
(`torchrun`) make the same draws, and each takes its rows of every batch: the steps are those of one process, up to
rounding, however many there are.

A judge is a task network that measures results and never guides. So that it does not share its guide's mistakes, it
has another architecture, draws other random numbers, and learns from clean images of half of the patients; a training
with --spare-judge learns from the other half.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from knife.batches import Ahead, Batch, made
from knife.checkpoint import describe, read_tensors, save, write_safely
from knife.data import short_hash
from knife.devices import deterministic, enough_memory, precision, ran_out_of_memory, told
from knife.errors import DiskError, DivergedError, InputError, ModelError, SettingsError
from knife.files import remove_left_behind
from knife.job import NETWORK, PREPARED, Job, Run, loss_of, prepare, refuse_full_disk, seed_of, which_half
from knife.layers import forget
from knife.lock import models_locked
from knife.ranks import Team, processes, team
from knife.resume import Log, State, commit, config_before, follow, mean, origin, record, start, tensorboard, tensors_of
from knife.sheets import measured, samples, sheet_of
from knife.tasks import Task

T = TypeVar("T")
USUAL = 0.98  # decay of the moving average that is the usual loss
PATIENCE = 10  # steps in a row whose loss or gradient is not finite, before a run gives up
TRIES = 3  # saves in a row that fail, before a run gives up
BYTES_A_PARAMETER = 56  # the model 4, two states of 16 each, and another of both before they take their places


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

    def warned(self, words: str) -> None:
        """Hear of what is amiss, but does not end the run."""


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

    def warned(self, words: str) -> None:
        """Hear of what is amiss."""


def train(run: Run, watch: Watch, stop: Callable[[], bool] = lambda: False) -> int:
    """Train one network, resuming where an earlier run of the same settings stopped; return the step it reached.

    Raises:
        SettingsError: if an earlier run used other settings or data (the message lists the differences).
        InputError: if the data cannot be used, or an image goes bad on the way.
        ModelError: if there is a state to resume from, and not of such a run.
        DiskError: if the disk is full or refuses, no state is whole, or another process trains this model.
        DivergedError: if the loss is not finite again and again.
        DeviceError: if not even single images fit into memory, or another of several processes ends before its time.
        TaskError: if the task is unknown, or its plugin broken.
    """
    if run.batch < processes():
        raise SettingsError(f"--batch-size {run.batch}: {processes()} processes share a batch; give one image each.")
    with team(run.device) as mine, alone(run, mine), deterministic(run.deterministic):
        writer = tensorboard() if run.tensorboard and mine.first else None
        watch = watch if mine.first else Unwatched()
        with mine.after_the_first():
            with enough_memory(run.device, "the state of an earlier run does", "close other programs"):
                config = config_before(run)
            job = replace(prepare(run, watch.loading, config), team=mine)
        with enough_memory(run.device, f"a batch of {run.batch} in parts of {run.at_once} does", more_memory(run)):
            with mine.after_the_first():
                state = start(job, watch.warned)
            job = introduced(state, replace(job, without=left_out(state, job)), watch)
            with closing(Log(job, state, writer, watch.warned)) as log, Ahead() as ahead:
                walk(state, job, log, watch, stop, ahead)
    return state.step


@contextmanager
def alone(run: Run, mine: Team) -> Iterator[None]:
    """Keep other trainings off a run's files; of several processes that share the run, the first does."""
    if not mine.first:
        yield
        return
    folder = run.path.parent
    refuse_full_disk(folder, 0)
    with models_locked(run.path, steal=run.steal_lock):
        remove_left_behind(folder)
        yield


def introduced(state: State, job: Job, watch: Watch) -> Job:
    """Tell what a run will take, once its checkpoints fit on the disk and its batches into memory."""
    parameters, seconds = sum(p.numel() for p in state.net.parameters()), 0.0
    refuse_full_disk(job.run.path.parent, parameters * BYTES_A_PARAMETER)
    if state.step < job.run.steps:
        seconds, job = fitting(job, state, watch, partial(time_a_step, state))
        job = replace(job, team=job.team.hurried(seconds))
    watch.budget(budget(state, job, parameters, seconds))
    return job


def walk(state: State, job: Job, log: Log, watch: Watch, stop: Callable[[], bool], ahead: Ahead) -> None:
    """Take all steps that are left, or until one of several processes shall stop, and keep what comes of them."""
    run, kept, failed = job.run, last_kept(state, job), 0
    while state.step < run.steps and not job.team.total(stop()):
        job = sound(state, job, watch, ahead.checksums(state.step, job))
        loss, job = fitting(job, state, watch, partial(train_step, state, make=ahead.batch))
        log.step(state, loss)
        watch.step(state.step, loss)
        if state.step % run.every == 0:
            try:
                kept, failed = keep(state, job, log, watch), 0
            except DiskError as error:
                failed += 1
                if failed == TRIES:
                    raise
                watch.warned(f"step {state.step} is not saved: {error} The next try comes {run.every} steps later.")
    if state.step != kept:
        keep(state, job, log, watch)


def sound(state: State, job: Job, watch: Watch, checksums: Mapping[int, int]) -> Job:
    """Look whether the images of the next step are as they were when first drawn; return the job without the others.

    checksums: those of these images now.

    Raises:
        InputError: if one is not, and --skip-bad is not given.
    """
    for i, found in checksums.items():
        if state.checksums.setdefault(i, found) == found:
            continue
        why = f"{job.cases[i].name}: its decoded copy has changed on the disk since step {state.step} or before"
        if not job.run.skip_bad:
            raise InputError(
                f"{why}; remove {job.run.models / PREPARED}, it is made anew, and the same command resumes, "
                "or go on without such images by --skip-bad."
            )
        state.bad.append(short_hash(job.cases[i].name))
        state.history.append({"step": state.step, "what": "an image went bad and is left out"})
        watch.warned(f"{why}; it is left out from now on, and the others come as they would have.")
    return replace(job, without=left_out(state, job))


def left_out(state: State, job: Job) -> frozenset[int]:
    """Return which examples are drawn and not learnt from."""
    bad = {*state.bad}
    return frozenset(i for i, case in enumerate(job.cases) if short_hash(case.name) in bad) if bad else frozenset()


def last_kept(state: State, job: Job) -> int:
    """Return the step of a run's model and state; 0, so that both are written anew, if the model's is another.

    So it is if the model is not there or damaged, and if a run was killed after its state, before its model.
    """
    try:
        read_tensors(job.run.path)
        step = int(describe(job.run.path).card.training["step"])
        return step if step == state.step else 0
    except (ModelError, LookupError, TypeError, ValueError):
        return 0


def fitting(job: Job, state: State, watch: Watch, work: Callable[[Job], T]) -> tuple[T, Job]:
    """Do a work, with batches in ever smaller parts if memory runs out; return what it returns, and the job it fits.

    Of several processes each would have to know of the others' parts, so they are refused instead.
    """
    while True:
        try:
            return work(job), job
        except Exception as error:
            if not ran_out_of_memory(error) or job.run.at_once == 1 or job.team.count > 1:
                raise
        # out of the handler, so that what the error held is free
        parts = -(-job.run.batch // job.run.at_once)
        job = replace(job, run=replace(job.run, accumulate=min(2 * parts, job.run.batch)))
        what = f"memory ran out: batches come in parts of {job.run.at_once}"
        state.history.append({"step": state.step, "what": what})
        watch.warned(f"{what} from step {state.step} on, which is equal to whole ones up to rounding.")


def validated_on(kind: Task | None, set_apart: int) -> str:
    """Say what the sheets will show."""
    if kind is None:
        return "samples from noise"
    return f"{set_apart} images set apart" if set_apart else "training images, for want of others set apart"


def budget(state: State, job: Job, parameters: int, seconds: float) -> Budget:
    """Return what a run is about to spend."""
    return Budget(
        images=len(job.examples),
        half=which_half(job.run),
        skipped=job.skipped,
        layout=job.folder.layout,
        parameters=parameters,
        done=state.step,
        steps=job.run.steps,
        seconds_a_step=seconds,
        device=job.run.device,
        why=job.folder.why,
        validation=validated_on(job.task, job.set_apart),
        config=job.card.config,
    )


def more_memory(run: Run) -> str:
    """Say how a run would need less memory."""
    if run.at_once == 1:
        return "choose a smaller --preset"
    parts = -(-run.batch // run.at_once)
    return f"split it by --accumulate {min(2 * parts, run.batch)}, which changes nothing but the rounding"


# --------------------------------------------------------------------------------------------------------- the one step


def backward(net: nn.Module, batch: Batch, job: Job, usual: Tensor | None = None) -> Tensor:
    """Compute the gradients of one batch, in as many parts as `run.accumulate` says; return the loss.

    The host never waits for a GPU here: the loss, a float64, and the usual ones lie on the device.

    Args:
        net: the network.
        batch: what it shall learn from.
        job: what it is trained on.
        usual: of a task, the usual size of the loss in each band of noise levels, which is brought up to date.
    """
    run, loss = job.run, loss_of(job.task, job.card.schedule)
    own = seed_of(run.drawn_from, batch.step, NETWORK) ^ job.team.number << 48
    torch.manual_seed(own)  # for networks that draw on their own, as dropout does
    nothing = torch.zeros((), dtype=torch.float64, device=run.device)
    total = nothing if batch.count else nothing + math.nan  # a step without any image is skipped
    for rows in batch.bands:
        weight, found = torch.ones_like(nothing) if usual is None else weight_of(usual, rows.band), nothing
        for part in rows.parts(run.at_once):
            x, label, k, e = (tensor.to(run.device, non_blocking=True) for tensor in part)
            x = x.to(memory_format=torch.channels_last)
            with precision(run.device, run.precision):
                value = loss(net, x, label, k, e) * len(x) / batch.count
            torch.autograd.backward(weight.to(value.dtype) * value)
            found = found + value.detach()
        found = job.team.summed(found)
        total = total + found
        if usual is not None and rows.count:
            bring_up_to_date(usual, rows.band, found.abs() * batch.count / rows.count)
    job.team.add_gradients(net)
    return total


def weight_of(usual: Tensor, band: int) -> Tensor:
    """Return what a band of noise levels counts: the inverse of its usual loss.

    A task's loss falls by orders of magnitude from noise to clean images. So that its network learns to tell well where
    things can be told well, each band counts by how much better it gets, not by how much there is to get better; a
    usual loss below a hundredth of the largest counts as that, and one not known yet as the largest.
    """
    most = usual.max()
    known = torch.where(usual[band] == 0, most, usual[band])
    return torch.where(most == 0, 1.0, 1 / torch.maximum(known, most / 100))


def bring_up_to_date(usual: Tensor, band: int, size: Tensor) -> None:
    """Let the usual loss of a band follow one more, unless that is not finite; the first one is taken as it is."""
    far = size - usual[band]
    far = torch.where(usual[band] == 0, far, (1 - USUAL) * far)
    usual[band] += torch.where(size.isfinite(), far, 0)


def train_step(state: State, job: Job, make: Callable[[int, Job], Batch] = made) -> float:
    """Take one step of Adam and follow it with the moving average; return the loss.

    A loss or gradient that is not finite leaves the weights as they are; after `PATIENCE` of them in a row it raises.
    If memory runs out, the state is as it was.

    make: returns what a step learns from.
    """
    began, usual = time.perf_counter(), state.usual.clone()
    try:
        loss = backward(state.net, make(state.step, job), job, state.usual)
    except Exception:
        state.usual = usual
        state.optimizer.zero_grad()
        raise
    value, size = told(loss, norm([p.grad for p in state.net.parameters() if p.grad is not None]))
    state.in_a_row = 0 if math.isfinite(value) and math.isfinite(size) else state.in_a_row + 1
    if state.in_a_row:
        state.skipped += 1
    else:
        descend(state, job)
    state.optimizer.zero_grad()
    state.step += 1
    state.seconds += time.perf_counter() - began
    if state.in_a_row == PATIENCE:
        raise DivergedError(
            f"{job.run.kind}: the loss was not finite in {PATIENCE} steps in a row, up to step {state.step}; "
            f"give an --lr below {job.run.lr:g}, or look for odd values in the data. What was saved before stays."
        )
    return value


def descend(state: State, job: Job) -> None:
    """Move weights and average; half a move cannot be taken back, so there is no second try with smaller parts."""
    with enough_memory(job.run.device, "the moments of Adam do", "choose a smaller --preset"):
        state.optimizer.step()
        follow(state.ema, state.net, state.step - state.skipped, job.run.ema)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all values: it is finite if and only if none of them is NaN or infinite."""
    return torch.nn.utils.get_total_norm(tensors)


def time_a_step(state: State, job: Job) -> float:
    """Return the seconds of a step whose batch is there, by computing the gradients of a copy twice."""
    net, batch, seconds = copy.deepcopy(state.net), made(state.step, job), 0.0
    for _ in range(2):
        began = time.perf_counter()
        told(backward(net, batch, job))
        seconds = time.perf_counter() - began
    return seconds


# ------------------------------------------------------------------------------------------------------------- keeping


def keep(state: State, job: Job, log: Log, watch: Watch) -> int:
    """Write the log, the state to resume from, the model (the weights' moving average), and a sheet; return the step.

    The state comes before all that could fail: a run that ends after it resumes there, and writes the rest anew. Of
    several processes the first does it, and the others go on until they need it.
    """
    if not job.team.first:
        return state.step
    run, ema = job.run, state.ema.eval().requires_grad_(False)
    if not norm([tensor for tensor in tensors_of(state).values() if tensor.is_floating_point()]).isfinite():
        raise DivergedError(
            f"{run.kind}: weights are not finite after step {state.step}, not saved; give a lower --lr."
        )
    log.write()
    commit(state, job)
    guidance = measured(job, job.task, ema) if job.task else {}
    with precision(run.device, run.precision):
        drawn = sheet_of(job, job.task, ema) if job.task else samples(ema, job.card)
    training = {**record(state, job), **origin(job), "loss": mean(state.losses)}
    save(run.path, ema.state_dict(), replace(job.card, guidance=guidance, training=training).to_json())
    sheet = run.path.with_suffix(".png")
    write_safely(sheet, drawn)
    forget(ema)
    watch.saved(run.path)
    watch.saved(sheet)
    return state.step
