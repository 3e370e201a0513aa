"""The command line: the only place that knows typer and rich, prints, and turns errors into exit codes.

Nothing heavy is imported before a command needs it, so that `knife --help` answers at once.
"""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from knife import __version__
from knife.errors import KnifeError

if TYPE_CHECKING:
    from knife.train import Budget

PLAIN_SECONDS = 5  # between two lines of progress where there is no terminal
words = Console(stderr=True, highlight=False, soft_wrap=True)  # what is said
results = Console(highlight=False, soft_wrap=True)  # what is asked for

app = typer.Typer(
    help="Image-to-image translation with one diffusion model and many tasks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
plugins_app = typer.Typer(help="Guidance tasks: what is installed, and a start for your own.", no_args_is_help=True)
models_app = typer.Typer(help="Trained models: list them, import foreign weights.", no_args_is_help=True)
app.add_typer(plugins_app, name="plugins")
app.add_typer(models_app, name="models")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Models = Annotated[Path, typer.Option("--models", help="Folder of trained models.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]


def main() -> None:
    """Run the command line; every refusal is one sentence and an exit code, a traceback only with --debug."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except KnifeError as error:
        if debug:
            raise
        words.print(f"knife: {error}", markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        words.print("knife: interrupted.")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if debug:
            raise
        words.print(f"knife: internal error, {type(error).__name__}: {error}; --debug shows where.", markup=False)
        sys.exit(1)


def version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        print(f"knife {__version__}")
        raise typer.Exit


@app.callback()
def knife(
    show: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where knife refuses or fails.")] = False,
) -> None:
    """Image-to-image translation with one diffusion model and many tasks."""


@app.command()
def train(
    kind: Annotated[str, typer.Argument(help="diffusion, or a task: regress, classify, segment, a plugin's.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of images.")],
    preset: Annotated[str, typer.Option("--preset", help="Size of the network (knife presets).")] = "small-64",
    dataset: Annotated[str | None, typer.Option("--dataset", help="Name of the data set; default: the folder's.")] = None,
    models: Models = Path("models"),
    label: Annotated[str | None, typer.Option("--label", help="What a task learns, where the data hold several.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps in all; default: the preset's.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images a step; default: the preset's.")] = None,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Split each batch into so many parts.")] = 1,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate; default: the preset's.")] = None,
    ema: Annotated[float | None, typer.Option("--ema", help="Decay of the moving average; default: the preset's.")] = None,
    schedule: Annotated[str, typer.Option("--schedule", help="linear or cosine.")] = "linear",
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random draw.")] = 0,
    every: Annotated[int, typer.Option("--every", help="Steps between checkpoints.")] = 500,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log for TensorBoard too.")] = False,
    device: Device = "auto",
) -> None:
    """Train a diffusion model or a task network; the same command again resumes."""
    from knife.devices import resolve_device
    from knife.spec import preset as look_up
    from knife.train import Run
    from knife.train import train as run_training

    settings = look_up(preset).settings(kind)
    where, why = resolve_device(device)
    run = Run(
        kind=kind,
        data=data,
        models=models,
        dataset=dataset or data.resolve().name,
        preset=preset,
        steps=settings.steps if steps is None else steps,
        batch=settings.batch if batch_size is None else batch_size,
        lr=settings.lr if lr is None else lr,
        ema=settings.ema if ema is None else ema,
        seed=seed,
        schedule=schedule,
        label=label,
        device=where,
        accumulate=accumulate,
        every=every,
        tensorboard=tensorboard,
        command=shlex.join(["knife", *sys.argv[1:]]),
    )
    with interruptible() as caught, TrainingView(run.steps, f"{where}: {why}") as view:
        reached = run_training(run, view, lambda: bool(caught))
    if caught:
        words.print(f"knife: stopped after step {reached}; saved. The same command resumes.")
        raise typer.Exit(128 + caught[0])
    results.print(str(run.path), markup=False)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one does what it always did."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for known, handler in before.items():
            signal.signal(known, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    """Show progress: a bar on a terminal, else a line every few seconds; yields a function of (done, note)."""
    if not words.is_terminal:
        last = time.monotonic()

        def line(done: int, note: str) -> None:
            nonlocal last
            if done == total or time.monotonic() - last >= PLAIN_SECONDS:
                last = time.monotonic()
                print(f"{what} {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=words) as bar:
        row = bar.add_task(what, total=total, note="")
        yield lambda done, note: bar.update(row, completed=done, note=note)


class TrainingView:
    """Shows a training: the budget line, then progress."""

    def __init__(self, steps: int, device: str) -> None:
        self.steps, self.device = steps, device
        self.show: Callable[[int, str], None] | None = None

    def __enter__(self) -> "TrainingView":
        self.bar = progress(self.steps, "step")
        return self

    def __exit__(self, *reason: Any) -> None:
        if self.show:
            self.bar.__exit__(None, None, None)

    def loading(self, done: int, total: int) -> None:
        """Say how far reading the images is."""
        if done and done < total:
            words.print(f"reading images: {done} of {total}", markup=False)

    def budget(self, budget: "Budget") -> None:
        """Say what the run will take."""
        left = (budget.steps - budget.done) * budget.seconds_a_step
        skipped = f", {len(budget.skipped)} skipped" if budget.skipped else ""
        words.print(
            f"{budget.images} images ({budget.layout}{skipped}); {budget.parameters:,} parameters; "
            f"steps {budget.done} to {budget.steps}, {budget.seconds_a_step:.2f} s each, about {duration(left)}; {self.device}.",
            markup=False,
        )
        for name, why in list(budget.skipped.items())[:3]:
            words.print(f"  skipped {name}: {why}", markup=False)
        self.show = self.bar.__enter__()

    def step(self, step: int, loss: float) -> None:
        """Show a step."""
        if self.show:
            self.show(step, f"loss {loss:.4f}")

    def saved(self, path: Path) -> None:
        """Say that a file was written."""
        if words.is_terminal:
            words.print(f"saved {path}", markup=False)


def duration(seconds: float) -> str:
    """Say a time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@app.command()
def translate(
    images: Annotated[list[Path], typer.Argument(help="Images, folders of images, or folders with one file a sequence.")],
    task: Annotated[str, typer.Option("--task", help="The task that guides: regress, classify, segment, a plugin's.")],
    target: Annotated[str, typer.Option("--target", help="What it shall become: 0.3, + or -, healthy, mask.nii.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path("translated"),
    models: Models = Path("models"),
    dataset: Annotated[str | None, typer.Option("--dataset", help="Which models, where several fit.")] = None,
    noise_level: Annotated[int | None, typer.Option("--noise-level", help="Level L to encode to.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps to encode, and to decode.")] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="The paper's s; default: from the guide's steepness.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images translated at once.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Translate images; writes result, difference map, panel and record of each."""
    from dataclasses import replace

    from knife.translate import Settings
    from knife.translate import translate as run_translation

    given = {"noise_level": noise_level, "steps": steps, "scale": scale, "batch_size": batch_size}
    settings = replace(Settings(), **{name: value for name, value in given.items() if value is not None})
    bars: list[Any] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.extend([bar := progress(total, "translating"), bar.__enter__()])
        bars[1](done, "")

    try:
        done = run_translation(
            images, task, target, out=out, models=models, dataset=dataset, settings=settings, device=device, progress=show
        )
    finally:
        if bars:
            bars[0].__exit__(None, None, None)
    if as_json:
        print(json.dumps([{**t.record, "folder": str(out)} for t in done], indent=1))
        return
    numbers = [name for name in done[0].record["after"] if name != "level"]
    table = Table("input", "target", *[f"{name} before" for name in numbers], *[f"{name} after" for name in numbers], "s", "result")
    for t in done:
        seen = [f"{t.record[when][name]:.4g}" for when in ("before", "after") for name in numbers]
        table.add_row(t.source.source.paths[0].name, target, *seen, f"{t.record['seconds']:.1f}", str(t.files[0]))
    results.print(table)


@app.command()
def presets(as_json: Json = False) -> None:
    """List the presets: image size, channels, parameters of each network."""
    from knife.spec import rows

    show_table(rows(), as_json)


def show_table(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows of the same keys as JSON or as a table."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        words.print("nothing to list.")
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*[cell(value) for value in row.values()])
    results.print(table)


def cell(value: Any) -> str:
    """Return a value as the text of a table cell, with markup disarmed."""
    from rich.markup import escape

    if isinstance(value, list | tuple):
        return escape(" ".join(map(str, value)))
    return f"{value:,}" if isinstance(value, int) else escape("any" if value is None else str(value))


@plugins_app.command("list")
def plugins_list(as_json: Json = False) -> None:
    """List the tasks: hooks, distribution, version, and what is wrong with those that cannot be used."""
    from knife.tasks import plugins

    keys = ("task", "hooks", "distribution", "version", "status")
    show_table([{key: getattr(row, key) for key in keys} for row in plugins()], as_json)


@plugins_app.command("new")
def plugins_new(
    name: Annotated[str, typer.Argument(help="The word after --task.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where the package goes.")] = Path(),
) -> None:
    """Write a working plugin package to start from."""
    from knife.scaffold import new_plugin

    made = new_plugin(name, folder)
    results.print(str(made), markup=False)
    words.print(f"Install it with: pip install -e {made}   Then: knife plugins list", markup=False)


@models_app.command("list")
def models_list(models: Models = Path("models"), as_json: Json = False) -> None:
    """List trained models, the shipped ones among them."""
    from knife.checkpoint import STARTER, stored_models

    show_table(
        [
            {
                "dataset": s.card.dataset,
                "kind": s.card.kind,
                "channels": list(s.card.spec.channels),
                "size": list(s.card.spec.size),
                "steps": s.card.training.get("step"),
                "path": "shipped" if folder == STARTER else str(s.path),
            }
            for folder in (models, STARTER)
            for s in stored_models(folder)
        ],
        as_json,
    )


@models_app.command("import")
def models_import(
    file: Annotated[Path, typer.Argument(help="Weights in guided-diffusion's layout (.pt).")],
    preset: Annotated[str, typer.Option("--preset", help="The architecture they have (knife presets).")],
    dataset: Annotated[str, typer.Option("--name", help="Name of the data set to store them under.")],
    kind: Annotated[str, typer.Option("--as", help="diffusion, regress, classify or segment.")] = "diffusion",
    value_range: Annotated[str, typer.Option("--value-range", help="Ends of the range of their images: LOW,HIGH.")] = "-1,1",
    models: Models = Path("models"),
) -> None:
    """Import weights of the guided-diffusion family."""
    from knife.interop import import_guided_diffusion

    results.print(str(import_guided_diffusion(file, preset, kind, dataset, value_range, models)), markup=False)


@app.command()
def info(file: Annotated[Path, typer.Argument(help="A stored model or an image.")], as_json: Json = False) -> None:
    """Say what a file is: the card of a model, or the channels and geometry of an image."""
    from knife.doctor import about_file

    show_facts(about_file(file), as_json)


def show_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print named facts as JSON or as a table."""
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, cell(json.dumps(value) if isinstance(value, dict) else value))
    results.print(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine offers, which ops run, and why."""
    from knife.doctor import examine

    facts = examine()
    show_facts(facts, as_json)
    if not facts["healthy"]:
        raise typer.Exit(1)


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    count: Annotated[int, typer.Option("--count", help="How many slices.")] = 1000,
    size: Annotated[int, typer.Option("--size", help="Edge of the square slices, in pixels.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random draw.")] = 0,
) -> None:
    """Write a data set of brain-like slices with tumours whose truth is known."""
    from knife.phantom import write_dataset

    with progress(count, "phantoms") as show:
        write_dataset(out, count, size, seed, lambda done: show(done, ""))
    results.print(str(out), markup=False)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where slice.nii, healthy.nii, mask.nii and demo/ go.")] = Path(),
    device: Device = "auto",
) -> None:
    """Make a brain slice, then let its tumour grow, shrink, vanish, and another appear where a mask says."""
    from knife.demo import run_demo

    with progress(4, "translations") as show:
        rows, picture = run_demo(folder, device, lambda done: show(done, ""))
    show_table(rows, as_json=False)
    results.print(f"Look at {picture}", markup=False)
