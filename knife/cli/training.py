"""The command `knife train`, and what it shows."""

import os
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from knife.cli.options import Device, Models, Nan, Precision
from knife.cli.terminal import Show, duration, give, progress, say, words
from knife.cli.words import slice_range
from knife.errors import SettingsError
from knife.settings import DEFAULTS

if TYPE_CHECKING:
    from knife.train import Budget

SHOWN_SKIPPED = 5  # skipped images that are named


def train(
    kind: Annotated[str, typer.Argument(help="diffusion, or a task: regress, classify, segment, a plugin's.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of images.")],
    preset: Annotated[str, typer.Option("--preset", help="Size of the network (knife presets).")] = "small-64",
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Name of the data set; default: the folder's.")
    ] = None,
    models: Models = Path("models"),
    label: Annotated[
        str | None, typer.Option("--label", help="What a task learns, where the data hold several.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option("--layout", help="How the folder is laid out; default: what fits.")
    ] = None,
    slices: Annotated[
        str | None, typer.Option("--slices", help="Axial slices of volumes, FIRST:LAST+1, as 80:129; default: all.")
    ] = None,
    crop: Annotated[
        bool, typer.Option("--crop", help="Fill the network's image size and cut off the rest, instead of padding.")
    ] = False,
    mask_labels: Annotated[
        str | None, typer.Option("--mask-labels", help="Labels of a mask that count, as 1,4; default: all but 0.")
    ] = None,
    min_brain: Annotated[
        float, typer.Option("--min-brain", help="Skip slices of volumes that show less than this share.")
    ] = 0.0,
    nan: Nan = None,
    synthetic: Annotated[
        bool, typer.Option("--allow-synthetic", help="Learn from images marked as made by knife too.")
    ] = False,
    balance: Annotated[
        bool,
        typer.Option(
            "--balance", help="Show classes, or tenths of a number's range, equally often; a size of 0 apart."
        ),
    ] = False,
    cap: Annotated[
        int | None, typer.Option("--cap", help="Images of one class, value or tenth of the masks' sizes at most.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps in all; default: the preset's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Images a step; default: the preset's.")
    ] = None,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Split each batch into so many parts.")] = 1,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate; default: the preset's.")] = None,
    ema: Annotated[
        float | None, typer.Option("--ema", help="Decay of the moving average; default: the preset's.")
    ] = None,
    schedule: Annotated[str, typer.Option("--schedule", help="linear or cosine.")] = "linear",
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random draw.")] = 0,
    every: Annotated[int, typer.Option("--every", help="Steps between checkpoints.")] = 500,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log for TensorBoard too.")] = False,
    judge: Annotated[
        bool, typer.Option("--judge", help="A network to measure results with: of clean images, half of the patients.")
    ] = False,
    spare_judge: Annotated[
        bool, typer.Option("--spare-judge", help="Leave out the half of the patients that judges learn from.")
    ] = False,
    accept_data: Annotated[
        bool, typer.Option("--accept-dataset-change", help="Resume though the images have changed.")
    ] = False,
    steal_lock: Annotated[
        bool, typer.Option("--steal-lock", help="Train though another machine seems to be training this model.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without an image that goes bad on the disk, where it is drawn.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Compute the same bits every time, on a GPU too, if more slowly.")
    ] = False,
    precision: Precision = DEFAULTS.precision,
    device: Device = "auto",
) -> None:
    """Train a diffusion model or a task network; the same command again resumes."""
    from knife.devices import keep_freed_memory, resolve_device
    from knife.job import Run
    from knife.ranks import leads, own_device
    from knife.spec import preset as look_up
    from knife.train import train as run_training

    defaults = look_up(preset).settings(kind)
    where, why = resolve_device(own_device(device))
    keep_freed_memory()
    run = Run(
        kind=kind,
        data=data,
        models=models,
        dataset=dataset or data.resolve().name,
        preset=preset,
        steps=defaults.steps if steps is None else steps,
        batch=defaults.batch if batch_size is None else batch_size,
        lr=defaults.lr if lr is None else lr,
        ema=defaults.ema if ema is None else ema,
        seed=seed,
        schedule=schedule,
        label=label,
        layout=layout,
        slices=slice_range(slices),
        crop=crop,
        mask_labels=label_numbers(mask_labels),
        min_brain=min_brain,
        nan=nan,
        synthetic=synthetic,
        balance=balance,
        cap=cap,
        device=where,
        accumulate=accumulate,
        every=every,
        tensorboard=tensorboard,
        judge=judge,
        spare_judge=spare_judge,
        accept_data=accept_data,
        steal_lock=steal_lock,
        skip_bad=skip_bad,
        precision=precision,
        deterministic=deterministic,
        command=command_line(sys.argv[1:]),
    )
    with interruptible() as caught, progress() as show:
        reached = run_training(run, TrainingView(show, run.steps, f"{where}: {why}", caught), lambda: bool(caught))
    if reached < run.steps:
        kept = "saved" if reached else "nothing to save yet"
        say(f"knife: stopped after step {reached}; {kept}. The same command resumes.")
        raise typer.Exit(128 + (caught or [signal.SIGTERM])[0])
    if leads():
        give(run.path)


def label_numbers(text: str | None) -> tuple[int, ...]:
    """Read the numbers of --mask-labels."""
    try:
        numbers = tuple(sorted({int(number) for number in text.split(",")})) if text else ()
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise SettingsError(f"--mask-labels {text}: give whole numbers from 1 on, such as 1,4.")
    return numbers


def command_line(arguments: Iterable[str]) -> str:
    """Return the command for a model's card, of absolute paths the last part alone: a card tells no places."""

    def word(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        return option + equals + (Path(value).name if os.path.isabs(value) else value)

    return shlex.join(["knife", *map(word, arguments)])


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one does what it always did."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()

    def restore() -> None:
        for known, handler in before.items():
            signal.signal(known, handler)

    try:
        for number in before:
            signal.signal(number, note)
        yield caught
    finally:
        restore()


class TrainingView:
    """Shows a training: how reading goes on, the budget line, the steps, and what was saved."""

    def __init__(self, show: Show, steps: int, device: str, caught: Sequence[int]) -> None:
        self.show, self.steps, self.device, self.caught = show, steps, device, caught

    def loading(self, done: int, total: int) -> None:
        """Show how many images have been read; there is nothing to save yet, so a signal ends it."""
        if self.caught:
            raise typer.Exit(128 + self.caught[0])
        self.show("reading images", done, total)

    def budget(self, budget: "Budget") -> None:
        """Say what the run will take, and on what it is spent."""
        from knife.doctor import learnt

        left = duration((budget.steps - budget.done) * budget.seconds_a_step)
        images = f"{budget.images} images {budget.half}".strip()
        found = f"{images} ({budget.layout}: {budget.why})"
        skipped = f"{len(budget.skipped)} skipped" if budget.skipped else ""
        label = f"learning {words}" if (words := learnt(budget.config)) else ""
        size = f"{budget.parameters:,} parameters"
        time = f"steps {budget.done} to {budget.steps}, {budget.seconds_a_step:.2f} s each, about {left}"
        say("; ".join(filter(None, (found, skipped, label, size, time, self.device))) + ".")
        for why in list(budget.skipped.values())[:SHOWN_SKIPPED]:
            say(f"  skipped {why}")

    def step(self, step: int, loss: float) -> None:
        """Show a step."""
        self.show("step", step, self.steps, f"loss {loss:.4f}")

    def saved(self, path: Path) -> None:
        """Say that a file was written."""
        if words.is_terminal:
            say(f"saved {path}")

    def warned(self, words: str) -> None:
        """Say what is amiss."""
        say(f"knife: {words}")
