"""A whole patient: seconds for reading, walking and writing.

    python benchmarks/patient.py FOLDER [--slices 80:129] [--task classify --target healthy] [--steps N] [--models DIR]

FOLDER holds a 3-D NIfTI file for each MR sequence. The last line printed is one JSON object.
"""

import argparse
import json
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from knife import volume
from knife.devices import resolve_device
from knife.settings import DEFAULTS, Wish
from knife.translation import translate


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slices", default="80:129")
    parser.add_argument("--task", default="classify")
    parser.add_argument("--target", default="healthy")
    parser.add_argument("--steps", type=int, default=DEFAULTS.steps)
    parser.add_argument("--models", type=Path, help="folder of trained models; default: the shipped ones")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    first, end = map(int, options.slices.split(":"))
    began = time.perf_counter()
    stack = volume.open_volume(options.folder)
    seconds = {"reading": time.perf_counter() - began}
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        volume.write(stack, Path(place) / "copy")
        seconds["writing the volume"] = time.perf_counter() - began
        began = time.perf_counter()
        done = translate(
            options.folder, Wish(options.task, options.target), out=Path(place) / "out", models=options.models,
            settings=replace(DEFAULTS, steps=options.steps), slices=(first, end), device=options.device,
        )  # fmt: skip
        seconds["all of it"] = time.perf_counter() - began
    seconds["walking, a slice"] = sum(one.record["seconds"] for one in done) / len(done)
    device, _ = resolve_device(options.device)
    for name, value in seconds.items():
        print(f"{name:<22} {value:8.2f} s")
    about = {"slices": len(done), "voxels": list(stack.files[0].shape), "steps": options.steps, "device": device}
    about |= {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    print(json.dumps({"benchmark": "patient", "seconds": {k: round(v, 3) for k, v in seconds.items()}, **about}))


if __name__ == "__main__":
    main()
