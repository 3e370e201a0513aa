"""The command line: with `terminal`, the only place that knows typer and rich, prints, and makes exit codes of errors.

Nothing heavy is imported before a command needs it, so that `knife --help` answers at once.
"""

import math
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from knife import __version__
from knife.cli.benching import bench
from knife.cli.crash import write_report
from knife.cli.data import data_app
from knife.cli.measure import calibrate, evaluate
from knife.cli.options import NoiseLevel, Quality, Solver, Steps
from knife.cli.terminal import Show, duration, give, give_json, progress, say, show_facts, show_table, words
from knife.cli.words import listed_targets, slice_range, span
from knife.errors import KnifeError, SettingsError
from knife.settings import DEFAULTS, FIRST, Settings, Wish

if TYPE_CHECKING:
    from knife.inputs import Shard
    from knife.outputs import Translation
    from knife.train import Budget

KNOWN = 0.03  # mean error of the unguided round trip, of the range, above which a model hardly knows an image
SOME_FAILED = 3  # the exit code of a batch of which a part was done
DISK, MEMORY = 4, 5  # the exit codes of what the system refuses
SHOWN_SKIPPED = 5  # skipped images that are named
SHOWN_MISSED = 5  # images that did not reach their targets
SAID = (  # what of a record is said in the end
    "input", "slice", "before", "after", "wanted", "judge", "preservation", "strength", "seconds", "reconstruction",
    "reached", "error", "tolerance", "attempts",
)  # fmt: skip

app = typer.Typer(
    help="Image-to-image translation with one diffusion model and many tasks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
plugins_app = typer.Typer(help="Guidance tasks: what is installed, and a start for your own.", no_args_is_help=True)
models_app = typer.Typer(help="Trained models: list, import and export them.", no_args_is_help=True)
app.add_typer(plugins_app, name="plugins")
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")
app.command()(calibrate)
app.command()(evaluate)
app.command()(bench)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Models = Annotated[Path, typer.Option("--models", help="Folder of trained models.")]
Nan = Annotated[
    str | None, typer.Option("--nan", help="What to read NaN and infinite pixels as: fill=0; default: refuse them.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]


def main() -> None:
    """Run the command line; every refusal is one sentence and an exit code, a traceback only with --debug."""
    ended: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        ended.append(number)
        raise KeyboardInterrupt  # removes what is half written; a plugin's hook passes it on, unlike SystemExit

    signal.signal(signal.SIGTERM, end)
    try:
        code = exit_code()
        code = written_out() or code
        hear_no_more()
    except KeyboardInterrupt:  # before typer listens, or after
        code = 128 + signal.SIGINT
        hear_no_more()
    sys.exit(128 + ended[0] if ended else code)


def exit_code() -> int:
    """Do what the command line says, and tell in one line why it was refused, if it was; return the exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if debug:
            traceback.print_exc()
        said, code = verdict(error)
        say(f"knife: {said}")
        return code
    return 0


def written_out() -> int:
    """Write out what stdout still holds, and return 0; or an exit code, if it takes no more. Nobody needs to listen."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again, and complains
        if not isinstance(error, BrokenPipeError):
            say(f"knife: stdout: {error.strerror}; make room.")
            return DISK
    return 0


def hear_no_more() -> None:
    """Let signals end the process at once and without words: what was to be done is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def verdict(error: Exception) -> tuple[str, int]:
    """Return what is said of an error, in one line, and the exit code: see the README's table."""
    if isinstance(error, KnifeError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'a file'}: {error.strerror}; make room, or allow it.", DISK
    if short_of_memory(error):
        return "out of memory; give smaller images, a smaller --batch-size, or another --device.", MEMORY
    report = write_report(error, typer.main.get_group(app).commands)
    where = f"; {report} holds what a report needs, and nothing of your data" if report else ""
    return f"internal error, {type(error).__name__}: {error}; --debug shows where{where}.", 1


def short_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out; torch, if it is loaded, has its own ways of saying so."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from knife.devices import ran_out_of_memory

    return ran_out_of_memory(error)


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
        bool, typer.Option("--balance", help="Show classes, or tenths of the label's range, equally often.")
    ] = False,
    cap: Annotated[int | None, typer.Option("--cap", help="Images of one class or value at most.")] = None,
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


# --------------------------------------------------------------------------------------------------------- translation


@app.command()
def translate(
    images: Annotated[list[Path], typer.Argument(help="Images, folders of images, or folders with a file a sequence.")],
    task: Annotated[
        list[str],
        typer.Option("--task", help="The task that guides: regress, classify, segment, a plugin's; or several."),
    ],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help="What it shall become: 0.3, +, -, healthy, mask.nii, ellipse:x,y,rx,ry; one for each task."
        ),
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", help="Instead of --target, what to add to what is there: +15%, -0.02.")
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Of each task's guidance, if there are several; default: 1.")
    ] = None,
    window: Annotated[
        list[str] | None,
        typer.Option("--window", help="Noise levels LOW:HIGH that guide, for all tasks or for each; default: all."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path("translated"),
    models: Models = Path("models"),
    dataset: Annotated[str | None, typer.Option("--dataset", help="Which models, where several fit.")] = None,
    slices: Annotated[
        str | None,
        typer.Option(
            "--slices", help="Axial slices of volumes, FIRST:LAST+1, as 80:129; default: all that show brain."
        ),
    ] = None,
    one_slice: Annotated[
        int | None, typer.Option("--slice", help="One axial slice of a volume, written as an image too.")
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            "--region",
            help="Where images may change: a mask, ellipse:cx,cy,rx,ry, or auto, where they change most; "
            "default: anywhere, as growing tumours push what is round them.",
        ),
    ] = None,
    noise_level: NoiseLevel = None,
    quality: Quality = DEFAULTS.quality,
    steps: Steps = None,
    solver: Solver = None,
    scale: Annotated[float | None, typer.Option("--scale", help="The paper's s, fixed.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            help=f"Size of the guidance against the noise's, fixed; default: {FIRST} or what reaches the target.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="How near the target is near enough; default: a tenth of the way, or twice the guide's error if less.",
        ),
    ] = None,
    extrapolate: Annotated[
        bool, typer.Option("--allow-extrapolation", help="Allow targets beyond the values that a guide was trained on.")
    ] = False,
    max_reconstruction: Annotated[
        float,
        typer.Option(
            "--max-reconstruction", help="Refuse images that the model gives back, unguided, with a larger mean error."
        ),
    ] = DEFAULTS.max_reconstruction,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images translated at once.")] = DEFAULTS.batch_size,
    control: Annotated[
        bool, typer.Option("--control/--no-control", help="Add to the input only what guidance changed.")
    ] = DEFAULTS.control,
    clamp: Annotated[
        bool, typer.Option("--clamp/--no-clamp", help="Keep the predicted clean image in range.")
    ] = DEFAULTS.clamp,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Voxels of NIfTI results: same (as the input, if all fit) or float32.")
    ] = DEFAULTS.dtype,
    nan: Nan = None,
    page: Annotated[
        bool, typer.Option("--report", help="Write report.html too: one page that shows all images, held in memory.")
    ] = False,
    shard: Annotated[
        str,
        typer.Option("--shard", help="Part of the inputs, as 2/8; auto: as a SLURM array or torchrun say, else all."),
    ] = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Translate images; writes result, difference map, panel and record of each. What is done already is not redone."""
    from knife.ranks import own_device
    from knife.translation import translations

    if scale is not None and strength is not None:
        raise SettingsError("--scale and --strength: two ways to say the same; give one of them.")
    if slices is not None and one_slice is not None:
        raise SettingsError("--slices and --slice: two ways to say the same; give one of them.")
    settings = Settings(
        noise_level=noise_level,
        quality=quality,
        steps=steps,
        solver=solver,
        scale=scale,
        strength=strength,
        tolerance=tolerance,
        extrapolate=extrapolate,
        max_reconstruction=max_reconstruction,
        batch_size=batch_size,
        control=control,
        clamp=clamp,
        dtype=dtype,
    )
    failures, done, pages = list[KnifeError](), list[Done](), list["Translation"]()
    begun = dict[str, Any]()

    def start(about: Mapping[str, Any]) -> None:
        begun.update(about)
        say_how(about)

    with saying_stopped(), progress() as show:
        for one in translations(
            images,
            *wishes(task, target or [], by, weight or [], window or []),
            out=out,
            models=models,
            dataset=dataset,
            settings=settings,
            region=region,
            nan=nan,
            slices=slice_range(slices) if one_slice is None else (one_slice, one_slice + 1),
            shard=shard,
            device=own_device(device),
            started=start,
            progress=lambda done, total: show("translating", done, total),
            failed=lambda file, error: failures.append(error),
        ):
            done.append(Done(one.record if as_json else brief(one.record), one.files and one.files.image, one.kept))
            pages += [one] if page else []
    if failures and not done:
        raise failures[0]
    sheet = write_page(pages, out, begun["shard"]) if pages else None
    if as_json:
        give_json([{**one.record, "folder": str(out)} for one in done])
    else:
        say_done(done)
        for file in dict.fromkeys([*(one.file for one in done), sheet]):
            if file:
                give(file)
    if failures:
        say(f"{len(failures)} failed:")
        for error in failures:
            say(f"  {error}")
        raise typer.Exit(SOME_FAILED)


def wishes(
    tasks: Sequence[str], targets: Sequence[str], by: str | None, weights: Sequence[float], windows: Sequence[str]
) -> list[Wish]:
    """Match tasks with targets, weights and windows, in the order given."""
    if by is not None:
        if targets or len(tasks) > 1:
            raise SettingsError(
                "--by: stands for the --target of a single --task; with several, give --target by:+15%."
            )
        targets = [f"by:{by}"]
    if len(targets) != len(tasks):
        raise SettingsError(f"--target: {len(targets)} for {len(tasks)} --task; give each task one target, in order.")
    if len(weights) not in (0, len(tasks)):
        raise SettingsError(f"--weight: {len(weights)} for {len(tasks)} --task; give each task one, or leave it out.")
    if len(windows) not in (0, 1, len(tasks)):
        raise SettingsError(f"--window: {len(windows)} for {len(tasks)} --task; give one for all, or one for each.")
    told = [span("--window", text, "two noise levels, the lower one first, such as 100:475") for text in windows]
    levels: Sequence[tuple[int, int] | None] = told * len(tasks) if len(told) == 1 else told or [None] * len(tasks)
    return [Wish(*parts) for parts in zip(tasks, targets, weights or [1.0] * len(tasks), levels, strict=True)]


@contextmanager
def saying_stopped() -> Iterator[None]:
    """Say what is kept of a translation that Ctrl-C ends."""
    try:
        yield
    except KeyboardInterrupt:
        say("knife: stopped. What was written stays; the same command goes on where this one stopped.")
        raise


class Done(NamedTuple):
    """What is remembered of a translation until all are done."""

    record: Mapping[str, Any]
    file: Path | None
    kept: bool


def brief(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is said of a translation in the end, out of its record: thousands of these are held in memory."""
    return {name: record[name] for name in SAID if name in record}


def write_page(pages: Sequence["Translation"], out: Path, shard: "Shard") -> Path:
    """Write the report, and return its file; that of each shard has a name of its own."""
    from knife.report import write_report

    sheet = out / (f"report_{shard.number}_of_{shard.of}.html" if shard.of > 1 else "report.html")
    write_report(pages, sheet)
    return sheet


def say_done(done: Sequence[Done]) -> None:
    """Say what became of all images."""
    records = [one.record for one in done]
    if not records:
        say("Nothing to do: there are fewer inputs than shards.")
        return
    show_table([row(record) for record in records], words)
    if kept := sum(one.kept for one in done):
        say(f"{kept} of {len(done)} were done already and lie there as written; to redo one, remove its record.")
    say_doubts(records)
    say_missed(records)


def say_doubts(records: Sequence[Mapping[str, Any]]) -> None:
    """Say if the model hardly knows such images: unguided, it does not give them back."""
    doubtful = [record for record in records if record.get("reconstruction", 0) > KNOWN]
    if doubtful:
        worst = max(doubtful, key=lambda record: record["reconstruction"])
        say(
            f"Take care: unguided, the model gives back {worst['input'][0]} with a mean error of "
            f"{worst['reconstruction']:.1%} of the range ({len(doubtful)} of {len(records)} images above {KNOWN:.0%}); "
            "it may not know such images."
        )


def say_missed(records: Sequence[Mapping[str, Any]]) -> None:
    """Say which images did not come as near to their targets as they should, and by how much."""
    missed = [record for record in records if record.get("reached") is False]
    for record in missed[:SHOWN_MISSED]:
        off = ", ".join(
            f"{task} {error:.3g} off, {record['tolerance'][task]:.3g} allowed"
            for task, error in record["error"].items()
            if error > record["tolerance"].get(task, math.inf)
        )
        tried = ", ".join(f"{attempt['strength']:g}" for attempt in record.get("attempts", []))
        where = f", slice {record['slice']}" if "slice" in record else ""
        say(f"Not reached: {record['input'][0]}{where}: {off}{f' (strengths tried: {tried})' if tried else ''}.")
    if len(missed) > SHOWN_MISSED:
        say(f"Not reached: {len(missed)} of {len(records)} images in all; their records say by how much.")


def say_how(about: Mapping[str, Any]) -> None:
    """Say what a translation is about to do, with which models and where."""
    settings, model = about["settings"], about["models"][0]
    known = {"scale": settings["scale"], "strength": settings["strength"]}
    fixed = [f"{name} {value:g}" for name, value in known.items() if value is not None]
    guidance = fixed[0] if fixed else "strength as it takes"
    part = f"shard {about['shard']} ({about['shard'].origin}): " if about["shard"].of > 1 else ""
    say(
        f"{part}{about['inputs']} to translate; models {model['dataset']}"
        f"{' (shipped with knife)' if model['shipped'] else ''}; noise level {settings['noise_level']}, "
        f"{settings['steps']} steps by {settings['solver']}, {guidance}; {about['device']}."
    )
    for name in about["left_out"]:
        say(f"  left out {name}: a mask by its name; to translate it, name it.")


def row(record: Mapping[str, Any]) -> dict[str, object]:
    """Return what the table says of one translation: before, wanted, reached, what else changed, and the time."""
    first, *others = record["input"]
    shown = (
        f"{first}, slice {record['slice']}" if "slice" in record else first + f" and {len(others)} more" * bool(others)
    )
    seen = {f"{name} {when}": record[when][name] for name in record["after"] for when in ("before", "after")}
    judged = {f"judge: {name}": value for name, value in record.get("judge", {}).get("after", {}).items()}
    kept = {name: record["preservation"].get(name, "") for name in ("changed_inside", "changed_outside")}
    whole = {"changed": record["preservation"]["changed"]}
    return {
        "input": shown,
        "target": ", ".join(record["wanted"].values()),
        **seen,
        **judged,
        **(kept if any(value != "" for value in kept.values()) else whole),
        **({"strength": record["strength"]} if "strength" in record else {}),
        "seconds": record["seconds"],
    }


@app.command()
def sweep(
    image: Annotated[Path, typer.Argument(help="An image, or a folder with a file a sequence.")],
    task: Annotated[str, typer.Option("--task", help="The task that guides.")],
    targets: Annotated[str, typer.Option("--targets", help="Targets, a column each: 0.02,0.05,0.1.")],
    noise_levels: Annotated[
        str | None, typer.Option("--noise-levels", help="Levels to encode to, a row each: 200,400; default: the usual.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the sheet.")] = Path("translated"),
    models: Models = Path("models"),
    dataset: Annotated[str | None, typer.Option("--dataset", help="Which models, where several fit.")] = None,
    one_slice: Annotated[int | None, typer.Option("--slice", help="Axial slice of a volume.")] = None,
    quality: Quality = DEFAULTS.quality,
    steps: Steps = None,
    strength: Annotated[float | None, typer.Option("--strength", help="Size of the guidance.")] = None,
    nan: Nan = None,
    device: Device = "auto",
) -> None:
    """Translate one image towards several targets, from several noise levels, onto one sheet."""
    from knife.sweep import sweep as run_sweep

    try:
        levels = [int(level) for level in noise_levels.split(",")] if noise_levels else []
    except ValueError:
        raise SettingsError(f"--noise-levels {noise_levels}: give whole numbers, such as 200,400.") from None
    with progress() as show:
        rows, sheet = run_sweep(
            image,
            task,
            listed_targets(targets),
            levels,
            out=out,
            settings=Settings(quality=quality, steps=steps, strength=strength),
            progress=lambda done, total: show("sweeping", done, total),
            models=models,
            dataset=dataset,
            nan=nan,
            slices=None if one_slice is None else (one_slice, one_slice + 1),
            device=device,
        )
    show_table(
        [{"noise level": one.record["settings"]["noise_level"], **row(one.record)} for line in rows for one in line],
        words,
    )
    give(sheet)


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
    """List tasks and judges: hooks, distribution, version, and what is wrong with those that cannot be used."""
    from knife.tasks import JUDGES, plugins

    keys = ("hooks", "distribution", "version", "status")
    listed = {"task": plugins(), "judge": plugins(group=JUDGES)}
    rows = [
        [{role: row.task, **{key: getattr(row, key) for key in keys}} for row in found]
        for role, found in listed.items()
    ]
    if as_json:
        give_json([row for part in rows for row in part])
    else:
        for part in filter(None, rows):
            show_table(part)


@plugins_app.command("check")
def plugins_check(name: Annotated[str, typer.Argument(help="The name of a task or a judge.")]) -> None:
    """Import a plugin and hold it to its contract; the exit code is 1 if it fails, and stderr says where."""
    from knife.contract import check_plugin
    from knife.errors import TaskError

    try:
        give(check_plugin(name))
    except TaskError as error:
        for line in "".join(traceback.format_exception(error.__cause__ or error)).splitlines():
            say(line)
        say(f"knife: {error}")
        raise typer.Exit(1) from None


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
    file: Annotated[Path, typer.Argument(help="Weights of guided-diffusion (.pt), or a folder of diffusers.")],
    dataset: Annotated[str, typer.Option("--name", help="Name of the data set to store them under.")],
    kind: Annotated[str, typer.Option("--as", help="diffusion, regress, classify or segment.")] = "diffusion",
    preset: Annotated[
        str | None, typer.Option("--preset", help="Architecture they must have; default: as they tell.")
    ] = None,
    size: Annotated[int | None, typer.Option("--size", help="Edge of their images; default: the paper's.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Heads of attention; default: the paper's.")] = None,
    head_width: Annotated[int | None, typer.Option("--head-width", help="Channels a head, instead of --heads.")] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="linear or cosine, of 1000 levels; default: linear.")
    ] = None,
    value_range: Annotated[
        str | None, typer.Option("--value-range", help="Range of their images: LOW,HIGH; default: -1,1.")
    ] = None,
    label: Annotated[
        int | None, typer.Option("--class", help="Class that is asked for ever; default: the mean of all.")
    ] = None,
    models: Models = Path("models"),
) -> None:
    """Import weights of the guided-diffusion family, or of diffusers."""
    from knife.checkpoint import save
    from knife.diffusers import import_diffusers
    from knife.interop import Told, import_guided_diffusion
    from knife.lock import models_locked
    from knife.schedule import Schedule

    if not dataset or Path(dataset).name != dataset or dataset.startswith("."):
        raise SettingsError(f"--name {dataset!r}: not the name of a folder; give a plain word.")
    path = models / dataset / f"{kind}.safetensors"
    refuse_taken(path, dataset)
    if preset is not None and file.is_dir():
        raise SettingsError(f"--preset {preset}: a folder of diffusers tells its architecture; leave it out.")
    told = Told(
        value_range=None if value_range is None else two_numbers(value_range),
        size=None if size is None else (size, size),
        heads=heads,
        head_width=head_width,
        schedule=None if schedule is None else Schedule(schedule, 1000),
        label=label,
    )
    if file.is_dir():
        card, weights = import_diffusers(file, kind, dataset, told)
    else:
        card, weights = import_guided_diffusion(file, kind, dataset, told, preset)
    with models_locked(path):
        refuse_taken(path, dataset)
        save(path, weights, card.to_json())
    say_what_was_assumed(card.training)
    give(path)


def refuse_taken(path: Path, dataset: str) -> None:
    """Refuse a name that another model has."""
    if path.exists():
        raise SettingsError(f"--name {dataset}: {path} is there already; give another name, or remove it.")


def say_what_was_assumed(training: Mapping[str, Any]) -> None:
    """Say which of an import's settings nobody told, and how a class-conditional network will be asked."""
    if training.get("assumed"):
        options = " ".join(f"{name}={value}" for name, value in training["assumed"].items())
        say(f"assumed: {options}; if it was trained otherwise, import it with these options as they were.")
    if training.get("class") == "mean":
        say("class-conditional: asked with the mean of its classes; --class N picks one.")


@models_app.command("export")
def models_export(
    file: Annotated[Path, typer.Argument(help="A stored model (.safetensors).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make.")],
    form: Annotated[str, typer.Option("--format", help="What shall open it: diffusers.")] = "diffusers",
) -> None:
    """Write a model as a folder that diffusers opens: UNet2DModel.from_pretrained(FOLDER)."""
    from knife.diffusers import export_diffusers

    if form != "diffusers":
        raise SettingsError(f"--format {form}: unknown; give diffusers.")
    if export_diffusers(file, out).spec.unet.classes:
        say("its label embedding is left out: knife asks it without a label.")
    give(out)


def two_numbers(text: str) -> tuple[float, float]:
    """Read LOW,HIGH."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise SettingsError(f"--value-range {text}: give two numbers, such as 0,1.") from None
    return low, high
