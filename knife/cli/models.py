"""The commands of `knife models`: list, import and export trained models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from knife.cli.options import Json, Models
from knife.cli.terminal import give, give_json, say, show_table
from knife.errors import SettingsError

models_app = typer.Typer(help="Trained models: list, import and export them.", no_args_is_help=True)


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
