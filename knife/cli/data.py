"""The commands of `knife data`: what may be done with a data folder before anything is trained on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from knife.cli.terminal import give, give_json, progress, say, show_facts, show_table
from knife.cli.words import slice_range

SHOWN = 10  # problems of one kind, notes, and values of a column that are shown

data_app = typer.Typer(
    help="Data folders: what is in them and wrong with them, and their splits.", no_args_is_help=True
)

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


@data_app.command("check")
def data_check(
    folder: Folder,
    layout: LayoutName = None,
    slices: Annotated[
        str | None, typer.Option("--slices", help="Axial slices of volumes, FIRST:LAST+1, as 80:129; default: all.")
    ] = None,
    nan: Annotated[
        str | None, typer.Option("--nan", help="What to read NaN and infinite pixels as: fill=0; default: a problem.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every value and problem.")] = False,
) -> None:
    """Say what a data folder holds, and what is wrong with it; the exit code is 1 if anything is."""
    from knife.finite import fill_of
    from knife.survey import survey

    with progress() as show:
        report = survey(
            folder, layout, slice_range(slices), lambda done, total: show("checked", done, total), fill_of(nan)
        )
    if as_json:
        give_json(report)
    else:
        show_report(report)
    if report["problems"]:
        raise typer.Exit(1)


def show_report(report: Mapping[str, Any]) -> None:
    """Print what is in a data folder, what to know about it, and what is wrong with it."""
    show_facts(facts(report))
    if report["channels"]:
        seen = "from a sample of the pixels" if report["sampled"] else "from all pixels"
        heading(f"Intensities, as stored; percentiles {seen} that are not 0:")
        show_table([channel_row(name, told) for name, told in report["channels"].items()])
    if labels := labels_of(report):
        heading("Labels; of many numbers, how many lie in each tenth of their range:")
        show_table([label_row(name, told) for name, told in labels.items()])
    if report["notes"]:
        show_list("Worth knowing", report["notes"])
    for kind, sentences in report["problems"].items():
        show_list(f"Problem, {kind}", sentences)
    if not report["problems"]:
        heading("No problems found.")


def facts(report: Mapping[str, Any]) -> dict[str, object]:
    """Return the head of the report."""
    images, volumes = report["images"], report["volumes"]
    unread = f"; {images - report['readable']:,} cannot be read" if report["readable"] < images else ""
    who = {"names": "drawn by name", "folder": "as the folder says"}
    counts = ", ".join(f"{report['splits'][name]['images']:,} {name}" for name in ("train", "val", "test"))
    return {
        "folder": report["folder"],
        "taken for": f"{report['layout']} ({report['why']})",
        "images": f"{images:,}" + (f", slices of {volumes:,} volumes" if volumes else "") + unread,
        "patients": report["patients"] or "not known; each image is on its own",
        "splits": f"{counts} ({who.get(report['splits']['told_by'], 'as split.json says')})",
        "files": frequencies(report["stored"]),
        "shapes": frequencies(report["shapes"]),
        "masks": masks_told(report["masks"]),
    }


def masks_told(masks: Mapping[str, Any]) -> str:
    """Say how many images have masks, and what is in them."""
    if not masks["with"]:
        return "none"
    lacking = f"; {masks['without']:,} images have none" if masks["without"] else ""
    values = f"; values above 0: {frequencies(masks['labels'])}" if masks["labels"] else ""
    return f"{masks['with']:,}, {masks['empty']:,} of them empty{values}{lacking}"


def frequencies(counts: Mapping[str, int]) -> str:
    """Say how often what occurs, the first few of it."""
    some = ", ".join(f"{count:,} of {what}" for what, count in [*counts.items()][:SHOWN])
    return some + (f" and {len(counts) - SHOWN:,} others" if len(counts) > SHOWN else "")


def channel_row(name: str, told: Mapping[str, Any]) -> dict[str, object]:
    """Return the row of a channel."""
    shares = {f"{float(share):g} %": value for share, value in told["percentiles"].items()}
    ends = {"min": told["min"], **shares, "max": told["max"]}
    return {"channel": name, "images": told["images"], **ends, "zeros": f"{100 * told['zeros']:.1f} %"}


def labels_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of values, and the size of the masks that are not empty as one of them."""
    sizes, masks = report["masks"]["sizes"], report["masks"]
    size = {"relative size of the mask": {**sizes, "images": masks["with"] - masks["empty"]}} if sizes else {}
    return {**report["labels"], **size}


def label_row(name: str, told: Mapping[str, Any]) -> dict[str, object]:
    """Return the row of a label."""
    counts = told.get("counts")
    tenths = ", ".join(f"{part['count']:,}" for part in told.get("bins", []))
    ends = {end: told.get(end, "") for end in ("min", "median", "max")}
    return {"label": name, "images": told["images"], **ends, "how many": frequencies(counts) if counts else tenths}


def heading(text: str) -> None:
    """Print a line below an empty one."""
    give("")
    give(text)


def show_list(title: str, sentences: Sequence[str]) -> None:
    """Print sentences under a title, the first few of them."""
    heading(f"{title} ({len(sentences):,}):")
    for sentence in sentences[:SHOWN]:
        give(f"  {sentence}")
    if len(sentences) > SHOWN:
        give(f"  and {len(sentences) - SHOWN:,} more; --json has them all.")
