"""The one training loop; a diffusion model and a task network differ in their loss alone.

Every random draw is a function of (seed, step, purpose), so that a resumed run walks the same way as one that was never interrupted.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from knife import __version__, data
from knife.checkpoint import Card, read_about, read_tensors, save, write_safely
from knife.ddim import decode, gradient
from knife.ddpm import hybrid_loss
from knife.errors import InputError, SettingsError
from knife.panel import curve, grid
from knife.schedule import Schedule, noise, path, timestep
from knife.spec import preset
from knife.tasks import Task, task

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]  # (net, x0, label, level, eps) -> scalar
FREE = ("steps", "every", "device", "accumulate")  # settings that may differ when a run is resumed


@dataclass(frozen=True)
class Run:
    """What to train, on what, and how."""

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
    device: str = "cpu"
    accumulate: int = 1  # split each batch into so many parts
    every: int = 1000  # steps between checkpoints and sheets

    @property
    def path(self) -> Path:
        """Return where the trained model goes."""
        return self.models / self.dataset / f"{self.kind}.safetensors"

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must agree on."""
        return {k: v for k, v in asdict(self).items() if k not in (*FREE, "data", "models")}


@dataclass(frozen=True)
class Budget:
    """What a run is about to spend; said before the first step."""

    images: int
    skipped: Mapping[str, str]
    layout: str
    parameters: int
    done: int
    steps: int
    seconds_a_step: float
    device: str


class Watch(Protocol):
    """What a caller may want to see of a run."""

    def budget(self, budget: Budget) -> None:
        """Hear once, before the first step, what the run will take."""

    def step(self, step: int, loss: float) -> None:
        """Hear of every step."""

    def saved(self, path: Path) -> None:
        """Hear of every file that was written."""


@dataclass
class State:
    """All that a training is, between two steps."""

    net: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0


def train(run: Run, watch: Watch, stop: Callable[[], bool] = lambda: False) -> int:
    """Train one network, resuming where an earlier run of the same settings stopped; return the step it reached.

    Raises:
        SettingsError: if an earlier run used other settings or data; the message lists the differences.
        InputError: if the data cannot be used.
    """
    plan = preset(run.preset)
    folder = data.open_folder(run.data)
    entries = folder.split("train")
    channels = data.channels_of(entries)
    card = Card(run.kind, run.dataset, plan.spec(run.kind, channels), Schedule(run.schedule))
    loaded, held_out = (
        data.load(some, card.spec.size, card.spec.value_range, channels) for some in (entries, folder.split("val"))
    )
    if len(loaded.cases) < 2:
        raise InputError(f"--data {run.data}: {len(loaded.cases)} images can be used, too few to train on.")
    kind = None if run.kind == "diffusion" else task(run.kind)
    if kind:
        card = replace(card, config=kind.configure(loaded.cases, run.label))
    x0, labels = tensors(loaded.cases, kind, card)
    state = start(run, card, data.fingerprint(entries))
    loss = loss_of(kind, card.schedule)
    parameters = sum(p.numel() for p in state.net.parameters())
    skipped = loaded.skipped | held_out.skipped
    seconds = time_a_step(state, run, loss, x0, labels, card.schedule)
    watch.budget(Budget(len(x0), skipped, folder.layout, parameters, state.step, run.steps, seconds, run.device))
    validation = tensors(held_out.cases, kind, card) if held_out.cases else (x0[: run.batch], labels[: run.batch])
    log = Log(run.path.with_suffix(".log.jsonl"), run.batch)
    while state.step < run.steps and not stop():
        value = train_step(state, run, loss, x0, labels, card.schedule)
        log.step(state.step, value)
        watch.step(state.step, value)
        if state.step % run.every == 0:
            keep(state, run, card, kind, data.fingerprint(entries), log, validation, watch)
    keep(state, run, card, kind, data.fingerprint(entries), log, validation, watch)
    return state.step


def tensors(cases: list[data.Case], kind: Task | None, card: Card) -> tuple[Tensor, Tensor]:
    """Return the images [N, C, H, W] and the labels [N, ...] of cases; a diffusion model needs no labels."""
    x0 = data.stack(cases)
    if kind is None:
        return x0, torch.zeros(len(x0))
    return x0, torch.stack([kind.label(case, card.config) for case in cases])


def loss_of(kind: Task | None, schedule: Schedule) -> Loss:
    """Return what a step descends: the hybrid loss, or the task's own loss on noised images."""
    if kind is None:
        return lambda net, x0, label, level, eps: hybrid_loss(net, x0, level, eps, schedule).mean()

    def loss(net: nn.Module, x0: Tensor, label: Tensor, level: Tensor, eps: Tensor) -> Tensor:
        x = noise(x0, eps, schedule.alpha_bar.to(x0.device)[level])
        return kind.train(net, x, timestep(level), label)

    return loss


def generator(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """Return the source of all random draws of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 101 + purpose)


def batch_of(step: int, run: Run, count: int) -> Tensor:
    """Return which images a step sees: every epoch is a permutation of its own, and runs on into the next."""
    first = step * run.batch
    places = range(first, first + run.batch)
    orders = {epoch: torch.randperm(count, generator=generator(run.seed, epoch, 1)) for epoch in {i // count for i in places}}
    return torch.stack([orders[i // count][i % count] for i in places])


def draw(run: Run, step: int, chosen: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Draw the noise levels 1..T [N] and the noise [N, C, H, W] of a step."""
    g = generator(run.seed, step)
    return torch.randint(1, T + 1, (len(chosen),), generator=g), torch.randn(chosen.shape, generator=g)


def backward(state: State, run: Run, loss: Loss, x0: Tensor, labels: Tensor, schedule: Schedule) -> float:
    """Compute the gradients of one batch, in as many parts as `run.accumulate` says; return the loss."""
    chosen = batch_of(state.step, run, len(x0))
    level, eps = draw(run, state.step, x0[chosen], schedule.T)
    parts = torch.arange(len(chosen)).chunk(run.accumulate)
    total = 0.0
    for part in parts:
        x, label = x0[chosen[part]].to(run.device), labels[chosen[part]].to(run.device)
        x = x.to(memory_format=torch.channels_last)
        with torch.autocast(run.device.split(":")[0], torch.bfloat16, enabled=run.device != "cpu"):
            value = loss(state.net, x, label, level[part].to(run.device), eps[part].to(run.device))
        (value * len(part) / len(chosen)).backward()
        total += value.item() * len(part) / len(chosen)
    return total


def train_step(state: State, run: Run, loss: Loss, x0: Tensor, labels: Tensor, schedule: Schedule) -> float:
    """Take one step of Adam and follow it with the moving average; return the loss."""
    value = backward(state, run, loss, x0, labels, schedule)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update_parameters(state.net)
    state.step += 1
    return value


def time_a_step(state: State, run: Run, loss: Loss, x0: Tensor, labels: Tensor, schedule: Schedule) -> float:
    """Return the seconds of a step, by computing gradients twice and throwing them away."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        backward(state, run, loss, x0, labels, schedule)
        state.optimizer.zero_grad()
        seconds = time.perf_counter() - began
    return seconds


def start(run: Run, card: Card, fingerprint: str) -> State:
    """Return the state of an earlier run of the same settings, or a fresh one."""
    torch.manual_seed(run.seed)
    net = card.build().to(run.device, memory_format=torch.channels_last)
    state = State(net, AveragedModel(net, multi_avg_fn=averaging(run.ema)), torch.optim.Adam(net.parameters(), lr=run.lr))
    before = resume_path(run)
    if before.exists():
        restore(state, before, run, fingerprint)
    return state


def averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return the moving average of the weights, quicker in the first steps so that it never remembers the random start."""

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return average


def resume_path(run: Run) -> Path:
    """Return where the state lies that a run resumes from."""
    return run.path.with_suffix(".resume.safetensors")


def restore(state: State, before: Path, run: Run, fingerprint: str) -> None:
    """Read the state of an earlier run, refusing other settings and other data."""
    about = read_about(before)
    now, then = {**run.settings(), "data": fingerprint}, about["settings"]
    differences = [f"{k}: {then.get(k)} then, {now.get(k)} now" for k in {**then, **now} if then.get(k) != now.get(k)]
    if differences:
        raise SettingsError(
            f"{before}: this run was begun with other settings ({'; '.join(differences)}). "
            f"Give the same ones to resume it, or another --dataset name to begin anew."
        )
    stored = read_tensors(before)
    state.net.load_state_dict(part(stored, "net."))
    state.ema.module.load_state_dict(part(stored, "ema."))
    state.ema.n_averaged.fill_(about["step"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part(stored, "adam.").items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = tensor
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    state.step = about["step"]


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def keep(
    state: State,
    run: Run,
    card: Card,
    kind: Task | None,
    fingerprint: str,
    log: "Log",
    validation: tuple[Tensor, Tensor],
    watch: Watch,
) -> None:
    """Write the model (its moving average), the state to resume from, the log, and a sheet that shows how good it is."""
    ema = state.ema.module
    ema.eval().requires_grad_(False)
    guidance = {} if kind is None else {"gradient": steepness(kind, ema, *validation, card.schedule)}
    about = {"settings": {**run.settings(), "data": fingerprint}, "step": state.step}
    training = {
        **about,
        "loss": log.recent(),
        "knife": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": run.device,
    }
    save(run.path, ema.state_dict(), replace(card, guidance=guidance, training=training).to_json())
    moments = {
        f"adam.{index}.{key}": value
        for index, values in state.optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    nets = {f"{name}.{k}": v for name, net in (("net", state.net), ("ema", ema)) for k, v in net.state_dict().items()}
    save(resume_path(run), nets | moments, about)
    log.write()
    sheet = run.path.with_suffix(".png")
    write_safely(sheet, samples(ema, card) if kind is None else errors(kind, ema, *validation, card.schedule))
    watch.saved(run.path)
    watch.saved(sheet)


@torch.no_grad()
def samples(net: nn.Module, card: Card, count: int = 8, steps: int = 50) -> bytes:
    """Draw a sheet of images made from nothing but noise, the same noise every time."""
    device = next(net.parameters()).device
    shape = (count, len(card.spec.channels), *card.spec.size)
    x = torch.randn(shape, generator=generator(0, 0, 2)).to(device)
    x = decode(net, x, card.schedule, path(card.schedule.T, steps), clamp=card.spec.value_range)
    return grid(x.cpu(), card.spec.value_range)


@torch.no_grad()
def errors(kind: Task, net: nn.Module, x0: Tensor, labels: Tensor, schedule: Schedule) -> bytes:
    """Draw the validation loss of a task against the noise level."""
    device = next(net.parameters()).device
    x0, labels = x0[:64].to(device), labels[:64].to(device)
    eps = torch.randn(x0.shape, generator=generator(0, 0, 3)).to(device)
    levels = path(schedule.T, min(10, schedule.T))[1:]
    losses = []
    for level in levels:
        x = noise(x0, eps, schedule.alpha_bar.to(device)[[level] * len(x0)])
        losses.append(float(kind.train(net, x, timestep(torch.full((len(x0),), level, device=device)), labels)))
    return curve(levels, losses, "noise level", f"{kind.name}: validation loss")


def steepness(kind: Task, net: nn.Module, x0: Tensor, labels: Tensor, schedule: Schedule) -> float:
    """Measure how steep a task's score is: the median size of sqrt(1 - ab) g against eps, whose size is 1 a pixel.

    Every image is pulled towards the label of another. The inverse of this number is the scale at which guidance is as large as
    the noise prediction, which is what makes a scale portable between data sets and tasks.
    """
    device = next(net.parameters()).device
    x0, wanted = x0[:64].to(device), labels[:64].roll(1, 0).to(device)
    eps = torch.randn(x0.shape, generator=generator(0, 0, 4)).to(device)
    sizes = []
    for level in path(max(schedule.T // 2, 1), min(5, max(schedule.T // 2, 1)))[1:]:
        ab = schedule.alpha_bar.to(device)[[level] * len(x0)]
        t = timestep(torch.full((len(x0),), level, device=device))
        g = gradient(kind.score(net, wanted), noise(x0, eps, ab), t)
        sizes.append((1 - ab[0]).sqrt() * g.flatten(1).square().mean(1).sqrt())
    return float(torch.cat(sizes).median())


class Log:
    """Loss and speed as JSON lines, a line for every twenty steps."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch
        self.losses: list[float] = []
        self.lines: list[str] = []
        self.since = time.perf_counter()

    def step(self, step: int, loss: float) -> None:
        """Take note of a step."""
        self.losses.append(loss)
        if step % 20 == 0:
            now = time.perf_counter()
            speed = 20 * self.batch / (now - self.since)
            self.since = now
            line = {"step": step, "loss": round(sum(self.losses[-20:]) / 20, 6), "images_per_second": round(speed, 2)}
            self.lines.append(json.dumps(line))

    def recent(self) -> float:
        """Return the mean loss of the last two hundred steps."""
        last = self.losses[-200:]
        return sum(last) / max(len(last), 1)

    def write(self) -> None:
        """Append what is new to the log file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in self.lines)
        self.lines.clear()
