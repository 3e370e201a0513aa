"""The commands that measure models on images set apart: `knife calibrate` the guides, `knife evaluate` the edits."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knife.cli.options import (
    BatchSize,
    Device,
    Extrapolate,
    Json,
    MaxReconstruction,
    Models,
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
from knife.cli.terminal import give, give_json, progress, say, show_table
from knife.cli.words import listed_targets, slice_range
from knife.settings import DEFAULTS, Settings

if TYPE_CHECKING:
    from knife.bootstrap import Figure
    from knife.calibrate import Calibration
    from knife.evaluate import Evaluation

OTHER_SPLIT = "Take care: the models' training kept to another split.json, or to none, and may have seen these images."
FEW = 16  # images, below which a measurement says little
NAMED = 5  # images that failed or were skipped, and are named
OF_TARGETS = ("error_median", "before_median", "after_median", "within", "flipped")  # by guide and judge, a column each
KEPT = ("changed", "changed_outside", "reached")


def calibrate(
    dataset: Annotated[str, typer.Argument(help="Name of a folder in the folder of models.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of images: those set apart to validate, or to test.")],
    models: Models = Path("models"),
    count: Annotated[int, typer.Option("--count", help="Images at most.")] = 64,
    layout: Annotated[
        str | None, typer.Option("--layout", help="How the folder is laid out; default: as in the training.")
    ] = None,
    slices: Annotated[
        str | None,
        typer.Option("--slices", help="Axial slices of volumes, FIRST:LAST+1, as 80:129; default: as in the training."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure up to which noise level the guides of a data set still see, and choose default noise levels by it.

    A guide's skill is 1 where it is always right, and 0 where its answer does not depend on the image. What is
    measured goes into the cards of the models, and into a picture beside them.
    """
    from knife.calibrate import calibrate as run_calibration

    with progress() as show:
        found = run_calibration(
            dataset,
            data,
            models=models,
            count=count,
            layout=layout,
            slices=slice_range(slices),
            device=device,
            progress=lambda done, total: show("measuring", done, total),
        )
    if as_json:
        give_json(told(found))
    else:
        show_found(found)
        give(found.picture)
    for sentence in doubts(found):
        say(sentence)


def told(found: "Calibration") -> dict[str, Any]:
    """Return what was measured as JSON values."""
    tasks = {
        kind: {**seen.to_json(), "skill": seen.skill, **found.choices[kind]} for kind, seen in found.sights.items()
    }
    return {
        "split": found.split,
        "other_split": found.other_split,
        "tasks": tasks,
        "diffusion": found.round_trip and found.round_trip.to_json(),
        "left_out": dict(found.left_out),
        "picture": str(found.picture),
    }


def show_found(found: "Calibration") -> None:
    """Print a table for each task and one for the diffusion model, and what was chosen."""
    for kind, seen in found.sights.items():
        give(f"{kind}, {seen.images} images ({found.split}):")
        rows = zip(seen.levels, seen.error, seen.chance, seen.skill, strict=True)
        show_table([dict(zip(("noise level", "error", "chance", "skill"), row, strict=True)) for row in rows])
    if trip := found.round_trip:
        give(f"round trip without guidance, {trip.images} images ({found.split}):")
        walks = {**trip.by_level, **trip.by_steps}.items()
        show_table([{"noise level": walk[0], "steps": walk[1], "error": f"{error:.2%}"} for walk, error in walks])
    for kind, choice in found.choices.items():
        if choice["noise_level"]:
            give(f"{kind}: default noise level {choice['noise_level']}; sees enough below {choice['guide_below']}.")


def doubts(found: "Calibration") -> Iterator[str]:
    """Yield what to know before the figures are believed."""
    from knife.calibrate import FAITHFUL

    if found.split == "train":
        yield "Take care: too few images are set apart, so training images were measured on, which guides know better."
    if found.other_split:
        yield OTHER_SPLIT
    for kind, seen in found.sights.items():
        if seen.images < FEW:
            yield f"Take care: {kind} was measured on {seen.images} images; that says little."
        if not any(seen.chance):
            yield f"Take care: all of these images have the same label for {kind}; measure it on others."
        elif found.choices[kind]["noise_level"] is None:
            yield (
                f"Take care: {kind} knows nothing of such images: of the error of guessing it makes "
                f"{seen.error[0] / seen.chance[0]:.0%} on clean ones. Train it further; no default was chosen."
            )
    if (trip := found.round_trip) and min(trip.by_level.values()) > FAITHFUL:
        yield f"Take care: the model hardly knows such images; every round trip misses more than {FAITHFUL:.0%}."
    for kind, why in found.left_out.items():
        yield f"left out {kind}: {why}"


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    dataset: Annotated[str, typer.Argument(help="Name of a folder in the folder of models, or of a shipped one.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of images: those set apart to test.")],
    task: Annotated[str, typer.Option("--task", help="The task that guides: regress, classify, segment, a plugin's.")],
    targets: Annotated[str, typer.Option("--targets", help="Targets: 0.02,0.05,0.1, or healthy, or shapes, or masks.")],
    models: Models = Path("models"),
    split: Annotated[str, typer.Option("--split", help="Whose images: test, val or train.")] = "test",
    count: Annotated[int, typer.Option("--count", help="Images at most, each towards each target.")] = 64,
    layout: Annotated[
        str | None, typer.Option("--layout", help="How the folder is laid out; default: as in the training.")
    ] = None,
    slices: Annotated[
        str | None,
        typer.Option("--slices", help="Axial slices of volumes, FIRST:LAST+1, as 80:129; default: as in the training."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the images' choice, and of the intervals.")] = 0,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for the results; default: evaluated/DATASET_TASK.")
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
    precision: Precision = DEFAULTS.precision,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Translate images set apart towards several targets, and say how good the edits are, by guide and by judge.

    Every figure has a 95 % interval. Writes evaluation.json with all of it, evaluation.csv and evaluation.png.
    """
    from knife.evaluate import evaluate as run_evaluation

    with progress() as show:
        found = run_evaluation(
            dataset,
            data,
            task,
            listed_targets(targets),
            out=out or Path("evaluated") / f"{dataset}_{task}",
            models=models,
            split=split,
            count=count,
            layout=layout,
            slices=slice_range(slices),
            seed=seed,
            region=region,
            settings=Settings(
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
                precision=precision,
            ),
            device=device,
            progress=lambda done, total: show("translating", done, total),
        )
    if as_json:
        give_json(found.to_json())
    else:
        show_evaluation(found)
        for file in found.files:
            give(file)
    for sentence in cautions(found):
        say(sentence)


def show_evaluation(found: "Evaluation") -> None:
    """Print a table with a row for each target, and one with a row for each figure."""
    about, settings = found.about, found.about["settings"]
    judges = "".join(f"; judged by {judge['origin']}" for judge in about.get("judges", []))
    give(
        f"{about['task']}: {about['count']} images of {about['patients']} patients ({about['split']}), "
        f"{len(found.rows)} translations; models {about['dataset']}; noise level {settings['noise_level']}, "
        f"{settings['steps']} steps{judges}; in brackets, 95 % intervals:"
    )
    names = [f"{who}_{name}" for name in OF_TARGETS for who in ("guide", "judge")] + [*KEPT]
    seen = [name for name in names if any(name in figures for figures in found.by_target.values())]
    show_table(
        [
            {"target": target, **{name: shown(figures.get(name)) for name in seen}}
            for target, figures in found.by_target.items()
        ]
    )
    head = "over all targets; means, unless said"
    show_table([{head: name, "value": shown(one), "of": one.rows} for name, one in found.figures.items()])


def shown(one: "Figure | None") -> str:
    """Return a figure with its interval."""
    if one is None:
        return ""
    return f"{one.value:.3g}" + (f" [{one.low:.3g}, {one.high:.3g}]" if one.low is not None else "")


def cautions(found: "Evaluation") -> Iterator[str]:
    """Yield what to know before the figures of an evaluation are believed."""
    about, task = found.about, found.about["task"]
    for doubt in about["doubts"]:
        yield f"Take care: {doubt}"
    for why in about.get("judges_left_out", []):
        yield f"Take care: a judge is left out. {why}"
    if not about["judge"]:
        yield (
            f"Take care: models {about['dataset']} have no judge of {task}, so the guide alone speaks for itself, and "
            f"it is easily pleased by what it drew: train one by `knife train {task} --judge`."
        )
    if about["split"] == "train":
        yield "Take care: these are training images, which guide and diffusion model know better than others."
    elif about["other_split"]:
        yield OTHER_SPLIT
    if about["patients"] < FEW:
        yield f"Take care: {about['patients']} patients; that says little."
    fixed = any(about["settings"][name] is not None for name in ("scale", "strength"))
    if not fixed and not any("reached" in row for row in found.rows):
        yield (
            f"Take care: nothing tells how near a target is near enough for {task}, so no edit was adjusted until it "
            "was there; a guide's card tells that once its training went on with a task that says its error."
        )
    yield from named(
        "translations failed", [f"{one['image']} to {one['target']}: {one['why']}" for one in found.failed]
    )
    yield from named("images could not be used", [*found.skipped.values()])


def named(what: str, reasons: Sequence[str]) -> Iterator[str]:
    """Yield how many there are, and the first ones."""
    if reasons:
        yield f"{len(reasons)} {what}:"
        yield from (f"  {why}" for why in reasons[:NAMED])
