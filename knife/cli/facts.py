"""The commands that say what there is: `knife presets`, `info` and `doctor`; and `knife phantom`, which makes data."""

from pathlib import Path
from typing import Annotated

import typer

from knife.cli.options import Json
from knife.cli.terminal import give, give_json, progress, show_facts, show_table


def presets(as_json: Json = False) -> None:
    """List the presets: image size, channels, parameters of each network."""
    from knife.spec import rows

    (give_json if as_json else show_table)(rows())


def info(file: Annotated[Path, typer.Argument(help="A stored model or an image.")], as_json: Json = False) -> None:
    """Say what a file is: the card of a model, or the channels and intensities of an image."""
    from knife.doctor import about_file, summary

    about = about_file(file)
    if as_json:
        give_json(about)
    else:
        show_facts(summary(about))


def doctor(as_json: Json = False) -> None:
    """Say what this machine offers, which ops run, and why; exit code 1 if knife cannot work here."""
    from knife.doctor import examine

    facts = examine()
    (give_json if as_json else show_facts)(facts)
    if not facts["healthy"]:
        raise typer.Exit(1)


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
