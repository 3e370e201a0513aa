"""The commands that translate: `knife translate`, `knife sweep` and `knife demo`, and what they say of results."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from knife.cli.options import (
    BatchSize,
    Device,
    Extrapolate,
    Json,
    MaxReconstruction,
    Models,
    Nan,
    NoiseLevel,
    Precision,
    Quality,
    Region,
    Scale,
    Solver,
    Steps,
    Strength,
    Tolerance,
)
from knife.cli.terminal import give, give_json, progress, say, show_table, words
from knife.cli.words import listed_targets, slice_range, span
from knife.errors import KnifeError, SettingsError
from knife.settings import DEFAULTS, Settings, Wish

if TYPE_CHECKING:
    from knife.inputs import Shard
    from knife.outputs import Translation

KNOWN = 0.03  # mean error of the unguided round trip, of the range, above which a model hardly knows an image
SOME_FAILED = 3  # the exit code of a batch of which a part was done
SHOWN_MISSED = 5  # images that did not reach their targets
SAID = (  # what of a record is said in the end
    "input", "slice", "before", "after", "wanted", "judge", "preservation", "strength", "seconds", "reconstruction",
    "reached", "error", "tolerance", "attempts",
)  # fmt: skip


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
    region: Region = None,
    noise_level: NoiseLevel = None,
    quality: Quality = DEFAULTS.quality,
    steps: Steps = None,
    solver: Solver = None,
    scale: Scale = None,
    strength: Strength = None,
    tolerance: Tolerance = None,
    extrapolate: Extrapolate = DEFAULTS.extrapolate,
    max_reconstruction: MaxReconstruction = DEFAULTS.max_reconstruction,
    batch_size: BatchSize = DEFAULTS.batch_size,
    control: Annotated[
        bool, typer.Option("--control/--no-control", help="Add to the input only what guidance changed.")
    ] = DEFAULTS.control,
    clamp: Annotated[
        bool, typer.Option("--clamp/--no-clamp", help="Keep the predicted clean image in range.")
    ] = DEFAULTS.clamp,
    precision: Precision = DEFAULTS.precision,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Voxels of NIfTI results: same (as the input, if all fit) or float32.")
    ] = DEFAULTS.dtype,
    nan: Nan = None,
    page: Annotated[
        bool, typer.Option("--report", help="Write report.html too: one page that shows all images, held in memory.")
    ] = False,
    shard: Annotated[
        str,
        typer.Option(
            "--shard", help="Part of the inputs, as 2/8; auto: as a SLURM array, srun or torchrun say, else all."
        ),
    ] = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Translate images; writes result, difference map, panel and record of each. What is done already is not redone."""
    from knife.ranks import own_device
    from knife.translation import translations

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
        precision=precision,
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
    if unread := about["unread"]:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        say(f"  left out {unread[0]}{more}: knife does not read such formats; save them as PNG, TIFF or NIfTI.")
    for doubt in about["doubts"]:
        say(f"Take care: {doubt}")


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
    strength: Strength = None,
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
