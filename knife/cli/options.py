"""Options that several commands have, without torch, so that --help is quick."""

from pathlib import Path
from typing import Annotated

import typer

from knife.settings import BATCH, FIRST, LEVEL, MOST_AT_ONCE, PRECISIONS, QUALITIES, SOLVER_NAMES

NoiseLevel = Annotated[
    int | None, typer.Option("--noise-level", help=f"Level L to encode to; default: as calibrated, else {LEVEL}.")
]
Quality = Annotated[
    str,
    typer.Option(
        "--quality",
        help="How finely to walk: "
        + "; ".join(f"{name}, {usual.steps} steps by {usual.solver}" for name, usual in QUALITIES.items())
        + " (never more steps than levels).",
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Steps to encode, and again to decode; default: as --quality says.")
]
Solver = Annotated[
    str | None,
    typer.Option(
        "--solver", help=f"{', '.join(SOLVER_NAMES)} (the paper's, of first order); default: as --quality says."
    ),
]
Scale = Annotated[float | None, typer.Option("--scale", help="The paper's s, fixed.")]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength",
        help=f"Size of the guidance against the noise's, fixed; default: {FIRST} or what reaches the target.",
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        help="How near the target is near enough; default: a tenth of the way, or twice the guide's error if less.",
    ),
]
Region = Annotated[
    str | None,
    typer.Option(
        "--region",
        help="Where images may change: a mask, ellipse:cx,cy,rx,ry, or auto, where they change most; "
        "default: anywhere, as growing tumours push what is round them.",
    ),
]
Extrapolate = Annotated[
    bool, typer.Option("--allow-extrapolation", help="Allow targets beyond the values that a guide was trained on.")
]
MaxReconstruction = Annotated[
    float,
    typer.Option(
        "--max-reconstruction", help="Refuse images that the model gives back, unguided, with a larger mean error."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        help=f"Images translated at once; default: {BATCH}, on a GPU up to {MOST_AT_ONCE} as its memory allows.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        help=f"What networks compute in: {', '.join(PRECISIONS)}; auto: bfloat16 where the processor multiplies in it "
        "(GPUs since Ampere, CPUs with AMX).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Models = Annotated[Path, typer.Option("--models", help="Folder of trained models.")]
Nan = Annotated[
    str | None, typer.Option("--nan", help="What to read NaN and infinite pixels as: fill=0; default: refuse them.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
