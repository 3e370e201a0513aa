"""Where a training stands: its state, in memory and on disk, and its log.

    start       a fresh network, or where an earlier run of the same settings stopped
    commit      write the state, and keep the one before
    digest      one hash of all that a training has come to

The state lies in a safetensors file with a hash of its own (`checkpoint.save`), and the state before it in another. A
crash at any moment leaves one of the two whole, and so does a bit that changes on the disk.
"""

import copy
import json
import os
import platform
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from knife import __version__, ops
from knife.checkpoint import read_about, read_tensors, ready, save, seal, write_safely
from knife.devices import computed_in
from knife.errors import DiskError, ModelError, SettingsError, UnreadableError
from knife.files import sync
from knife.image import PERCENTILES
from knife.job import BANDS, Job, Run

LOG_EVERY = 20  # steps a line of the log
AVERAGED = 200  # steps whose mean loss a card tells
Warn = Callable[[str], None]


@dataclass
class State:
    """All that a training is, between two steps."""

    net: nn.Module
    ema: nn.Module  # of the moving average of its weights
    optimizer: torch.optim.Optimizer
    usual: Tensor  # a task's loss by band of noise levels, [BANDS] float64, on the device
    step: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    in_a_row: int = 0  # how many of the last steps were such
    seconds: float = 0.0  # spent in steps, by earlier runs too
    told: int = 0  # how many were skipped before the last line of the log
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=AVERAGED))  # the last finite ones
    history: list[dict[str, Any]] = field(default_factory=list)  # what has happened that changed how it goes on
    bad: list[str] = field(default_factory=list)  # hashes of the names of images that are left out since they went bad
    checksums: dict[int, int] = field(default_factory=dict)  # of the examples, as they were first drawn; never stored


class Found(NamedTuple):
    """A state on the disk."""

    path: Path
    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


# ---------------------------------------------------------------------------------------------------- start and resume


def start(job: Job, warn: Warn) -> State:
    """Return the state of an earlier run of the same settings, or a fresh one.

    warn: is told what is amiss, but can be helped.

    Raises:
        SettingsError: if an earlier run had other settings or images, or a model is there without a state.
        DiskError: if none of its states is whole: no training begins anew unasked.
        ModelError: if there is a state, and not of such a training.
    """
    run = job.run
    torch.manual_seed(run.drawn_from)
    net = ready(job.card.build(), run.device)
    usual = torch.zeros(BANDS, dtype=torch.float64, device=run.device)
    state = State(net, copy.deepcopy(net), adam(net, run.lr), usual)
    found = newest(run, warn)
    if found:
        restore(state, found, job, warn)
    elif run.path.exists():  # every run writes its state before its model
        raise SettingsError(
            f"{run.path}: a model is there, and no state to resume it from; move it away, or give another "
            f"--dataset name."
        )
    return state


def adam(net: nn.Module, lr: float) -> torch.optim.Adam:
    """Return Adam, which on a GPU takes its step in a few kernels instead of a dozen for each of its formulas."""
    fused = all(p.is_cuda and p.is_floating_point() for p in net.parameters())
    return torch.optim.Adam(net.parameters(), lr=lr, fused=fused or None)


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, count: int, decay: float) -> None:
    """Move the average of `count` steps' weights on, quicker in the first steps: the random start has no part in it.

    torch's AveragedModel does so too, but keeps the count in a tensor, for which the host would wait.
    """
    mine, theirs = (list[Tensor](one.parameters()) for one in (average, net))
    if count:
        torch._foreach_lerp_(mine, theirs, 1 - min(decay, (1 + count) / (10 + count)))
    else:
        torch._foreach_copy_(mine, theirs)
    for own, current in zip(average.buffers(), net.buffers(), strict=True):
        own.copy_(current)


def resume_path(run: Run) -> Path:
    """Return where the state lies that a run resumes from."""
    return run.path.with_suffix(".resume.safetensors")


def path_before(run: Run) -> Path:
    """Return where the state before that one lies."""
    return run.path.with_suffix(".before.resume.safetensors")


def newest(run: Run, warn: Warn) -> Found | None:
    """Return the newest state of a run that is whole; None if it has left none.

    If a newer one is damaged, it is kept aside, and `warn` is told of it.

    Raises:
        DiskError: if there are states, but all are damaged.
        UnreadableError: if the disk refuses to read one, which may be whole.
    """
    damaged = dict[Path, str]()
    for path in filter(os.path.lexists, (resume_path(run), path_before(run))):
        try:
            found = Found(path, read_about(path), read_tensors(path))
        except UnreadableError:
            raise
        except ModelError as error:
            damaged[path] = str(error)
            continue
        for bad, why in damaged.items():
            aside = set_aside(bad, run)
            step = found.about.get("step")
            warn(f"{why} It is kept as {aside.name}; the training goes on from {path.name}, step {step}.")
        return found
    if damaged:
        raise DiskError(
            f"{' '.join(damaged.values())} No state of this training is whole: bring one back from a copy, "
            f"or move {' and '.join(path.name for path in damaged)} away to begin anew."
        )
    return None


def config_before(run: Run) -> dict[str, Any] | None:
    """Return what the task of an earlier run remembers of its images; None if there is no such run.

    Its network answers in these terms: with the mean or the classes of other images, the same answer means another.
    """
    for path in filter(os.path.lexists, (resume_path(run), path_before(run))):
        with suppress(ModelError):  # one that is damaged is told of by `newest`
            config: dict[str, Any] | None = read_about(path).get("config")
            return config
    return None


def set_aside(path: Path, run: Run) -> Path:
    """Move a damaged state out of the way, so that it never takes the place of a whole one."""
    aside = run.path.with_suffix(".damaged.resume.safetensors")
    try:
        os.replace(path, aside)
        sync(aside.parent)
    except OSError as error:
        raise DiskError(f"{path}: damaged, and cannot be moved away ({error.strerror or error}); allow it.") from error
    return aside


def restore(state: State, found: Found, job: Job, warn: Warn) -> None:
    """Take over the state of an earlier run, refusing other settings and other data."""
    about = found.about
    try:
        differences, changed = compare(about["settings"], job.settings), changed_data(about, job)
        refused = differences + ([changed] if changed and not job.run.accept_data else [])
        if not refused:
            fill(state, about, found.tensors)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{found.path}: does not hold the state of this run ({reason}); move it away to begin anew."
        ) from error
    if refused:
        remedy = "" if differences else ", or --accept-dataset-change to go on with these images"
        raise SettingsError(
            f"{found.path}: this run was begun with other settings ({'; '.join(refused)}). "
            f"Give the same ones to resume it, or another --dataset name to begin anew{remedy}."
        )
    before = about.get("environment") or environment(job)
    drift = compare({"precision": "float32", **before}, environment(job))  # which was not told before there was another
    if drift:
        warn(f"resumed with other means ({'; '.join(drift)}): no longer bit for bit what one uninterrupted run gives.")
    state.history += [{"step": state.step, "what": what} for what in (changed, *drift) if what]


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words what differs between an earlier run's values and this one's; the data are compared apart."""
    differ = [k for k in {**then, **now} if k != "data" and (then.get(k) or None) != (now.get(k) or None)]
    return [f"{k}: {then.get(k)} then, {now.get(k)} now" for k in differ]


def changed_data(about: Mapping[str, Any], job: Job) -> str:
    """Return in words what has changed of the images since an earlier run; nothing if nothing has."""
    files = about.get("files")
    if files is not None and files != job.inventory:
        added, removed = job.inventory.keys() - files.keys(), files.keys() - job.inventory.keys()
        changed = [name for name in job.inventory.keys() & files.keys() if job.inventory[name] != files[name]]
        counts = f"{len(added)} images added, {len(removed)} removed, {len(changed)} changed"
        return f"data: {counts} since step {about['step']}"
    if files is None and about["settings"]["data"] != job.fingerprint:
        return "data: names, values or sizes of the images have changed since"
    return ""


def fill(state: State, about: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
    """Put what was read of an earlier run in the place of a fresh state."""
    state.net.load_state_dict(below(stored, "net."))
    state.ema.load_state_dict(below(stored, "ema."))
    parameters = state.optimizer.param_groups[0]["params"]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in below(stored, "adam.").items():
        index, key = name.split(".")
        like = parameters[int(index)]  # keeps its layout in memory
        moments.setdefault(int(index), {})[key] = tensor if key == "step" else torch.empty_like(like).copy_(tensor)
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    state.step, state.skipped = int(about["step"]), int(about.get("skipped", 0))
    state.in_a_row, state.told = int(about.get("in_a_row", 0)), int(about.get("told", 0))
    state.seconds = float(about.get("seconds", 0.0))
    state.history, state.bad = list(about.get("history", [])), list(about.get("bad", []))
    state.usual.copy_(stored.get("usual", state.usual))
    state.losses.extend(stored.get("losses", torch.zeros(0)).tolist())


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------------- writing


def commit(state: State, job: Job) -> None:
    """Write the state to resume from, and keep the one that was there; once it returns, no crash takes it away.

    Raises:
        DiskError: if the disk refuses; what was there is kept.
    """
    also = {"in_a_row": state.in_a_row, "told": state.told, "environment": environment(job), "bad": state.bad}
    also |= {"config": job.card.config} if job.task else {}
    about = {**record(state, job), **also, "files": dict(job.inventory)}
    save(resume_path(job.run), tensors_of(state), about, path_before(job.run))


def tensors_of(state: State) -> dict[str, Tensor]:
    """Return all that a run resumes from, but for its counts."""
    nets = {"net": state.net, "ema": state.ema}
    weights = {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
    moments = state.optimizer.state_dict()["state"]
    others = {"usual": state.usual, "losses": torch.tensor(list(state.losses), dtype=torch.float64)}
    adam = {f"adam.{i}.{key}": value for i, values in moments.items() for key, value in values.items()}
    return weights | others | adam


def record(state: State, job: Job) -> dict[str, Any]:
    """Return how far a run is, with which settings, and what has happened to it."""
    counts = {"step": state.step, "skipped": state.skipped, "seconds": round(state.seconds, 3)}
    counts |= {"left_out": len(state.bad)} if state.bad else {}
    return {"settings": job.settings, **counts, **({"history": state.history} if state.history else {})}


def environment(job: Job) -> dict[str, Any]:
    """Return what the last bits of a result depend on beside the settings."""
    device = job.run.device
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {
        "torch": torch.__version__,
        "device": f"{device.split(':')[0]} {name}",
        "processes": job.team.count,
        "precision": computed_in(device, job.run.precision),
        "deterministic": job.run.deterministic,
        "accumulate": job.run.accumulate,
        "kernels": ops.status(device.split(":")[0]).path,
        **({"threads": torch.get_num_threads()} if device == "cpu" else {}),
    }


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
        "precision": computed_in(job.run.device, job.run.precision),
        "deterministic": job.run.deterministic,
    }


def digest(run: Run) -> str:
    """Return one SHA-256 of what a training has come to: weights, their average, Adam's moments, counts and losses.

    Two runs of the same settings have the same one, however often either was stopped, killed and resumed.

    Raises:
        ModelError: if its state is missing or damaged.
    """
    about, path = read_about(resume_path(run)), log_path(run)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    counts = {name: about.get(name) for name in ("step", "skipped", "in_a_row")}
    log = [{name: line.get(name) for name in ("step", "loss", "skipped")} for line in lines]
    return seal({**counts, "log": log}, read_tensors(resume_path(run)))


# ----------------------------------------------------------------------------------------------------------------- log


def log_path(run: Run) -> Path:
    """Return where the log of a run lies."""
    return run.path.with_suffix(".log.jsonl")


class Log:
    """Loss and speed as JSON lines, one for every twenty steps, and for TensorBoard if its writer is given.

    A training goes on if its log cannot be written: `warn` hears of it, and it is tried again, at the end too.
    """

    def __init__(self, job: Job, state: State, writer: Any, warn: Warn) -> None:
        board, self.batch = job.run.path.parent / "tensorboard" / job.run.path.stem, job.run.batch
        self.path, self.warn, self.behind = log_path(job.run), warn, False
        self.lines = earlier_lines(self.path, state.step)
        self.since = (state.step, state.seconds)  # of this run, at the last line
        self.board = writer(str(board), purge_step=state.step + 1) if writer else None

    def step(self, state: State, loss: float) -> None:
        """Take note of a step."""
        if not state.in_a_row:
            state.losses.append(loss)
        if state.step % LOG_EVERY == 0:
            values = self.values(state)
            self.lines.append(json.dumps({"step": state.step, **values}))
            if self.board:
                for name, value in values.items():
                    self.board.add_scalar(name, value, state.step)
            self.since, state.told = (state.step, state.seconds), state.skipped

    def values(self, state: State) -> dict[str, float]:
        """Return what has happened since the last line; without a finite loss there is none to tell."""
        (step, seconds), bad = self.since, state.skipped - state.told
        values: dict[str, float] = {}
        if bad < LOG_EVERY:
            values["loss"] = mean(list(state.losses)[bad - LOG_EVERY :])
        speed = (state.step - step) * self.batch / max(state.seconds - seconds, 1e-9)
        values["images_per_second"] = round(speed, 2)
        return values | ({"skipped": bad} if bad else {}) | ({"left_out": len(state.bad)} if state.bad else {})

    def write(self) -> None:
        """Write the log, whole."""
        try:
            write_safely(self.path, "".join(f"{line}\n" for line in self.lines).encode())
            self.behind = False
        except DiskError as error:
            if not self.behind:
                self.warn(f"{error} The training goes on without a log.")
            self.behind = True

    def close(self) -> None:
        """Write what could not be written before, and let TensorBoard write what it still holds."""
        if self.behind:
            self.write()
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
