"""Seconds per image, by task: a whole call of `knife.translate`, models read and files written.

    python benchmarks/translate.py [--batch-sizes 1,8] [--noise-level L] [--steps N] [--repeats 3] [--images N]
                                   [--models DIR] [--figure batch.png]

Images are phantoms. Prints a table (medians over the repeats) and, last, one JSON line; draws the seconds over the
batch if asked to.
"""

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from knife import ops, panel
from knife.devices import resolve_device
from knife.graphs import in_words
from knife.phantom import phantom, write_nifti
from knife.settings import PRECISIONS, Settings, Wish
from knife.translation import translate

TARGETS = {"regress": "0.15", "classify": "healthy", "segment": "mask.nii"}


def measure(task: str, batch: int, folder: Path, options: argparse.Namespace) -> float:
    """Return the median seconds an image."""
    given = {"noise_level": options.noise_level, "steps": options.steps}
    known = {name: value for name, value in given.items() if value is not None}
    settings = Settings(batch_size=batch, precision=options.precision, **known)
    count = max(batch, options.images)
    images = [folder / f"{i}.nii" for i in range(count)]
    target = str(folder / TARGETS[task]) if task == "segment" else TARGETS[task]
    seconds = []
    for repeat in range(options.repeats + 1):
        began = time.perf_counter()
        translate(
            images,
            Wish(task, target),
            out=folder / f"{task}_{batch}_{repeat}",  # what is there already would not be done again
            models=options.models,
            settings=settings,
            device=options.device,
        )
        seconds.append((time.perf_counter() - began) / count)
    return statistics.median(seconds[1:])  # the first run warms up


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--noise-level", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=1, help="of each call, if more than the batch")
    parser.add_argument("--models", type=Path, help="folder of trained models; default: the shipped ones")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    batches = [int(text) for text in options.batch_sizes.split(",")]
    figures: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(max(*batches, options.images)):
            write_nifti(folder / f"{i}.nii", phantom(i, seed=5).pixels)
        write_nifti(folder / "mask.nii", phantom(0, seed=5, relative_size=0.1).mask)
        print(f"{'task':<10}" + "".join(f"batch {batch:<3} s/image  " for batch in batches))
        for task in TARGETS:
            figures[task] = {batch: measure(task, batch, folder, options) for batch in batches}
            print(f"{task:<10}" + "".join(f"{seconds:17.3f}  " for seconds in figures[task].values()))
    if options.figure:
        lines = [
            panel.Line(task, [(math.log2(batch), seconds) for batch, seconds in row.items()])
            for task, row in figures.items()
        ]
        panel.chart(lines, "log2 of the batch", "seconds an image").save(options.figure)
    device, _ = resolve_device(options.device)
    machine = (
        torch.cuda.get_device_name() if device != "cpu" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    ways = {"precision": options.precision, "graphs": in_words(), "images": options.images}
    about = {**ways, "machine": machine, "ops": ops.status().path, "torch": torch.__version__}
    print(json.dumps({"seconds_per_image": figures, **about}))


if __name__ == "__main__":
    main()
