"""The command line: with `terminal`, the only place that knows typer and rich, prints, and makes exit codes of errors.

Nothing heavy is imported before a command needs it, so that `knife --help` answers at once.
"""

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knife import __version__
from knife.cli.terminal import Show, duration, give, give_json, progress, say, show_facts, show_table, words
from knife.errors import KnifeError, SettingsError

if TYPE_CHECKING:
    from knife.train import Budget

SHOWN_SKIPPED = 5  # skipped images that are named

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
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # removes what is half written
    try:
        app()
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, KnifeError):
            say(f"knife: {error}")
            sys.exit(error.exit_code)
        say(f"knife: internal error, {type(error).__name__}: {error}; --debug shows where.")
        sys.exit(1)


def version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        give(f"knife {__version__}")
        raise typer.Exit


@app.callback()
def knife(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where knife refuses or fails.")] = False,
) -> None:
    """Image-to-image translation with one diffusion model and many tasks."""


# ------------------------------------------------------------------------------------------------------------ training


@app.command()
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
    device: Device = "auto",
) -> None:
    """Train a diffusion model or a task network; the same command again resumes."""
    from knife.devices import resolve_device
    from knife.spec import preset as look_up
    from knife.train import Run
    from knife.train import train as run_training

    defaults = look_up(preset).settings(kind)
    where, why = resolve_device(device)
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
        device=where,
        accumulate=accumulate,
        every=every,
        tensorboard=tensorboard,
        command=command_line(sys.argv[1:]),
    )
    with interruptible() as caught, progress() as show:
        reached = run_training(run, TrainingView(show, run.steps, f"{where}: {why}", caught), lambda: bool(caught))
    if caught and reached < run.steps:
        kept = "saved" if reached else "nothing to save yet"
        say(f"knife: stopped after step {reached}; {kept}. The same command resumes.")
        raise typer.Exit(128 + caught[0])
    give(run.path)


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

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()

    def restore() -> None:
        for known, handler in before.items():
            signal.signal(known, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
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
        found = f"{budget.images} images ({budget.layout}: {budget.why})"
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


# --------------------------------------------------------------------------------------------------------- translation


@app.command()
def translate(
    images: Annotated[list[Path], typer.Argument(help="Images, folders of images, or folders with a file a sequence.")],
    task: Annotated[str, typer.Option("--task", help="The task that guides: regress, classify, segment, a plugin's.")],
    target: Annotated[str, typer.Option("--target", help="What it shall become: 0.3, + or -, healthy, mask.nii.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path("translated"),
    models: Models = Path("models"),
    dataset: Annotated[str | None, typer.Option("--dataset", help="Which models, where several fit.")] = None,
    noise_level: Annotated[int | None, typer.Option("--noise-level", help="Level L to encode to.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps to encode, and to decode.")] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="The paper's s; default: by --strength.")] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="Size of the guidance against the noise's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images translated at once.")] = None,
    clamp: Annotated[bool | None, typer.Option("--clamp/--no-clamp", help="Keep predictions in range.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Translate images; writes result, difference map, panel and record of each."""
    from dataclasses import replace

    from knife.translation import DEFAULTS
    from knife.translation import translate as run_translation

    if scale is not None and strength is not None:
        raise SettingsError("--scale and --strength: two ways to say the same; give one of them.")
    if steps is None and noise_level is not None:
        steps = min(DEFAULTS.steps, max(noise_level, 1))
    given: dict[str, Any] = {"noise_level": noise_level, "steps": steps, "scale": scale, "strength": strength}
    given |= {"batch_size": batch_size, "clamp": clamp}
    settings = replace(DEFAULTS, **{name: value for name, value in given.items() if value is not None})
    with progress() as show:
        done = run_translation(
            images,
            task,
            target,
            out=out,
            models=models,
            dataset=dataset,
            settings=settings,
            device=device,
            started=say_how,
            progress=lambda done, total: show("translating", done, total),
        )
    if as_json:
        give_json([{**t.record, "folder": str(out)} for t in done])
        return
    show_table([row(t.record) for t in done], words)
    for translation in done:
        give(translation.files.image if translation.files else "")


def say_how(about: Mapping[str, Any]) -> None:
    """Say what a translation is about to do, with which models and where."""
    settings, model = about["settings"], about["models"][0]
    say(
        f"{about['images']} image{'s' * (about['images'] != 1)}; models {model['dataset']}"
        f"{' (shipped with knife)' if model['shipped'] else ''}; noise level {settings['noise_level']}, "
        f"{settings['steps']} steps, scale {settings['scale']:.4g}; {about['device']}."
    )
    for name in about["left_out"]:
        say(f"  left out {name}: a mask by its name; to translate it, name it.")


def row(record: Mapping[str, Any]) -> dict[str, object]:
    """Return what the table says of one translation."""
    seen = {f"{name} {when}": record[when][name] for name in record["after"] for when in ("before", "after")}
    first, *others = record["input"]
    shown = f"{first} and {len(others)} more" if others else first
    return {"input": shown, "target": record["target"], **seen, "seconds": record["seconds"]}


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--folder", help="Where slice.nii, healthy.nii, mask.nii, demo/ go.")
    ] = Path(),
    device: Device = "auto",
) -> None:
    """Make a brain slice, then let its tumour grow, shrink, vanish, and another appear where a mask says."""
    from knife.demo import run_demo

    with progress() as show:
        rows, picture = run_demo(folder, device, lambda done, total: show("translating", done, total))
    show_table(rows, words)
    say("Look at this picture:")
    give(picture)


# ------------------------------------------------------------------------------------------------------- what there is


@app.command()
def presets(as_json: Json = False) -> None:
    """List the presets: image size, channels, parameters of each network."""
    from knife.spec import rows

    (give_json if as_json else show_table)(rows())


@app.command()
def info(file: Annotated[Path, typer.Argument(help="A stored model or an image.")], as_json: Json = False) -> None:
    """Say what a file is: the card of a model, or the channels and intensities of an image."""
    from knife.doctor import about_file, summary

    about = about_file(file)
    if as_json:
        give_json(about)
    else:
        show_facts(summary(about))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine offers, which ops run, and why; exit code 1 if knife cannot work here."""
    from knife.doctor import examine

    facts = examine()
    (give_json if as_json else show_facts)(facts)
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

    with progress() as show:
        write_dataset(out, count, size, seed, lambda done: show("phantoms", done, count))
    give(out)


@plugins_app.command("list")
def plugins_list(as_json: Json = False) -> None:
    """List the tasks: hooks, distribution, version, and what is wrong with those that cannot be used."""
    from knife.tasks import plugins

    keys = ("task", "hooks", "distribution", "version", "status")
    (give_json if as_json else show_table)([{key: getattr(row, key) for key in keys} for row in plugins()])


@plugins_app.command("new")
def plugins_new(
    name: Annotated[str, typer.Argument(help="The word after --task.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where the package goes.")] = Path(),
) -> None:
    """Write a working plugin package to start from."""
    from knife.scaffold import new_plugin

    made = new_plugin(name, folder)
    give(made)
    say(f"Install it with: pip install -e {shlex.quote(str(made))}   Then: knife plugins list")


@models_app.command("list")
def models_list(models: Models = Path("models"), as_json: Json = False) -> None:
    """List trained models, the shipped ones among them; what cannot be read is named on stderr."""
    from knife.doctor import model_rows

    rows, unreadable = model_rows(models)
    for problem in unreadable:
        say(f"knife: {problem}")
    (give_json if as_json else show_table)(rows)


@models_app.command("import")
def models_import(
    file: Annotated[Path, typer.Argument(help="Weights in guided-diffusion's layout (.pt).")],
    preset: Annotated[str, typer.Option("--preset", help="The architecture they have (knife presets).")],
    dataset: Annotated[str, typer.Option("--name", help="Name of the data set to store them under.")],
    kind: Annotated[str, typer.Option("--as", help="diffusion, regress, classify or segment.")] = "diffusion",
    value_range: Annotated[str, typer.Option("--value-range", help="Range of their images: LOW,HIGH.")] = "-1,1",
    models: Models = Path("models"),
) -> None:
    """Import weights of the guided-diffusion family."""
    from knife.checkpoint import save
    from knife.interop import import_guided_diffusion

    if not dataset or Path(dataset).name != dataset or dataset.startswith("."):
        raise SettingsError(f"--name {dataset!r}: not the name of a folder; give a plain word.")
    path = models / dataset / f"{kind}.safetensors"
    if path.exists():
        raise SettingsError(f"--name {dataset}: {path} is there already; give another name, or remove it.")
    card, weights = import_guided_diffusion(file, preset, kind, dataset, two_numbers(value_range))
    save(path, weights, card.to_json())
    give(path)


def two_numbers(text: str) -> tuple[float, float]:
    """Read LOW,HIGH."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise SettingsError(f"--value-range {text}: give two numbers, such as 0,1.") from None
    return low, high
