"""The command that measures models on images whose labels are known: `knife calibrate`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knife.cli.terminal import give, give_json, progress, say, show_table
from knife.cli.words import slice_range

if TYPE_CHECKING:
    from knife.calibrate import Calibration

FEW = 16  # images, below which a measurement says little


def calibrate(
    dataset: Annotated[str, typer.Argument(help="Name of a folder in the folder of models.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of images: those set apart to validate, or to test.")],
    models: Annotated[Path, typer.Option("--models", help="Folder of trained models.")] = Path("models"),
    count: Annotated[int, typer.Option("--count", help="Images at most.")] = 64,
    layout: Annotated[
        str | None, typer.Option("--layout", help="How the folder is laid out; default: as in the training.")
    ] = None,
    slices: Annotated[
        str | None,
        typer.Option("--slices", help="Axial slices of volumes, FIRST:LAST+1, as 80:129; default: as in the training."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
