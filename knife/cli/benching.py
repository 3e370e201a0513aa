"""The command that measures how fast knife is on this machine: `knife bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knife.cli.options import Device, Json
from knife.cli.terminal import give, give_json, progress, say, show_facts, show_table
from knife.settings import ROUNDS

if TYPE_CHECKING:
    from knife.bench import Bench, Call, Pace


def bench(
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Which models to measure with; default: the shipped ones.")
    ] = None,
    models: Annotated[Path, typer.Option("--models", help="Folder that --dataset lies in.")] = Path("models"),
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at once, beside one at a time.")] = 8,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure how fast knife is on this machine, and how near that comes to what the machine can do.

    Takes about a minute with the shipped models; what else the machine does meanwhile is in the figures.
    """
    from knife.bench import bench as run_bench

    with progress() as show:
        found = run_bench(
            dataset,
            models=models,
            batch=batch_size,
            device=device,
            progress=lambda done, total: show("measuring", done, total),
        )
    if as_json:
        give_json(found.to_json())
    else:
        show_bench(found)
    for name, why in found.left_out.items():
        say(f"left out {name}: {why}")


def show_bench(found: "Bench") -> None:
    """Print what was measured with, a table of translations, one of the networks' calls, and the step's line."""
    show_facts(found.about)
    if found.paces:
        few, more = sorted(found.paces[0].timed)
        give(
            f"Translations, seconds an image ({few} and {more} steps were timed, the usual ones are drawn on from both;"
        )
        give(f"one decode with its control: an image that does not reach its target at once takes up to {ROUNDS}):")
        show_table([pace_row(pace) for pace in found.paces])
    give(f"Calls of the networks, beside a product of large matrices ({found.peak_gflops:.4g} GFLOP/s):")
    show_table([call_row(call) for call in found.calls])
    size, step = "x".join(map(str, found.step.size)), found.step
    rates = f"{step.gigabytes:.4g} GB/s, {step.of_copy:.0%} of a plain copy's {step.copy_gigabytes:.4g}"
    give(f"The fused step, {size}: {rates}.")


def pace_row(pace: "Pace") -> dict[str, object]:
    """Return what the table says of a task's translations."""
    timed = {f"{steps} steps, timed": seconds for steps, seconds in pace.timed.items()}
    return {"task": pace.task, "batch": pace.batch, "usual steps": pace.steps, "seconds": pace.seconds, **timed}


def call_row(call: "Call") -> dict[str, object]:
    """Return what the table says of a call."""
    return {
        "network": "diffusion, a call" if call.network == "diffusion" else f"{call.network}, its gradient",
        "batch": call.batch,
        "milliseconds": call.milliseconds,
        "GFLOP/s": call.gflops,
        "of the product's": f"{call.of_peak:.0%}",
    }
