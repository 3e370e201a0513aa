"""The commands of `knife data`: what may be done with a data folder before anything is trained on it."""

from pathlib import Path
from typing import Annotated

import typer

from knife.cli.terminal import give, say

data_app = typer.Typer(help="Data folders: who is trained on, who validates, who tests.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of images.")]
LayoutName = Annotated[str | None, typer.Option("--layout", help="How the folder is laid out; default: what fits.")]


@data_app.callback()
def data() -> None:
    """Look after data folders."""


@data_app.command("split")
def data_split(
    folder: Folder,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draw.")] = 0,
    val: Annotated[float, typer.Option("--val", help="Share of the patients that validates.")] = 0.05,
    test: Annotated[float, typer.Option("--test", help="Share of the patients that tests.")] = 0.05,
    layout: LayoutName = None,
) -> None:
    """Write split.json: which patients (images, where none are known) are trained on, validate and test."""
    from knife.layouts import SPLIT_FILE, recognise, write_split

    found = recognise(folder, layout)
    splits = write_split(found, seed, val, test)
    counts = ", ".join(f"{len(keys)} {name}" for name, keys in splits.items())
    say(f"{len(found.entries)} images ({found.layout}: {found.why}); {counts}.")
    give(folder / SPLIT_FILE)
